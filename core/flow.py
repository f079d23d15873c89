"""The time convention of flow matching, shared by training, sampling and export.

`sigma` runs from 0 (picture) to 1 (noise); latents at sigma are `(1 - sigma) * picture + sigma * noise`, the model
predicts the velocity `noise - picture`, and its `timestep` input is `1000 * sigma`.
"""

import torch

NUM_TRAIN_TIMESTEPS = 1000


def shift_sigmas(sigmas: torch.Tensor, shift: float) -> torch.Tensor:
    """Move sigmas in 0..1 toward noise: `shift * s / (1 + (shift - 1) * s)` (SD3, arXiv 2403.03206, section 5.3.2)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def interpolate(latents: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """Return latents (B, C, H, W) at sigmas (B,): the straight line from picture to noise."""
    sigmas = sigmas.view(-1, *[1] * (latents.ndim - 1)).to(latents.dtype)
    return (1 - sigmas) * latents + sigmas * noise
