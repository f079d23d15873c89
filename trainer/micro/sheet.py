"""Contact sheets of the micro world: real scenes, and what a model drew, with the verifier's verdicts."""

import numpy as np
from PIL import Image

from ..sheets import Cell, contact_sheet, stack
from .tasks import EDIT_KINDS, T2I_KINDS, sample_edit, sample_t2i
from .verifier import verify_edit, verify_t2i
from .world import render


def world_sheet(seed: int, per_kind: int = 8) -> Image.Image:
    """Return real renders of every kind of prompt and edit, framed by the verifier's verdict."""
    rng = np.random.default_rng([seed, 6])
    t2i, edits = [], []
    for kind in T2I_KINDS:
        for _ in range(per_kind):
            task, scene = sample_t2i(rng, kind)
            image = render(scene)
            t2i.append(Cell(task.prompt, [image], verify_t2i(image, task).strict))
    for kind in EDIT_KINDS:
        for _ in range(per_kind):
            task = sample_edit(rng, kind)
            image = render(task.target)
            edits.append(Cell(task.prompt, [render(task.source), image], verify_edit(image, task).strict))
    return stack([contact_sheet(t2i, per_kind), contact_sheet(edits, per_kind)])


def result_sheet(drawn: dict, limit: int = 48) -> Image.Image:
    """Return a sheet of what `evaluate` drew: the first `limit` prompts, and edits with their sources."""
    t2i = [Cell(t.prompt, [i], v.strict) for t, i, v in list(zip(*drawn["t2i"], strict=True))[:limit]]
    edits = [
        Cell(t.prompt, [render(t.source), i], v.strict) for t, i, v in list(zip(*drawn["edit"], strict=True))[:limit]
    ]
    return stack([contact_sheet(t2i, 12), contact_sheet(edits, 6)])
