"""Flow-matching pretraining of text-to-image and editing in one model.

Convention: sigma 0 is the picture, sigma 1 is noise (see `core.flow`). A sample is a dict with `latents` (C, H, W),
already scaled for the transformer, `prompt`, and for an edit `ref_latents` (C, H, W). Batches hold one task only,
so no padding and no mask is needed.
"""

import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback

from ..core.checkpoint import cast_file, save_tensors
from ..core.errors import InputError
from ..core.files import cannot_write, check_replaceable
from ..core.flow import NUM_TRAIN_TIMESTEPS, interpolate, shift_sigmas
from .flow_matching_config import FlowMatchingConfig
from .kontext_pipeline import StableDiffusion3KontextPipeline
from .muon import MuonWithAdamW, is_block_matrix

_EMA_FILE = "ema.safetensors"
_STATE_FILE = "trainer_state.json"
_DRAW_SEED = "draw_seed"


class TaskBlockSampler(torch.utils.data.Sampler[int]):
    """Yields indices in blocks of `block_size` that belong to one task, edits taking `edit_ratio` of the blocks.

    One pass has as many blocks as the dataset fills; each task is walked in a fresh random order and walked again
    when it runs out, so a small task repeats rather than ends the pass.
    """

    def __init__(self, is_edit: list[bool], block_size: int, edit_ratio: float, seed: int):
        self.indices = {
            task: torch.tensor([i for i, e in enumerate(is_edit) if e == task], dtype=torch.long)
            for task in (False, True)
        }
        if not len(self.indices[True]):
            edit_ratio = 0.0
        elif not len(self.indices[False]):
            edit_ratio = 1.0
        self.num_blocks = max(1, len(is_edit) // block_size)
        self.block_size, self.edit_ratio, self.seed, self.epoch = block_size, edit_ratio, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the pass; the same epoch gives the same order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_blocks * self.block_size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        streams = {task: self._stream(indices, generator) for task, indices in self.indices.items()}
        for block in range(self.num_blocks):
            # The running count of edits follows the ratio to within one block.
            is_edit = int((block + 1) * self.edit_ratio) > int(block * self.edit_ratio)
            for _ in range(self.block_size):
                yield next(streams[is_edit])

    @staticmethod
    def _stream(indices: torch.Tensor, generator: torch.Generator) -> Iterator[int]:
        while True:
            for i in torch.randperm(len(indices), generator=generator):
                yield int(indices[i])


def _seed_cpu(seed: int) -> None:
    # torch.manual_seed also queues a call, with its stack as text, for each kind of device that is not in use yet:
    # a millisecond a sample, and memory that is never freed.
    torch.default_generator.manual_seed(seed)


class SeededDraws(torch.utils.data.Dataset):
    """A dataset whose random choices depend on the draw alone, not on what was loaded before it.

    Loaders read ahead, and a resumed run skips what it has seen; with the global random state either would change
    prompts and dropout. Here each draw `(index, seed)` sets torch's generator for one sample only.
    """

    def __init__(self, samples):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, draw: tuple[int, int]) -> dict:
        index, seed = draw
        with torch.random.fork_rng(devices=[]):
            _seed_cpu(seed)
            return {**self.samples[index], _DRAW_SEED: seed}


class SeededSampler(torch.utils.data.Sampler[tuple[int, int]]):
    """Adds to each index of a sampler a seed made from the run's seed, the pass and the place in it."""

    def __init__(self, sampler: TaskBlockSampler):
        self.sampler = sampler

    def set_epoch(self, epoch: int) -> None:
        """Choose the pass."""
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        start = np.random.SeedSequence([self.sampler.seed, self.sampler.epoch]).generate_state(1, np.uint64)[0]
        for place, index in enumerate(self.sampler):
            yield index, (int(start) + place) % 2**63


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


class EMACallback(TrainerCallback):
    """Averages the trained weights after each optimizer step, and stores the average with each checkpoint."""

    def __init__(self, model: nn.Module, decay: float):
        self.names = [n for n, p in model.named_parameters() if p.requires_grad]
        self.ema = EMAModel(
            [p for p in model.parameters() if p.requires_grad],
            decay=decay,
            use_ema_warmup=True,
            power=0.75,
            foreach=True,
        )

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.ema.to(args.device)  # built before the Trainer moved the model

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.ema.step([p for p in model.parameters() if p.requires_grad])

    def on_save(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        tensors = dict(zip(self.names, (t.contiguous() for t in self.ema.shadow_params), strict=True))
        save_tensors(tensors, folder / _EMA_FILE)

    def load(self, folder: Path, step: int) -> None:
        """Take the average of a checkpoint back."""
        tensors = load_file(folder / _EMA_FILE)
        for name, shadow in zip(self.names, self.ema.shadow_params, strict=True):
            shadow.copy_(tensors[name])
        self.ema.optimization_step = step

    def swap_in(self, model: nn.Module) -> None:
        """Put the average into the model; `swap_out` brings the trained weights back."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.ema.store(parameters)
        self.ema.copy_to(parameters)

    def swap_out(self, model: nn.Module) -> None:
        """Undo `swap_in`."""
        self.ema.restore([p for p in model.parameters() if p.requires_grad])


def last_checkpoint(output_dir: str | Path, use_ema: bool) -> Path | None:
    """Return the newest whole `checkpoint-N` in a folder: a killed run may have left its last one half-written."""
    needed = [_STATE_FILE, *([_EMA_FILE] if use_ema else [])]
    folders = [f for f in Path(output_dir).glob("checkpoint-*") if f.name.rpartition("-")[2].isdecimal()]
    whole = [f for f in folders if all((f / name).is_file() for name in needed)]
    return max(whole, key=lambda f: int(f.name.rpartition("-")[2]), default=None)


class FlowMatchingTrainer(Trainer):
    """`transformers.Trainer` for a Kontext pipeline: velocity loss, task batches, EMA, previews, export.

    Args:
        pipeline: the model; its transformer (and text encoder, if asked) is trained in place, in float32.
        args: settings.
        train_dataset: map-style dataset of samples (module docstring) with `is_edit`, one bool for each sample.
        previews: callable `(pipeline, step) -> PIL image` drawing the fixed-seed grid, or None.
        callbacks: further transformers callbacks.
    """

    def __init__(
        self,
        pipeline: StableDiffusion3KontextPipeline,
        args: FlowMatchingConfig,
        train_dataset,
        previews=None,
        callbacks: list | None = None,
    ):
        if args.train_text_encoder and pipeline.text_encoder_2 is not None:
            raise InputError(
                "train_text_encoder",
                found="true for a model with several text encoders",
                expected="false",
                remedy="Only the micro model's text encoder is trained; published ones stay frozen.",
            )
        self.pipeline, self.previews = pipeline, previews
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config, shift=args.shift)
        pipeline.vae.requires_grad_(False)
        for encoder in (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3):
            if encoder is not None:
                encoder.requires_grad_(args.train_text_encoder)
        pipeline.transformer.requires_grad_(True)
        text_encoder = pipeline.text_encoder.float() if args.train_text_encoder else None
        model = KontextForTraining(pipeline.transformer.float(), text_encoder)
        self.ema = EMACallback(model, args.ema_decay) if args.use_ema else None
        self._task_losses: dict[str, list[torch.Tensor]] = defaultdict(list)
        super().__init__(
            model=model, args=args, train_dataset=train_dataset, data_collator=self._collate_draws, callbacks=callbacks
        )
        if self.ema is not None:
            self.add_callback(self.ema)
        if previews is not None and args.preview_steps:
            self.add_callback(_PreviewCallback(self))

    def collate(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        """Stack samples of one task; some prompts are dropped to the empty one.

        Prompts become token ids (B, L) where the text encoder is trained, and stay words where it is frozen.
        """
        is_edit = "ref_latents" in samples[0]
        dropout = self.args.edit_caption_dropout if is_edit else self.args.caption_dropout
        keep = torch.rand(len(samples)) >= dropout
        prompts = [s["prompt"] if k else "" for s, k in zip(samples, keep, strict=True)]
        batch = {"latents": torch.stack([s["latents"] for s in samples]), "text": prompts}
        if self.args.train_text_encoder:
            tokenizer = self.pipeline.tokenizer
            length = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
            batch["text"] = tokenizer(prompts, **length, return_tensors="pt").input_ids
        if is_edit:
            batch["ref_latents"] = torch.stack([s["ref_latents"] for s in samples])
        return batch

    def _collate_draws(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        seeds = [sample.pop(_DRAW_SEED) for sample in samples]
        with torch.random.fork_rng(devices=[]):
            _seed_cpu(seeds[0])
            return self.collate(samples)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Return transformers' optimizer, or Muon with AdamW where `muon_learning_rate` is set."""
        if self.args.muon_learning_rate is None or self.optimizer is not None:
            return super().create_optimizer(model)
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

    def sample_sigmas(self, batch_size: int, device: torch.device) -> torch.Tensor:
        """Return training sigmas (B,) in 0..1, after the shift."""
        if self.args.timestep_sampling == "uniform":
            sigmas = torch.rand(batch_size, device=device)
        else:
            normal = torch.randn(batch_size, device=device) * self.args.logit_std + self.args.logit_mean
            sigmas = torch.sigmoid(normal)
        return shift_sigmas(sigmas, self.args.shift)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean squared error of the velocity `noise - latents` (SD3, arXiv 2403.03206, section 2, uniform weight)."""
        latents = inputs["latents"]
        noise = torch.randn_like(latents)
        sigmas = self.sample_sigmas(latents.shape[0], latents.device)
        text = inputs["text"]
        if not self.args.train_text_encoder:
            text = self.encode_text(text, latents.device)
        velocity = model(interpolate(latents, noise, sigmas), sigmas, text, inputs.get("ref_latents"))
        loss = F.mse_loss(velocity.float(), noise - latents)
        self._task_losses["edit" if "ref_latents" in inputs else "t2i"].append(loss.detach())
        return (loss, velocity) if return_outputs else loss

    @torch.no_grad()
    def encode_text(self, prompts: list[str], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return states (B, L, D) and pooled text (B, P) from the pipeline's frozen encoders."""
        for encoder in (self.pipeline.text_encoder, self.pipeline.text_encoder_2, self.pipeline.text_encoder_3):
            if encoder is not None:
                encoder.to(device)
        states, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, None, device=device, do_classifier_free_guidance=False
        )
        return states, pooled

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Add the mean loss of each task since the last log."""
        for task, losses in self._task_losses.items():
            if losses and "loss" in logs:
                logs[f"loss/{task}"] = round(torch.stack(losses).mean().item(), 4)
                losses.clear()
        super().log(logs, *args, **kwargs)

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """Return transformers' loader over draws that carry their own seeds."""
        draws = SeededDraws(self.train_dataset)
        return self._get_dataloader(draws, "Training", self._train_batch_size, self._get_train_sampler, True)

    def _get_train_sampler(self, train_dataset=None) -> SeededSampler:
        block, ratio = self._train_batch_size, self.args.edit_ratio
        return SeededSampler(TaskBlockSampler(self.train_dataset.is_edit, block, ratio, self.args.seed))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.ema is not None:
            folder = Path(resume_from_checkpoint)
            self.ema.load(folder, int(folder.name.rpartition("-")[2]))

    def export(self, folder: str | Path) -> None:
        """Write the model in the published layout, averaged weights where there are any; all or nothing.

        An exported pipeline in `folder` is replaced. Of several processes the first one writes.

        Raises:
            InputError: `folder` holds something else, cannot be written, or the disk is full; what was there stays.
        """
        if not self.is_world_process_zero():
            return
        folder = Path(folder).absolute()
        check_replaceable(folder)
        model = self.accelerator.unwrap_model(self.model)
        if self.ema is not None:
            self.ema.swap_in(model)
        unfinished = folder.with_name(f".{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            self.pipeline.save_pretrained(unfinished, safe_serialization=True)
            for file in unfinished.glob("*/*.safetensors"):
                cast_file(file, getattr(torch, self.args.export_dtype))
            if folder.exists():
                shutil.rmtree(folder)
            unfinished.rename(folder)
        except (OSError, SafetensorError) as error:
            raise cannot_write(folder, error) from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
            if self.ema is not None:
                self.ema.swap_out(model)


class _PreviewCallback(TrainerCallback):
    """Draws the fixed-seed grid with the averaged weights, to `previews/` and to TensorBoard."""

    def __init__(self, trainer: FlowMatchingTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % args.preview_steps or not state.is_world_process_zero:
            return
        trainer = self.trainer
        # Drawing must not move the training's random numbers: the run is the same with and without previews.
        with torch.random.fork_rng():
            trainer.pipeline.vae.to(args.device)
            if trainer.ema is not None:
                trainer.ema.swap_in(model)
            model.eval()
            try:
                grid = trainer.previews(trainer.pipeline, state.global_step)
            finally:
                model.train()
                if trainer.ema is not None:
                    trainer.ema.swap_out(model)
        folder = Path(args.output_dir) / "previews"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step_{state.global_step:06d}.png"
        grid.save(path)
        self._to_tensorboard(grid, state.global_step)

    def _to_tensorboard(self, grid, step: int) -> None:
        from numpy import asarray
        from transformers.integrations import TensorBoardCallback

        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_image("previews", asarray(grid), step, dataformats="HWC")
