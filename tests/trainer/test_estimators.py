"""Losses of reinforcement learning against small references that spell out the formulae, gradients included."""

import math

import pytest
import torch
from unipic2.trainer.estimators.awm import awm_loss, matching_log_prob
from unipic2.trainer.estimators.diffusion_nft import nft_loss, optimality, velocity_distance
from unipic2.trainer.estimators.flow_grpo import policy_loss, step_weights
from unipic2.trainer.estimators.grpo_guard import guarded_loss
from unipic2.trainer.rollouts import log_prob, transition

ADVANTAGES = torch.tensor([1.0, -2.0, 0.5])


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(function, tensor):
    leaf = tensor.clone().requires_grad_()
    function(leaf).sum().backward()
    return leaf.grad


# Flow-GRPO


def test_on_policy_the_gradient_is_the_plain_policy_gradient():
    old = randn(3)
    found = policy_loss(old, old, ADVANTAGES, 1e-4)
    assert found.ratio.tolist() == [1, 1, 1] and not (found.clipped_low | found.clipped_high).any()
    grad = gradient(lambda new: policy_loss(new, old, ADVANTAGES, 1e-4).loss, old)
    torch.testing.assert_close(grad, -ADVANTAGES.double())


@pytest.mark.parametrize(
    ("advantage", "change", "learns"),
    [(1.0, 0.3, False), (1.0, -0.3, True), (-1.0, -0.3, False), (-1.0, 0.3, True), (1.0, 0.1, True)],
)
def test_the_clip_stops_what_goes_too_far(advantage, change, learns):
    old, advantages = torch.zeros(1, dtype=torch.float64), torch.tensor([advantage], dtype=torch.float64)
    grad = gradient(lambda new: policy_loss(new, old, advantages, 0.2).loss, old + change)
    assert (grad.item() != 0) == learns
    if learns:
        assert grad.item() == pytest.approx(-advantage * math.exp(change))
    found = policy_loss(old + change, old, advantages, 0.2)
    assert (found.clipped_low | found.clipped_high).item() != learns


def test_the_upper_end_of_the_range_can_be_its_own():
    old, advantages = torch.zeros(1), torch.ones(1)
    grad = gradient(lambda new: policy_loss(new, old, advantages, 0.2, 0.5).loss, old + 0.3)
    assert grad.item() == pytest.approx(-math.exp(0.3))


def test_step_weights_are_one_on_average_and_favour_noise():
    sigmas = torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0])
    weights = step_weights(sigmas, (0, 1, 2))
    by_hand = torch.tensor([1 * math.sqrt(0.1), 0.9 * math.sqrt(0.15), 0.75 * math.sqrt(0.25)])
    torch.testing.assert_close(weights, 3 * by_hand / by_hand.sum())
    assert weights.mean().item() == pytest.approx(1)


# GRPO-Guard


def guard_case(shift):
    """A step of an old model, a sample of it, and the loss of a new velocity, `shift` away from the old one."""
    latents, velocity, noise = (randn(3, 16, 8, 8, seed=seed).float() for seed in range(3))
    old = transition("flow_sde", latents, velocity, 0.8, 0.7, 0.7)
    drawn = old.mean + old.std * noise
    new = transition("flow_sde", latents, velocity + shift, 0.8, 0.7, 0.7)
    logs = log_prob(drawn, new), log_prob(drawn, old)
    return guarded_loss(*logs, new, old.mean, 0.1, ADVANTAGES, 1e-2), logs, new, old, drawn


def test_guarded_ratios_are_one_at_first_and_by_formula_afterwards():
    at_first = guard_case(0.0)[0]
    assert at_first.ratio.tolist() == [1, 1, 1]
    torch.testing.assert_close(at_first.loss, -ADVANTAGES / 0.1)
    moved, (new_log, old_log), new, old, _ = guard_case(0.05)
    bias = (new.mean - old.mean).square().mean(dim=(1, 2, 3)) / (2 * new.std**2)
    torch.testing.assert_close(moved.ratio, ((new_log - old_log + bias) * new.std).exp())


def test_steps_without_variance_are_not_guarded():
    step = transition("cps", randn(3, 16, 4, 4), randn(3, 16, 4, 4, seed=1), 0.8, 0.7, 0.7)
    with pytest.raises(ValueError, match="dynamics: found cps, expected flow_sde"):
        guarded_loss(ADVANTAGES, ADVANTAGES, step, step.mean, 0.1, ADVANTAGES, 1e-2)


def test_guarded_ratios_are_centred():
    """What is left in the exponent is linear in the step's noise: without bias, and of one size for all steps."""
    moved, (new_log, old_log), new, old, drawn = guard_case(0.3)
    noise = (drawn - old.mean) / old.std
    linear = (noise * (new.mean - old.mean) / old.std).mean(dim=(1, 2, 3))
    torch.testing.assert_close(moved.ratio.log() / new.std, linear, atol=1e-3, rtol=1e-3)
    assert (new_log - old_log - linear < 0).all(), "the plain ratio is biased downwards"


# DiffusionNFT


def test_optimality():
    found = optimality(torch.tensor([-9.0, -5.0, 0.0, 2.5, 9.0]))
    torch.testing.assert_close(found, torch.tensor([0.0, 0.0, 0.5, 0.75, 1.0]))


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_nft_by_formula_with_its_gradient(beta):
    velocity, old, latents, noise = (randn(3, 16, 4, 4, seed=seed) for seed in range(4))
    sigmas = torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64)
    t = sigmas.view(-1, 1, 1, 1)
    noisy = (1 - t) * latents + t * noise

    def by_hand(v):
        share = ADVANTAGES.double() / 10 + 0.5
        total = 0
        for weight, side in ((share, beta * v + (1 - beta) * old), (1 - share, (1 + beta) * old - beta * v)):
            error = noisy - t * side - latents
            size = error.detach().abs().mean(dim=(1, 2, 3))
            total = total + weight * error.square().mean(dim=(1, 2, 3)) / size
        return 5 * total / beta

    def ours(v):
        return nft_loss(v, old, noisy, sigmas, latents, ADVANTAGES.double(), beta)

    torch.testing.assert_close(ours(velocity), by_hand(velocity))
    torch.testing.assert_close(gradient(ours, velocity), gradient(by_hand, velocity))


def test_nft_goes_to_good_pictures_and_away_from_bad_ones():
    latents, noise = randn(1, 16, 4, 4), randn(1, 16, 4, 4, seed=1)
    sigmas = torch.tensor([0.5], dtype=torch.float64)
    noisy, target = 0.5 * latents + 0.5 * noise, noise - latents
    old = target + 1.0
    for advantage, direction in ((5.0, 1), (-5.0, -1)):
        grad = gradient(lambda v, a=advantage: nft_loss(v, old, noisy, sigmas, latents, torch.tensor([a])), old)
        assert torch.sign((grad * (old - target)).sum()).item() == direction
    with pytest.raises(ValueError, match="beta: found 0"):
        nft_loss(old, old, noisy, sigmas, latents, torch.ones(1), beta=0)


def test_the_distance_to_the_reference():
    velocity, reference = randn(2, 16, 4, 4), randn(2, 16, 4, 4, seed=1).requires_grad_()
    distance = velocity_distance(velocity.requires_grad_(), reference)
    torch.testing.assert_close(distance, (velocity - reference).square().mean(dim=(1, 2, 3)))
    distance.sum().backward()
    assert velocity.grad.abs().max() > 0 and reference.grad is None


# AWM


def test_awm_by_formula_with_its_gradient():
    velocity, target = randn(3, 16, 4, 4), randn(3, 16, 4, 4, seed=1)
    sigmas = torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64)

    def by_hand(v):
        error = (v - target).square().mean(dim=(1, 2, 3))
        return -sigmas / 0.25 * ((error + 1e-10) ** 0.25 - 1e-10**0.25)

    torch.testing.assert_close(matching_log_prob(velocity, target, sigmas), by_hand(velocity))
    torch.testing.assert_close(
        gradient(lambda v: matching_log_prob(v, target, sigmas), velocity), gradient(by_hand, velocity)
    )
    assert torch.isfinite(gradient(lambda v: matching_log_prob(v, target, sigmas), target)).all(), "no error at all"
    with pytest.raises(ValueError, match="power: found 0"):
        matching_log_prob(velocity, target, sigmas, 0)


def test_awm_on_policy_weighs_matching_by_the_advantage():
    velocity, target = randn(3, 16, 4, 4), randn(3, 16, 4, 4, seed=1)
    sigmas = torch.full((3,), 0.5, dtype=torch.float64)
    old = matching_log_prob(velocity, target, sigmas)

    def ours(v):
        return awm_loss(matching_log_prob(v, target, sigmas), old, ADVANTAGES.double()).loss

    weighted = gradient(lambda v: -ADVANTAGES.double() * matching_log_prob(v, target, sigmas), velocity)
    torch.testing.assert_close(gradient(ours, velocity), weighted)
    grad = gradient(ours, velocity)
    toward = ((velocity - target) * grad).sum(dim=(1, 2, 3))
    assert (torch.sign(toward) == torch.sign(ADVANTAGES)).all(), "good pictures are matched, bad ones left"
