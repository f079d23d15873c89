"""Prompts and edits of the micro world for reinforcement learning: new ones at each draw, without right answers."""

from collections.abc import Sequence

import numpy as np
import torch

from ...core.errors import InputError, check_one_of, check_share
from ...core.micro import IMAGE_SIZE
from .tasks import EDIT_KINDS, T2I_KINDS, sample_t2i, sample_training_edit
from .world import render


class MicroTasks(torch.utils.data.Dataset):
    """Rows for `FlowGRPOTrainer`: `prompt`, `size`, `task` and `kind` for rewards, for edits `source_image`.

    A row stands for a kind of prompt or edit; each time it is drawn it is another one, given by torch's random
    numbers. Held-out words (see `tasks`) never occur.

    Args:
        num_prompts, num_edits: rows of either task, the kinds in turn; they say how long a pass is.
        prompt_kinds, edit_kinds: the kinds; one that is named twice is drawn twice as often.
        same_color_edits: share of hard edits, see `sample_training_edit`.

    Raises:
        InputError: an unknown kind, or none; a share that is none.
    """

    def __init__(
        self,
        num_prompts: int = 1200,
        num_edits: int = 1200,
        prompt_kinds: Sequence[str] = T2I_KINDS,
        edit_kinds: Sequence[str] = EDIT_KINDS,
        same_color_edits: float = 0.0,
    ):
        check_share("same_color_edits", same_color_edits)
        self.same_color_edits = same_color_edits
        for name, kinds, known in (
            ("prompt_kinds", prompt_kinds, T2I_KINDS), ("edit_kinds", edit_kinds, EDIT_KINDS)
        ):  # fmt: skip
            if not kinds:
                raise InputError(name, found="none", expected=f"one or more of {', '.join(known)}")
            for kind in kinds:
                check_one_of(name, kind, known)
        self.kinds = [prompt_kinds[i % len(prompt_kinds)] for i in range(num_prompts)]
        self.kinds += [edit_kinds[i % len(edit_kinds)] for i in range(num_edits)]
        self.is_edit = [False] * num_prompts + [True] * num_edits

    def __len__(self) -> int:
        return len(self.kinds)

    def __getitem__(self, index: int) -> dict:
        rng = np.random.default_rng(int(torch.randint(2**62, ())))
        kind, size = self.kinds[index], (IMAGE_SIZE, IMAGE_SIZE)
        is_edit = self.is_edit[index]
        task = sample_training_edit(rng, kind, self.same_color_edits) if is_edit else sample_t2i(rng, kind)[0]
        row = {"prompt": task.prompt, "size": size, "task": task, "kind": kind}
        return {**row, "source_image": render(task.source)} if is_edit else row
