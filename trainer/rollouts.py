"""Sampling whose steps have a known probability, which is what policy-gradient training of a flow model learns from.

Convention of `core.flow`: sigma 1 is noise, the velocity is `noise - picture`, and sampling goes to smaller sigmas. A
rollout draws its noisy steps in a window and plain Euler steps elsewhere. What a later pass needs to compute the same
probabilities is stored as it was used: latents go through the storage type *before* their probability is taken, so the
first ratio of new to old probability is exactly 1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

DYNAMICS = ("flow_sde", "cps")
SDE_WINDOWS = ("fixed", "random", "progressive")
KL_SCALINGS = ("exact", "coded")
Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""`predict(latents (B, C, H, W), sigmas (B,))` returns the velocity (B, C, H, W), float32."""


@dataclass(frozen=True, slots=True)
class Transition:
    """The Gaussian that a noisy step draws from. Example: `transition("cps", x, velocity, 0.9, 0.8, eta=0.8)`."""

    dynamics: str
    """One of `DYNAMICS`."""
    mean: torch.Tensor
    """(B, C, H, W), float32."""
    std: float
    """Standard deviation of each number, above 0."""
    rate: float
    """`flow_sde`: `std` without the step's length, std^2 = rate^2 (sigma - next_sigma). `cps`: equal to `std`."""


def euler_step(latents: torch.Tensor, velocity: torch.Tensor, sigma: float, next_sigma: float) -> torch.Tensor:
    """Return the latents at `next_sigma` by a step without noise, as FlowMatchEuler does it."""
    return latents + velocity * (next_sigma - sigma)


def transition(
    dynamics: str, latents: torch.Tensor, velocity: torch.Tensor, sigma: float, next_sigma: float, eta: float,
    largest_sigma: float = 1.0,
) -> Transition:  # fmt: skip
    """Return the Gaussian of one noisy step.

    Args:
        dynamics: `flow_sde` (Flow-GRPO, arXiv 2505.05470, as its code has it) or `cps` (Flow-CPS,
            arXiv 2509.05952): the noise left after the step is exactly that of `next_sigma`.
        latents, velocity: (B, C, H, W); computed in float32.
        sigma, next_sigma: 0 to 1, falling.
        eta: how much noise, above 0: `flow_sde` 0.7 as published; `cps` up to 1, 0.8 as published.
        largest_sigma: `flow_sde`: what stands for sigma 1 where the formula would divide by 0; Flow-GRPO takes the
            second sigma of the schedule.

    Raises:
        ValueError: an unknown name, sigmas that do not fall, or no noise: that is `euler_step`.
    """
    if not 0 <= next_sigma < sigma <= 1:
        raise ValueError(f"sigma: found {sigma} to {next_sigma}, expected two that fall, within 1 to 0")
    latents, velocity = latents.float(), velocity.float()
    if dynamics == "flow_sde":
        below_one = largest_sigma if sigma == 1 else sigma
        if below_one >= 1:
            raise ValueError(f"largest_sigma: found {largest_sigma} for sigma {sigma}, expected below 1")
        rate = eta * math.sqrt(sigma / (1 - below_one))
        drift = rate**2 / (2 * sigma)
        step = next_sigma - sigma
        mean = latents * (1 + drift * step) + velocity * (1 + drift * (1 - sigma)) * step
        std = rate * math.sqrt(-step)
    elif dynamics == "cps":
        std = rate = next_sigma * math.sin(eta * math.pi / 2)
        picture, noise = latents - sigma * velocity, latents + (1 - sigma) * velocity
        mean = (1 - next_sigma) * picture + math.sqrt(next_sigma**2 - std**2) * noise
    else:
        raise ValueError(f"dynamics: found {dynamics!r}, expected one of {', '.join(DYNAMICS)}")
    if not std > 0:
        raise ValueError(f"eta {eta} to sigma {next_sigma}: found no noise, expected some; use euler_step")
    return Transition(dynamics, mean, std, rate)


def log_prob(sample: torch.Tensor, step: Transition) -> torch.Tensor:
    """Return the logarithm of a sample's probability (B,), as a mean over its numbers.

    For `cps` it is `-(sample - mean)^2` alone, as its authors do it: variance and constants cancel in a ratio, and
    steps near the picture, whose variance is small, would outweigh all others.
    """
    squares = (sample.float() - step.mean).square().flatten(1).mean(dim=1)
    if step.dynamics == "cps":
        return -squares
    return -squares / (2 * step.std**2) - math.log(step.std) - 0.5 * math.log(2 * math.pi)


def kl(step: Transition, reference: Transition, scaling: str = "exact") -> torch.Tensor:
    """Return the Kullback-Leibler divergence (B,) of a step from the reference model's, as a mean over its numbers.

    Args:
        step, reference: of the same latents and sigmas.
        scaling: `exact` is that of the two Gaussians; `coded` is Flow-GRPO's code, smaller by the step's length in
            sigma, for which the published weights (0.04, ...) are meant. They are the same for `cps`.

    Raises:
        ValueError: an unknown name.
    """
    if scaling not in KL_SCALINGS:
        raise ValueError(f"kl scaling: found {scaling!r}, expected one of {', '.join(KL_SCALINGS)}")
    std = step.std if scaling == "exact" else step.rate
    return (step.mean - reference.mean.detach()).square().flatten(1).mean(dim=1) / (2 * std**2)


@dataclass(frozen=True, slots=True)
class Rollout:
    """Pictures that were drawn and the noisy steps on the way. Example: what `rollout` returns."""

    latents: torch.Tensor
    """(B, C, H, W): the result, float32."""
    before: torch.Tensor
    """(S, B, C, H, W), storage type: latents before each of the S noisy steps."""
    after: torch.Tensor
    """(S, B, C, H, W), storage type: what each step drew."""
    log_probs: torch.Tensor
    """(S, B), float32, under the model that drew them."""
    steps: tuple[int, ...]
    """Numbers of the noisy steps in the schedule."""

    def cpu(self) -> "Rollout":
        """Return the same in main memory."""
        tensors = (self.latents, self.before, self.after, self.log_probs)
        return Rollout(*(tensor.cpu() for tensor in tensors), self.steps)


def window_start(strategy: str, iteration: int, size: int, first: int, last: int, rng: np.random.Generator) -> int:
    """Return the first step of the window of noisy steps.

    Args:
        strategy: `fixed` stays at `first`; `random` draws anew each time (Flow-GRPO-Fast); `progressive` moves on by
            one each iteration and starts again at the end (MixGRPO, arXiv 2507.21802).
        iteration: number of the rollout, from 0.
        size: steps of a window.
        first, last: the window lies within steps `first` to `last` - 1.
        rng: for `random`.

    Raises:
        ValueError: an unknown name, or a window that does not fit.
    """
    places = last - first - size + 1
    if size < 1 or first < 0 or places < 1:
        raise ValueError(f"window: found {size} steps within {first} to {last}, expected some that fit")
    if strategy not in SDE_WINDOWS:
        raise ValueError(f"window: found {strategy!r}, expected one of {', '.join(SDE_WINDOWS)}")
    if strategy == "random":
        return first + int(rng.integers(places))
    return first + (iteration % places if strategy == "progressive" else 0)


@torch.no_grad()
def rollout(
    predict: Predict,
    latents: torch.Tensor,
    sigmas: torch.Tensor,
    dynamics: str,
    eta: float,
    window: range,
    noise: torch.Tensor,
    storage_dtype: torch.dtype = torch.float32,
) -> Rollout:
    """Draw pictures, with noise in the steps of `window` and without elsewhere.

    Args:
        predict: the model, with guidance or without.
        latents: noise (B, C, H, W).
        sigmas: (N + 1,), falling from 1 (or less) to 0, as a scheduler's `set_timesteps(N)` gives them.
        dynamics, eta: of the noisy steps, see `transition`.
        window: numbers of the noisy steps; empty is plain Euler sampling. The last step, to sigma 0, cannot be one: it
            has no noise under `cps`, and `flow_sde` would leave noise in the picture.
        noise: (S, B, C, H, W), what the S noisy steps draw, standard normal: the caller draws it, so that pictures do
            not depend on how many are drawn at a time.
        storage_dtype: in which latents around noisy steps are kept.

    Raises:
        ValueError: a window beyond the last step but one, noise of another shape, or see `transition`.
    """
    if noise.shape != (len(window), *latents.shape):
        expected = (len(window), *latents.shape)
        raise ValueError(f"noise: found shape {tuple(noise.shape)}, expected {expected}")
    schedule = snapped(sigmas).tolist()
    if window and not 0 <= window[0] <= window[-1] < len(schedule) - 2:
        raise ValueError(f"window: found {window}, expected steps 0 to {len(schedule) - 3}")
    latents = latents.float()
    before, after, log_probs = [], [], []
    for number, (sigma, next_sigma) in enumerate(zip(schedule, schedule[1:], strict=False)):
        if number in window:
            latents = latents.to(storage_dtype).float()
        velocity = predict(latents, latents.new_full((len(latents),), sigma))
        if number not in window:
            latents = euler_step(latents, velocity, sigma, next_sigma)
            continue
        step = transition(dynamics, latents, velocity, sigma, next_sigma, eta, schedule[1])
        drawn = (step.mean + step.std * noise[number - window[0]].to(latents)).to(storage_dtype)
        before.append(latents.to(storage_dtype))
        after.append(drawn)
        log_probs.append(log_prob(drawn, step))
        latents = drawn.float()
    empty = latents.new_empty(0, *latents.shape, dtype=storage_dtype)
    return Rollout(
        latents,
        torch.stack(before) if before else empty,
        torch.stack(after) if after else empty,
        torch.stack(log_probs) if log_probs else latents.new_empty(0, len(latents)),
        tuple(window),
    )


def replay(
    predict: Predict, drawn: Rollout, place: int, sigmas: torch.Tensor, dynamics: str, eta: float
) -> tuple[torch.Tensor, Transition]:
    """Return what `predict` makes of one stored step: the logarithm of its probability (B,), and its Gaussian.

    With the model that drew the rollout the former equals `drawn.log_probs[place]` bit for bit, as long as the model's
    own result does not depend on the batch or on gradients being recorded.

    Args:
        place: which of the S noisy steps, from 0.
        sigmas, dynamics, eta: as they were for `rollout`.
    """
    number, schedule = drawn.steps[place], snapped(sigmas).tolist()
    sigma, next_sigma = schedule[number], schedule[number + 1]
    latents = drawn.before[place].float()
    velocity = predict(latents, latents.new_full((len(latents),), sigma))
    step = transition(dynamics, latents, velocity, sigma, next_sigma, eta, schedule[1])
    return log_prob(drawn.after[place], step), step


def snapped(sigmas: torch.Tensor) -> torch.Tensor:
    """Return a schedule's sigmas; a shift may leave the first an ulp beside 1, and formulae divide by 1 - sigma."""
    return sigmas.where((sigmas - 1).abs() >= 1e-5, 1.0)
