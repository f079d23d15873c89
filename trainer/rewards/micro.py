"""Exact rewards of the micro world: its verifier reads the picture."""

from PIL import Image

from ..micro.evaluate import judge
from ..micro.tasks import EditTask, T2ITask

Task = T2ITask | EditTask


def micro_soft(prompts: list[str], images: list[Image.Image], task: list[Task], **columns) -> list[float]:
    """Return the share of clauses that hold, 0 to 1: what was asked is there, what was not asked is unchanged."""
    return [verdict.soft for verdict in judge(images, task)]


def micro_strict(prompts: list[str], images: list[Image.Image], task: list[Task], **columns) -> list[float]:
    """Return 1 where all clauses hold, else 0."""
    return [float(verdict.strict) for verdict in judge(images, task)]
