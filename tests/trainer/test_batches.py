"""The sampler: one task and one size in a block, the asked ratio, and draws that do not depend on the processes."""

from collections import Counter

import pytest
import torch
from unipic2.trainer.batches import DRAW_SEED, SeededDraws, TaskBlockSampler


def blocks_of(sampler):
    draws = list(sampler)
    assert len(draws) == len(sampler)
    return [draws[i : i + sampler.block_size] for i in range(0, len(draws), sampler.block_size)]


def indices(block):
    return [index for index, _ in block]


@pytest.mark.parametrize(("ratio", "expected"), [(0.0, 0), (0.25, 5), (0.5, 10), (0.7, 14), (1.0, 20)])
def test_blocks_hold_one_task_in_the_asked_ratio(ratio, expected):
    is_edit = [False] * 50 + [True] * 30
    blocks = blocks_of(TaskBlockSampler(is_edit, 4, ratio, seed=0))
    kinds = [{is_edit[i] for i in indices(block)} for block in blocks]
    assert all(len(k) == 1 for k in kinds)
    assert len(blocks) == 20 and sum(k == {True} for k in kinds) == expected


def test_edits_are_spread_evenly():
    is_edit = [False] * 50 + [True] * 50
    kinds = [is_edit[block[0][0]] for block in blocks_of(TaskBlockSampler(is_edit, 5, 0.5, seed=0))]
    assert all(kinds[i] != kinds[i + 1] for i in range(len(kinds) - 1))


def test_an_epoch_is_determined_by_seed_and_number():
    def order(seed, epoch):
        sampler = TaskBlockSampler([False] * 20 + [True] * 20, 4, 0.5, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_no_two_draws_share_a_seed():
    sampler = TaskBlockSampler([False] * 30 + [True] * 30, 3, 0.5, seed=0)
    seeds = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        seeds += [seed for _, seed in sampler]
    assert len(set(seeds)) == len(seeds) == 180 and min(seeds) >= 0


def test_a_small_task_repeats_evenly():
    is_edit = [False] * 37 + [True] * 3
    counts = Counter(index for index, _ in TaskBlockSampler(is_edit, 4, 0.5, seed=0))
    edits = [counts[i] for i in (37, 38, 39)]
    assert sum(edits) == 20 and max(edits) - min(edits) <= 1
    assert all(counts[i] <= 1 for i in range(37))


@pytest.mark.parametrize("task", [False, True])
def test_one_task_alone_fills_all_blocks(task):
    sampler = TaskBlockSampler([task] * 10, 3, 0.5, seed=0)
    assert len(sampler) == 9 and len(set(indices(sampler))) == 9


def test_fewer_samples_than_a_block():
    assert len(list(TaskBlockSampler([False, True], 8, 0.5, seed=0))) == 8


def test_blocks_hold_one_size_and_every_sample_has_its_turn():
    """Uneven buckets, one of them smaller than a block: all samples are drawn about as often as their task allows."""
    is_edit = [False] * 40 + [True] * 24
    buckets = ["wide"] * 21 + ["tall"] * 17 + ["square"] * 2 + ["wide"] * 13 + ["tall"] * 11
    sampler = TaskBlockSampler(is_edit, 4, 0.5, seed=0, buckets=buckets)
    counts = Counter()
    for epoch in range(40):
        sampler.set_epoch(epoch)
        for block in blocks_of(sampler):
            assert len({(is_edit[i], buckets[i]) for i in indices(block)}) == 1
            counts.update(indices(block))
    for task in (range(40), range(40, 64)):
        drawn = [counts[i] for i in task]
        assert min(drawn) >= 25 and max(drawn) - min(drawn) <= 4, drawn


def test_a_pass_goes_on_where_the_last_one_ended():
    """Two passes of a small dataset are one pass of one twice as long, so nothing is lost between them."""
    is_edit = [False] * 7 + [True] * 5
    short, seen = TaskBlockSampler(is_edit, 4, 0.5, seed=0), []
    for epoch in range(6):
        short.set_epoch(epoch)
        seen += list(short)
    whole = TaskBlockSampler(is_edit, 4, 0.5, seed=0)
    whole.num_blocks = 6 * short.num_blocks
    assert seen == list(whole)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.7])
def test_turns_hold_the_same_draws_for_any_number_of_processes(ratio):
    is_edit = [False] * 40 + [True] * 40
    alone, shared = (TaskBlockSampler(is_edit, 4, ratio, 3, num_processes=n) for n in (1, 4))
    alone, shared = blocks_of(alone), blocks_of(shared)
    for first in range(0, len(alone), 4):
        assert sorted(alone[first : first + 4]) == sorted(shared[first : first + 4])


@pytest.mark.parametrize("rows", [3, 18, 21])
def test_a_pass_is_whole_steps(rows):
    """So that N processes do the steps of one that accumulates N times as long, also over the end of a pass."""
    is_edit = [i % 2 == 0 for i in range(rows)]
    alone = TaskBlockSampler(is_edit, 2, 0.5, seed=0, turns=4)
    shared = TaskBlockSampler(is_edit, 2, 0.5, seed=0, num_processes=2, turns=2)
    assert len(alone) == len(shared) and alone.num_blocks % 4 == 0 and 0 <= len(alone) - rows < 8
    for epoch in range(3):
        alone.set_epoch(epoch)
        shared.set_epoch(epoch)
        one, two = blocks_of(alone), blocks_of(shared)
        for first in range(0, len(one), 4):
            assert sorted(one[first : first + 4]) == sorted(two[first : first + 4])


def test_processes_share_the_edits():
    is_edit = [False] * 40 + [True] * 40
    blocks = blocks_of(TaskBlockSampler(is_edit, 4, 0.5, seed=0, num_processes=2))
    for process in range(2):
        kinds = [is_edit[block[0][0]] for block in blocks[process::2]]
        assert sum(kinds) == 5 and kinds[0] != kinds[1]


class Random(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"value": torch.rand(())}


def test_a_draw_depends_on_its_seed_alone():
    draws = SeededDraws(Random())
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = draws[2, 5]
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left where it was"
    torch.rand(3)
    assert draws[2, 5]["value"] == first["value"] != draws[2, 6]["value"]
    assert first[DRAW_SEED] == 5
