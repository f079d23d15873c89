"""Learning from finished pictures and their rewards, by flow matching: DiffusionNFT and AWM.

Any sampler will do, and nothing of the way is kept. T noise levels of a picture, B samples of a batch, N of a
generation.
"""

from typing import TYPE_CHECKING

import torch

from ..core.flow import interpolate
from .estimators.awm import awm_loss, matching_log_prob
from .estimators.diffusion_nft import nft_loss, velocity_distance
from .rollouts import Rollout

if TYPE_CHECKING:
    from .flow_grpo_trainer import FlowGRPOTrainer


class Matching:
    """What is kept of pictures, and the loss of a batch.

    The old model is the one that drew the pictures (`old_policy`), on the same noise.

    Args:
        trainer: whose model, settings and notes are used.
    """

    def __init__(self, trainer: "FlowGRPOTrainer"):
        self.trainer, self.args = trainer, trainer.args

    def window(self, number: int) -> range:
        """Return no noisy steps."""
        return range(0)

    def keep(self, drawn: list[Rollout], sigmas: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Return pictures (1, N, C, H, W), T levels of the schedule (T, N) for each, noise (T, N, C, H, W)."""
        latents, count = torch.cat([part.latents for part in drawn]), self.args.train_timesteps
        orders = [torch.randperm(len(sigmas) - 1, generator=generator)[:count] for _ in latents]
        noise = torch.randn(count, *latents.shape, generator=generator)
        return {"latents": latents[None], "levels": sigmas[torch.stack(orders, dim=1)], "noise": noise}

    def old(self, model, batch: dict) -> dict[str, torch.Tensor]:
        """Return `old`, to compare with later: velocities (T, B, C, H, W), for AWM log-probabilities (T, B)."""
        velocity, _ = self._velocity(model, batch)
        return {"old": velocity if self.args.estimator == "diffusion_nft" else self._log_probs(batch, velocity)}

    def average(self, model, batch: dict) -> dict[str, torch.Tensor]:
        """Return `average`: velocities (T, B, C, H, W) of the averaged weights, which `model` now has."""
        return {"average": self._velocity(model, batch)[0]}

    def loss(self, model, batch: dict) -> torch.Tensor:
        """Return the mean loss of a batch's pictures at their noise levels, plus the weighted distances."""
        args, note = self.args, self.trainer.note
        velocity, inputs = self._velocity(model, batch)
        count, levels = len(velocity), batch["levels"].flatten()
        advantages = batch["advantages"].repeat(count)
        if args.estimator == "diffusion_nft":
            old = batch.get("old", velocity.detach()).flatten(0, 1)
            pictures = self._pictures(batch)
            loss = nft_loss(
                velocity.flatten(0, 1), old, inputs["latents"], levels, pictures, advantages, args.nft_beta,
                args.advantage_clip or 5.0,
            ).mean()  # fmt: skip
        else:
            new = self._log_probs(batch, velocity).flatten()
            found = awm_loss(new, batch["old"].flatten() if "old" in batch else new, advantages, args.epsilon)
            loss = found.loss.mean()
            note(found.metrics())
        if self.trainer.measures_kl:
            reference = self.trainer.reference_velocity(**inputs)
            distance = velocity_distance(velocity.flatten(0, 1), reference).mean()
            note({"kl": distance.item()})
            loss = loss + args.beta * distance if args.beta else loss
        if "average" in batch:
            distance = velocity_distance(velocity.flatten(0, 1), batch["average"].flatten(0, 1)).mean()
            loss = loss + args.ema_beta * distance
            note({"ema_distance": distance.item()})
        return loss

    @staticmethod
    def _pictures(batch: dict) -> torch.Tensor:
        """Return the pictures as often as they have levels (T * B, C, H, W)."""
        return batch["latents"].expand_as(batch["noise"]).flatten(0, 1)

    def _velocity(self, model, batch: dict) -> tuple[torch.Tensor, dict]:
        """Return velocities (T, B, C, H, W), by one pass, and its inputs."""
        levels, noise = batch["levels"], batch["noise"]
        noisy = interpolate(self._pictures(batch), noise.flatten(0, 1), levels.flatten())
        text = self.trainer.repeated(batch["text"], len(levels))
        inputs = {"latents": noisy, "sigmas": levels.flatten(), "text": text}
        return self.trainer.velocity(model, **inputs).float().unflatten(0, levels.shape), inputs

    def _log_probs(self, batch: dict, velocity: torch.Tensor) -> torch.Tensor:
        levels, target = batch["levels"], batch["noise"].flatten(0, 1) - self._pictures(batch)
        found = matching_log_prob(velocity.flatten(0, 1), target, levels.flatten(), self.args.awm_power)
        return found.unflatten(0, levels.shape)
