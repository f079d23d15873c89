"""Batches of one task and one size, drawn so that each sample's random choices are its own.

A run is the same whatever was loaded ahead, wherever it was stopped and resumed, and on however many processes the
batches of one optimizer step are spread.
"""

from collections.abc import Hashable, Iterator, Sequence
from itertools import count, islice

import numpy as np
import torch

DRAW_SEED = "draw_seed"


def derived_seed(seed: int, purpose: int) -> int:
    """Return another seed, 0 to 2**63 - 1, whose random numbers have nothing to do with those of `seed`."""
    return int(np.random.SeedSequence([seed, purpose]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def tasks_of_turn(turn: int, edit_ratio: float, num_processes: int) -> list[bool]:
    """Return which blocks of a turn, one for each process, are edits: any run of blocks has the ratio within one."""
    blocks = range(turn * num_processes, (turn + 1) * num_processes)
    return [int((b + 1) * edit_ratio) > int(b * edit_ratio) for b in blocks]


def rotated(blocks: list, turn: int) -> list:
    """Return a turn's blocks so that, over several turns, each process gets as many edits."""
    start = turn % len(blocks)
    return blocks[start:] + blocks[:start]


class TaskBlockSampler(torch.utils.data.Sampler[tuple[int, int]]):
    """Yields draws `(index, seed)` in blocks of `block_size` of one task and one bucket.

    Blocks are one endless sequence, of which a pass is the next stretch, as long as the dataset fills. Edits take
    `edit_ratio` of the blocks, evenly spread, so any run of blocks follows the ratio to within one. Each task is
    walked in a fresh random order, and walked again when it runs out, so a small task repeats. What does not fill a
    block of its bucket is kept for the next walk: rows of a bucket smaller than a block have their turn as often as
    others.

    Args:
        is_edit: one bool for each sample.
        block_size: samples of one process's batch.
        edit_ratio: 0 to 1; ignored where the data has one task only.
        seed: the same seed gives the same sequence.
        buckets: what samples of one batch must share (their size), one for each sample; None for one size.
        num_processes: processes that take blocks in turn. Their tasks rotate, so that over several blocks each process
            has the same share of edits, which take longer. Draws of one turn are the same set for any number.
        turns: of an optimizer step. A pass is whole steps: transformers would end it with a smaller one.
    """

    def __init__(
        self,
        is_edit: Sequence[bool],
        block_size: int,
        edit_ratio: float,
        seed: int,
        buckets: Sequence[Hashable] | None = None,
        num_processes: int = 1,
        turns: int = 1,
    ):
        groups: dict[bool, dict[Hashable, list[int]]] = {False: {}, True: {}}
        for index, edit in enumerate(is_edit):
            bucket = None if buckets is None else buckets[index]
            groups[bool(edit)].setdefault(bucket, []).append(index)
        self.groups = {task: [torch.tensor(g) for g in by_size.values()] for task, by_size in groups.items()}
        if not self.groups[True]:
            edit_ratio = 0.0
        elif not self.groups[False]:
            edit_ratio = 1.0
        blocks, of_step = max(1, len(is_edit) // block_size), num_processes * turns
        self.num_blocks = -(-blocks // of_step) * of_step
        self.block_size, self.edit_ratio, self.seed, self.epoch = block_size, edit_ratio, seed, 0
        self.num_processes = num_processes

    def set_epoch(self, epoch: int) -> None:
        """Choose the pass; the same pass gives the same order, without the ones before it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_blocks * self.block_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        streams, starts = {}, {}
        for task, groups in self.groups.items():
            # A generator for each task: the draws of one do not depend on when the other's turn comes.
            words = np.random.SeedSequence([self.seed, int(task)]).generate_state(2, np.uint64)
            generator = torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))
            streams[task], starts[task] = enumerate(self._blocks(groups, generator)), int(words[1] >> np.uint64(1))
        first = self.epoch * self.num_blocks
        for number, task in enumerate(islice(self._tasks(), first + self.num_blocks)):
            place, block = next(streams[task])
            if number >= first:
                start = starts[task] + place * self.block_size
                yield from ((index, (start + i) % 2**63) for i, index in enumerate(block.tolist()))

    def _tasks(self) -> Iterator[bool]:
        for turn in count():
            yield from rotated(tasks_of_turn(turn, self.edit_ratio, self.num_processes), turn)

    def _blocks(self, groups: list[torch.Tensor], generator: torch.Generator) -> Iterator[torch.Tensor]:
        left = [group[:0] for group in groups]
        while True:
            blocks: list[torch.Tensor] = []
            for i, group in enumerate(groups):
                order = torch.cat([left[i], group[torch.randperm(len(group), generator=generator)]])
                whole = len(order) // self.block_size * self.block_size
                blocks += order[:whole].split(self.block_size) if whole else []
                left[i] = order[whole:]
            for i in torch.randperm(len(blocks), generator=generator).tolist():
                yield blocks[i]


class SeededDraws(torch.utils.data.Dataset):
    """A dataset whose random choices depend on the draw alone, not on what was loaded before it.

    Loaders read ahead, and a resumed run skips what it has seen; with the global random state either would change
    prompts and dropout. Here each draw `(index, seed)` sets torch's CPU generator for one sample only.
    """

    def __init__(self, samples):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, draw: tuple[int, int]) -> dict:
        index, seed = draw
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed also queues a call, with its stack as text, for every kind of device that is not in
            # use yet: a millisecond a sample, and memory that is never freed.
            torch.default_generator.manual_seed(seed)
            return {**self.samples[index], DRAW_SEED: seed}
