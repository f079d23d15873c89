"""The training pool of the micro model: scenes, edits and their latents, drawn from one seed and encoded once."""

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderTiny
from tqdm import tqdm

from ...core.errors import check_share
from .codec import encode
from .tasks import T2I_KINDS, describe, is_held_out, reworded, sample_t2i, sample_training_edit, undone
from .world import Scene, render

_CHUNK = 512  # pictures rendered at a time
# Kinds of the scenes made for text-to-image: edits bring thousands of scenes of two things, fewer of one, and few
# that can be counted.
_MADE_KINDS = ("counting", "counting", "counting", "single_object", "single_object", "position")
# Backgrounds are learned soonest, and half of what adds or removes a thing is drawn as the other.
_MADE_EDITS = (
    "recolor", "reshape", "add", "move", "remove", "recolor", "reshape", "add", "move", "background"
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _T2IItem:
    scene: Scene
    kinds: tuple[str, ...]
    """Kinds of prompts that this scene answers."""
    latents: int
    """Row of the scene's latents."""


class MicroDataset(torch.utils.data.Dataset):
    """Samples for `FlowMatchingTrainer`: text-to-image first, then edits.

    A scene keeps its picture but gets a new prompt each time it is drawn. Every edit's source and target is also a
    text-to-image sample when it answers a prompt. An edit is drawn in any of its words, half of the time backwards
    where an instruction says that. Held-out words (see `tasks`) never occur.

    Args:
        vae: the trained codec; it encodes in bfloat16.
        num_scenes: scenes made for text-to-image.
        num_edits: source and target pairs.
        seed: the same seed gives the same pool and the same prompts in the same order.
        same_color_edits: share of hard edits, see `sample_training_edit`.
        with_sources: edits also bring the picture that they start from, `source_pixels`, uint8 (3, 64, 64).

    Raises:
        InputError: `same_color_edits` is no share.
    """

    def __init__(
        self,
        vae: AutoencoderTiny,
        num_scenes: int,
        num_edits: int,
        seed: int,
        same_color_edits: float = 0.0,
        with_sources: bool = False,
    ):
        check_share("same_color_edits", same_color_edits)
        self.with_sources = with_sources
        self.rng = np.random.default_rng([seed, 3])
        scenes = [sample_t2i(self.rng, _MADE_KINDS[i % len(_MADE_KINDS)])[1] for i in range(num_scenes)]
        kinds = [_MADE_EDITS[i % len(_MADE_EDITS)] for i in range(num_edits)]
        self.edits = [sample_training_edit(self.rng, kind, same_color_edits) for kind in kinds]
        self.num_scenes = num_scenes
        scenes += [task.target for task in self.edits] + [task.source for task in self.edits]
        items = (_T2IItem(scene, self._kinds(scene), row) for row, scene in enumerate(scenes))
        self.items = [item for item in items if item.kinds]
        self.latents = self._encode(vae, scenes)
        self.is_edit = [False] * len(self.items) + [True] * num_edits

    def _kinds(self, scene: Scene) -> tuple[str, ...]:
        return tuple(kind for kind in T2I_KINDS if describe(self.rng, scene, kind) is not None)

    @staticmethod
    def _encode(vae: AutoencoderTiny, scenes: list[Scene]) -> torch.Tensor:
        fast = AutoencoderTiny.from_config(vae.config)
        fast.load_state_dict(vae.state_dict())
        fast = fast.to(torch.bfloat16).to(memory_format=torch.channels_last)
        starts = tqdm(range(0, len(scenes), _CHUNK), desc="encoding the pool", unit_scale=_CHUNK, unit="picture")
        return torch.cat([encode(fast, [render(s) for s in scenes[i : i + _CHUNK]]).half() for i in starts])

    def __len__(self) -> int:
        return len(self.is_edit)

    def __getitem__(self, index: int) -> dict:
        # One draw of torch's generator seeds the words, so that the trainer's random state resumes them too.
        rng = np.random.default_rng(int(torch.randint(2**62, ())))
        if index < len(self.items):
            item = self.items[index]
            sample = {"prompt": self._prompt(rng, item), "latents": self.latents[item.latents].float()}
            return {**sample, "source_id": index}
        number = index - len(self.items)
        target = self.latents[self.num_scenes + number].float()
        source = self.latents[self.num_scenes + len(self.edits) + number].float()
        task = self.edits[number]
        back = undone(rng, task) if rng.random() < 0.5 else None
        if back is not None:
            task, target, source = back, source, target
        else:
            task = reworded(rng, task)
        sample = {"prompt": task.prompt, "latents": target, "ref_latents": source, "source_id": index}
        if self.with_sources:
            sample["source_pixels"] = torch.from_numpy(np.array(render(task.source))).permute(2, 0, 1).contiguous()
        return sample

    @staticmethod
    def _prompt(rng: np.random.Generator, item: _T2IItem) -> str:
        while True:
            kind = item.kinds[rng.integers(len(item.kinds))]
            task = describe(rng, item.scene, kind)
            # Two things always answer a prompt of another kind, too, so this ends.
            if kind != "color_attribution" or not is_held_out(task.prompt.removeprefix("a picture of ")):
                return task.prompt
