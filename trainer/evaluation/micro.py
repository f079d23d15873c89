"""The micro benchmark: held-out prompts and edits of the micro world, judged by the verifier."""

from functools import partial

from ...core.micro import IMAGE_SIZE
from ..micro.evaluate import eval_edit_tasks, eval_t2i_tasks, judge
from ..micro.world import render
from .items import Benchmark, Item, Score


def micro_benchmark(count: int, seed: int) -> Benchmark:
    """Return `count` prompts and as many edits, the kinds of each in turn, always the same for a seed."""
    tasks = {"t2i": eval_t2i_tasks(count, seed), "edit": eval_edit_tasks(count, seed)}
    items = [
        Item(f"{name}-{i:04d}", name, task.kind, task.prompt, seed + i, (IMAGE_SIZE, IMAGE_SIZE),
             partial(render, task.source) if name == "edit" else None, task)
        for name, of_task in tasks.items()
        for i, task in enumerate(of_task)
    ]  # fmt: skip

    def scores(items, images) -> list[Score]:
        verdicts = judge(images, [item.data for item in items])
        return [
            Score((float(v.strict), v.soft), tuple(clause.name for clause in v.clauses if not clause.passed))
            for v in verdicts
        ]

    return Benchmark("micro", items, scores)
