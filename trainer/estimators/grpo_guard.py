"""GRPO-Guard (arXiv 2510.22319): Flow-GRPO with ratios that are centred and of equal spread in all steps.

The plain ratio lies below 1 on average, the more so the less noise a step has, so that its clip range guards against
too much of what is good and hardly against anything else.
"""

import torch

from ..rollouts import Transition
from .flow_grpo import PolicyLoss, clipped_loss


def guarded_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    step: Transition,
    old_mean: torch.Tensor,
    length: float,
    advantages: torch.Tensor,
    epsilon: float,
) -> PolicyLoss:
    """Return the clipped loss of one `flow_sde` step of each sample.

    Args:
        log_probs, old_log_probs: (B,), see `flow_grpo.policy_loss`.
        step: the Gaussian of the model that is trained.
        old_mean: (B, C, H, W), mean of the model that drew the samples.
        length: of the step in sigma, above 0; the loss is divided by it, so that steps weigh alike.
        advantages: (B,).
        epsilon: ratios count from 1 - epsilon to 1 + epsilon; published 2e-6.

    Raises:
        ValueError: a step of other dynamics, whose log-probabilities leave the variance out.
    """
    if step.dynamics != "flow_sde":
        raise ValueError(f"dynamics: found {step.dynamics}, expected flow_sde for GRPO-Guard")
    moved = (step.mean - old_mean.detach()).square().flatten(1).mean(dim=1) / (2 * step.std**2)
    ratio = ((log_probs - old_log_probs.detach() + moved) * step.std).exp()
    clipped = clipped_loss(ratio, advantages, epsilon, epsilon)
    return PolicyLoss(clipped.loss / length, clipped.ratio, clipped.clipped_low, clipped.clipped_high)
