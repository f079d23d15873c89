"""The terms of the flow-matching loss, as pure functions.

Shapes: B batch, C latent channels, H and W latent height and width. Velocities are `noise - latents` (`core.flow`).
"""

import torch
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

from ..core.flow import shift_sigmas

TIMESTEP_SAMPLINGS = ("logit_normal", "uniform", "mode")
LOSS_WEIGHTINGS = ("none", "sigma_sqrt", "cosmap")


def sample_sigmas(
    batch_size: int,
    timestep_sampling: str,
    shift: float,
    generator: torch.Generator,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    mode_scale: float = 1.29,
) -> torch.Tensor:
    """Draw training sigmas (B,) in 0..1 on the CPU, after the shift (SD3, arXiv 2403.03206, section 3.1).

    Args:
        timestep_sampling: one of `TIMESTEP_SAMPLINGS`.
        shift: as in `core.flow.shift_sigmas`.
        logit_mean, logit_std: of the normal under `logit_normal`; a mean above 0 gives noisier sigmas.
        mode_scale: of `mode`, -1 to 1.75; above 0 the middle is drawn more often, below 0 the ends.
    """
    sigmas = compute_density_for_timestep_sampling(
        timestep_sampling, batch_size, logit_mean, logit_std, mode_scale, generator=generator
    )
    return shift_sigmas(sigmas, shift)


def loss_weights(loss_weighting: str, sigmas: torch.Tensor) -> torch.Tensor:
    """Return how much each sample's loss counts (B,), as SD3's training does.

    Args:
        loss_weighting: `none` 1; `sigma_sqrt` sigma^-2; `cosmap` 2 / (pi (1 - 2 sigma + 2 sigma^2)).
        sigmas: (B,), after the shift. They are kept from below 0.001, where sigma^-2 has no bound.
    """
    return compute_loss_weighting_for_sd3(loss_weighting, sigmas.clamp_min(1e-3))


def pick_negatives(source_ids: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose for each sample another one of the batch to contrast it with.

    Args:
        source_ids: (B,) int64; samples with the same id are never contrasted with each other (edits of one picture,
            pictures of one prompt).
        generator: on the CPU.

    Returns:
        Indices (B,) of the negatives, and (B,) bool: False where the batch holds no sample with another id.
    """
    source_ids = source_ids.cpu()
    allowed = source_ids[:, None] != source_ids[None, :]
    scores = torch.rand(allowed.shape, generator=generator).masked_fill(~allowed, -1.0)
    return scores.argmax(dim=1), allowed.any(dim=1)


def squared_error(velocity: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Return the mean squared error of each sample (B,).

    Args:
        velocity, target: (B, C, H, W).
        mask: (B, 1, H, W), 0 or more; how much each place counts. Each sample's mean is over the weights, so a
            small mask does not make a small loss.
    """
    error = (velocity - target).square().mean(dim=1, keepdim=True)
    if mask is None:
        return error.mean(dim=(1, 2, 3))
    return (error * mask).sum(dim=(1, 2, 3)) / mask.sum(dim=(1, 2, 3)).clamp_min(1e-6)


def contrastive_error(
    velocity: torch.Tensor,
    target: torch.Tensor,
    source_ids: torch.Tensor,
    generator: torch.Generator,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return each sample's squared distance (B,) to the velocity of another sample, 0 where there is none.

    This is what contrastive flow matching subtracts from the loss, `lambda` times (arXiv 2506.05350, equation 5).
    """
    negatives, found = pick_negatives(source_ids, generator)
    error = squared_error(velocity, target[negatives.to(target.device)], mask)
    return error * found.to(error)
