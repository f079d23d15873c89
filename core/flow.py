"""The time convention of flow matching, shared by training, sampling and export.

`sigma` runs from 0 (picture) to 1 (noise); latents at sigma are `(1 - sigma) * picture + sigma * noise`, the model
predicts the velocity `noise - picture`, and its `timestep` input is `1000 * sigma`.
"""

import math

import torch

NUM_TRAIN_TIMESTEPS = 1000
BASE_TOKENS, MAX_TOKENS = 256, 4096
"""Picture tokens (16x16 pixels each) at which the resolution-dependent shift is given: 256x256 and 1024x1024."""


def shift_sigmas(sigmas: torch.Tensor, shift: float) -> torch.Tensor:
    """Move sigmas in 0..1 toward noise: `shift * s / (1 + (shift - 1) * s)` (SD3, arXiv 2403.03206, section 5.3.2)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def resolution_shift(num_tokens: int, base_shift: float, max_shift: float) -> float:
    """Return the shift for a picture of `num_tokens` tokens, for `shift_sigmas`.

    Its logarithm is linear in the number of tokens: `base_shift` at 256 tokens, `max_shift` at 4096. This is what
    diffusers' scheduler does under `use_dynamic_shifting` (its `mu`), so an exported model samples as it was trained.
    """
    slope = (max_shift - base_shift) / (MAX_TOKENS - BASE_TOKENS)
    return math.exp(base_shift + slope * (num_tokens - BASE_TOKENS))


def interpolate(latents: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """Return latents (B, C, H, W) at sigmas (B,): the straight line from picture to noise."""
    sigmas = sigmas.view(-1, *[1] * (latents.ndim - 1)).to(latents.dtype)
    return (1 - sigmas) * latents + sigmas * noise
