"""Flow-GRPO (arXiv 2505.05470): the clipped policy gradient of PPO on sampling steps with noise."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """A clipped policy-gradient loss. Example: `policy_loss(new, old, advantages, epsilon=1e-4)`."""

    loss: torch.Tensor
    """(B,)."""
    ratio: torch.Tensor
    """(B,), of new to old probability, without gradient."""
    clipped_low: torch.Tensor
    """(B,) bool: the advantage is negative and the ratio below the range, so nothing is learned."""
    clipped_high: torch.Tensor
    """(B,) bool: the advantage is positive and the ratio above the range."""

    def metrics(self) -> dict[str, float]:
        """Return the mean ratio, and the shares of samples that were clipped, under TRL's names."""
        return {
            "ratio": self.ratio.mean().item(),
            "clip_ratio/low_mean": self.clipped_low.float().mean().item(),
            "clip_ratio/high_mean": self.clipped_high.float().mean().item(),
        }


def policy_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    epsilon: float,
    epsilon_high: float | None = None,
) -> PolicyLoss:
    """Return `-min(ratio A, clip(ratio) A)` for one step of each sample.

    Args:
        log_probs: (B,), with gradient; see `rollouts.log_prob`. They are means over a latent's numbers, so ratios stay
            very near to 1 and ranges are small.
        old_log_probs: (B,), of the model that drew the samples.
        advantages: (B,).
        epsilon: ratios count from 1 - epsilon on; published 1e-4 (10 steps) and 1e-5 (window of 3, CPS).
        epsilon_high: and up to 1 + epsilon_high; None is epsilon.
    """
    ratio = (log_probs - old_log_probs.detach()).exp()
    return clipped_loss(ratio, advantages, epsilon, epsilon if epsilon_high is None else epsilon_high)


def clipped_loss(ratio: torch.Tensor, advantages: torch.Tensor, low: float, high: float) -> PolicyLoss:
    """Return PPO's loss of ratios (B,) and advantages (B,), with the range 1 - low to 1 + high."""
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high))
    seen = ratio.detach()
    return PolicyLoss(loss, seen, (seen < 1 - low) & (advantages < 0), (seen > 1 + high) & (advantages > 0))


def step_weights(sigmas: torch.Tensor, steps: tuple[int, ...]) -> torch.Tensor:
    """Return how much each noisy step counts (S,), on average 1: as sigma times the root of the step's length.

    TempFlow-GRPO's noise-aware weight (arXiv 2508.04324), as EditScore's training has it: steps that can still change
    much learn more.

    Args:
        sigmas: (N + 1,), the schedule.
        steps: numbers of the noisy steps.
    """
    chosen = torch.tensor(steps)
    weights = sigmas[chosen] * (sigmas[chosen] - sigmas[chosen + 1]).sqrt()
    return len(steps) * weights / weights.sum()
