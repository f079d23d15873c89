"""Advantages against numbers worked out by hand."""

import math

import pytest
import torch
from unipic2.trainer.advantages import advantages

NAN = float("nan")
GROUPS = torch.tensor([7, 7, 3, 3])


def of(rewards, groups=GROUPS, **options):
    return advantages(torch.tensor(rewards), groups, **options)


def test_one_reward_by_group():
    result = of([[1.0], [0.0], [0.5], [0.25]], clip=None)
    std = [math.sqrt(0.5), math.sqrt(0.5) / 4]
    expected = [0.5 / (std[0] + 1e-4), -0.5 / (std[0] + 1e-4), 0.125 / (std[1] + 1e-4), -0.125 / (std[1] + 1e-4)]
    torch.testing.assert_close(result.values, torch.tensor(expected))
    assert result.metrics["reward"] == pytest.approx(0.4375)
    assert result.metrics["reward_std"] == pytest.approx(sum(std) / 2)
    assert result.metrics["frac_reward_zero_std"] == 0 and result.informative.all()


def test_other_scales():
    rewards = [[1.0], [0.0], [0.5], [0.25]]
    plain = torch.tensor([0.5, -0.5, 0.125, -0.125])
    torch.testing.assert_close(of(rewards, scale_rewards="none").values, plain)
    std = torch.tensor([1.0, 0.0, 0.5, 0.25]).std()
    torch.testing.assert_close(of(rewards, scale_rewards="batch").values, plain / (std + 1e-4))


def test_groups_are_known_by_number_in_any_order():
    straight = of([[1.0], [0.0], [0.5], [0.25]]).values
    mixed = of([[1.0], [0.5], [0.0], [0.25]], torch.tensor([7, 3, 7, 3])).values
    torch.testing.assert_close(mixed, straight[[0, 2, 1, 3]])


def test_a_group_without_differences_teaches_nothing_and_is_counted():
    result = of([[1.0], [1.0], [0.5], [0.25]])
    assert result.values[:2].tolist() == [0, 0] and result.informative.tolist() == [False, False, True, True]
    assert result.metrics["frac_reward_zero_std"] == 0.5


def test_rewards_that_do_not_apply():
    """One for each task, and a group that none applies to."""
    rewards = [[1.0, NAN], [0.0, NAN], [NAN, 3.0], [NAN, 1.0], [NAN, NAN], [NAN, NAN]]
    result = of(rewards, torch.tensor([0, 0, 1, 1, 2, 2]), scale_rewards="none")
    torch.testing.assert_close(result.values, torch.tensor([0.5, -0.5, 1.0, -1.0, 0.0, 0.0]))
    assert result.rewards.isnan().tolist() == [False] * 4 + [True] * 2
    assert result.metrics["reward"] == pytest.approx(1.25)
    one = of([[1.0], [0.0], [NAN], [0.5]], torch.tensor([0, 0, 1, 1]))
    assert one.values[2:].tolist() == [0, 0], "one number has nothing to be compared with"


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_a_reward_that_could_not_be_found_out_is_no_zero(aggregation):
    """The others of the group are compared as if that sample had not been drawn."""
    rewards = [[0.5, 0.8], [0.5, 0.9], [0.5, 0.7], [0.5, NAN]]
    options = {"aggregation": aggregation, "scale_rewards": "none"}
    found = of(rewards, torch.zeros(4, dtype=torch.int64), **options)
    torch.testing.assert_close(found.values[:3], of(rewards[:3], torch.zeros(3, dtype=torch.int64), **options).values)
    assert found.values[3] == 0 and found.informative.tolist() == [True, True, True, False]
    assert found.rewards[3].isnan()


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_a_group_whose_judge_was_down_learns_nothing_from_its_other_rewards(aggregation):
    """Preservation alone is best where nothing is edited. A reward that does not apply is no such thing."""
    rewards, groups = [[NAN, 0.9], [NAN, 0.1], [NAN, 0.9], [NAN, 0.1]], torch.tensor([0, 0, 1, 1])
    missing = torch.tensor([[True, False], [True, False], [False, False], [False, False]])
    found = of(rewards, groups, aggregation=aggregation, missing=missing)
    assert found.values[:2].tolist() == [0, 0] and found.rewards[:2].isnan().all()
    assert found.values[2] > 0 > found.values[3] and found.informative.tolist() == [False, False, True, True]


@pytest.mark.parametrize(("value", "count"), [(0.1, 3), (0.7, 24), (0.9, 7)])
def test_equal_rewards_are_equal_whatever_rounding_does(value, count):
    found = of([[value]] * count, torch.zeros(count, dtype=torch.int64))
    assert found.metrics["frac_reward_zero_std"] == 1 and not found.informative.any() and (found.values == 0).all()


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_groups_without_rewards_do_not_change_the_others(aggregation):
    rewards, groups = [[1.0], [0.0], [0.5], [0.25]], torch.tensor([0, 0, 1, 1])
    more = rewards + [[NAN]] * 12
    options = {"aggregation": aggregation, "scale_rewards": "batch", "clip": None}
    alone = of(rewards, groups, **options).values
    among = of(more, torch.cat([groups, torch.full((12,), 2)]), **options).values
    torch.testing.assert_close(among[:4], alone)
    assert (among[4:] == 0).all()


def test_weights():
    rewards = [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]
    result = of(rewards, weights=torch.tensor([2.0, 1.0]), scale_rewards="none")
    torch.testing.assert_close(result.values, torch.tensor([0.5, -0.5, 1.5, -1.5]))


def test_gdpo_hears_a_reward_of_small_spread():
    """Added first, the reward of hundreds decides alone; normalised first, both count."""
    rewards = [[100.0, 0.0], [300.0, 0.1], [200.0, 0.9], [200.0, 0.2]]
    groups = torch.tensor([0, 0, 0, 0])
    first = of(rewards, groups).values
    assert (first[2] - first[3]).abs() < 0.02
    both = of(rewards, groups, aggregation="normalize_then_sum", clip=None).values
    assert both[2] - both[3] > 0.5
    columns = torch.tensor(rewards).double()
    normal = ((columns - columns.mean(dim=0)) / (columns.std(dim=0) + 1e-4)).sum(dim=1)
    torch.testing.assert_close(both, (normal / (normal.std() + 1e-4)).float())


def test_rewards_that_cancel_still_teach_under_gdpo():
    result = of([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 1.0]], torch.tensor([0, 0, 1, 1]), scale_rewards="none")
    assert result.values[:2].tolist() == [0, 0] and result.informative.all()


def test_the_clip():
    values = of([[1000.0]] + [[0.0]] * 63, torch.zeros(64, dtype=torch.int64), clip=5.0).values
    assert values.max() == 5 and -1 < values.min() < 0


@pytest.mark.parametrize(
    ("rewards", "groups", "options", "found"),
    [
        ([[1.0]], [0], {}, "found one of a single sample"),
        ([[1.0], [2.0]], [0], {}, "shapes: found"),
        ([[1.0], [2.0]], [0, 0], {"weights": torch.ones(2)}, "shapes: found"),
        ([[1.0], [math.inf]], [0, 0], {}, "found an infinite one"),
        ([[1.0], [2.0]], [0, 0], {"scale_rewards": "all"}, "scale_rewards: found 'all'"),
        ([[1.0], [2.0]], [0, 0], {"aggregation": "mean"}, "aggregation: found 'mean'"),
    ],
)
def test_what_cannot_be(rewards, groups, options, found):
    with pytest.raises(ValueError, match=found):
        of(rewards, torch.tensor(groups), **options)
