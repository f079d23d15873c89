"""Training MetaQuery: queries and connector behind a frozen Qwen2.5-VL, with or without LoRAs in it, and with or
without the transformer.

Objective, data, batches, averages, previews, checkpoints and exports are those of `FlowMatchingTrainer`; only the text
is another: in place of ready states the loss gets what stands before the queries, and runs these itself.

Stages as published by the connector's authors (OpenUni, arXiv 2505.23661): alignment with the transformer frozen, then
joint training at a lower rate.
"""

import hashlib
from collections import OrderedDict
from dataclasses import fields

import torch
from torch import nn

from ..core.errors import InputError
from .batches import DRAW_SEED, derived_seed
from .flow_matching_trainer import FlowMatchingTrainer
from .kontext_pipeline import StableDiffusion3KontextPipeline
from .kontext_trainer import KontextForTraining
from .metaquery_config import MetaQueryConfig
from .metaquery_pipeline import MetaQueryPipeline
from .query_states import Prefix, PrefixCache, remember, text_states
from .vlm_lora import add_lora

_VISION = 3  # purpose of a seed derived from a draw's, see `flow_matching_trainer`


class MetaQueryForTraining(KontextForTraining):
    """The parts that one loss reaches: the transformer, before it queries and connector, and LoRAs in Qwen2.5-VL."""

    def __init__(
        self, transformer: nn.Module, conditioner: nn.Module, vlm: nn.Module, vlm_lora: dict[str, nn.Parameter]
    ):
        super().__init__(transformer, None)
        self.conditioner = conditioner
        self.vlm_lora = nn.ParameterDict({name.replace(".", "-"): weight for name, weight in vlm_lora.items()})
        self._vlm = (vlm,)  # in a tuple: no part of what is trained, saved or wrapped

    def forward(self, noisy, sigmas, text, ref_latents=None) -> torch.Tensor:
        """Predict the velocity, see `KontextForTraining.forward`; `text` is a `Prefix` or a `PrefixCache`."""
        return super().forward(noisy, sigmas, text_states(self._vlm[0], self.conditioner, text), ref_latents)


class PrefixStore:
    """Keeps keys and values of prefixes in main memory, up to a size; the least recently used are let go.

    Args:
        pipeline: makes what is missing.
        limit: bytes.
    """

    def __init__(self, pipeline: MetaQueryPipeline, limit: float):
        self.pipeline, self.limit = pipeline, limit
        self.rows: OrderedDict[tuple, PrefixCache] = OrderedDict()
        self.size = self.hits = self.misses = 0

    def __call__(self, prompts: list[str], pictures: torch.Tensor | None) -> PrefixCache:
        """Return the prefixes of prompts, with pictures (B, 3, H, W) uint8 for edits, as one batch."""
        keys = [(p, None if pictures is None else _digest(pictures[i])) for i, p in enumerate(prompts)]
        missing = list({key: i for i, key in enumerate(keys) if key not in self.rows}.values())
        found = {key: self.rows[key] for key in keys if key in self.rows}
        self.hits, self.misses = self.hits + len(keys) - len(missing), self.misses + len(missing)
        for i in missing:
            # Each alone: in a batch, rounding would depend on the others, and a resumed run on what came before.
            seen = None if pictures is None else pictures[i : i + 1].float() / 255
            made = remember(self.pipeline.text_encoder, self.pipeline.prefix([prompts[i]], seen))
            found[keys[i]] = PrefixCache(*(getattr(made, field.name).cpu() for field in fields(made)))
        for key in keys:
            self._keep(key, found[key])
        return _joined([found[key] for key in keys], self.pipeline.text_encoder.device)

    def _keep(self, key: tuple, row: PrefixCache) -> None:
        if key not in self.rows:
            self.size += _bytes(row)
            self.rows[key] = row
        self.rows.move_to_end(key)
        while self.size > self.limit and self.rows:
            self.size -= _bytes(self.rows.popitem(last=False)[1])


def _digest(picture: torch.Tensor) -> bytes:
    content = f"{tuple(picture.shape)}".encode() + picture.contiguous().numpy().tobytes()
    return hashlib.blake2b(content, digest_size=16).digest()


def _bytes(row: PrefixCache) -> int:
    return row.keys.nbytes + row.values.nbytes


def _joined(rows: list[PrefixCache], device: torch.device) -> PrefixCache:
    """Return rows as one batch on a device, padded on the left."""
    width = max(row.mask.shape[1] for row in rows)

    def padded(part: torch.Tensor, dim: int) -> torch.Tensor:
        missing = width - part.shape[dim]
        shape = [*part.shape[:dim], missing, *part.shape[dim + 1 :]]
        return torch.cat([part.new_zeros(shape), part], dim=dim) if missing else part

    keys, values = (torch.cat([padded(getattr(row, kind), 3) for row in rows], 1) for kind in ("keys", "values"))
    mask = torch.cat([padded(row.mask, 1) for row in rows])
    position = torch.cat([row.next_position for row in rows])
    return PrefixCache(keys.to(device), values.to(device), mask.to(device), position.to(device))


class MetaQueryTrainer(FlowMatchingTrainer):
    """Flow matching through Qwen2.5-VL, queries and connector.

    Args:
        pipeline: a `MetaQueryPipeline`; its language model's own weights are not changed.
        args: settings.
        train_dataset: as for `FlowMatchingTrainer`; edits bring what Qwen2.5-VL sees, uint8 (3, H, W), as
            `ref_pixel_values` or, beside latents, as `source_pixels`.
        previews, callbacks: as for `KontextTrainer`.
        teacher: for `distillation_weight`, a pipeline with text encoders; its transformer may be the one in `pipeline`
            as long as that is frozen.

    Raises:
        InputError: see `FlowMatchingTrainer`; or no teacher where one is needed.
    """

    method = "MetaQuery"
    can_be_sharded = False

    def __init__(
        self,
        pipeline: MetaQueryPipeline,
        args: MetaQueryConfig,
        train_dataset,
        previews=None,
        callbacks: list | None = None,
        teacher: StableDiffusion3KontextPipeline | None = None,
    ):
        if args.distillation_weight and teacher is None:
            raise InputError("teacher", found="nothing", expected="a pipeline with text encoders to learn from")
        self.teacher = teacher
        self._taught = None if teacher is None else KontextForTraining(teacher.transformer, None)
        pipeline.positions = args.positions = args.positions or pipeline.positions
        pipeline.conditioner.requires_grad_(True).float()
        self._store = PrefixStore(pipeline, args.prefix_cache_gib * 2**30) if args.prefix_cache_gib else None
        super().__init__(pipeline, args, train_dataset, previews, callbacks)

    def build_model(self, pipeline: MetaQueryPipeline) -> MetaQueryForTraining:
        """Return the transformer with queries and connector before it, and LoRAs in Qwen2.5-VL if they are trained."""
        vlm, args = pipeline.text_encoder, self.args
        lora = add_lora(vlm, args.vlm_lora_r, args.vlm_lora_alpha, args.seed) if args.vlm_lora_r else {}
        return MetaQueryForTraining(pipeline.transformer, pipeline.conditioner, vlm, lora)

    def trained_components(self) -> set[str]:
        """Return the connector, and the transformer if it is trained. A LoRA in Qwen2.5-VL is no part of its own."""
        return {"conditioner"} if self.args.trainable == "none" else {"conditioner", "transformer"}

    def collate(self, samples: list[dict]) -> dict:
        """Do as `FlowMatchingTrainer` does, and add what Qwen2.5-VL sees: uint8 (B, 3, H, W), some of it black."""
        batch = super().collate(samples)
        if not batch["is_edit"]:
            return batch
        name = "source_pixels" if "source_pixels" in samples[0] else "ref_pixel_values"
        if name not in samples[0]:
            raise InputError("edits for MetaQuery", found="no pixels", expected="source_pixels, which Qwen2.5-VL sees")
        seen = torch.stack([s[name] for s in samples])
        generator = torch.Generator().manual_seed(derived_seed(samples[0].get(DRAW_SEED, 0), _VISION))
        seen[torch.rand(len(samples), generator=generator) < self.args.vision_dropout] = 0
        if not any(name.startswith("ref_") for name in batch):  # `reference_dropout`: nobody sees it
            seen.zero_()
        return {**batch, "seen": seen}

    def text_of(self, inputs: dict, device: torch.device) -> Prefix | PrefixCache:
        """Return what stands before the queries of a batch, out of the store if there is one.

        Either way the language model has run over it without gradients, and runs over the queries alone with them. If
        LoRAs in it are trained, it runs over all with gradients.
        """
        seen = inputs.get("seen")
        self.pipeline.text_encoder.to(device)
        with torch.autocast(device.type, enabled=False):
            if self._store is not None:
                return self._store(inputs["text"], None if seen is None else seen.cpu())
            prefix = self.pipeline.prefix(inputs["text"], None if seen is None else seen.float() / 255)
            return prefix if self.args.vlm_lora_r else remember(self.pipeline.text_encoder, prefix)

    def target_of(self, inputs: dict, velocity, noisy, sigmas, reference) -> torch.Tensor:
        """Return the data's velocities (B, C, H, W), or those of the teacher by `distillation_weight`.

        The squared error to what lies between two targets has the gradient of both errors, so weighted.
        """
        if not self.args.distillation_weight:
            return velocity
        device = velocity.device
        for part in (*self.teacher.text_encoders, self._taught):
            part.to(device)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=self.args.bf16):
            text = self.teacher.encode_conditions(inputs["text"], device=device)
            said = self._taught(noisy, sigmas, text, reference)
        return torch.lerp(velocity, said.to(velocity), self.args.distillation_weight)

    def get_decay_parameter_names(self, model) -> list[str]:
        """Return what weight decay is for: not the queries, which are states and no matrix."""
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith("meta_queries")]

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Return the optimizer, with the transformer's weights in groups of their own rate if they have one."""
        made = self.optimizer is None
        optimizer = super().create_optimizer(*([] if model is None else [model]))
        if made and self.args.transformer_learning_rate is not None:
            slow = {id(p) for p in self.trained_model().transformer.parameters()}
            groups = []
            for group in optimizer.param_groups:
                own, rest = ([p for p in group["params"] if (id(p) in slow) == kind] for kind in (True, False))
                groups += [{**group, "params": rest}] if rest else []
                rate = self.args.transformer_learning_rate
                groups += [{**group, "params": own, "lr": rate}] if own else []
            optimizer.param_groups[:] = groups
        return optimizer

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Add how often a prefix was in the store since training began."""
        if "loss" in logs and self._store is not None:
            asked = max(1, self._store.hits + self._store.misses)
            logs |= {"prefix_cache/hits": round(self._store.hits / asked, 4)}
            logs |= {"prefix_cache/gib": round(self._store.size / 2**30, 3)}
        super().log(logs, *args, **kwargs)
