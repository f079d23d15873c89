"""The pure functions of the loss against their definitions."""

import math

import pytest
import torch
from unipic2.core.errors import InputError
from unipic2.core.flow import resolution_shift
from unipic2.trainer import FlowMatchingConfig
from unipic2.trainer.objective import contrastive_error, loss_weights, pick_negatives, sample_sigmas, squared_error


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(kind, shift=1.0, **settings):
    return sample_sigmas(20_000, kind, shift, seeded(), **settings)


def test_sigma_distributions():
    uniform, normal, shifted = draw("uniform"), draw("logit_normal"), draw("logit_normal", 3.0)
    for sigmas in (uniform, normal, shifted):
        assert 0 <= sigmas.min() and sigmas.max() <= 1
    assert uniform.mean() == pytest.approx(0.5, abs=0.01) and uniform.std() == pytest.approx(12**-0.5, abs=0.01)
    logits = torch.logit(normal)
    assert logits.mean() == pytest.approx(0, abs=0.03) and logits.std() == pytest.approx(1, abs=0.03)
    # shift s turns odds sigma / (1 - sigma) into s times the odds
    torch.testing.assert_close(torch.logit(shifted), logits + math.log(3.0), atol=1e-3, rtol=1e-3)
    moved = torch.logit(draw("logit_normal", logit_mean=1.0, logit_std=0.5))
    assert moved.mean() == pytest.approx(1, abs=0.03) and moved.std() == pytest.approx(0.5, abs=0.03)


def test_mode_sampling():
    """SD3 section 3.1: scale 0 is uniform, above 0 gathers in the middle, below 0 at the ends; all stay in 0..1."""
    spread = {}
    for scale in (-1.0, 0.0, 1.29, 1.75):
        sigmas = draw("mode", mode_scale=scale)
        assert -1e-6 <= sigmas.min() and sigmas.max() <= 1 + 1e-6
        spread[scale] = sigmas.std().item()
    assert spread[-1.0] > spread[0.0] > spread[1.29] > spread[1.75]
    assert spread[0.0] == pytest.approx(12**-0.5, abs=0.01)


def test_loss_weights():
    sigmas = torch.tensor([0.0, 0.25, 0.5, 1.0])
    assert loss_weights("none", sigmas).tolist() == [1, 1, 1, 1]
    torch.testing.assert_close(loss_weights("sigma_sqrt", sigmas), torch.tensor([1e6, 16.0, 4.0, 1.0]))
    cosmap = [2 / (math.pi * (1 - 2 * s + 2 * s * s)) for s in (1e-3, 0.25, 0.5, 1.0)]
    torch.testing.assert_close(loss_weights("cosmap", sigmas), torch.tensor(cosmap))


def test_the_shift_by_resolution():
    assert resolution_shift(256, 0.5, 1.16) == pytest.approx(math.exp(0.5))
    assert resolution_shift(4096, 0.5, 1.16) == pytest.approx(math.exp(1.16))
    between = math.log(resolution_shift(1024, 0.5, 1.16))
    assert between == pytest.approx(0.5 + 0.66 * (1024 - 256) / (4096 - 256))


def test_negatives_have_another_source_and_vary():
    ids = torch.tensor([1, 1, 2, 3, 3, 3])
    seen = [set() for _ in ids]
    for seed in range(60):
        negatives, found = pick_negatives(ids, seeded(seed))
        assert found.all() and (ids[negatives] != ids).all()
        for i, n in enumerate(negatives.tolist()):
            seen[i].add(n)
    assert seen == [{2, 3, 4, 5}, {2, 3, 4, 5}, {0, 1, 3, 4, 5}, *[{0, 1, 2}] * 3]


def test_a_batch_of_one_source_has_no_negatives():
    assert not pick_negatives(torch.tensor([4, 4, 4]), seeded())[1].any()
    velocity, target = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    assert contrastive_error(velocity, target, torch.tensor([4, 4, 4]), seeded()).tolist() == [0, 0, 0]


def test_contrastive_error_is_the_distance_to_the_negative():
    velocity, target = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3)
    ids = torch.arange(4)
    negatives, _ = pick_negatives(ids, seeded(2))
    expected = (velocity - target[negatives]).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(contrastive_error(velocity, target, ids, seeded(2)), expected)


def test_the_optimum_of_the_contrastive_loss():
    """For negatives that do not depend on the sample it is `(v - lambda E[v_neg]) / (1 - lambda)`, not v."""
    weight, target, negative = 0.05, torch.randn(1, 2, 3, 3), torch.randn(1, 2, 3, 3)
    velocity = torch.zeros_like(target, requires_grad=True)
    optimizer = torch.optim.SGD([velocity], lr=4.0)
    for _ in range(200):
        loss = (squared_error(velocity, target) - weight * squared_error(velocity, negative)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(velocity.detach(), (target - weight * negative) / (1 - weight), atol=1e-4, rtol=1e-4)


def test_a_mask_weighs_places():
    velocity, target = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    error = (velocity - target).square().mean(dim=1)
    mask = torch.full((2, 1, 4, 4), 0.1)
    mask[:, :, 0, 0] = 1
    expected = (error[:, 0, 0] + 0.1 * (error.sum(dim=(1, 2)) - error[:, 0, 0])) / (1 + 0.1 * 15)
    torch.testing.assert_close(squared_error(velocity, target, mask), expected)
    torch.testing.assert_close(squared_error(velocity, target, torch.ones_like(mask)), error.mean(dim=(1, 2)))


@pytest.mark.parametrize(
    ("field", "value"),
    [("mode_scale", 2.0), ("contrastive_weight", 1.0), ("contrastive_weight", -0.1), ("loss_weighting", "min_snr"),
     ("reference_dropout", 1.5), ("unmasked_weight", -1.0), ("ema_update_steps", 0), ("timestep_sampling", "beta")],
)  # fmt: skip
def test_values_that_cannot_be(field, value, tmp_path):
    with pytest.raises(InputError, match=field):
        FlowMatchingConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, **{field: value})
