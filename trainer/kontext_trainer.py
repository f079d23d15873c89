"""What all trainers of a Kontext model share: what is trained, averages, checkpoints, previews, exports, sharding.

A trainer adds its own batches (`collate`, `get_train_dataloader`) and its own loss (`compute_loss`).
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import TorchDynamoPlugin
from diffusers import FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Trainer, TrainerCallback
from transformers.utils import SAFE_WEIGHTS_NAME

from ..core.checkpoint import cast_file, read_header, save_tensors, shift_of_scheduler
from ..core.errors import InputError
from ..core.files import cannot_write, check_replaceable, replaced_folder, write_file
from ..core.flow import BASE_TOKENS, MAX_TOKENS, NUM_TRAIN_TIMESTEPS, resolution_shift
from .adapters import prepare, save_lora
from .ema import EMA_FILE, EMACallback
from .hub import hub_error, repository_name
from .kontext_config import ATTENTION_BACKENDS, KontextConfig
from .kontext_pipeline import StableDiffusion3KontextPipeline
from .kontext_transformer import SD3Transformer2DKontextModel
from .muon import MuonWithAdamW, is_block_matrix
from .report import ReportCallback
from .sheets import save_sheet

_STATE_FILE = "trainer_state.json"
_LOGGED = ("loss", "loss/t2i", "loss/edit", "reward", "kl")  # the last of each is written into exports
_OF_THIS_PLACE = (
    "output_dir",
    "logging_dir",
    "run_name",
    "resume",
)  # left out: the same run elsewhere is the same run
_UNWRITABLE = ("PytorchStreamWriter", "inline_container", "No space left", "I/O error")


class KontextForTraining(nn.Module):
    """The parts that one loss reaches: the transformer and, when it is trained, the text encoder."""

    def __init__(self, transformer: nn.Module, text_encoder: nn.Module | None):
        super().__init__()
        self.transformer, self.text_encoder = transformer, text_encoder

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict | None = None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """Recompute the transformer's blocks in the backward pass, by diffusers' own switch.

        Raises:
            InputError: options that diffusers does not have.
        """
        if activation_checkpointing_kwargs or every_n_layers != 1 or offload:
            raise InputError(
                "activation_checkpointing_kwargs",
                found="options",
                expected="none: each block is recomputed, as diffusers does it",
            )
        self.transformer.enable_gradient_checkpointing()

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None) -> None:
        """Do the same under the name that transformers used before 5.23."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs)

    def forward(self, noisy, sigmas, text, ref_latents=None) -> torch.Tensor:
        """Predict the velocity.

        Args:
            noisy: latents (B, C, H, W) at `sigmas`.
            sigmas: (B,), 0 to 1.
            text: token ids (B, L) for the trained text encoder, or ready `(states (B, L, D), pooled (B, P))`.
            ref_latents: (B, C, H, W) of the references, or None.

        Returns:
            (B, C, H, W).
        """
        if self.text_encoder is not None:
            encoded = self.text_encoder(text, output_hidden_states=True)
            text = encoded.hidden_states[-2], encoded.text_embeds
        states, pooled = text
        return self.transformer(
            hidden_states=noisy,
            timestep=sigmas * NUM_TRAIN_TIMESTEPS,
            encoder_hidden_states=states,
            pooled_projections=pooled,
            ref_hidden_states=ref_latents,
            return_dict=False,
        )[0]


def last_checkpoint(output_dir: str | Path, use_ema: bool) -> Path | None:
    """Return the newest whole `checkpoint-N` in a folder: a killed run may have left its last one half-written."""
    folders = [f for f in Path(output_dir).glob("checkpoint-*") if f.name.rpartition("-")[2].isdecimal()]
    whole = [f for f in folders if _is_whole(f) and (not use_ema or (f / EMA_FILE).is_file())]
    return max(whole, key=lambda f: int(f.name.rpartition("-")[2]), default=None)


def _is_whole(checkpoint: Path) -> bool:
    """Whether the last file that transformers writes to a checkpoint is there and complete."""
    try:
        return bool(json.loads((checkpoint / _STATE_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return False


def _placeless(value):
    """Return a setting without the folders that lead to a path."""
    if isinstance(value, (list, tuple)):
        return [_placeless(item) for item in value]
    return Path(value).name if isinstance(value, str) and os.path.exists(value) else value


def scheduler_of(args: KontextConfig, scheduler) -> FlowMatchEulerDiscreteScheduler:
    """Return the scheduler with the shift that is trained, for previews and export."""
    changes = {"use_dynamic_shifting": args.dynamic_shift}
    if args.dynamic_shift:
        changes |= {"time_shift_type": "exponential", "base_shift": args.base_shift, "max_shift": args.max_shift}
        changes |= {"base_image_seq_len": BASE_TOKENS, "max_image_seq_len": MAX_TOKENS}
    else:
        changes["shift"] = args.shift
    return FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, **changes)


class KontextTrainer(Trainer):
    """`transformers.Trainer` for a Kontext pipeline: the part that is the same for every method.

    Args:
        pipeline: the model; its transformer (and text encoder, if asked) is trained in place. What is trained is kept
            in float32, what is frozen in the type it comes in.
        args: settings.
        train_dataset: what the trainer's own loader draws from.
        previews: callable `(pipeline, step) -> PIL image` drawing the fixed-seed grid, or None.
        callbacks: further transformers callbacks.
        peft_config: train LoRAs with these settings instead of `args.trainable`.

    Raises:
        InputError: several text encoders to train, LoRA beside other trained weights, LoRA targets that the
            transformer does not have, a logger that is not installed, a hub that cannot be used, or what sharded
            training does not do.
    """

    method = "training"
    """Its name in the metadata of exported LoRAs."""
    can_be_sharded = True
    """Whether FSDP2 can spread the weights over processes."""

    def __init__(
        self,
        pipeline: StableDiffusion3KontextPipeline,
        args: KontextConfig,
        train_dataset,
        previews=None,
        callbacks: list | None = None,
        peft_config: LoraConfig | None = None,
    ):
        if args.train_text_encoder and pipeline.text_encoder_2 is not None:
            raise InputError(
                "train_text_encoder",
                found="true for a model with several text encoders",
                expected="false",
                remedy="Only the micro model's text encoder is trained; published ones stay frozen.",
            )
        if peft_config is not None and (args.train_text_encoder or args.trainable != "full"):
            found = "train_text_encoder" if args.train_text_encoder else f"trainable: {args.trainable}"
            expected = "LoRAs alone; the parts that get them are named in lora_target_modules"
            raise InputError("use_peft", found=f"{found} too", expected=expected)
        self.pipeline, self.previews = pipeline, previews
        self.restored_step: int | None = None
        pipeline.scheduler = scheduler_of(args, pipeline.scheduler)
        pipeline.vae.requires_grad_(False)
        for encoder in pipeline.text_encoders:
            encoder.requires_grad_(args.train_text_encoder)
        prepare(pipeline.transformer, args.trainable, peft_config, args.seed)
        if args.train_text_encoder:
            pipeline.text_encoder.float()
        self.args = args
        model = self.build_model(pipeline)
        self.peft_config = peft_config
        self.ema = EMACallback(args.ema_decay, args.ema_update_steps, args.ema_on_cpu) if args.use_ema else None
        self._resumed_from: Path | None = None
        self.run_settings: dict = {}
        """Settings beside `args`, such as the data's, for the report and the export."""
        try:
            super().__init__(
                model=model, args=args, train_dataset=train_dataset, data_collator=self.collate, callbacks=callbacks
            )
        except RuntimeError as error:  # what transformers' loggers say of a missing package
            if "to be installed" not in str(error):
                raise
            raise InputError("report_to", found=str(error), remedy="Install it, or choose another one.") from None
        self._check_sharding()
        if self.ema is not None:
            if not self.is_fsdp_enabled:  # else once the weights are sharded
                self.ema.attach(model)
            self.add_callback(self.ema)
        self.add_callback(ReportCallback(self.settings))
        if previews is not None and args.preview_steps:
            self.add_callback(_PreviewCallback(self))

    def create_accelerator_and_postprocess(self) -> None:
        """Do as transformers does, with this trainer's torch_compile: accelerate keeps a process's first one."""
        super().create_accelerator_and_postprocess()
        backend, mode = self.args.torch_compile_backend, self.args.torch_compile_mode
        self.accelerator.state.dynamo_plugin = TorchDynamoPlugin(backend=backend, mode=mode)

    def build_model(self, pipeline: StableDiffusion3KontextPipeline) -> KontextForTraining:
        """Return what one loss reaches."""
        return KontextForTraining(
            pipeline.transformer, pipeline.text_encoder if self.args.train_text_encoder else None
        )

    def trained_components(self) -> set[str]:
        """Return the names of the pipeline's parts that are trained."""
        return {"transformer", "text_encoder"} if self.args.train_text_encoder else {"transformer"}

    def _check_sharding(self) -> None:
        """Refuse what has not been made to work with weights that are spread over processes."""
        args, name = self.args, "--accelerate_config"
        if self.is_fsdp_enabled and not self.can_be_sharded:
            raise InputError(name, found="sharding", expected=f"ddp for {self.method}")
        if self.is_deepspeed_enabled:
            raise InputError(name, found="DeepSpeed", expected="ddp, fsdp2 or zero2, which FSDP2 does")
        if not self.is_fsdp_enabled:
            return
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2 or "SHARDED" not in str(plugin.state_dict_type):
            raise InputError(name, found="FSDP 1 or full state dicts", expected="FSDP 2 and SHARDED_STATE_DICT")
        for option, used in (
            ("use_peft", self.peft_config is not None),
            ("train_text_encoder", args.train_text_encoder),
            ("muon_learning_rate", args.muon_learning_rate is not None),
            ("a schedule-free optimizer", "schedule_free" in args.optim.value),
        ):
            if used:
                raise InputError(name, found=f"sharding with {option}", expected="ddp for it")
        if args.bf16:
            # Weights travel and compute in bfloat16. Inputs are left to autocast, as without sharding: the usual
            # policy rounds them all, and with them timesteps, to 8 bits.
            plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
            )

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Return transformers' optimizer, or Muon with AdamW where `muon_learning_rate` is set."""
        if self.args.muon_learning_rate is None or self.optimizer is not None:
            try:
                return super().create_optimizer(*([] if model is None else [model]))
            except (ImportError, ValueError) as error:
                found = " ".join(str(error).split())
                remedy = "Install its package, or take adamw_torch_fused or adafactor."
                raise InputError(f"optim {self.args.optim.value}", found=found, remedy=remedy) from error
        model = self.model if model is None else model
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        decayed = set(self.get_decay_parameter_names(model))
        rest = [(name, p) for name, p in trained if not is_block_matrix(name, p)]
        args = self.args
        self.optimizer = MuonWithAdamW(
            [p for name, p in trained if is_block_matrix(name, p)],
            [
                {"params": [p for name, p in rest if name in decayed], "weight_decay": args.weight_decay},
                {"params": [p for name, p in rest if name not in decayed], "weight_decay": 0.0},
            ],
            muon_lr=args.muon_learning_rate,
            weight_decay=args.weight_decay,
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            fused=True,
        )
        return self.optimizer

    def shift_for(self, latents: torch.Tensor) -> float:
        """Return the timestep shift for latents (B, C, H, W): one number, or by their size under `dynamic_shift`."""
        if not self.args.dynamic_shift:
            return self.args.shift
        num_tokens = latents.shape[-2] * latents.shape[-1] // self.pipeline.patch_size**2
        return resolution_shift(num_tokens, self.args.base_shift, self.args.max_shift)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """Train as transformers does; True resumes from the last whole checkpoint in `output_dir`, if there is one."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir, self.args.use_ema)
        if resume_from_checkpoint:
            self._resumed_from = Path(resume_from_checkpoint)  # a stream needs it before the weights are loaded
            resume_from_checkpoint = str(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _run_epoch(self, *args, **kwargs):
        """Do nothing where a resumed run is done already: transformers would train a step more."""
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return None
        loader = kwargs["train_dataloader"]
        # Else torch draws its workers' seed from the generator of dropout, once more where a stream goes on.
        getattr(loader, "base_dataloader", loader).generator = torch.Generator().manual_seed(self.args.seed)
        # Of several processes that go on within a pass, neither transformers nor accelerate finds the sampler.
        batches = loader.batch_sampler
        while hasattr(batches, "batch_sampler"):
            batches = batches.batch_sampler
        if hasattr(batches.sampler, "set_epoch"):
            batches.sampler.set_epoch(kwargs["epoch"])
        return super()._run_epoch(*args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """Do a step with `attention_backend`, in the backward pass too: checkpointed blocks are recomputed there."""
        with self.attention():
            return super().training_step(model, inputs, num_items_in_batch)

    @contextmanager
    def attention(self) -> Iterator[None]:
        """Use the kernel of `attention_backend` meanwhile.

        Raises:
            InputError: there is no such kernel for the device, type or shape.
        """
        name = self.args.attention_backend
        if name == "auto":
            yield
            return
        try:
            with sdpa_kernel(getattr(SDPBackend, ATTENTION_BACKENDS[name])):
                yield
        except RuntimeError as error:
            if not any(words in str(error) for words in ("No available kernel", "No viable backend")):
                raise
            found = f"{name}, which torch does not have for this device, type or shape"
            raise InputError("attention_backend", found=found, remedy="Take auto.") from error

    @torch.no_grad()
    def encode_text(
        self, prompts: list[str], device: torch.device, pictures: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return states (B, L, D) and pooled text (B, P) from the pipeline's frozen encoders.

        `pictures` (B, 3, H, W) in 0..1 are those that edits start from, for encoders that see them.
        """
        for encoder in self.pipeline.text_encoders:
            encoder.to(device)
        return self.pipeline.encode_conditions(prompts, pictures, device)

    def _save_checkpoint(self, model, trial) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except InputError:
            raise
        except (OSError, RuntimeError, CheckpointException) as error:
            # torch.save says RuntimeError of a file that it cannot write, and sharded saves wrap what was wrong.
            if isinstance(error, RuntimeError) and not any(word in str(error) for word in _UNWRITABLE):
                raise
            raise InputError(
                f"writing {Path(self.args.output_dir) / f'checkpoint-{self.state.global_step}'}",
                found=getattr(error, "strerror", None) or str(error).strip().splitlines()[0],
                expected="room for a checkpoint",
                remedy="Free some space and resume; the checkpoints before it are whole.",
            ) from error

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write a checkpoint's weights; sharded ones are written by their library, all else as for whole ones."""
        if self.is_fsdp_enabled:
            self._save_beside(Path(output_dir or self.args.output_dir))
        super().save_model(output_dir, _internal_call)

    def _save_beside(self, folder: Path) -> None:
        """Write what goes beside the weights. All of it comes before transformers deletes older checkpoints."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.ema is not None:
            self.ema.save(folder, self.trained_model(), writes=self.args.should_save)
        if self.args.should_save:
            self.save_position(folder)

    def save_position(self, folder: Path) -> None:
        """Write where in its data a run is, for trainers whose loader cannot simply skip what was seen."""

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Write what is trained, as a whole or not at all; what is frozen is in the model that was loaded."""
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._save_beside(folder)
        save_tensors(self.trained_weights(), folder / SAFE_WEIGHTS_NAME)

    def trained_weights(self) -> dict[str, torch.Tensor]:
        """Return what is trained, by name, not copied."""
        named = self.trained_model().named_parameters()
        return {name: p.detach().contiguous() for name, p in named if p.requires_grad}

    @torch.no_grad()
    def restore(self, tensors: dict[str, torch.Tensor], step: int) -> None:
        """Put the weights of an earlier step, as `trained_weights` names them, in place of what is trained and of its
        average; exports say that step."""
        self.restored_step = step
        for name, parameter in self.trained_model().named_parameters():
            if parameter.requires_grad:
                parameter.copy_(tensors[name])
        if self.ema is not None:
            self.ema.restart(self.trained_model())

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        folder = Path(resume_from_checkpoint)
        if not self.is_fsdp_enabled:
            self._load_trained(folder / SAFE_WEIGHTS_NAME)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.ema is not None:
            self.ema.attach(self.trained_model())
            self.ema.load(folder, int(folder.name.rpartition("-")[2]), self.trained_model())

    @torch.no_grad()
    def _load_trained(self, path: Path) -> None:
        """Take back what `_save` wrote.

        Raises:
            InputError: the checkpoint is of other weights than those that are trained now.
        """
        trained = {n: p for n, p in self.trained_model().named_parameters() if p.requires_grad}
        shapes = {name: tuple(p.shape) for name, p in trained.items()}
        if read_header(path).shapes != shapes:
            remedy = "Resume with the settings it was made with (trainable, use_peft, lora_r, ...)."
            found = "other weights than those that are trained now"
            raise InputError(f"checkpoint {path}", found=found, remedy=remedy)
        for name, tensor in load_file(path).items():
            trained[name].copy_(tensor)

    def trained_model(self) -> KontextForTraining:
        """The model under the wrappers of accelerate and torch.compile, which change the names of its weights."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Hold the averaged weights in the model meanwhile: ours, or those of a schedule-free optimizer."""
        model, optimizer = self.trained_model(), getattr(self.optimizer, "optimizer", self.optimizer)
        if self.ema is not None:
            self._forget_gathered(model)
            self.ema.swap_in(model)
            try:
                yield
            finally:
                self._forget_gathered(model)
                self.ema.swap_out(model)
        elif callable(getattr(optimizer, "eval", None)):
            # Its way back rounds, and a run would depend on its previews: so the weights are kept.
            kept = [p.detach().clone() for p in model.parameters() if p.requires_grad]
            optimizer.eval()
            try:
                yield
            finally:
                optimizer.train()
                with torch.no_grad():
                    torch._foreach_copy_([p for p in model.parameters() if p.requires_grad], kept)
        else:
            yield

    @contextmanager
    def drawing(self) -> Iterator[StableDiffusion3KontextPipeline]:
        """Hold the pipeline ready to draw meanwhile: averaged weights, all parts on the device, evaluation mode.

        Random numbers are put back afterwards: a run is the same however often it is looked at.
        """
        args, model = self.args, self.trained_model()
        helpers = [self.pipeline.vae, *self.pipeline.text_encoders]
        places = [module.device for module in helpers]  # with cached texts the encoders wait on the CPU
        was_training = model.training
        with torch.random.fork_rng():
            for module in helpers:
                module.to(args.device)
            model.eval()
            types = {module.dtype for module in (self.pipeline.transformer, *helpers)}
            mixed = len(types) > 1 or (self.is_fsdp_enabled and args.bf16)
            try:
                with self.averaged_weights(), torch.autocast(args.device.type, torch.bfloat16, enabled=mixed):
                    yield self.pipeline
            finally:
                model.train(was_training)
                for module, place in zip(helpers, places, strict=True):
                    module.to(place)

    @staticmethod
    def _forget_gathered(model: nn.Module) -> None:
        """Free whole weights that sharded modules still hold from a pass: their shards are about to change."""
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def init_hf_repo(self, *args, **kwargs) -> None:
        """Make the hub repository before training starts, so that what is wrong with it is known in time.

        Raises:
            InputError: the hub cannot be reached or does not take the name.
        """
        try:
            super().init_hf_repo(*args, **kwargs)
        except Exception as error:  # whatever the hub's client and its own libraries raise
            name = repository_name(self.args, Path(self.args.output_dir))
            remedy = "`hf auth login`, or take push_to_hub out and upload the export yourself."
            raise hub_error(name, error, remedy) from error

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Checkpoints stay here; what is pushed is the export (`pretrain`)."""

    def export(self, folder: str | Path, card: str | None = None) -> None:
        """Write the model in the published layout, or its LoRA (`adapters.save_lora`); all or nothing.

        Averaged weights are written where there are any. An exported pipeline in `folder` is replaced. Of several
        processes the first one writes. `card` becomes its README.md. The files' metadata say how they were trained.

        Raises:
            InputError: `folder` holds something else, cannot be written, or the disk is full; what was there stays.
        """
        folder = Path(folder).absolute()
        with self._exported_weights():
            if self.is_world_process_zero():
                self._replace(folder, card)
        self.accelerator.wait_for_everyone()  # the next stage of a run reads it at once

    @contextmanager
    def _exported_weights(self) -> Iterator[None]:
        """Hold the averaged weights in the pipeline meanwhile; whole in the first process, if they are sharded."""
        if not self.is_fsdp_enabled:
            with self.averaged_weights():
                yield
            return
        sharded = self.pipeline.transformer
        with self.averaged_weights():
            state = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if self.is_world_process_zero():
            with torch.device("meta"):
                self.pipeline.transformer = SD3Transformer2DKontextModel.from_config(sharded.config)
            self.pipeline.transformer.load_state_dict(state, assign=True)
        try:
            yield
        finally:
            self.pipeline.transformer = sharded

    def _replace(self, folder: Path, card: str | None) -> None:
        """Write the export beside `folder`, then put it in its place."""
        check_replaceable(folder)
        with replaced_folder(folder) as unfinished:
            try:
                self._write_export(unfinished, getattr(torch, self.args.export_dtype))
            except SafetensorError as error:
                raise cannot_write(folder, error) from error
            if card is not None:
                write_file(unfinished / "README.md", card)

    @property
    def exported_step(self) -> int:
        """Optimizer steps that the weights of an export had, fewer than were done where a gate went back."""
        return self.state.global_step if self.restored_step is None else self.restored_step

    def settings(self) -> dict:
        """Return names and values of all settings of the run, those of `run_settings` among them."""
        return {**self.run_settings, **self.args.to_sanitized_dict()}

    def _metadata(self) -> dict[str, str]:
        """Return what is written into exported files: how they came to be, and what sampling has to know."""
        settings = {k: _placeless(v) for k, v in self.settings().items() if k not in _OF_THIS_PLACE}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
        until = [entry for entry in self.state.log_history if entry["step"] <= self.exported_step]
        logged = {name: entry[name] for entry in until for name in _LOGGED if name in entry}
        found = {"unipic2.method": self.method, "unipic2.step": str(self.exported_step)}
        found |= {"unipic2.metrics": json.dumps(logged)} if logged else {}
        found["unipic2.config_sha256"] = digest
        base = str(self.run_settings.get("model_name_or_path", ""))
        if base and not Path(base).exists():  # a name; where a folder lay is nobody's business
            found["unipic2.base"] = base
        return found | shift_of_scheduler(self.pipeline.scheduler.config)

    def _write_export(self, folder: Path, dtype: torch.dtype) -> None:
        if self.peft_config is None:
            self.pipeline.save_trained(folder, self.trained_components(), dtype, self._metadata())
            return
        save_lora(self.pipeline, folder, self._metadata())
        for file in folder.rglob("*.safetensors"):
            cast_file(file, dtype)


class _PreviewCallback(TrainerCallback):
    """Draws the fixed-seed grid with the averaged weights, to `previews/` and to the loggers that show pictures."""

    def __init__(self, trainer: KontextTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, model=None, **kwargs):
        trainer = self.trainer
        # Sharded weights need all processes for each pass; one of them keeps the picture.
        if state.global_step % args.preview_steps or not (state.is_world_process_zero or trainer.is_fsdp_enabled):
            return
        try:
            with trainer.drawing() as pipeline:
                grid = trainer.previews(pipeline, state.global_step)
        except RuntimeError as error:  # such as too little memory: no reason to lose a run
            if trainer.is_fsdp_enabled:
                raise  # the other processes wait for this one
            sys.stderr.write(f"no preview at step {state.global_step}: {error}\n")
            return
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / "previews"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_sheet(grid, folder / f"step_{state.global_step:06d}.png")
        except (InputError, OSError) as error:
            sys.stderr.write(f"no preview at step {state.global_step}: {error}\n")
        self._to_loggers(grid, state.global_step)

    def _to_loggers(self, grid, step: int) -> None:
        from numpy import asarray
        from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_image("previews", asarray(grid), step, dataformats="HWC")
            elif isinstance(callback, WandbCallback) and callback._wandb.run is not None:
                callback._wandb.log({"previews": callback._wandb.Image(grid), "train/global_step": step})
            elif isinstance(callback, TrackioCallback) and callback._initialized:
                callback._trackio.log({"previews": callback._trackio.Image(asarray(grid))}, step=step)
