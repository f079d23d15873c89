"""Prompts and edits of the micro world for reinforcement learning: new ones at each draw, without right answers."""

import numpy as np
import torch

from ...core.micro import IMAGE_SIZE
from .tasks import EDIT_KINDS, T2I_KINDS, sample_edit, sample_t2i
from .world import render


class MicroTasks(torch.utils.data.Dataset):
    """Rows for `FlowGRPOTrainer`: `prompt`, `size`, `task` and `kind` for rewards, for edits `source_image`.

    A row stands for a kind of prompt or edit; each time it is drawn it is another one, given by torch's random
    numbers. Held-out words (see `tasks`) never occur.

    Args:
        num_prompts, num_edits: rows of either task, the kinds in turn; they say how long a pass is.
    """

    def __init__(self, num_prompts: int = 1200, num_edits: int = 1200):
        self.kinds = [T2I_KINDS[i % len(T2I_KINDS)] for i in range(num_prompts)]
        self.kinds += [EDIT_KINDS[i % len(EDIT_KINDS)] for i in range(num_edits)]
        self.is_edit = [False] * num_prompts + [True] * num_edits

    def __len__(self) -> int:
        return len(self.kinds)

    def __getitem__(self, index: int) -> dict:
        rng = np.random.default_rng(int(torch.randint(2**62, ())))
        kind, size = self.kinds[index], (IMAGE_SIZE, IMAGE_SIZE)
        task = sample_edit(rng, kind) if self.is_edit[index] else sample_t2i(rng, kind)[0]
        row = {"prompt": task.prompt, "size": size, "task": task, "kind": kind}
        return {**row, "source_image": render(task.source)} if self.is_edit[index] else row
