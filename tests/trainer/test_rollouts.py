"""Noisy sampling steps: their Gaussians against closed forms, and probabilities that a second pass finds again."""

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from unipic2.trainer.rollouts import Transition, euler_step, kl, log_prob, replay, rollout, transition, window_start

SIGMAS = torch.tensor([1.0, 0.9, 0.75, 0.5, 0.2, 0.0])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


def step_noise(window, *shape, seed=1):
    return torch.randn(len(window), *shape, generator=seeded(seed))


def predict(latents, sigmas):
    """A velocity that depends on everything, as a model's does."""
    return torch.tanh(latents) * (1 + sigmas.view(-1, 1, 1, 1)) + 0.1 * latents.mean(dim=(1, 2, 3), keepdim=True)


@pytest.mark.parametrize(("sigma", "next_sigma", "largest"), [(0.8, 0.7, 0.95), (1.0, 0.9, 0.9), (0.2, 0.1, 0.95)])
def test_flow_sde_by_hand(sigma, next_sigma, largest):
    latents, velocity, eta = randn(2, 16, 4, 4), randn(2, 16, 4, 4, seed=1), 0.7
    step = transition("flow_sde", latents, velocity, sigma, next_sigma, eta, largest)
    rate = math.sqrt(sigma / (1 - (largest if sigma == 1 else sigma))) * eta
    dt = next_sigma - sigma
    mean = latents * (1 + rate**2 / (2 * sigma) * dt) + velocity * (1 + rate**2 * (1 - sigma) / (2 * sigma)) * dt
    torch.testing.assert_close(step.mean, mean)
    assert step.rate == pytest.approx(rate) and step.std == pytest.approx(rate * math.sqrt(-dt))


@pytest.mark.parametrize("eta", [0.2, 0.8, 1.0])
@pytest.mark.parametrize(("sigma", "next_sigma"), [(1.0, 0.9), (0.6, 0.3), (0.1, 0.02)])
def test_cps_leaves_exactly_the_noise_of_its_sigma(eta, sigma, next_sigma):
    """With the true velocity: the mean's noise and the step's own add up to next_sigma, and the picture is kept."""
    picture, noise = randn(1, 16, 4, 4).double(), randn(1, 16, 4, 4, seed=1).double()
    latents = (1 - sigma) * picture + sigma * noise
    step = transition("cps", latents, noise - picture, sigma, next_sigma, eta)
    left = step.mean.double() - (1 - next_sigma) * picture
    share = (left / noise).mean().item()
    torch.testing.assert_close(left, share * noise, atol=1e-5, rtol=1e-4)
    assert math.hypot(share, step.std) == pytest.approx(next_sigma, rel=1e-4)


@pytest.mark.parametrize("dynamics", ["flow_sde", "cps"])
def test_little_noise_is_nearly_the_plain_step(dynamics):
    latents, velocity = randn(2, 16, 4, 4), randn(2, 16, 4, 4, seed=1)
    step = transition(dynamics, latents, velocity, 0.8, 0.7, 1e-3)
    torch.testing.assert_close(step.mean, euler_step(latents, velocity, 0.8, 0.7), atol=1e-4, rtol=1e-4)
    assert 0 < step.std < 1e-2


def test_log_probs_by_hand():
    step = Transition("flow_sde", randn(3, 16, 4, 4), 0.3, 0.9)
    sample = step.mean + 0.3 * randn(3, 16, 4, 4, seed=1)
    exact = torch.distributions.Normal(step.mean, 0.3).log_prob(sample).flatten(1).mean(dim=1)
    torch.testing.assert_close(log_prob(sample, step), exact)
    step = Transition("cps", step.mean, 0.3, 0.3)
    torch.testing.assert_close(log_prob(sample, step), -(sample - step.mean).square().flatten(1).mean(dim=1))


def test_kl_in_both_scalings():
    latents, one, two = (randn(2, 16, 4, 4, seed=seed) for seed in range(3))
    sigma, next_sigma = 0.8, 0.7
    first, second = (transition("flow_sde", latents, v, sigma, next_sigma, 0.7) for v in (one, two))
    normals = [torch.distributions.Normal(step.mean, step.std) for step in (first, second)]
    exact = torch.distributions.kl_divergence(*normals).flatten(1).mean(dim=1)
    torch.testing.assert_close(kl(first, second), exact)
    torch.testing.assert_close(kl(first, second, "coded"), exact * (sigma - next_sigma))
    first, second = (transition("cps", latents, v, sigma, next_sigma, 0.7) for v in (one, two))
    torch.testing.assert_close(kl(first, second), kl(first, second, "coded"))
    with pytest.raises(ValueError, match="kl scaling: found 'paper'"):
        kl(first, second, "paper")


def test_kl_is_zero_at_the_start_and_pulls_afterwards():
    latents, velocity = randn(2, 16, 4, 4), randn(2, 16, 4, 4, seed=1)
    own = (velocity + 0.1).requires_grad_()
    reference = transition("flow_sde", latents, velocity, 0.8, 0.7, 0.7)
    assert kl(transition("flow_sde", latents, velocity, 0.8, 0.7, 0.7), reference).abs().max() == 0
    kl(transition("flow_sde", latents, own, 0.8, 0.7, 0.7), reference).sum().backward()
    assert (own.grad > 0).all()


def test_no_window_is_the_scheduler(make_small_pipeline):
    """Plain Euler sampling, step by step as diffusers' scheduler does it."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    latents = noise = randn(2, 16, 8, 8)
    for time in scheduler.timesteps:
        velocity = predict(latents, (time / 1000).expand(2))
        latents = scheduler.step(velocity, time, latents, return_dict=False)[0]
    drawn = rollout(predict, noise, scheduler.sigmas, "cps", 0.8, range(0), step_noise(range(0), 2, 16, 8, 8))
    torch.testing.assert_close(drawn.latents, latents, atol=1e-5, rtol=1e-5)
    assert drawn.steps == () and drawn.log_probs.shape == (0, 2) and drawn.before.shape == (0, 2, 16, 8, 8)


@pytest.mark.parametrize("storage", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("dynamics", "window"), [("flow_sde", range(0, 4)), ("cps", range(1, 3)), ("cps", range(0, 1))]
)
def test_the_first_ratio_is_one(dynamics, window, storage):
    drawn = rollout(
        predict, randn(3, 16, 8, 8), SIGMAS, dynamics, 0.7, window, step_noise(window, 3, 16, 8, 8), storage
    )
    assert drawn.before.dtype == drawn.after.dtype == storage and drawn.steps == tuple(window)
    for place in range(len(window)):
        again, step = replay(predict, drawn, place, SIGMAS, dynamics, 0.7)
        assert torch.equal(again, drawn.log_probs[place])
        assert (drawn.after[place].float() - step.mean).std() == pytest.approx(step.std, rel=0.1)
    other, _ = replay(lambda x, s: predict(x, s) + 0.1, drawn, 0, SIGMAS, dynamics, 0.7)
    assert not torch.equal(other, drawn.log_probs[0])


def test_a_rollout_with_references_and_a_real_transformer(make_small_pipeline):
    transformer = make_small_pipeline().transformer
    states, pooled, reference = randn(2, 5, 32, seed=2), randn(2, 24, seed=3), randn(2, 16, 8, 8, seed=4)

    def model(latents, sigmas):
        return transformer(
            hidden_states=latents, timestep=1000 * sigmas, encoder_hidden_states=states, pooled_projections=pooled,
            ref_hidden_states=reference, return_dict=False,
        )[0]  # fmt: skip

    drawn = rollout(
        model, randn(2, 16, 8, 8), SIGMAS, "cps", 0.8, range(1, 4), step_noise(range(3), 2, 16, 8, 8), torch.bfloat16
    )
    for place in range(3):
        log_prob_again, _ = replay(model, drawn, place, SIGMAS, "cps", 0.8)
        assert torch.equal(log_prob_again.detach(), drawn.log_probs[place]) and log_prob_again.requires_grad


def test_pictures_do_not_depend_on_how_many_are_drawn_at_a_time():
    start, noise = randn(4, 16, 8, 8), step_noise(range(2), 4, 16, 8, 8)

    def local(latents, sigmas):
        return torch.tanh(latents) * (1 + sigmas.view(-1, 1, 1, 1))

    whole = rollout(local, start, SIGMAS, "cps", 0.8, range(2), noise)
    parts = [rollout(local, start[i : i + 2], SIGMAS, "cps", 0.8, range(2), noise[:, i : i + 2]) for i in (0, 2)]
    assert torch.equal(whole.latents, torch.cat([part.latents for part in parts]))
    assert torch.equal(whole.log_probs, torch.cat([part.log_probs for part in parts], dim=1))
    with pytest.raises(ValueError, match="noise: found shape"):
        rollout(local, start, SIGMAS, "cps", 0.8, range(3), noise)


@pytest.mark.parametrize("first", [0.9999999, 1.0000001])
@pytest.mark.parametrize("dynamics", ["flow_sde", "cps"])
def test_a_schedule_that_starts_beside_one(dynamics, first):
    """As diffusers' scheduler does under some shifts."""
    noise, beside = randn(2, 16, 8, 8), torch.cat([torch.tensor([first]), SIGMAS[1:]])
    exact, found = (
        rollout(predict, noise, s, dynamics, 0.7, range(2), step_noise(range(2), 2, 16, 8, 8))
        for s in (SIGMAS, beside)
    )
    assert torch.equal(exact.latents, found.latents) and torch.equal(exact.log_probs, found.log_probs)
    assert torch.equal(replay(predict, found, 0, beside, dynamics, 0.7)[0], found.log_probs[0])


def test_windows():
    rng = np.random.default_rng(0)
    assert [window_start("fixed", i, 3, 1, 6, rng) for i in range(4)] == [1, 1, 1, 1]
    assert [window_start("progressive", i, 3, 1, 6, rng) for i in range(5)] == [1, 2, 3, 1, 2]
    assert {window_start("random", i, 3, 1, 6, rng) for i in range(50)} == {1, 2, 3}
    for strategy, size, first, last in (("random", 4, 0, 3), ("fixed", 0, 0, 3), ("sliding", 1, 0, 3)):
        with pytest.raises(ValueError, match="window: found"):
            window_start(strategy, 0, size, first, last, rng)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (("ddim", 0.8, 0.7, 0.7), "dynamics: found 'ddim'"),
        (("cps", 0.7, 0.8, 0.7), "sigma: found 0.7 to 0.8"),
        (("cps", 0.8, 0.7, 0.0), "found no noise"),
        (("cps", 0.8, 0.0, 0.7), "found no noise"),
        (("flow_sde", 1.0, 0.9, 0.7), "largest_sigma: found 1.0"),
    ],
)
def test_steps_that_cannot_be(arguments, found):
    dynamics, sigma, next_sigma, eta = arguments
    with pytest.raises(ValueError, match=found):
        transition(dynamics, randn(1, 1, 2, 2), randn(1, 1, 2, 2), sigma, next_sigma, eta)


def test_the_last_step_is_not_noisy():
    with pytest.raises(ValueError, match="expected steps 0 to 3"):
        rollout(predict, randn(1, 16, 4, 4), SIGMAS, "cps", 0.8, range(3, 5), step_noise(range(2), 1, 16, 4, 4))
