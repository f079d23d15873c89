"""DiffusionNFT (arXiv 2509.16117): good and bad pictures teach by flow matching, without a policy gradient.

It needs finished pictures alone, from any sampler. What the model would have to become for good pictures, and for bad
ones, are two sides of one velocity: `v+ = b v + (1 - b) v_old`, `v- = (1 + b) v_old - b v`.
"""

import torch


def optimality(advantages: torch.Tensor, clip: float = 5.0) -> torch.Tensor:
    """Return how good each sample is (B,), 0 to 1: advantages -clip..clip on a straight line."""
    return (advantages.clamp(-clip, clip) / clip / 2 + 0.5).clamp(0, 1)


def nft_loss(
    velocity: torch.Tensor,
    old_velocity: torch.Tensor,
    noisy: torch.Tensor,
    sigmas: torch.Tensor,
    latents: torch.Tensor,
    advantages: torch.Tensor,
    beta: float = 1.0,
    clip: float = 5.0,
) -> torch.Tensor:
    """Return the loss (B,) as its authors code it: errors in the picture, each divided by its own size.

    Args:
        velocity: (B, C, H, W), of the model that is trained, with gradient.
        old_velocity: (B, C, H, W), of the model that drew the pictures.
        noisy: (B, C, H, W), latents at `sigmas`.
        sigmas: (B,), 0 to 1.
        latents: (B, C, H, W), the pictures.
        advantages: (B,).
        beta: how far the two sides lie from the old model; published 1 and 0.1.
        clip: of advantages; the loss is multiplied by it.

    Raises:
        ValueError: beta is not above 0.
    """
    if not beta > 0:
        raise ValueError(f"beta: found {beta}, expected a number above 0")
    old_velocity = old_velocity.detach()
    good = _size_free_error(beta * velocity + (1 - beta) * old_velocity, noisy, sigmas, latents)
    bad = _size_free_error((1 + beta) * old_velocity - beta * velocity, noisy, sigmas, latents)
    share = optimality(advantages, clip)
    return clip * (share * good + (1 - share) * bad) / beta


def _size_free_error(velocity, noisy, sigmas, latents) -> torch.Tensor:
    difference = (noisy - sigmas.view(-1, 1, 1, 1) * velocity - latents).flatten(1)
    size = difference.detach().double().abs().mean(dim=1).clamp_min(1e-5).to(difference)
    return difference.square().mean(dim=1) / size


def velocity_distance(velocity: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return the mean squared distance (B,) to the reference model's velocity, which NFT and AWM keep small."""
    return (velocity - reference.detach()).square().flatten(1).mean(dim=1)
