"""Learning from the noisy steps of rollouts: the policy gradients of Flow-GRPO and GRPO-Guard.

S noisy steps, B samples of a batch, N of a generation.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch

from .batches import derived_seed
from .estimators.flow_grpo import policy_loss, step_weights
from .estimators.grpo_guard import guarded_loss
from .rollouts import Rollout, Transition, kl, log_prob, transition, window_start

if TYPE_CHECKING:
    from .flow_grpo_trainer import FlowGRPOTrainer

_WINDOW = 4  # purpose of a seed


class NoisySteps:
    """Where rollouts are noisy, what is kept of them, and the loss of a batch.

    Args:
        trainer: whose model, settings and notes are used.
    """

    def __init__(self, trainer: "FlowGRPOTrainer"):
        self.trainer, self.args = trainer, trainer.args
        self.keeps_means = self.args.estimator == "grpo_guard"

    def window(self, number: int) -> range:
        """Return the noisy steps of generation `number`."""
        args = self.args
        rng = np.random.default_rng(derived_seed(args.draw_seed + number, _WINDOW))
        start = window_start(args.sde_window, number, args.sde_window_size, *args.sde_window_range, rng)
        return range(start, start + args.sde_window_size)

    def keep(self, drawn: list[Rollout], sigmas: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Return what a generation keeps, each (S, N, ...), on the CPU."""
        return {name: torch.cat([getattr(part, name) for part in drawn], dim=1) for name in ("before", "after")}

    def old(self, model, batch: dict) -> dict[str, torch.Tensor]:
        """Return what a later loss compares with, of the model that drew the pictures.

        `old`, log-probabilities (S, B), and for GRPO-Guard `means` (S, B, C, H, W) of the noisy steps.
        """
        steps, _ = self._steps(model, batch)
        found = {"old": self._log_probs(batch, steps)}
        return found | {"means": torch.stack([step.mean for step in steps])} if self.keeps_means else found

    def loss(self, model, batch: dict) -> torch.Tensor:
        """Return the loss of a batch's noisy steps, all of them alike or by their noise, plus the weighted KL."""
        args, note = self.args, self.trainer.note
        steps, inputs = self._steps(model, batch)
        new = self._log_probs(batch, steps)
        old = batch.get("old", new.detach())
        weights = step_weights(batch["sigmas"], batch["steps"]) if args.noise_weighting else [1.0] * len(steps)
        reference = [None] * len(steps)
        measures_kl = self.trainer.measures_kl
        if measures_kl:
            velocity = self.trainer.reference_velocity(**inputs).unflatten(0, batch["before"].shape[:2])
            reference = self._transitions(batch, velocity)
        total = 0.0
        for place, (step, weight) in enumerate(zip(steps, weights, strict=True)):
            if self.keeps_means:
                number = batch["steps"][place]
                length = (batch["sigmas"][number] - batch["sigmas"][number + 1]).item()
                mean = batch["means"][place] if "means" in batch else step.mean
                found = guarded_loss(new[place], old[place], step, mean, length, batch["advantages"], args.epsilon)
            else:
                found = policy_loss(new[place], old[place], batch["advantages"], args.epsilon, args.epsilon_high)
            loss = float(weight) * found.loss.mean()
            if measures_kl:
                distance = kl(step, reference[place], args.kl_scaling).mean()
                note({"kl": distance.item()})
                loss = loss + args.beta * distance if args.beta else loss
            total = total + loss / len(steps)
            note(found.metrics())
        return total

    def _steps(self, model, batch: dict) -> tuple[list[Transition], dict]:
        """Return the Gaussians of all S noisy steps, by one pass, and the inputs of that pass."""
        before, sigmas = batch["before"].float(), batch["sigmas"].tolist()
        count, size = before.shape[:2]
        levels = torch.tensor([sigmas[i] for i in batch["steps"]], device=before.device).repeat_interleave(size)
        text = self.trainer.repeated(batch["text"], count)
        inputs = {"latents": before.flatten(0, 1), "sigmas": levels, "text": text}
        velocity = self.trainer.velocity(model, **inputs).float().unflatten(0, (count, size))
        return self._transitions(batch, velocity), inputs

    def _transitions(self, batch: dict, velocity: torch.Tensor) -> list[Transition]:
        args, sigmas, before = self.args, batch["sigmas"].tolist(), batch["before"].float()
        return [
            transition(args.dynamics, x, v, sigmas[i], sigmas[i + 1], args.eta, sigmas[1])
            for x, v, i in zip(before, velocity, batch["steps"], strict=True)
        ]

    @staticmethod
    def _log_probs(batch: dict, steps: list[Transition]) -> torch.Tensor:
        return torch.stack([log_prob(after, step) for after, step in zip(batch["after"], steps, strict=True)])
