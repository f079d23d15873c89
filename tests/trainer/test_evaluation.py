"""Benchmarks: drawing that goes on, scores of anybody's pictures, pages, and comparisons worked out by hand."""

import copy as copy_module
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from unipic2.core.errors import InputError
from unipic2.trainer.adapters import lora_config, prepare, save_lora
from unipic2.trainer.cli import main
from unipic2.trainer.evaluation.compare import compare, table
from unipic2.trainer.evaluation.figures import mean_interval
from unipic2.trainer.evaluation.items import digest
from unipic2.trainer.evaluation.micro import micro_benchmark
from unipic2.trainer.evaluation.run import score
from unipic2.trainer.micro.evaluate import draw, eval_edit_tasks, eval_t2i_tasks
from unipic2.trainer.micro.world import render

COUNT = 6
FROZEN = "f7c496ff5ab27b6d820fef63fec6c591f465e3cb95ff35ff7d2927d1b2998066"


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
    assert results["overall"] == pytest.approx(
        (results["tasks"]["t2i"]["strict"] + results["tasks"]["edit"]["strict"]) / 2
    )


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
    assert results["tasks"]["t2i"]["strict"] == results["tasks"]["edit"]["strict"] == results["overall"] == 1.0
    assert results["tasks"]["t2i"]["interval"] == [1.0, 1.0]
    assert {kind["n"] for kind in results["tasks"]["edit"]["kinds"].values()} == {1}
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
    assert results["coverage"] == {"expected": 12, "judged": 9, "missing": missing, "broken": broken, "unjudged": []}
    assert results["tasks"]["t2i"]["n"] == 4 and results["tasks"]["edit"]["n"] == 5
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

    page = write_page(right, results, []).read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page and "not &lt;b&gt;" in page


def write_results(folder, strict: dict[str, float], **other):
    same = {"task": "t2i", "seed": 0, "group": "", "notes": []}
    items = [{**same, "id": k, "kind": k[0], "prompt": k, "strict": v, "soft": v} for k, v in strict.items()]
    results = {"benchmark": "micro", "prompts": "p", "measures": ["strict", "soft"], "passing": 1, "items": items}
    results["mean_of_kinds"] = False
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({**results, **other}))
    return folder


def test_a_comparison_by_hand(tmp_path):
    first = write_results(tmp_path / "a", {"x1": 0, "x2": 1, "y1": 0, "y2": 1})
    second = write_results(tmp_path / "b", {"x1": 1, "x2": 1, "y1": 1, "y2": 0})
    found = compare([first, second])["tasks"]
    assert list(found) == ["t2i", "t2i: x", "t2i: y"]
    assert [entry["mean"] for entry in found["t2i"]] == [0.5, 0.75]
    assert found["t2i"][0]["difference"] is None
    assert found["t2i"][1]["difference"] == 0.25  # of 1, 0, 1, -1
    assert found["t2i"][1]["interval"] == mean_interval(alone(1, 0, 1, -1))
    assert "| **t2i** | 0.500 | 0.750 (+0.250, " in table(compare([first, second]))


def test_a_comparison_is_of_the_benchmarks_own_mean(tmp_path):
    """Kinds that weigh the same, of different size; the pictures of a prompt are drawn anew together."""
    first = write_results(tmp_path / "a", {"x1": 0, "x2": 0, "x3": 0, "y1": 0}, mean_of_kinds=True)
    second = write_results(tmp_path / "b", {"x1": 1, "x2": 1, "x3": 0, "y1": 0}, mean_of_kinds=True)
    for folder in (first, second):
        results = json.loads((folder / "results.json").read_text())
        for item in results["items"]:
            item["group"] = "all" if item["kind"] == "x" else ""
        (folder / "results.json").write_text(json.dumps(results))
    entry = compare([first, second])["tasks"]["t2i"][1]
    assert entry["mean"] == entry["difference"] == pytest.approx(1 / 3, abs=1e-4)
    assert entry["interval"] == [pytest.approx(1 / 3, abs=1e-4)] * 2, "one group of each kind: nothing is drawn anew"


def test_only_what_all_have_is_compared(tmp_path):
    first = write_results(tmp_path / "a", {"x1": 1, "x2": 0, "x3": 1})
    second = write_results(tmp_path / "b", {"x1": 0, "x2": 1})
    entries = compare([first, second])["tasks"]["t2i"]
    assert [entry["n"] for entry in entries] == [2, 2] and entries[0]["mean"] == 0.5


def test_what_cannot_be_compared(tmp_path):
    first = write_results(tmp_path / "a", {"x1": 1})
    with pytest.raises(InputError, match="b, prompts: found q, expected p"):
        compare([first, write_results(tmp_path / "b", {"x1": 1}, prompts="q")])
    with pytest.raises(InputError, match="no item that all of them have"):
        compare([first, write_results(tmp_path / "c", {"y1": 1})])
    with pytest.raises(InputError, match="found no results.json.*Score it first"):
        compare([first, tmp_path])
    with pytest.raises(InputError, match="compare: found one folder or model"):
        main(["compare", str(first)])


def test_the_compare_command(drawn, right, tmp_path, capsys):
    evaluate("no model", right, "--only", "score")
    assert main(["compare", str(drawn), str(right), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "| | random | right |" in printed and "(+1.000, " in printed
    assert Image.open(tmp_path / "out/comparison.png").width > 100
    assert json.loads((tmp_path / "out/comparison.json").read_text())["folders"] == [str(drawn), str(right)]


def alone(*values: float) -> np.ndarray:
    return np.array([(value, 1) for value in values], float)


def test_intervals_of_means():
    assert mean_interval(alone(*[1] * 5)) == [1.0, 1.0] and mean_interval(alone(0)) == [0.0, 0.0]
    halves = alone(*[0, 1] * 200)
    low, high = mean_interval(halves)
    assert low == pytest.approx(0.451, abs=0.01) and high == pytest.approx(0.549, abs=0.01)
    assert [low, high] == mean_interval(halves)


def test_intervals_draw_whole_groups():
    """400 pictures of which each four are alike tell no more than 100."""
    low, high = mean_interval(np.array([(4, 4), (0, 4)] * 50, float))
    assert low == pytest.approx(0.402, abs=0.015) and high == pytest.approx(0.598, abs=0.015)


def test_intervals_of_means_over_kinds():
    """One kind of 10 weighs as much as one of 1000; a kind without any spread only shifts."""
    small, large, fixed = alone(*[0, 1] * 5), alone(*[0, 1] * 500), alone(*[1] * 7)
    low, high = mean_interval(small, large)
    half = 1.96 / 2 * np.sqrt(0.25 / 10 + 0.25 / 1000)
    assert low == pytest.approx(0.5 - half, abs=0.02) and high == pytest.approx(0.5 + half, abs=0.02)
    low, high = mean_interval(small, fixed)
    half = 1.96 / 2 * np.sqrt(0.25 / 10)
    assert low == pytest.approx(0.75 - half, abs=0.04) and high == pytest.approx(0.75 + half, abs=0.04)


def test_two_processes_draw_what_one_draws(model, drawn, tmp_path):
    out = tmp_path / "two"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command += ["-m", "unipic2.cli", "eval", "micro", "--model", str(model), "--out", str(out), "--n", str(COUNT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--steps", "1"], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for path in (drawn / "images").iterdir():
        one, two = (np.asarray(Image.open(folder / "images" / path.name), int) for folder in (drawn, out))
        assert np.abs(one - two).max() <= 1
    results = [json.loads((folder / "results.json").read_text()) for folder in (drawn, out)]
    assert results[0]["prompts"] == results[1]["prompts"] and len(results[1]["items"]) == 2 * COUNT


def test_a_lora_on_top(model, pipeline, drawn, tmp_path):
    adapted = copy_module.deepcopy(pipeline)
    prepare(adapted.transformer, "full", lora_config(4, 8, 0.0, ["attention"]), seed=0)
    with torch.no_grad():
        for name, parameter in adapted.transformer.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    save_lora(adapted, tmp_path / "lora")
    results = evaluate(model, tmp_path / "out", "--lora", tmp_path / "lora")
    before = json.loads((drawn / "results.json").read_text())
    assert results["lora"] == str(tmp_path / "lora") and results["weights"] != before["weights"]
    with torch.no_grad():
        expected = adapted(
            [item["prompt"] for item in results["items"][:1]], width=64, height=64, num_inference_steps=1,
            guidance_scale=1.5, generator=[torch.Generator().manual_seed(1234)],
        ).images[0]  # fmt: skip
    found = np.asarray(Image.open(tmp_path / "out/images/t2i-0000.png"), int)
    assert np.abs(found - np.asarray(expected, int)).max() <= 1
    assert np.abs(found - np.asarray(Image.open(drawn / "images/t2i-0000.png"), int)).max() > 1
    shutil.copy(tmp_path / "lora/pytorch_lora_weights.safetensors", tmp_path / "x.safetensors")
    tensors = {f"unet.{key}": tensor for key, tensor in load_file(tmp_path / "x.safetensors").items()}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="--lora .*found nothing for this transformer"):
        evaluate(model, tmp_path / "none", "--lora", tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="--lora .*found no such file.*training exported"):
        evaluate(model, tmp_path / "none", "--lora", tmp_path / "nothing.safetensors")


def test_through_another_models_connector(make_metaquery_pipeline, tmp_path):
    first, second = make_metaquery_pipeline(), make_metaquery_pipeline()
    with torch.no_grad():
        for parameter in second.transformer.parameters():
            parameter.mul_(1.05)
    for name, made in (("first", first), ("second", second)):
        made.save_pretrained(tmp_path / name)
    found = evaluate(tmp_path / "second", tmp_path / "out", "--metaquery", tmp_path / "first")
    assert found["metaquery"] == str(tmp_path / "first") and found["model"] == str(tmp_path / "second")
    evaluate(tmp_path / "second", tmp_path / "own")  # the same connector and language model
    for path in (tmp_path / "own/images").iterdir():
        assert path.read_bytes() == (tmp_path / "out/images" / path.name).read_bytes()


def test_models_by_name_are_drawn_and_compared(model, tmp_path, capsys):
    other = shutil.copytree(model, tmp_path / "other")
    command = ["compare", str(model), str(other), "--out", str(tmp_path / "out"), "--n", "2", "--steps", "1"]
    assert main(command) == 0
    assert "| | " in capsys.readouterr().out and (tmp_path / "out/comparison.png").is_file()
    folders = json.loads((tmp_path / "out/comparison.json").read_text())["folders"]
    assert all((tmp_path / "out") in Path(folder).parents for folder in folders) and len(set(folders)) == 2
    with pytest.raises(InputError, match="found a model, expected --out too"):
        main(["compare", str(model), str(other)])
    with pytest.raises(InputError, match="compare .*typo: found no such folder"):
        main(["compare", str(model), str(tmp_path / "typo"), "--out", str(tmp_path / "out")])


def test_a_model_is_drawn_like_the_folder_beside_it(model, drawn, right, tmp_path):
    out = tmp_path / "out"
    assert main(["compare", str(drawn), str(model), "--out", str(out)]) == 0
    (folder,) = (path for path in out.iterdir() if path.is_dir())
    found, before = (json.loads((path / "run.json").read_text()) for path in (folder, drawn))
    assert found["n"] == before["n"] == COUNT and found["sampling"] == before["sampling"]
    evaluate("no model", right, "--only", "score")  # a folder without run.json says it, too
    assert main(["compare", str(right), str(model), "--out", str(tmp_path / "two"), "--steps", "1"]) == 0
    with pytest.raises(InputError, match="found other prompts, expected those of --n and --seed"):
        main(["compare", str(right), str(model), "--out", str(tmp_path / "none"), "--seed", "5"])
    results, other = json.loads((drawn / "results.json").read_text()), tmp_path / "other"
    other.mkdir()
    (other / "results.json").write_text(json.dumps({**results, "benchmark": "geneval"}))
    with pytest.raises(InputError, match="other: found geneval, expected results of the micro benchmark"):
        main(["compare", str(other), str(model), "--out", str(tmp_path / "none")])
    (other / "results.json").write_text(json.dumps({**results, "judge": {"model": "another"}}))
    with pytest.raises(InputError, match="other, judge: found .*another"):
        compare([drawn, other])
    assert not (tmp_path / "none").exists()


def test_the_bundled_models_from_drawing_to_the_table(tmp_path, capsys):
    """The whole way on real weights: 24 prompts and 24 edits of two models, judged, compared, on a page."""
    command = ["compare", "micro-pretrained", "micro", "--n", "24", "--guidance-scale", "1", "--out", str(tmp_path)]
    assert main(command) == 0
    found = json.loads((tmp_path / "comparison.json").read_text())["tasks"]
    assert found["t2i"][1]["mean"] >= 0.5 and found["edit"][1]["mean"] >= 0.5, "0.93 and 0.88 of many"
    assert found["t2i"][1]["difference"] > 0, "0.37 of many"
    assert "| | micro-pretrained | micro |" in capsys.readouterr().out
    assert (tmp_path / "micro/index.html").is_file() and (tmp_path / "comparison.png").is_file()
