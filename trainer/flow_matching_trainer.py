"""Flow-matching pretraining of text-to-image and editing in one model.

Convention: sigma 0 is the picture, sigma 1 is noise (see `core.flow`). A sample is a dict with `prompt`, `latents`
(C, H, W), already scaled for the transformer, and for an edit `ref_latents` (C, H, W). In place of latents it may have
`pixel_values` and `ref_pixel_values`, uint8 (3, 8H, 8W). Optional: `loss_mask` (1, H, W), 0 to 1, where an edit is to
be learned, `source_id` (int), the same for samples that contrastive training must not play off against each other, and
`text`, ready states (L, D) and pooled text (P,); the dataset then has `empty_text`, those of the empty prompt.
Batches hold one task and one size only (`batches`), so no padding and no mask is needed.
"""

import json
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
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

from ..core.checkpoint import cast_file, read_header, save_tensors
from ..core.errors import InputError
from ..core.files import cannot_write, check_replaceable, write_file
from ..core.flow import BASE_TOKENS, MAX_TOKENS, NUM_TRAIN_TIMESTEPS, interpolate, resolution_shift
from .adapters import prepare, save_lora
from .batches import DRAW_SEED, SeededDraws, TaskBlockSampler, derived_seed
from .data.stream import StreamedPairs
from .ema import EMA_FILE, EMACallback
from .flow_matching_config import ATTENTION_BACKENDS, FlowMatchingConfig
from .hub import hub_error
from .kontext_pipeline import StableDiffusion3KontextPipeline
from .kontext_transformer import SD3Transformer2DKontextModel
from .muon import MuonWithAdamW, is_block_matrix
from .objective import contrastive_error, loss_weights, sample_sigmas, squared_error
from .report import ReportCallback

_STATE_FILE = "trainer_state.json"
_UNWRITABLE = ("PytorchStreamWriter", "inline_container", "No space left", "I/O error")
_DROPOUT, _NOISE = 1, 2  # purposes of the seeds derived from a draw's
_BANDS = 4  # equal bands of sigma whose mean losses are reported


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


def scheduler_of(args: FlowMatchingConfig, scheduler) -> FlowMatchEulerDiscreteScheduler:
    """Return the scheduler with the shift that is trained, for previews and export."""
    changes = {"use_dynamic_shifting": args.dynamic_shift}
    if args.dynamic_shift:
        changes |= {"time_shift_type": "exponential", "base_shift": args.base_shift, "max_shift": args.max_shift}
        changes |= {"base_image_seq_len": BASE_TOKENS, "max_image_seq_len": MAX_TOKENS}
    else:
        changes["shift"] = args.shift
    return FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, **changes)


class FlowMatchingTrainer(Trainer):
    """`transformers.Trainer` for a Kontext pipeline: velocity loss, task batches, EMA, previews, report, export.

    Args:
        pipeline: the model; its transformer (and text encoder, if asked) is trained in place. What is trained is kept
            in float32, what is frozen in the type it comes in.
        args: settings.
        train_dataset: map-style dataset of samples (module docstring) with `is_edit`, one bool for each sample, and,
            if sizes differ, `buckets`, one hashable for each sample that says its size; or `StreamedPairs`.
        previews: callable `(pipeline, step) -> PIL image` drawing the fixed-seed grid, or None.
        callbacks: further transformers callbacks.
        peft_config: train LoRAs with these settings instead of `args.trainable`.

    Raises:
        InputError: several text encoders to train, LoRA beside other trained weights, LoRA targets that the
            transformer does not have, a stream without `max_steps`, a logger that is not installed, a hub that cannot
            be used, or what sharded training does not do.
    """

    def __init__(
        self,
        pipeline: StableDiffusion3KontextPipeline,
        args: FlowMatchingConfig,
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
        pipeline.scheduler = scheduler_of(args, pipeline.scheduler)
        pipeline.vae.requires_grad_(False)
        for encoder in pipeline.text_encoders:
            encoder.requires_grad_(args.train_text_encoder)
        prepare(pipeline.transformer, args.trainable, peft_config, args.seed)
        text_encoder = pipeline.text_encoder.float() if args.train_text_encoder else None
        model = KontextForTraining(pipeline.transformer, text_encoder)
        self.peft_config = peft_config
        self.ema = EMACallback(args.ema_decay, args.ema_update_steps, args.ema_on_cpu) if args.use_ema else None
        # A stream goes on by its own state: nothing is drawn only to be skipped.
        self._is_streamed, self._stream, self._resumed_from = isinstance(train_dataset, StreamedPairs), None, None
        if self._is_streamed:
            args.ignore_data_skip = True
            if args.max_steps <= 0:
                raise InputError("max_steps", found=args.max_steps, expected="at least 1, as a stream has no end")
        self._losses: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._throughput = _Throughput()
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
        self.add_callback(ReportCallback())
        if previews is not None and args.preview_steps:
            self.add_callback(_PreviewCallback(self))

    def _check_sharding(self) -> None:
        """Refuse what has not been made to work with weights that are spread over processes."""
        args, name = self.args, "--accelerate_config"
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

    def collate(self, samples: list[dict]) -> dict:
        """Stack samples of one task and size; some prompts are dropped to the empty one, some references left out.

        Prompts become token ids (B, L) where the text encoder is trained, ready states and pooled text where samples
        bring them as `text`, and else stay words for the frozen encoders. `seed` is what the loss draws noise and
        sigmas from.
        """
        seed = samples[0].get(DRAW_SEED, 0)
        generator = torch.Generator().manual_seed(derived_seed(seed, _DROPOUT))
        kind = "latents" if "latents" in samples[0] else "pixel_values"
        is_edit = f"ref_{kind}" in samples[0]
        dropout = self.args.edit_caption_dropout if is_edit else self.args.caption_dropout
        keep = torch.rand(len(samples), generator=generator) >= dropout
        prompts = [s["prompt"] if k else "" for s, k in zip(samples, keep, strict=True)]
        batch = {kind: torch.stack([s[kind] for s in samples]), "text": prompts, "is_edit": is_edit}
        if "text" in samples[0]:
            empty = self.train_dataset.empty_text
            chosen = [s["text"] if k else empty for s, k in zip(samples, keep, strict=True)]
            batch["text"] = tuple(torch.stack(part) for part in zip(*chosen, strict=True))
        elif self.args.train_text_encoder:
            tokenizer = self.pipeline.tokenizer
            length = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
            batch["text"] = tokenizer(prompts, **length, return_tensors="pt").input_ids
        # A batch keeps or loses its references as a whole: mixed, it would need padding and a mask.
        if is_edit and torch.rand((), generator=generator) >= self.args.reference_dropout:
            batch[f"ref_{kind}"] = torch.stack([s[f"ref_{kind}"] for s in samples])
        masks = [s["loss_mask"] for s in samples if "loss_mask" in s]
        if masks and self.args.unmasked_weight < 1:
            mask = torch.stack([s.get("loss_mask", torch.ones_like(masks[0])) for s in samples])
            batch["loss_mask"] = self.args.unmasked_weight + (1 - self.args.unmasked_weight) * mask
        if self.args.contrastive_weight:
            ids = [s.get("source_id", -1 - i) for i, s in enumerate(samples)]  # without an id each stands for itself
            batch["source_ids"] = torch.tensor(ids)
        for sample in samples:
            batch.setdefault("broken", {}).update(sample.get("broken", {}))
        batch["seed"] = derived_seed(seed, _NOISE)
        return batch

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

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """Do a step with `attention_backend`, in the backward pass too: checkpointed blocks are recomputed there.

        Raises:
            InputError: there is no such kernel for the device, type or shape.
        """
        name = self.args.attention_backend
        if name == "auto":
            return super().training_step(model, inputs, num_items_in_batch)
        try:
            with sdpa_kernel(getattr(SDPBackend, ATTENTION_BACKENDS[name])):
                return super().training_step(model, inputs, num_items_in_batch)
        except RuntimeError as error:
            if not any(words in str(error) for words in ("No available kernel", "No viable backend")):
                raise
            found = f"{name}, which torch does not have for this device, type or shape"
            raise InputError("attention_backend", found=found, remedy="Take auto.") from error

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Weighted squared error of the velocity `noise - latents` (SD3, arXiv 2403.03206, section 2).

        With `contrastive_weight` the distance to other samples' velocities is subtracted (arXiv 2506.05350).
        """
        args = self.args
        for row, reason in inputs.get("broken", {}).items():  # counted here, as loaders may be processes of their own
            self.train_dataset.note_broken(row, reason)
        latents, reference = self._latents(inputs, "latents"), self._latents(inputs, "ref_latents")
        # Drawn on the CPU from the batch's own seed: the same on any device and any number of processes.
        generator = torch.Generator().manual_seed(inputs["seed"])
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        sigmas = sample_sigmas(
            len(latents), args.timestep_sampling, self.shift_for(latents), generator,
            args.logit_mean, args.logit_std, args.mode_scale,
        ).to(latents.device)  # fmt: skip
        text = inputs["text"]
        if isinstance(text, list):
            text = self.encode_text(text, latents.device)
        mask, target = inputs.get("loss_mask"), noise - latents
        mixed = self.is_fsdp_enabled and args.bf16  # without sharding accelerate does it
        with torch.autocast(latents.device.type, torch.bfloat16) if mixed else nullcontext():
            velocity = model(interpolate(latents, noise, sigmas), sigmas, text, reference)
        error = squared_error(velocity.float(), target, mask)
        objective = error
        if args.contrastive_weight:
            contrast = contrastive_error(velocity.float(), target, inputs["source_ids"], generator, mask)
            objective = error - args.contrastive_weight * contrast
        loss = (loss_weights(args.loss_weighting, sigmas) * objective).mean()
        if model.training:
            self._note(error.detach(), sigmas, inputs["is_edit"])
            self._throughput.add(latents, reference, self.pipeline.patch_size)
        return (loss, velocity) if return_outputs else loss

    def _latents(self, inputs: dict, name: str) -> torch.Tensor | None:
        """Return ready latents (B, C, H, W), or encode pixels by the posterior's mode, or None."""
        pixels = inputs.get(name.replace("latents", "pixel_values"))
        if pixels is None:
            return inputs.get(name)
        self.pipeline.vae.to(pixels.device)
        with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
            return self.pipeline.encode_bytes(pixels).float()

    def _note(self, errors: torch.Tensor, sigmas: torch.Tensor, is_edit: bool) -> None:
        """Keep errors (B,) for the next log, by task and by band of sigma, as sums and counts."""
        task = "edit" if is_edit else "t2i"
        self._losses[task].append(torch.stack([errors.sum(), torch.ones_like(errors).sum()]))
        bands = (sigmas * _BANDS).long().clamp_max(_BANDS - 1)
        sums = torch.zeros(_BANDS, 2, device=errors.device)
        sums.index_add_(0, bands, torch.stack([errors, torch.ones_like(errors)], dim=1))
        self._losses["bands"].append(sums)

    @torch.no_grad()
    def encode_text(self, prompts: list[str], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return states (B, L, D) and pooled text (B, P) from the pipeline's frozen encoders."""
        for encoder in self.pipeline.text_encoders:
            encoder.to(device)
        states, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, None, device=device, do_classifier_free_guidance=False
        )
        return states, pooled

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Add what happened since the last log: mean error by task and by band of sigma, throughput, peak memory."""
        if "loss" in logs:
            device = self.args.device
            rows = [sum(self._losses[task], torch.zeros(2, device=device)) for task in ("t2i", "edit")]
            bands = sum(self._losses["bands"], torch.zeros(_BANDS, 2, device=device))
            sums = self.accelerator.reduce(torch.cat([torch.stack(rows), bands]), "sum").tolist()
            names = ["t2i", "edit", *(f"sigma_{i / _BANDS:.2f}-{(i + 1) / _BANDS:.2f}" for i in range(_BANDS))]
            logs |= {
                f"loss/{n}": round(total / count, 4) for n, (total, count) in zip(names, sums, strict=True) if count
            }
            logs |= self._throughput.read(self.args.world_size)
            self._losses.clear()
        super().log(logs, *args, **kwargs)

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """Return transformers' loader over draws that carry their own seeds."""
        draws = self.train_dataset if self._is_streamed else SeededDraws(self.train_dataset)
        return self._get_dataloader(draws, "Training", self._train_batch_size, self._get_train_sampler, True)

    def _get_train_sampler(self, train_dataset=None) -> torch.utils.data.Sampler:
        data, args = self.train_dataset, self.args
        if self._is_streamed:
            ahead = args.gradient_accumulation_steps + args.dataloader_num_workers * (
                args.dataloader_prefetch_factor or 2
            )
            self._stream = data.sampler(self._train_batch_size, args.edit_ratio, args.seed, args.world_size, ahead + 4)
            if self._resumed_from is not None:
                self._stream.load(self._resumed_from)
            return self._stream
        buckets = getattr(data, "buckets", None)
        return TaskBlockSampler(
            data.is_edit, self._train_batch_size, args.edit_ratio, args.seed, buckets, args.world_size
        )

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
            self.ema.save(folder, self._trained_model(), writes=self.args.should_save)
        if self._stream is not None and self.args.should_save:
            blocks = self.args.gradient_accumulation_steps * self.args.world_size
            self._stream.save(folder, self.state.global_step * blocks)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Write what is trained, as a whole or not at all; what is frozen is in the model that was loaded."""
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._save_beside(folder)
        model = self._trained_model()
        trained = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
        save_tensors(trained, folder / SAFE_WEIGHTS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        folder = Path(resume_from_checkpoint)
        if not self.is_fsdp_enabled:
            self._load_trained(folder / SAFE_WEIGHTS_NAME)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.ema is not None:
            self.ema.attach(self._trained_model())
            self.ema.load(folder, int(folder.name.rpartition("-")[2]), self._trained_model())

    @torch.no_grad()
    def _load_trained(self, path: Path) -> None:
        """Take back what `_save` wrote.

        Raises:
            InputError: the checkpoint is of other weights than those that are trained now.
        """
        trained = {n: p for n, p in self._trained_model().named_parameters() if p.requires_grad}
        shapes = {name: tuple(p.shape) for name, p in trained.items()}
        if read_header(path).shapes != shapes:
            remedy = "Resume with the settings it was made with (trainable, use_peft, lora_r, ...)."
            found = "other weights than those that are trained now"
            raise InputError(f"checkpoint {path}", found=found, remedy=remedy)
        for name, tensor in load_file(path).items():
            trained[name].copy_(tensor)

    def _trained_model(self) -> KontextForTraining:
        """The model under the wrappers of accelerate and torch.compile, which change the names of its weights."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Hold the averaged weights in the model meanwhile: ours, or those of a schedule-free optimizer."""
        model, optimizer = self._trained_model(), getattr(self.optimizer, "optimizer", self.optimizer)
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
            name = self.args.hub_model_id or Path(self.args.output_dir).name
            remedy = "`hf auth login`, or take push_to_hub out and upload the export yourself."
            raise hub_error(name, error, remedy) from error

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Checkpoints stay here; what is pushed is the export (`pretrain`)."""

    def export(self, folder: str | Path, card: str | None = None) -> None:
        """Write the model in the published layout, or its LoRA (`adapters.save_lora`); all or nothing.

        Averaged weights are written where there are any. An exported pipeline in `folder` is replaced. Of several
        processes the first one writes. `card` becomes its README.md.

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
        unfinished, dtype = folder.with_name(f".{folder.name}.unfinished"), getattr(torch, self.args.export_dtype)
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            self._write_export(unfinished, dtype)
            if card is not None:
                write_file(unfinished / "README.md", card)
            if folder.exists():
                shutil.rmtree(folder)
            unfinished.rename(folder)
        except (OSError, SafetensorError) as error:
            raise cannot_write(folder, error) from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def _write_export(self, folder: Path, dtype: torch.dtype) -> None:
        if self.peft_config is None:
            trained = {"transformer", "text_encoder"} if self.args.train_text_encoder else {"transformer"}
            self.pipeline.save_trained(folder, trained, dtype)
            return
        save_lora(
            self.pipeline, folder, {"unipic2.method": "flow matching", "unipic2.step": str(self.state.global_step)}
        )
        for file in folder.rglob("*.safetensors"):
            cast_file(file, dtype)


class _Throughput:
    """Counts what passes through one process between two logs."""

    def __init__(self):
        self.start, self.samples, self.tokens = None, 0, 0

    def add(self, latents: torch.Tensor, reference: torch.Tensor | None, patch_size: int) -> None:
        """Count a batch; picture tokens of target and reference, not those of the text."""
        if self.start is None:
            self.start = time.perf_counter()  # what came before the first batch is loading
        each = latents.shape[-2] * latents.shape[-1] // patch_size**2
        self.samples += len(latents)
        self.tokens += len(latents) * each * (1 if reference is None else 2)

    def read(self, num_processes: int) -> dict[str, float]:
        """Return rates of all processes together, and start anew."""
        if self.start is None:
            return {}
        seconds = max(time.perf_counter() - self.start, 1e-9)
        rates = {
            "samples_per_second": round(num_processes * self.samples / seconds, 2),
            "tokens_per_second": round(num_processes * self.tokens / seconds),
        }
        if torch.cuda.is_available():
            rates["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        self.start, self.samples, self.tokens = time.perf_counter(), 0, 0
        return rates


class _PreviewCallback(TrainerCallback):
    """Draws the fixed-seed grid with the averaged weights, to `previews/` and to the loggers that show pictures."""

    def __init__(self, trainer: FlowMatchingTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, model=None, **kwargs):
        trainer = self.trainer
        # Sharded weights need all processes for each pass; one of them keeps the picture.
        if state.global_step % args.preview_steps or not (state.is_world_process_zero or trainer.is_fsdp_enabled):
            return
        # Drawing must not move the training's random numbers: the run is the same with and without previews.
        helpers = [trainer.pipeline.vae, *trainer.pipeline.text_encoders]
        places = [module.device for module in helpers]  # with cached texts the encoders wait on the CPU
        with torch.random.fork_rng():
            for module in helpers:
                module.to(args.device)
            model.eval()
            types = {module.dtype for module in (trainer.pipeline.transformer, *helpers)}
            try:
                mixed = len(types) > 1 or (trainer.is_fsdp_enabled and args.bf16)
                autocast = torch.autocast(args.device.type, torch.bfloat16, enabled=mixed)
                with trainer.averaged_weights(), autocast:
                    grid = trainer.previews(trainer.pipeline, state.global_step)
            except RuntimeError as error:  # such as too little memory: no reason to lose a run
                if trainer.is_fsdp_enabled:
                    raise  # the other processes wait for this one
                sys.stderr.write(f"no preview at step {state.global_step}: {error}\n")
                return
            finally:
                model.train()
                for module, place in zip(helpers, places, strict=True):
                    module.to(place)
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / "previews"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step_{state.global_step:06d}.png"
        grid.save(path)
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
