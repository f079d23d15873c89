"""Flow-matching pretraining of text-to-image and editing in one model.

Convention: sigma 0 is the picture, sigma 1 is noise (see `core.flow`). A sample is a dict with `prompt`, `latents`
(C, H, W), already scaled for the transformer, and for an edit `ref_latents` (C, H, W). In place of latents it may have
`pixel_values` and `ref_pixel_values`, uint8 (3, 8H, 8W). Optional: `loss_mask` (1, H, W), 0 to 1, where an edit is to
be learned, `source_id` (int), the same for samples that contrastive training must not play off against each other, and
`text`, ready states (L, D) and pooled text (P,); the dataset then has `empty_text`, those of the empty prompt.
Batches hold one task and one size only (`batches`), so no padding and no mask is needed.
"""

import time
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path

import torch
from peft import LoraConfig

from ..core.errors import InputError
from ..core.flow import interpolate
from .batches import DRAW_SEED, SeededDraws, TaskBlockSampler, derived_seed
from .data.stream import StreamedPairs
from .flow_matching_config import FlowMatchingConfig
from .kontext_pipeline import StableDiffusion3KontextPipeline
from .kontext_trainer import KontextTrainer
from .objective import contrastive_error, loss_weights, sample_sigmas, squared_error

_DROPOUT, _NOISE = 1, 2  # purposes of the seeds derived from a draw's
_BANDS = 4  # equal bands of sigma whose mean losses are reported


class FlowMatchingTrainer(KontextTrainer):
    """Flow matching on text-to-image and edits: velocity loss, batches of one task, loss by task and by band of sigma.

    Args:
        pipeline, args, previews, callbacks, peft_config: as for `KontextTrainer`.
        train_dataset: map-style dataset of samples (module docstring) with `is_edit`, one bool for each sample, and,
            if sizes differ, `buckets`, one hashable for each sample that says its size; or `StreamedPairs`.

    Raises:
        InputError: see `KontextTrainer`, or a stream without `max_steps`.
    """

    method = "flow matching"

    def __init__(
        self,
        pipeline: StableDiffusion3KontextPipeline,
        args: FlowMatchingConfig,
        train_dataset,
        previews=None,
        callbacks: list | None = None,
        peft_config: LoraConfig | None = None,
    ):
        # A stream goes on by its own state: nothing is drawn only to be skipped.
        self._is_streamed, self._stream = isinstance(train_dataset, StreamedPairs), None
        if self._is_streamed:
            args.ignore_data_skip = True
            if args.max_steps <= 0:
                raise InputError("max_steps", found=args.max_steps, expected="at least 1, as a stream has no end")
        self._losses: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._throughput = _Throughput()
        super().__init__(pipeline, args, train_dataset, previews, callbacks, peft_config)

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
        text = self.text_of(inputs, latents.device)
        mask, noisy = inputs.get("loss_mask"), interpolate(latents, noise, sigmas)
        target = self.target_of(inputs, noise - latents, noisy, sigmas, reference)
        mixed = self.is_fsdp_enabled and args.bf16  # without sharding accelerate does it
        with torch.autocast(latents.device.type, torch.bfloat16) if mixed else nullcontext():
            velocity = model(noisy, sigmas, text, reference)
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

    def target_of(self, inputs: dict, velocity, noisy, sigmas, reference) -> torch.Tensor:
        """Return what velocities (B, C, H, W) are to be, here the data's; the rest is what the model gets."""
        return velocity

    def text_of(self, inputs: dict, device: torch.device):
        """Return the text of a batch as the model takes it: encoded words, ready states, or token ids."""
        text = inputs["text"]
        return self.encode_text(text, device) if isinstance(text, list) else text

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
            self._stream = data.sampler(
                self._train_batch_size, args.edit_ratio, args.draw_seed, args.world_size, ahead + 4
            )
            if self._resumed_from is not None:
                self._stream.load(self._resumed_from)
            return self._stream
        buckets, turns = getattr(data, "buckets", None), args.gradient_accumulation_steps
        return TaskBlockSampler(
            data.is_edit, self._train_batch_size, args.edit_ratio, args.draw_seed, buckets, args.world_size, turns
        )

    def train(self, *args, **kwargs):
        """Train as `KontextTrainer` does, and close the stream, if there is one."""
        result = super().train(*args, **kwargs)
        if self._stream is not None:
            self._stream.close()
        return result

    def save_position(self, folder: Path) -> None:
        """Write where a stream is, and what it holds."""
        if self._stream is not None:
            blocks = self.args.gradient_accumulation_steps * self.args.world_size
            self._stream.save(folder, self.state.global_step * blocks)


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
