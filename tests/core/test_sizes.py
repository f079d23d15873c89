"""Picture sizes and the time convention: edge cases worked out by hand."""

import pytest
import torch
from unipic2.core.errors import InputError
from unipic2.core.flow import interpolate, shift_sigmas
from unipic2.core.sizes import (
    FITS,
    MAX_EDGE,
    fit_size,
    nearest_valid_size,
    place,
    understanding_size,
    vision_size,
)
from unipic2.core.vision import vision_pixels


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
        ((7, 7), {"longer_edge": MAX_EDGE, "multiple": 80}, (6080, 6080)),  # not rounded up beyond it
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
    ("fit", "source", "size", "target"),
    [
        ("stretch", (0, 0, 500, 330), (512, 352), (0, 0, 512, 352)),
        ("crop", (10, 0, 490, 330), (512, 352), (0, 0, 512, 352)),
        ("pad", (0, 0, 500, 330), (512, 352), (0, 7, 512, 345)),
    ],
)
def test_place(fit, source, size, target):
    found = place(500, 330, fit=fit)
    assert (found.original, found.source, found.size, found.target) == ((500, 330), source, size, target)


@pytest.mark.parametrize("size", [(1, 1), (10_000, 3), (3, 10_000), (503, 331), (331, 503), (64, 64), (512, 271)])
@pytest.mark.parametrize("fit", FITS)
def test_placements_hold_together(size, fit):
    """Boxes lie inside, what is drawn has edges that are multiples, and only stretching changes a shape."""
    found = place(*size, fit=fit)
    for box, outer in ((found.source, size), (found.target, found.size)):
        assert 0 <= box[0] < box[2] <= outer[0] and 0 <= box[1] < box[3] <= outer[1]
    assert nearest_valid_size(*found.size) == found.size and max(found.size) == 512
    if fit != "stretch" and max(size) < 50 * min(size):
        (w, h), (tw, th) = ((b[2] - b[0], b[3] - b[1]) for b in (found.source, found.target))
        assert abs(w * th - h * tw) <= max(w, h, tw, th)  # to a pixel


def test_place_refuses_an_unknown_fit():
    with pytest.raises(InputError, match="found 'fill', expected one of stretch, crop, pad"):
        place(5, 5, fit="fill")


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


@pytest.mark.parametrize(
    ("size", "seen"),
    [((64, 64), (56, 56)), ((512, 384), (448, 336)), ((4096, 4096), (3584, 3584)), ((32, 128), (28, 112))],
)
def test_qwen_sees_28_of_32_pixels(size, seen):
    assert vision_size(*size) == seen


@pytest.mark.parametrize("size", [(48, 64), (64, 80), (32, 32), (32, 96), (4128, 4096), (0, 64)])
def test_what_qwen_cannot_see_as_it_is_is_refused(size):
    with pytest.raises(InputError, match=rf"{size[0]}x{size[1]} pixels.*multiples of 32"):
        vision_size(*size)


def test_the_picture_qwen_sees_is_bicubic_and_within_range():
    pixels = (torch.arange(64 * 96).reshape(1, 1, 64, 96) % 7 > 3).half().expand(2, 3, -1, -1)
    seen = vision_pixels(pixels)
    assert seen.shape == (2, 3, 56, 84) and seen.dtype == torch.float32
    assert seen.min() == 0 and seen.max() == 1
    torch.testing.assert_close(vision_pixels(torch.full((1, 3, 64, 64), 0.25)), torch.full((1, 3, 56, 56), 0.25))


@pytest.mark.parametrize(
    ("size", "seen"),
    [
        ((64, 64), (56, 56)),
        ((640, 480), (644, 476)),
        ((20, 20), (56, 56)),  # too few pixels
        ((10, 100), (28, 196)),
        ((8000, 4000), (5068, 2520)),  # too many
        ((42, 70), (56, 56)),  # halves go to the even multiple, as in Qwen's own rule
    ],
)
def test_the_size_at_which_qwen_is_asked(size, seen):
    assert understanding_size(*size) == seen


@pytest.mark.parametrize("size", [(0, 5), (2010, 10)])
def test_a_picture_that_qwen_is_not_asked_about(size):
    with pytest.raises(InputError, match="200 times"):
        understanding_size(*size)


def test_a_picture_to_edit_that_is_too_long():
    with pytest.raises(InputError, match="6432x32 pixels, expected at least 1x1, edges at most 200 times"):
        vision_size(6432, 32)
