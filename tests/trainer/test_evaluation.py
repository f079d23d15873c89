"""Benchmarks: drawing that goes on, scores of anybody's pictures, pages, and comparisons worked out by hand."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from unipic2.core.errors import InputError
from unipic2.trainer.cli import main
from unipic2.trainer.evaluation.compare import compare, table
from unipic2.trainer.evaluation.items import digest
from unipic2.trainer.evaluation.micro import micro_benchmark
from unipic2.trainer.evaluation.run import mean_interval, score
from unipic2.trainer.micro.evaluate import draw, eval_edit_tasks, eval_t2i_tasks
from unipic2.trainer.micro.world import render

COUNT = 6
FROZEN = "149c755d22436c880c2d7d0f8fbf86de192e725c17031d807db0191ffab40346"


@pytest.fixture(scope="module")
def model(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "random"
    pipeline.save_pretrained(folder)
    return folder


def evaluate(model, out, *flags) -> dict | None:
    arguments = ["eval", "micro", "--model", str(model), "--out", str(out), "--n", str(COUNT), "--steps", "1"]
    assert main([*arguments, *map(str, flags)]) == 0
    path = out / "results.json"
    return json.loads(path.read_text()) if path.is_file() else None


@pytest.fixture(scope="module")
def drawn(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "random"
    evaluate(model, out)
    return out


@pytest.fixture
def copy(drawn, tmp_path):
    return shutil.copytree(drawn, tmp_path / "copy")


@pytest.fixture
def right(tmp_path):
    """Return a folder of right answers, made without any model."""
    benchmark = micro_benchmark(COUNT, 1234)
    (tmp_path / "right/images").mkdir(parents=True)
    rng = np.random.default_rng([1234, 5, 0])
    from unipic2.trainer.micro.tasks import T2I_KINDS, sample_t2i

    scenes = [sample_t2i(rng, T2I_KINDS[i % len(T2I_KINDS)], held_out=True)[1] for i in range(COUNT)]
    scenes += [item.data.target for item in benchmark.items if item.task == "edit"]
    for item, scene in zip(benchmark.items, scenes, strict=True):
        render(scene).save(tmp_path / "right/images" / f"{item.id}.png")
    return tmp_path / "right"


def test_it_draws_what_the_pipeline_draws(drawn, pipeline):
    for name, tasks in (("t2i", eval_t2i_tasks(COUNT, 1234)), ("edit", eval_edit_tasks(COUNT, 1234))):
        for i, image in enumerate(draw(pipeline, tasks, 1234, num_inference_steps=1)):
            assert np.array_equal(np.asarray(image), np.asarray(Image.open(drawn / f"images/{name}-{i:04d}.png")))


def test_the_prompts_are_frozen():
    """The benchmark's figures in cards and README are of these items."""
    assert digest(micro_benchmark(256, 1234).items) == FROZEN
    assert digest(micro_benchmark(256, 1235).items) != FROZEN


def test_results_say_what_was_run(drawn, model):
    results = json.loads((drawn / "results.json").read_text())
    assert results["benchmark"] == "micro" and results["model"] == str(model)
    assert (results["n"], results["seed"]) == (COUNT, 1234)
    assert results["sampling"] == {"num_inference_steps": 1, "guidance_scale": 1.5}
    assert results["prompts"] == digest(micro_benchmark(COUNT, 1234).items)
    assert re.fullmatch("[0-9a-f]{64}", results["weights"])
    assert len(results["items"]) == 2 * COUNT
    assert results["overall"] == pytest.approx((results["t2i"]["strict"] + results["edit"]["strict"]) / 2)


def test_a_stopped_run_goes_on(copy, model, drawn):
    lost = copy / "images/edit-0003.png"
    lost.unlink()
    (copy / "results.json").unlink()
    kept = (copy / "images/edit-0002.png").stat().st_mtime_ns
    evaluate(model, copy)
    assert (copy / "images/edit-0002.png").stat().st_mtime_ns == kept
    found, before = (np.asarray(Image.open(f / "images/edit-0003.png"), int) for f in (copy, drawn))
    assert np.abs(found - before).max() <= 1


@pytest.mark.parametrize(
    ("flags", "name"), [(["--guidance-scale", "3"], "sampling"), (["--seed", "5"], "--seed"), (["--n", "7"], "--n")]
)
def test_other_settings_need_another_folder(copy, model, flags, name):
    before = (copy / "results.json").read_bytes()
    with pytest.raises(InputError, match=f"{name}: .*Name another folder"):
        evaluate(model, copy, *flags)
    assert (copy / "results.json").read_bytes() == before


def test_another_model_needs_another_folder(copy):
    with pytest.raises(InputError, match="weights: .*Name another folder"):
        evaluate("micro", copy)


def test_drawing_and_scoring_apart(model, tmp_path):
    assert evaluate(model, tmp_path / "out", "--only", "draw") is None
    assert main(["eval", "micro", "--only", "score", "--out", str(tmp_path / "out")]) == 0  # n and seed as drawn
    assert (tmp_path / "out/index.html").is_file()


def test_anybodys_pictures_are_scored(right):
    results = evaluate("no model", right, "--only", "score")
    assert results["t2i"]["strict"] == results["edit"]["strict"] == results["overall"] == 1.0
    assert results["t2i"]["interval"] == [1.0, 1.0]
    assert {kind["n"] for kind in results["edit"]["kinds"].values()} == {1}
    assert not any(item["notes"] for item in results["items"])
    assert "model" not in results


def test_missing_and_broken_pictures_are_counted(right):
    (right / "images/t2i-0000.png").unlink()
    (right / "images/t2i-0001.png").write_bytes(b"\x89PNG broken")
    Image.new("RGB", (32, 32)).save(right / "images/edit-0002.png")  # of another size
    with pytest.raises(InputError, match=r"found 9 of 12 \(missing: 1, broken: 2; such as t2i-0000, t2i-0001"):
        evaluate("no model", right, "--only", "score")
    assert not (right / "results.json").exists()
    results = evaluate("no model", right, "--only", "score", "--min-coverage", 0.7)
    missing, broken = ["t2i-0000"], ["t2i-0001", "edit-0002"]
    assert results["coverage"] == {"expected": 12, "judged": 9, "missing": missing, "broken": broken}
    assert results["t2i"]["n"] == 4 and results["edit"]["n"] == 5
    page = (right / "index.html").read_text()
    assert "9 of 12 pictures were judged" in page


def test_nothing_to_score(tmp_path):
    with pytest.raises(InputError, match="found 0 of 12"):
        evaluate("no model", tmp_path / "none", "--only", "score", "--min-coverage", 0)


def test_the_page_has_every_item_and_its_verdict(right):
    source = Image.open(right / "images/t2i-0001.png")
    source.save(right / "images/t2i-0000.png")  # another prompt's picture
    evaluate("no model", right, "--only", "score")
    page = (right / "index.html").read_text()
    assert page.count("<figure") == 12
    (failed,) = re.findall(r"<figure class=failed[^>]*>.*?</figure>", page, flags=re.DOTALL)
    assert "images/t2i-0000.png" in failed and "single_object: not " in failed
    assert all(f"<option>{kind}</option>" in page for kind in ("counting", "background", "edit", "failed"))


def test_prompts_cannot_write_into_the_page(right):
    benchmark = micro_benchmark(COUNT, 1234)
    results, _ = score(benchmark, right)
    results["items"][0] |= {"prompt": "<script>alert(1)</script>", "notes": ["<b>"]}
    from unipic2.trainer.evaluation.page import write_page

    page = write_page(right, results).read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page and "not &lt;b&gt;" in page


def write_results(folder, strict: dict[str, float], **other):
    items = [{"id": k, "task": "t2i", "kind": k[0], "prompt": k, "strict": v, "soft": v, "notes": []}
             for k, v in strict.items()]  # fmt: skip
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"benchmark": "micro", "prompts": "p", "items": items, **other}))
    return folder


def test_a_comparison_by_hand(tmp_path):
    first = write_results(tmp_path / "a", {"x1": 0, "x2": 1, "y1": 0, "y2": 1})
    second = write_results(tmp_path / "b", {"x1": 1, "x2": 1, "y1": 1, "y2": 0})
    found = compare([first, second])["tasks"]
    assert list(found) == ["t2i", "t2i: x", "t2i: y"]
    assert [entry["strict"] for entry in found["t2i"]] == [0.5, 0.75]
    assert found["t2i"][0]["difference"] is None
    assert found["t2i"][1]["difference"] == 0.25  # of 1, 0, 1, -1
    deviation = np.std([1, 0, 1, -1], ddof=1) / 2
    np.testing.assert_allclose(
        found["t2i"][1]["interval"], [0.25 - 1.96 * deviation, 0.25 + 1.96 * deviation], atol=1e-3
    )
    assert "| **t2i** | 0.500 | 0.750 (+0.250, " in table(compare([first, second]))


def test_only_what_all_have_is_compared(tmp_path):
    first = write_results(tmp_path / "a", {"x1": 1, "x2": 0, "x3": 1})
    second = write_results(tmp_path / "b", {"x1": 0, "x2": 1})
    entries = compare([first, second])["tasks"]["t2i"]
    assert [entry["n"] for entry in entries] == [2, 2] and entries[0]["strict"] == 0.5


def test_what_cannot_be_compared(tmp_path):
    first = write_results(tmp_path / "a", {"x1": 1})
    with pytest.raises(InputError, match="b, prompts: found q, expected p"):
        compare([first, write_results(tmp_path / "b", {"x1": 1}, prompts="q")])
    with pytest.raises(InputError, match="no item that all of them have"):
        compare([first, write_results(tmp_path / "c", {"y1": 1})])
    with pytest.raises(InputError, match="found no results.json.*Score it first"):
        compare([first, tmp_path])
    with pytest.raises(InputError, match="compare: found one folder"):
        main(["compare", str(first)])


def test_the_compare_command(drawn, right, tmp_path, capsys):
    evaluate("no model", right, "--only", "score")
    assert main(["compare", str(drawn), str(right), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "| | random | right |" in printed and "(+1.000, " in printed
    assert Image.open(tmp_path / "out/comparison.png").width > 100
    assert json.loads((tmp_path / "out/comparison.json").read_text())["folders"] == [str(drawn), str(right)]


def test_intervals_of_means():
    assert mean_interval(np.ones(5)) == [1.0, 1.0] and mean_interval(np.zeros(1)) == [0.0, 0.0]
    low, high = mean_interval(np.array([0.0, 1.0] * 200))
    assert low == pytest.approx(0.451, abs=0.01) and high == pytest.approx(0.549, abs=0.01)
    assert [low, high] == mean_interval(np.array([0.0, 1.0] * 200))
