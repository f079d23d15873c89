"""The interference matrix: intervals, paired differences, negative transfer."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from scipy import stats
from unipic2.core.errors import InputError
from unipic2.trainer.held_out import Measurement, reward_held_out
from unipic2.trainer.interference import (
    figure_text,
    has_fallen,
    matrix,
    paired_difference,
    share_interval,
    write_matrix,
)


def measured(strict, kinds=None):
    strict = np.array(strict, dtype=np.float64)
    return Measurement(kinds or ["a"] * len(strict), strict, (1 + strict) / 2)


@pytest.mark.parametrize(("right", "n"), [(0, 20), (7, 20), (20, 20), (512, 1024)])
def test_shares_have_wilsons_interval(right, n):
    expected = stats.binomtest(right, n).proportion_ci(0.95, method="wilson")
    found = share_interval(np.arange(n) < right)
    assert found == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_shown_figures_are_rounded_once():
    """961 of 1024 are 0.93848, which with four digits in the file would be shown as 0.939."""
    found = matrix({"start": {"t2i": measured(np.arange(1024) < 961)}}, 0.02)["start"]["t2i"]
    assert figure_text(json.loads(json.dumps(found))).startswith("0.938 (")


def test_differences_are_paired():
    """Two measurings that agree on most samples differ with far less doubt than two of other samples would."""
    rng = np.random.default_rng(0)
    before = (rng.random(500) < 0.5).astype(float)
    after = before.copy()
    after[np.flatnonzero(before == 0)[:20]] = 1
    difference, (low, high) = paired_difference(before, after)
    assert difference == pytest.approx(0.04) and 0 < low < difference < high < 0.07
    t = stats.ttest_rel(after, before).confidence_interval(0.95)
    assert (low, high) == pytest.approx((t.low, t.high), abs=1e-3)
    with pytest.raises(ValueError, match="expected the same"):
        paired_difference(before, after[:-1])


def test_what_is_not_known_of_both_is_left_out():
    before, after = np.array([1, 1, 0, np.nan, 1.0]), np.array([1, np.nan, 1, 0, 1.0])
    assert paired_difference(before, after)[0] == pytest.approx(1 / 3)
    assert share_interval(before) == share_interval(np.array([1, 1, 0, 1.0]))
    assert not has_fallen(np.array([1.0, np.nan]), np.array([0.0, 0.0]), 0.02), "of one pair nothing is known"
    one = Measurement(["a", "b"], np.array([1, np.nan]), np.array([0.7, np.nan]))
    again = Measurement.from_json(json.loads(json.dumps(one.to_json())))
    assert again.mean() == 1 and np.isnan(again.strict[1])
    found = matrix({"start": {"edit": one}}, 0.02)["start"]["edit"]
    assert found["n"] == 1 and found["kinds"] == {"a": 1.0, "b": None}


class Painter:
    """What measuring needs of a pipeline: grey pictures."""

    def set_progress_bar_config(self, **options):
        pass

    def __call__(self, prompts, image, height, width, **sampling):
        return SimpleNamespace(images=[Image.new("RGB", (width, height), "gray") for _ in prompts])


class Rows(list):
    is_edit = [False] * 4


STRICT = {"t2i": 0.9, "edit": 0.5}


@pytest.mark.parametrize("unanswered", [[1], [0, 1, 2, 3]])
def test_what_a_reward_could_not_say_is_not_said_by_the_others(unanswered):
    rows = Rows({"prompt": f"p{i}", "size": (64, 64), "place": i} for i in range(4))

    def judge(prompts, images, place, **columns):
        return [math.nan if i in unanswered else 0.6 for i in place]

    def kept(prompts, images, **columns):
        return [1.0] * len(prompts)

    def for_edits(prompts, images, **columns):
        return [None] * len(prompts)

    rewards = [judge, kept, for_edits]
    found, _ = reward_held_out(rows, rewards, None, STRICT, 4, 0)(Painter())
    if len(unanswered) == 4:
        assert not found
    else:
        assert np.isnan(found["t2i"].soft).tolist() == [False, True, False, False]
        assert found["t2i"].mean() == 0 and found["t2i"].soft[0] == pytest.approx(0.8)
    with pytest.raises(InputError, match=f"measuring t2i: found {len(unanswered)} of 4 samples.*share of 0.2"):
        reward_held_out(rows, rewards, None, STRICT, 4, 0, most_unanswered=0.2)(Painter())
    found, _ = reward_held_out(rows, rewards, None, STRICT, 4, 0, most_unanswered=0.2, is_optional=True)(Painter())
    assert not found


def test_edits_have_a_bar_of_their_own_and_what_they_kept():
    rows = Rows(
        {"prompt": "p", "size": (64, 64), "source_image": Image.new("RGB", (64, 64), c)} for c in ("gray", "red")
    )
    rows += [{"prompt": "p", "size": (64, 64)}] * 2
    rows.is_edit = [True, True, False, False]
    found, _ = reward_held_out(rows, [lambda prompts, images, **columns: [0.6] * 2], None, STRICT, 4, 0)(Painter())
    assert found["t2i"].mean() == 0 and found["edit"].mean() == 1
    assert found["t2i"].preserved is None and found["edit"].preserved.tolist() == [1, 0]


def test_the_matrix_says_how_much_less_of_the_source_is_kept():
    rng = np.random.default_rng(0)
    first = rng.random(100)
    start, later = (Measurement(["a"] * 100, np.ones(100), np.ones(100), kept) for kept in (first, first - 0.25))
    found = matrix({"start": {"edit": start}, "1-edit": {"edit": start}, "2-t2i": {"edit": later}}, 0.02)
    assert "drift" not in found["start"]["edit"] and found["1-edit"]["edit"]["drift"]["difference"] == 0
    assert found["2-t2i"]["edit"]["drift"] == {"difference": -0.25, "interval": [-0.25, -0.25]}
    assert found["2-t2i"]["edit"]["preserved"] == pytest.approx(first.mean() - 0.25, abs=1e-3)
    again = Measurement.from_json(json.loads(json.dumps(later.to_json())))
    assert (again.preserved == later.preserved).all()


def test_a_fall_counts_when_it_is_large_and_no_chance():
    before = np.ones(400)
    slightly, clearly = before.copy(), before.copy()
    slightly[:4], clearly[:40] = 0, 0
    assert not has_fallen(before, slightly, 0.02) and has_fallen(before, clearly, 0.02)
    assert not has_fallen(clearly, before, 0.02), "a rise is none"
    few = np.ones(10)
    few[0] = 0
    assert not has_fallen(np.ones(10), few, 0.02), "one of ten may be chance"


def test_the_matrix_says_what_each_stage_did(tmp_path):
    start = {"t2i": measured([1, 0] * 50, ["x", "y"] * 50), "edit": measured([1] * 100)}
    edit = {"t2i": measured([1, 0] * 50, ["x", "y"] * 50), "edit": measured([1] * 100)}
    t2i = {"t2i": measured([1, 1] * 50, ["x", "y"] * 50), "edit": measured([1] * 60 + [0] * 40)}
    found = matrix({"start": start, "1-edit": edit, "2-t2i": t2i}, max_drop=0.02)
    assert "change" not in found["start"]["t2i"] and found["start"]["t2i"]["kinds"] == {"x": 1.0, "y": 0.0}
    assert found["1-edit"]["t2i"]["change"] == {"difference": 0, "interval": [0, 0], "negative_transfer": False}
    last = found["2-t2i"]
    assert last["t2i"]["strict"] == 1 and last["t2i"]["change"]["difference"] == 0.5
    assert last["edit"]["change"]["negative_transfer"] and last["edit"]["change"]["difference"] == -0.4
    assert last["edit"]["n"] == 100 and last["edit"]["soft"] == 0.8
    write_matrix(tmp_path / "interference.json", found)
    assert json.loads((tmp_path / "interference.json").read_text()) == found


def test_measurements_survive_json():
    one = measured([1, 0, 1], ["a", "b", "a"])
    two = Measurement.from_json(json.loads(json.dumps(one.to_json())))
    assert two.kinds == one.kinds and (two.strict == one.strict).all() and (two.soft == one.soft).all()
