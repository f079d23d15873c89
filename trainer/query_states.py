"""States of MetaQuery's learned queries behind a prompt, and a picture, in a frozen Qwen2.5-VL.

All that stands before the queries, the prefix, does not depend on them: attention is causal. So its keys and values
can be kept while the queries are trained, and give the very same states.

Shapes: B batch, N prefix tokens (the longest prompt's; shorter ones are padded on the left), Q queries, L width.

Source: UniPic 2.0 (arXiv 2509.04548), section 3.3; placement and positions of the published MetaQuery scripts.
"""

from dataclasses import dataclass

import torch
from transformers import (
    BatchFeature,
    DynamicCache,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
)

from ..core.connector import StableDiffusion3Conditioner
from ..core.errors import InputError, check_one_of
from ..core.prompts import IMAGE_TOKEN, POSITIONS, metaquery_segments
from ..core.vision import vision_pixels


@dataclass(frozen=True, slots=True)
class Prefix:
    """What stands before the queries, ready for the language model."""

    embeds: torch.Tensor
    """(B, N, L): embedded words, and the picture's tokens."""
    mask: torch.Tensor
    """(B, N): 1 for tokens, 0 for padding."""
    positions: torch.Tensor
    """(3, B, N): position in time, row and column; all the same under "1d"."""

    @property
    def next_position(self) -> torch.Tensor:
        """(B,): position of the first query."""
        return self.positions.amax((0, 2)) + 1


@dataclass(frozen=True, slots=True)
class PrefixCache:
    """What the queries need of a prefix: nothing of the language model has to be run over it again."""

    keys: torch.Tensor
    """(layers, B, heads, N, head width)."""
    values: torch.Tensor
    """As `keys`."""
    mask: torch.Tensor
    """(B, N): 1 for tokens, 0 for padding."""
    next_position: torch.Tensor
    """(B,): position of the first query."""


def token_ids(tokenizer: Qwen2Tokenizer, segments: list[str]) -> list[int]:
    """Return the ids of a chat that comes in pieces (`core.prompts.metaquery_segments`)."""
    return [i for segment in segments for i in tokenizer(segment, add_special_tokens=False).input_ids]


def picture_tokens(vlm: Qwen2_5_VLForConditionalGeneration, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the vision encoder's tokens (B, N', L) for pictures (B, 3, H, W) in 0..1, and their grid (B, 3).

    Pictures are seen at 28/32 of each edge (`core.vision`), normalised as Qwen2.5-VL's processor does it.

    Raises:
        InputError: see `core.sizes.vision_size`.
    """
    inputs = picture_inputs(vlm.config.vision_config, vision_pixels(pixels)).to(vlm.device)
    grid = inputs["image_grid_thw"]
    return torch.stack(vlm.model.get_image_features(inputs["pixel_values"], grid).pooler_output), grid


def picture_inputs(config, pixels: torch.Tensor) -> BatchFeature:
    """Return `pixel_values` and `image_grid_thw` (B, 3), as Qwen2.5-VL takes them: normalised, in patches.

    Args:
        config: the model's `vision_config`.
        pixels: pictures (B, 3, H, W) in 0..1 at the size that it sees (`core.vision`).
    """
    processor = Qwen2VLImageProcessorPil(
        do_resize=False,
        do_rescale=False,
        patch_size=config.patch_size,
        temporal_patch_size=config.temporal_patch_size,
        merge_size=config.spatial_merge_size,
    )
    return processor(list(pixels.cpu().numpy()), return_tensors="pt", input_data_format="channels_first")


@torch.no_grad()
def build_prefix(
    vlm: Qwen2_5_VLForConditionalGeneration,
    tokenizer: Qwen2Tokenizer,
    prompts: list[str],
    pixels: torch.Tensor | None = None,
    positions: str = POSITIONS[0],
) -> Prefix:
    """Return what stands before the queries for prompts, or for instructions with their pictures.

    Args:
        vlm: any size of Qwen2.5-VL.
        tokenizer: its tokenizer.
        prompts: one for each sample.
        pixels: pictures (B, 3, H, W) in 0..1 at the size that is drawn; None for text-to-image.
        positions: one of `POSITIONS`; without a picture both are the same.

    Raises:
        InputError: see `core.sizes.vision_size`; another number of pictures than prompts; unknown positions; or a
            tokenizer without Qwen2.5-VL's tokens for pictures.
    """
    check_one_of("positions", positions, POSITIONS)
    if pixels is not None and len(pixels) != len(prompts):
        raise InputError("pictures", found=len(pixels), expected=f"{len(prompts)}, one for each prompt")
    config, device = vlm.config, vlm.device
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) != config.image_token_id:
        found, expected = "a tokenizer of another model", f"{IMAGE_TOKEN} with id {config.image_token_id}"
        raise InputError("Qwen2.5-VL", found=found, expected=expected)
    rows = [token_ids(tokenizer, metaquery_segments(prompt, pixels is not None)) for prompt in prompts]
    pictures = grid = None
    if pixels is not None:
        pictures, grid = picture_tokens(vlm, pixels)
        rows = [widened(row, config.image_token_id, pictures.shape[1]) for row in rows]
    width = max(len(row) for row in rows)
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    embeds = vlm.get_input_embeddings()(ids)
    is_picture = (ids == config.image_token_id) & mask.bool()
    if pictures is not None:
        embeds = embeds.masked_scatter(is_picture[..., None], pictures.to(embeds.dtype))
    if positions == "mrope" and grid is not None:
        numbered, _ = vlm.model.get_rope_index(
            ids, image_grid_thw=grid, attention_mask=mask, mm_token_type_ids=is_picture.int()
        )
        numbered = numbered.masked_fill(mask[None] == 0, 0)
    else:
        numbered = (mask.cumsum(1) - 1).clamp_min(0)[None].expand(3, -1, -1)
    return Prefix(embeds, mask, numbered)


def widened(row: list[int], image_token_id: int, count: int) -> list[int]:
    """Return the ids with the picture's one token `count` times."""
    at = row.index(image_token_id)
    return row[:at] + [image_token_id] * count + row[at + 1 :]


@torch.no_grad()
def remember(vlm: Qwen2_5_VLForConditionalGeneration, prefix: Prefix) -> PrefixCache:
    """Run the language model over a prefix and keep its keys and values."""
    cache = DynamicCache(config=vlm.config.text_config)
    vlm.model.language_model(
        inputs_embeds=prefix.embeds,
        attention_mask=prefix.mask,
        position_ids=prefix.positions,
        cache=cache,
        use_cache=True,
    )
    keys, values = (torch.stack([getattr(layer, kind) for layer in cache.layers]) for kind in ("keys", "values"))
    return PrefixCache(keys, values, prefix.mask, prefix.next_position)


def query_states(
    vlm: Qwen2_5_VLForConditionalGeneration, queries: torch.Tensor, prefix: Prefix | PrefixCache
) -> torch.Tensor:
    """Return the states (B, Q, L) of queries (Q, L) behind a prefix, after the last norm.

    Gradients flow to the queries; the language model's own weights get none if they are frozen.
    """
    count = len(queries)
    following = torch.arange(count, device=prefix.mask.device)
    positions = (prefix.next_position[:, None] + following)[None].expand(3, -1, -1)
    mask = torch.cat([prefix.mask, prefix.mask.new_ones(len(prefix.mask), count)], dim=1)
    embeds = queries.to(vlm.dtype).expand(len(prefix.mask), -1, -1)
    if isinstance(prefix, Prefix):
        return vlm.model.language_model(
            inputs_embeds=torch.cat([prefix.embeds, embeds], dim=1),
            attention_mask=mask,
            position_ids=torch.cat([prefix.positions, positions], dim=2),
            use_cache=False,
        ).last_hidden_state[:, -count:]
    cache = DynamicCache(config=vlm.config.text_config)
    for layer, (keys, values) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
        cache.update(keys, values, layer)
    return vlm.model.language_model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True
    ).last_hidden_state


def text_states(
    vlm: Qwen2_5_VLForConditionalGeneration, conditioner: StableDiffusion3Conditioner, prefix: Prefix | PrefixCache
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return text states (B, Q, D) and pooled text (B, P) that a connector makes of its queries behind a prefix."""
    return conditioner(query_states(vlm, conditioner.meta_queries, prefix).to(conditioner.dtype))
