"""GenEval's own rules on hand-made detections, and the whole command with small models of the real classes."""

import json

import pytest
from PIL import Image
from unipic2.core.errors import InputError
from unipic2.trainer.cli import main
from unipic2.trainer.evaluation import command
from unipic2.trainer.evaluation.geneval import geneval_benchmark, read_prompts, verdict
from unipic2.trainer.rewards.geneval import Found, GenEval, by_name, relations

CUP, DOG = {"class": "cup", "count": 1}, {"class": "dog", "count": 1}


def thing(name, x=0, y=0, score=0.95, size=20):
    return Found(name, score, (x, y, x + size, y + size))


def judge(objects, include, exclude=(), tag="single_object", colors=None, exact=False):
    row = {"tag": tag, "prompt": "", "include": list(include), "exclude": list(exclude)}
    names = colors or {}
    return verdict(objects, row, lambda found: names[found.box[0]], exact)


def test_a_single_object():
    assert judge([thing("cup"), thing("dog")], [CUP]) == (True, [])
    assert judge([thing("dog")], [CUP]) == (False, ["0 cup for 1"])
    assert judge([thing("cup", score=0.29)], [CUP])[0] is False
    assert judge([], [CUP])[0] is False


def test_two_objects():
    assert judge([thing("cup"), thing("dog")], [CUP, DOG])[0]
    assert judge([thing("cup"), thing("cup")], [CUP, DOG]) == (False, ["0 dog for 1"])


@pytest.mark.parametrize(("n", "least", "exact"), [(1, False, False), (2, True, True), (3, True, False)])
def test_counts_are_at_least(n, least, exact):
    asked = [{"class": "cup", "count": 2}]
    assert judge([thing("cup")] * n, asked)[0] is least
    assert judge([thing("cup")] * n, asked, exact=True)[0] is exact


def test_counting_rows_say_how_many_are_too_many():
    asked, excluded = [{"class": "cup", "count": 2}], [{"class": "cup", "count": 3}]
    assert judge([thing("cup")] * 2, asked, excluded, tag="counting")[0]
    assert judge([thing("cup")] * 3, asked, excluded, "counting") == (False, ["3 cup, 3 are too many"])
    unsure = [thing("cup"), thing("cup", score=0.6)]
    assert judge(unsure, asked, excluded, tag="counting") == (False, ["1 cup for 2"])


def test_colors():
    asked = [{"class": "cup", "count": 1, "color": "red"}]
    assert judge([thing("cup", 5)], asked, colors={5: "red"})[0]
    assert judge([thing("cup", 5)], asked, colors={5: "blue"}) == (False, ["cup is blue, not red"])
    # As published only the surest one is looked at; a red one behind it does not count.
    two = [thing("cup", 5, score=0.99), thing("cup", 50, score=0.5)]
    assert judge(two, asked, colors={5: "blue", 50: "red"})[0] is False


def test_colors_of_nothing_are_not_asked_for():
    assert judge([], [{"class": "cup", "count": 1, "color": "red"}]) == (False, ["0 cup for 1"])


def test_color_attribution():
    asked = [{**CUP, "color": "red"}, {**DOG, "color": "black"}]
    both = [thing("cup", 5), thing("dog", 50)]
    assert judge(both, asked, colors={5: "red", 50: "black"})[0]
    swapped = judge(both, asked, colors={5: "black", 50: "red"})
    assert swapped == (False, ["cup is black, not red", "dog is red, not black"])


def test_positions():
    asked = [DOG, {**CUP, "position": ["left of", 0]}]
    assert judge([thing("cup", 0, 40), thing("dog", 70, 40)], asked)[0]
    assert judge([thing("dog", 0, 40), thing("cup", 70, 40)], asked) == (False, ["cup is not left of dog"])
    assert judge([thing("cup", 0, 40)], asked) == (False, ["0 dog for 1", "cup has nothing to be left of"])
    overlapping = [thing("cup", 40, 40), thing("dog", 42, 40)]  # closer than a tenth of both
    assert judge(overlapping, asked)[0] is False


def test_a_place_beside_something_that_is_named_later_never_holds():
    """The benchmark reads its clauses in order."""
    asked = [{**CUP, "position": ["left of", 1]}, DOG]
    assert judge([thing("cup", 0, 40), thing("dog", 70, 40)], asked)[0] is False


def test_ties_are_broken_by_order():
    """Equal scores: the detector's order, as a stable sort has it."""
    two = [thing("cup", 5), thing("cup", 50)]
    assert [found.box[0] for found in by_name(two, {"cup"}, counting=False)["cup"]] == [5, 50]
    assert relations(two[0].box, two[0].box) == set()


@pytest.fixture
def prompts(tmp_path):
    rows = [
        {"tag": "single_object", "include": [CUP], "prompt": "a photo of a cup"},
        {"tag": "counting", "include": [{"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 3}],
         "prompt": "a photo of two dogs"},
        {"tag": "counting", "include": [{"class": "cup", "count": 2}], "prompt": "a photo of two cups"},
    ]  # fmt: skip
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return path


def test_the_score_is_the_mean_over_kinds_not_over_pictures(prompts, tmp_path):
    """Two of three rows count; each kind weighs the same."""
    from unipic2.trainer.evaluation.run import score

    scorer = GenEval(lambda images: [[thing("cup")] for _ in images], None)
    benchmark = geneval_benchmark(read_prompts(prompts), lambda: scorer, 0, (32, 32), samples=2)
    assert [item.id for item in benchmark.items[:3]] == ["00000-0", "00000-1", "00001-0"]
    assert [item.seed for item in benchmark.items] == list(range(6))
    (tmp_path / "out/images").mkdir(parents=True)
    for item in benchmark.items:
        Image.new("RGB", (32, 32)).save(tmp_path / "out/images" / f"{item.id}.png")
    results, _ = score(benchmark, tmp_path / "out")
    assert [found["strict"] for found in results["tasks"].values()] == [1, 0]
    assert results["overall"] == 0.5
    assert results["items"][2]["notes"] == ["0 dog for 2"]


def test_classes_that_the_detector_does_not_know_are_refused(prompts):
    detector = lambda images: [[] for _ in images]  # noqa: E731
    scorer = GenEval(detector, None)
    scorer.check_classes(["cup"], "include of a row")
    detector.classes = {"cup", "cat"}
    benchmark = geneval_benchmark(read_prompts(prompts), lambda: scorer, 0, (8, 8), samples=1)
    with pytest.raises(InputError, match="found 'dog'"):
        benchmark.judge(benchmark.items, [Image.new("RGB", (8, 8))] * 3)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 1: found {"),
        ('{"tag": "x", "prompt": "y"}', "found no include"),
        ('{"tag": "x", "include": [{"class": "cup", "count": 1}]}', "expected JSON with tag, prompt and include"),
        ('{"tag": "x", "prompt": "y", "include": [{"class": "cup"}]}', "line 1: include"),
        ("", "found no rows"),
    ],
)
def test_bad_rows(tmp_path, line, words):
    (tmp_path / "rows.jsonl").write_text(line)
    with pytest.raises(InputError, match=words):
        read_prompts(tmp_path / "rows.jsonl")
    with pytest.raises(InputError, match="no such file.*evaluation_metadata.jsonl"):
        read_prompts(tmp_path / "absent.jsonl")


def test_the_command(prompts, pipeline, tmp_path, capsys, monkeypatch):
    pipeline.save_pretrained(tmp_path / "model")
    scorer = GenEval(lambda images: [[thing("cup"), thing("cup")] for _ in images], None)
    monkeypatch.setattr(command.GenEval, "from_pretrained", lambda *_: scorer)
    flags = ["--model", str(tmp_path / "model"), "--prompts", str(prompts), "--out", str(tmp_path / "out")]
    flags += ["--width", "64", "--height", "64", "--steps", "1", "--guidance-scale", "1"]
    assert main(["eval", "geneval", *flags, "--samples", "2"]) == 0
    printed = capsys.readouterr().out
    assert "single_object: strict 1.000, soft 1.000 of 2\ncounting: strict 0.500, soft 0.750 of 4\n" in printed
    assert "overall: 0.750\n" in printed
    assert "2 cup for 1" in exact(flags, tmp_path)


def exact(flags, tmp_path) -> str:
    """Score the same pictures again, with exact counts: another benchmark, so in a folder of its own."""
    (tmp_path / "exact").mkdir()
    (tmp_path / "out/images").rename(tmp_path / "exact/images")
    flags = [str(tmp_path / "exact") if flag == str(tmp_path / "out") else flag for flag in flags]
    assert main(["eval", "geneval", *flags, "--samples", "2", "--exact-counts", "--only", "score"]) == 0
    return (tmp_path / "exact/index.html").read_text()
