"""The exponential moving average of the trained weights, which is what previews show and exports hold."""

from pathlib import Path

from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

from ..core.checkpoint import save_tensors

EMA_FILE = "ema.safetensors"


class EMACallback(TrainerCallback):
    """Averages the trained weights after optimizer steps, for checkpoints, previews and exports.

    Args:
        model: its parameters that require gradients are averaged.
        decay: weight of the old average at each update, 0 to 1; it warms up from 0.
        update_steps: optimizer steps between updates.
        on_cpu: keep the average in main memory; an update then copies the weights there.
    """

    def __init__(self, model: nn.Module, decay: float, update_steps: int = 1, on_cpu: bool = False):
        self.names = [n for n, p in model.named_parameters() if p.requires_grad]
        self.update_steps, self.on_cpu = update_steps, on_cpu
        self.ema = EMAModel(
            self._parameters(model),
            decay=decay,
            use_ema_warmup=True,
            power=0.75,
            foreach=True,
        )

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.ema.to("cpu" if self.on_cpu else args.device)  # built before the Trainer moved the model

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.update_steps == 0:
            self.ema.step(self._parameters(model))

    def _parameters(self, model: nn.Module) -> list[nn.Parameter]:
        trained = [p for p in model.parameters() if p.requires_grad]
        # EMAModel averages what requires gradients and copies the rest.
        return [p.detach().cpu().requires_grad_() for p in trained] if self.on_cpu else trained

    def save(self, folder: Path) -> None:
        """Write the average to a checkpoint."""
        tensors = dict(zip(self.names, (t.contiguous() for t in self.ema.shadow_params), strict=True))
        save_tensors(tensors, folder / EMA_FILE)

    def load(self, folder: Path, step: int) -> None:
        """Take the average of a checkpoint back."""
        tensors = load_file(folder / EMA_FILE)
        for name, shadow in zip(self.names, self.ema.shadow_params, strict=True):
            shadow.copy_(tensors[name])
        self.ema.optimization_step = step // self.update_steps

    def swap_in(self, model: nn.Module) -> None:
        """Put the average into the model; `swap_out` brings the trained weights back."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.ema.store(parameters)
        self.ema.copy_to(parameters)

    def swap_out(self, model: nn.Module) -> None:
        """Undo `swap_in`."""
        self.ema.restore([p for p in model.parameters() if p.requires_grad])
