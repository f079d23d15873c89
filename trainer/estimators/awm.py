"""Advantage Weighted Matching (arXiv 2509.25050): the flow-matching error takes the place of a log-probability.

Pretraining and reinforcement learning then have one objective. Old and new errors are of the same noise and sigma.
"""

import torch

from .flow_grpo import PolicyLoss, clipped_loss

_TINY = 1e-10


def matching_log_prob(
    velocity: torch.Tensor, target: torch.Tensor, sigmas: torch.Tensor, power: float = 0.25
) -> torch.Tensor:
    """Return what stands for the log-probability (B,), float64: minus the error's generalised Huber function.

    `-(sigma / p) ((e + tiny)^p - tiny^p)`, e the mean squared error: the gradient of large errors is bounded.

    Args:
        velocity: (B, C, H, W), the model's.
        target: (B, C, H, W), `noise - latents`.
        sigmas: (B,), 0 to 1.
        power: p, above 0; published 0.25.

    Raises:
        ValueError: a power that is not above 0.
    """
    if not power > 0:
        raise ValueError(f"power: found {power}, expected a number above 0")
    error = (velocity.double() - target.double()).square().flatten(1).mean(dim=1)
    return -sigmas.double() / power * ((error + _TINY) ** power - _TINY**power)


def awm_loss(
    log_probs: torch.Tensor, old_log_probs: torch.Tensor, advantages: torch.Tensor, epsilon: float = 1.0
) -> PolicyLoss:
    """Return the clipped loss of each sample; as published the range is so wide that on-policy steps never meet it.

    Args:
        log_probs: (B,), from `matching_log_prob`, with gradient.
        old_log_probs: (B,), of the model that drew the pictures, on the same noise and sigmas.
        advantages: (B,); published within -1..1.
        epsilon: ratios count from 1 - epsilon to 1 + epsilon.
    """
    return clipped_loss((log_probs - old_log_probs.detach()).exp(), advantages, epsilon, epsilon)
