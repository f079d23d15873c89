"""Rewards of groups of samples become advantages, as TRL's GRPO trainer does it.

Shapes: B samples, R reward functions. A group is the samples of one prompt, or of one prompt with one source picture;
it is known by a number, never by its text, as different pictures may share an instruction.
"""

from dataclasses import dataclass

import torch

SCALE_REWARDS = ("group", "batch", "none")
AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")
_EPSILON = 1e-4


@dataclass(frozen=True, slots=True)
class Advantages:
    """What a step learns from. Example: `advantages(rewards, groups)`."""

    values: torch.Tensor
    """(B,), 0 where nothing is to be learned."""
    rewards: torch.Tensor
    """(B,): weighted sums of the rewards that apply to the group; nan where none does, or one is not known."""
    informative: torch.Tensor
    """(B,) bool: all its group's rewards are known of the sample, and some of them differ in the group."""
    metrics: dict[str, float]
    """`reward`, `reward_std` (mean of the groups'), `frac_reward_zero_std`."""


def advantages(
    rewards: torch.Tensor,
    groups: torch.Tensor,
    weights: torch.Tensor | None = None,
    scale_rewards: str = "group",
    aggregation: str = "sum_then_normalize",
    clip: float | None = 5.0,
    missing: torch.Tensor | None = None,
) -> Advantages:
    """Return how much better than its group each sample is.

    Args:
        rewards: (B, R); nan means that a reward does not apply to a group (such as one for edits), or, where others of
            the group have it, that it could not be found out: such a sample teaches nothing.
        groups: (B,) int64, the same number for the samples of a group.
        weights: (R,), default all 1.
        scale_rewards: divide by the standard deviation of the `group`, of the `batch`, or not (`none`).
        aggregation: `sum_then_normalize`, or `normalize_then_sum`: GDPO (arXiv 2601.05242), each reward is compared
            within its groups before the weighted sum, so that one of great spread does not drown the others; the sum
            is then divided by its standard deviation over the batch, unless `scale_rewards` is `none`.
        clip: advantages are kept within -clip..clip; None leaves them.
        missing: (B, R) bool, rewards that apply and could not be found out. Where they are so for a whole group, as
            its judge was down, the group's other rewards alone must not teach: some are best where nothing is done.

    Raises:
        ValueError: an unknown name, shapes that do not fit, a group of one, or rewards that are infinite.
    """
    for name, value, known in (
        ("scale_rewards", scale_rewards, SCALE_REWARDS),
        ("aggregation", aggregation, AGGREGATIONS),
    ):
        if value not in known:
            raise ValueError(f"{name}: found {value!r}, expected one of {', '.join(known)}")
    device = rewards.device
    rewards, groups = rewards.detach().cpu().double(), groups.cpu()
    weights = torch.ones(rewards.shape[1]) if weights is None else weights.cpu()
    weights = weights.double()
    if len(groups) != len(rewards) or len(weights) != rewards.shape[1]:
        found = f"rewards {tuple(rewards.shape)}, groups {tuple(groups.shape)}, weights {tuple(weights.shape)}"
        raise ValueError(f"shapes: found {found}, expected (B, R), (B,) and (R,)")
    if rewards.isinf().any():
        raise ValueError("rewards: found an infinite one, expected numbers, or nan where a reward does not apply")
    _, members, sizes = groups.unique(return_inverse=True, return_counts=True)
    if (sizes < 2).any():
        raise ValueError("groups: found one of a single sample, expected at least 2 to compare")
    applies = ~rewards.isnan()
    wanted = applies if missing is None else applies | missing.cpu()
    in_group = torch.stack([wanted[members == group].any(dim=0) for group in range(len(sizes))])
    # One that others of the group have and this sample lacks could not be found out: it must not count as 0.
    complete = applies.any(dim=1) & (applies == in_group[members]).all(dim=1)
    total = (rewards.nan_to_num() * weights).sum(dim=1).where(complete, torch.nan)
    center, spread = _by_group(total, members, len(sizes))
    if aggregation == "sum_then_normalize":
        values = total - center[members]
        if scale_rewards == "group":
            values = values / (spread[members] + _EPSILON)
    else:
        each = []
        for column in rewards.T:
            column_center, column_spread = _by_group(column.where(complete, torch.nan), members, len(sizes))
            scaled = (column - column_center[members]) / (column_spread[members] + _EPSILON)
            each.append(scaled.nan_to_num())
        values = (torch.stack(each, dim=1) * weights).sum(dim=1).where(complete, torch.nan)
    if scale_rewards == "batch" or (aggregation == "normalize_then_sum" and scale_rewards == "group"):
        over = total if aggregation == "sum_then_normalize" else values
        values = values / (_std(over[~over.isnan()]) + _EPSILON)
    varies = _varies(rewards.where(complete[:, None], torch.nan), members, len(sizes))
    values = values.nan_to_num().where(varies[members], 0.0)
    if clip is not None:
        values = values.clamp(-clip, clip)
    valid = spread[~spread.isnan()]
    metrics = {
        "reward": total.nanmean().item(),
        "reward_std": valid.mean().item() if len(valid) else float("nan"),
        "frac_reward_zero_std": 1 - varies.double().mean().item(),
    }
    informative = varies[members] & complete
    return Advantages(values.float().to(device), total.float().to(device), informative.to(device), metrics)


def _std(values: torch.Tensor) -> torch.Tensor:
    """Return the sample standard deviation, 0 of fewer than two."""
    return values.std() if len(values) > 1 else values.new_zeros(())


def _by_group(values: torch.Tensor, members: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each group's mean and standard deviation (G,) over its numbers; nan for a group without any."""
    parts = [values[(members == group) & ~values.isnan()] for group in range(count)]
    nothing = values.new_tensor(torch.nan)
    means = torch.stack([part.mean() if len(part) else nothing for part in parts])
    return means, torch.stack([_std(part) if len(part) else nothing for part in parts])


def _varies(rewards: torch.Tensor, members: torch.Tensor, count: int) -> torch.Tensor:
    """Return for each group (G,) whether any reward differs in it; a deviation would not be exactly 0."""
    groups = [rewards[members == group] for group in range(count)]
    highest = torch.stack([group.nan_to_num(nan=-torch.inf).amax(dim=0) for group in groups])
    lowest = torch.stack([group.nan_to_num(nan=torch.inf).amin(dim=0) for group in groups])
    return (highest > lowest).any(dim=1)
