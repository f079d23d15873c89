"""Picture sizes and the time convention: edge cases worked out by hand."""

import pytest
import torch
from unipic2.core.errors import InputError
from unipic2.core.flow import interpolate, shift_sigmas
from unipic2.core.sizes import MAX_EDGE, fit_size, nearest_valid_size


@pytest.mark.parametrize(
    ("size", "options", "expected"),
    [
        ((512, 512), {}, (512, 512)),
        ((640, 480), {}, (512, 384)),
        ((480, 640), {}, (384, 512)),
        ((1920, 1080), {}, (512, 288)),
        ((1920, 1080), {"longer_edge": 1024}, (1024, 576)),
        ((64, 64), {"longer_edge": 64}, (64, 64)),
        ((1, 1), {}, (512, 512)),
        ((10_000, 1), {}, (512, 32)),  # never below one multiple
        ((1, 10_000), {}, (32, 512)),
        ((512, 272), {}, (512, 288)),  # 8.5 multiples go up
        ((512, 271), {}, (512, 256)),
        ((100, 100), {"longer_edge": 500}, (512, 512)),  # the longer edge too is a multiple
        ((300, 200), {"longer_edge": 96, "multiple": 16}, (96, 64)),
        ((7, 7), {"longer_edge": 32}, (32, 32)),
        ((7, 7), {"longer_edge": MAX_EDGE}, (MAX_EDGE, MAX_EDGE)),
    ],
)
def test_fit_size(size, options, expected):
    assert fit_size(*size, **options) == expected


@pytest.mark.parametrize("size", [(0, 10), (10, 0), (0, 0), (-5, 5)])
def test_fit_size_refuses_empty_pictures(size):
    with pytest.raises(InputError, match=f"found {size[0]}x{size[1]}, expected at least 1x1"):
        fit_size(*size)


@pytest.mark.parametrize("longer_edge", [0, 31, -512, MAX_EDGE + 1])
def test_fit_size_refuses_edges_out_of_range(longer_edge):
    with pytest.raises(InputError, match=f"longer_edge: found {longer_edge}, expected 32 to 6144"):
        fit_size(512, 512, longer_edge)


@pytest.mark.parametrize("width", [1, 33, 511, 1023, 4999])
@pytest.mark.parametrize("height", [2, 64, 767])
def test_fit_size_gives_valid_sizes(width, height):
    fitted = fit_size(width, height)
    assert nearest_valid_size(*fitted) == fitted
    assert max(fitted) == 512
    assert (fitted[0] >= fitted[1]) == (width >= height) or abs(fitted[0] - fitted[1]) <= 32


@pytest.mark.parametrize(
    ("size", "multiple", "expected"),
    [((511, 17), 32, (512, 32)), ((0, 0), 32, (32, 32)), ((48, 47), 32, (64, 32)), ((100, 8), 16, (96, 16))],
)
def test_nearest_valid_size(size, multiple, expected):
    assert nearest_valid_size(*size, multiple) == expected


def test_input_error_says_what_found_expected_and_remedy():
    error = InputError("width of photo.png", found=0, expected="at least 1 pixel", remedy="Export it again.")
    assert str(error) == "width of photo.png: found 0, expected at least 1 pixel. Export it again."
    assert str(InputError("photo.png")) == "photo.png."
    assert str(InputError("photo.png", remedy="Export it.")) == "photo.png. Export it."
    assert str(InputError("photo.png", found="")) == "photo.png: found ."
    assert isinstance(error, ValueError)


def test_shift_sigmas_by_hand():
    sigmas = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(shift_sigmas(sigmas, 3.0), torch.tensor([0, 0.5, 0.75, 1], dtype=torch.float64))
    assert torch.equal(shift_sigmas(sigmas, 1.0), sigmas)


def test_interpolate_goes_straight_from_picture_to_noise():
    latents, noise = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    mixed = interpolate(latents, noise, torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64))
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed[0], latents[0]) and torch.equal(mixed[2], noise[2])
    torch.testing.assert_close(mixed[1], 0.75 * latents[1] + 0.25 * noise[1])
