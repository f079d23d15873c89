"""Fixed-seed grids that show how far training is: the same prompts, edits and noise each time."""

import numpy as np
import torch
from PIL import Image, ImageOps

from .data.cache import CachedPairs
from .data.pairs import PairDataset
from .data.sources import BrokenRow, read_pair
from .data.stream import StreamedPairs
from .kontext_config import KontextConfig
from .micro.evaluate import draw, judge
from .micro.sheet import result_sheet
from .micro.tasks import EDIT_KINDS, T2I_KINDS, sample_edit, sample_t2i
from .sheets import Cell, contact_sheet

_SEED = 7
_THUMBNAIL = 256


def micro_previews(args: KontextConfig):
    """Return a function `(pipeline, step) -> picture` that draws 24 prompts and 12 edits and has them judged."""
    rng = np.random.default_rng([_SEED, 8])
    t2i = [sample_t2i(rng, T2I_KINDS[i % 6])[0] for i in range(24)]
    edits = [sample_edit(rng, EDIT_KINDS[i % 6]) for i in range(12)]

    def preview(pipeline, step):
        sampling = dict(num_inference_steps=args.preview_inference_steps, guidance_scale=args.preview_guidance_scale)
        drawn = {}
        for name, tasks in (("t2i", t2i), ("edit", edits)):
            images = draw(pipeline, tasks, _SEED, **sampling)
            drawn[name] = (tasks, images, judge(images, tasks))
        return result_sheet(drawn)

    return preview


def pair_previews(dataset: PairDataset | CachedPairs | StreamedPairs, args: KontextConfig, each: int = 4):
    """Return a function `(pipeline, step) -> picture` that draws prompts and edits of the training data.

    A cell shows what was drawn; for an edit the source is on its left. `each` rows of each task are chosen by the
    data's order alone, so runs on the same data show the same rows. Texts come out of the cache where there is one.
    """
    pairs, cached = dataset, None
    if isinstance(dataset, CachedPairs):
        pairs, cached = dataset.pairs, None if dataset.with_sources else dataset
    if isinstance(dataset, StreamedPairs):
        cases = dataset.previews(each)
    else:
        cases = [case for task in (False, True) for case in _spread(pairs, task, each)]

    cases = [
        (prompt, None if source is None else ImageOps.fit(source, size, Image.Resampling.BICUBIC), size)
        for prompt, source, size in cases
    ]

    def preview(pipeline, step) -> Image.Image:
        pipeline.set_progress_bar_config(disable=True)
        cells = []
        edge = min(_THUMBNAIL, max(max(size) for _, _, size in cases))
        for i, (prompt, source, (width, height)) in enumerate(cases):
            text = {"prompt": prompt} if cached is None else _cached_text(cached, pipeline, prompt, source is not None)
            image = pipeline(
                **text,
                image=source,
                height=height,
                width=width,
                num_inference_steps=args.preview_inference_steps,
                guidance_scale=args.preview_guidance_scale,
                generator=torch.Generator().manual_seed(_SEED + i),
            ).images[0]
            cells.append(Cell(prompt, [image] if source is None else [source, image]))
        return contact_sheet(cells, columns=each, edge=edge)

    return preview


def _cached_text(cached: CachedPairs, pipeline, prompt: str, is_edit: bool) -> dict[str, torch.Tensor]:
    """Return the arguments that stand for `prompt` and the pipeline's own negative prompt."""
    negative = pipeline.default_negative_prompt(is_edit)
    like = next(pipeline.transformer.parameters())
    states, pooled, negative_states, negative_pooled = (
        part[None].to(like) for part in (*cached.text_of(prompt), *cached.text_of(negative))
    )
    return {
        "prompt_embeds": states,
        "pooled_prompt_embeds": pooled,
        "negative_prompt_embeds": negative_states,
        "negative_pooled_prompt_embeds": negative_pooled,
    }


def _spread(dataset: PairDataset, task: bool, count: int) -> list[tuple[str, Image.Image | None, tuple[int, int]]]:
    """Return `(prompt, source, size)` of whole rows of a task, evenly spread over the data."""
    indices = [i for i, edit in enumerate(dataset.is_edit) if edit == task]
    cases = []
    for place in dict.fromkeys(i * len(indices) // count for i in range(count)) if indices else ():
        number, row = dataset.places[indices[place]]
        source = dataset.sources[number]
        try:
            pair = read_pair(source.rows[row], source.columns, source.root)
        except BrokenRow:
            continue
        size = dataset.buckets[indices[place]]
        cases.append((pair.prompt, pair.source, size))
    return cases
