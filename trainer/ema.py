"""The exponential moving average of the trained weights, which is what previews show and exports hold."""

from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback

from ..core.checkpoint import save_tensors

EMA_FILE = "ema.safetensors"


class EMACallback(TrainerCallback):
    """Averages the trained weights after optimizer steps, for checkpoints, previews and exports.

    Of sharded weights (FSDP2) each process averages its own shards.

    Args:
        decay: weight of the old average at each update, 0 to 1; it warms up from 0.
        update_steps: optimizer steps between updates.
        on_cpu: keep the average in main memory; an update then copies the weights there.
    """

    def __init__(self, decay: float, update_steps: int = 1, on_cpu: bool = False):
        self.decay, self.update_steps, self.on_cpu = decay, update_steps, on_cpu
        self.names: list[str] = []
        self.ema: EMAModel | None = None

    def attach(self, model: nn.Module) -> None:
        """Start the average at the model's weights that require gradients, unless it has been started."""
        if self.ema is None:
            self.names = [n for n, p in model.named_parameters() if p.requires_grad]
            parameters = self._parameters(model)
            self.ema = EMAModel(parameters, decay=self.decay, use_ema_warmup=True, power=0.75, foreach=True)

    @torch.no_grad()
    def restart(self, model: nn.Module) -> None:
        """Make the average equal to the model's weights."""
        torch._foreach_copy_(list(self.ema.shadow_params), self._parameters(model))

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.attach(model)
        self.ema.to("cpu" if self.on_cpu else args.device)  # built before the Trainer moved the model

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.update_steps == 0:
            self.ema.step(self._parameters(model, copied=self.on_cpu))

    @staticmethod
    def _parameters(model: nn.Module, copied: bool = False) -> list[torch.Tensor]:
        """Return what is trained, of sharded weights this process's part; in main memory if `copied`."""
        # EMAModel averages what requires gradients and copies the rest.
        parts = [_local(p.detach()) for p in model.parameters() if p.requires_grad]
        return [(part.cpu() if copied else part).requires_grad_() for part in parts]

    def save(self, folder: Path, model: nn.Module, writes: bool = True) -> None:
        """Write the average to a checkpoint. Of sharded weights all processes take part, and one `writes`."""
        tensors = {}
        for name, shadow in zip(self.names, self.ema.shadow_params, strict=True):
            whole = _gathered(shadow, model.get_parameter(name))
            if writes:
                tensors[name] = whole.cpu().contiguous()
        if writes:
            save_tensors(tensors, folder / EMA_FILE)

    def load(self, folder: Path, step: int, model: nn.Module) -> None:
        """Take the average of a checkpoint back."""
        with safe_open(folder / EMA_FILE, framework="pt") as file:
            for name, shadow in zip(self.names, self.ema.shadow_params, strict=True):
                parameter, whole = model.get_parameter(name), file.get_tensor(name)
                if isinstance(parameter, DTensor):
                    whole = whole.to(parameter.device)
                    whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements).to_local()
                shadow.copy_(whole)
        self.ema.optimization_step = step // self.update_steps

    def swap_in(self, model: nn.Module) -> None:
        """Put the average into the model; `swap_out` brings the trained weights back."""
        parameters = self._parameters(model)
        self.ema.store(parameters)
        self.ema.copy_to(parameters)

    def swap_out(self, model: nn.Module) -> None:
        """Undo `swap_in`."""
        self.ema.restore(self._parameters(model))


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _gathered(shadow: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Return the whole of what `shadow` is a part of, if `parameter` is sharded."""
    if not isinstance(parameter, DTensor):
        return shadow
    shape = {"shape": parameter.shape, "stride": parameter.stride()}
    part = shadow.to(parameter.device)
    return DTensor.from_local(part, parameter.device_mesh, parameter.placements, **shape).full_tensor()
