"""Codec helpers, scores, contact sheets and the micro commands."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from unipic2.core.errors import InputError
from unipic2.trainer.cli import main
from unipic2.trainer.micro.codec import (
    CodecLoss,
    PictureDataset,
    round_trip_accuracy,
    sample_scenes,
    to_images,
    to_pixels,
)
from unipic2.trainer.micro.evaluate import evaluate, judge, summarize
from unipic2.trainer.micro.sheet import Cell, contact_sheet, world_sheet
from unipic2.trainer.micro.tasks import T2I_KINDS, sample_t2i
from unipic2.trainer.micro.world import render


def test_pixels_and_pictures_are_inverse():
    images = [render(scene) for scene in sample_scenes(3, seed=0)]
    pixels = to_pixels(images)
    assert pixels.shape == (3, 3, 64, 64) and -1 <= pixels.min() and pixels.max() <= 1
    assert all(a.tobytes() == b.tobytes() for a, b in zip(to_images(pixels), images, strict=True))
    assert to_images(torch.full((1, 3, 2, 2), 9.0))[0].getpixel((0, 0)) == (255, 255, 255)


def test_training_pictures_are_the_same_for_the_same_seed():
    first, again, later = (PictureDataset(12, 4, seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[i]["pixel_values"], again[i]["pixel_values"]) for i in range(4))
    assert not all(torch.equal(first[i]["pixel_values"], later[i]["pixel_values"]) for i in range(4))
    assert first[0]["pixel_values"].shape == (3, 64, 64)


def test_codec_training_reaches_encoder_and_decoder(vae, tmp_path):
    pictures = PictureDataset(12, 8, 0)
    model = CodecLoss(copy.deepcopy(vae))
    torch.manual_seed(0)
    model(torch.stack([pictures[i]["pixel_values"] for i in range(4)]))["loss"].backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert all(g is not None and g.abs().sum() > 0 for n, g in grads.items() if n.endswith("weight"))


def test_a_work_folder_of_another_run_is_left_alone(tmp_path):
    from unipic2.trainer.micro.make import Stages

    first = Stages(tmp_path, {"seed": 0})
    first.run("codec", lambda: (tmp_path / "weights").write_text("hours of work"))
    again = Stages(tmp_path, {"seed": 0})
    again.run("codec", lambda: pytest.fail("it is done"))
    assert again.minutes.keys() == {"codec"}
    with pytest.raises(InputError, match="a run with other settings.*--work"):
        Stages(tmp_path, {"seed": 1})
    assert (tmp_path / "weights").read_text() == "hours of work"


def test_make_replaces_nothing_that_is_not_a_model(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/photo.png").write_text("dear to me")
    for out in ("mine", "mine/photo.png"):
        with pytest.raises(InputError, match="expected a new folder, an empty one, or an exported pipeline"):
            main(["micro", "make", "--out", str(tmp_path / out), "--work", str(tmp_path / "work")])
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    with pytest.raises(InputError, match="found --output_dir, expected other flags. Take --out and --work"):
        main(["micro", "make", "--out", str(tmp_path / "new"), "--output_dir", "x"])


def test_an_untrained_codec_scores_badly(vae):
    assert round_trip_accuracy(vae, 12, seed=0) < 0.5


def test_scores_are_counted_by_kind():
    rng = np.random.default_rng(0)
    samples = [sample_t2i(rng, kind) for kind in T2I_KINDS for _ in range(2)]
    tasks = [task for task, _ in samples]
    images = [render(scene) for _, scene in samples]
    images[0] = Image.new("RGB", (64, 64), "white")
    scores = summarize(tasks, judge(images, tasks))
    assert scores["strict"] == round(11 / 12, 6) and scores["n"] == 12
    assert scores["kinds"]["single_object"]["strict"] == 0.5 and scores["kinds"]["counting"]["strict"] == 1.0


def test_evaluate_draws_and_counts(pipeline):
    results, drawn = evaluate(pipeline, 6, seed=3, num_inference_steps=1)
    assert results["n"] == 6 and results["seed"] == 3
    for task in ("t2i", "edit"):
        assert results[task]["n"] == 6 and results[task]["strict"] == 0.0 and len(results[task]["kinds"]) == 6
        assert [image.size for image in drawn[task][1]] == [(64, 64)] * 6
    assert json.loads(json.dumps(results)) == results


def test_contact_sheet_frames_tell_the_verdict():
    picture = render(sample_scenes(1, seed=0)[0])
    cells = [Cell("a red circle", [picture], passed) for passed in (True, False, None)]
    colors = [{c for _, c in contact_sheet([cell]).getcolors(100_000)} for cell in cells]
    green, red, gray = (40, 160, 70), (210, 40, 40), (190, 190, 190)
    assert [green in c for c in colors] == [True, False, False]
    assert [red in c for c in colors] == [False, True, False]
    assert [gray in c for c in colors] == [False, False, True]
    wide = contact_sheet(cells * 4, columns=4)
    one = contact_sheet(cells[:1], columns=1)
    assert wide.size == (4 * one.width, 3 * one.height)
    assert np.asarray(one)[6 + 64, 6 + 64].tolist() == list(picture.getpixel((32, 32)))


def test_world_sheet_is_all_green(tmp_path):
    sheet = world_sheet(seed=0, per_kind=2)
    assert sheet.tobytes() == world_sheet(seed=0, per_kind=2).tobytes()
    colors = {c for _, c in sheet.getcolors(1_000_000)}
    assert (40, 160, 70) in colors and (210, 40, 40) not in colors


def test_the_sheet_command(tmp_path, capsys):
    assert main(["micro", "sheet", "-o", str(tmp_path / "sheet.png"), "--seed", "3"]) == 0
    assert Image.open(tmp_path / "sheet.png").size == world_sheet(3).size
    assert capsys.readouterr().out.strip() == str(tmp_path / "sheet.png")


@pytest.mark.parametrize("name", ["no/such/folder/sheet.png", "sheet.unknown"])
def test_the_sheet_command_with_a_bad_file_name(tmp_path, name):
    with pytest.raises(InputError, match="sheet"):
        main(["micro", "sheet", "-o", str(tmp_path / name)])
    assert list(tmp_path.iterdir()) == []


def test_the_eval_command(pipeline, tmp_path, capsys):
    pipeline.save_pretrained(tmp_path / "model")
    flags = ["--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--n", "6", "--steps", "1"]
    assert main(["eval", "micro", *flags]) == 0
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["n"] == 6 and results["seed"] == 1234 and results["model"] == str(tmp_path / "model")
    assert {"strict", "kinds"} <= results["tasks"]["t2i"].keys() & results["tasks"]["edit"].keys()
    made = ["images", "index.html", "results.json", "results.png", "run.json", "sources"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == made
    assert "edit: strict 0.000, soft " in capsys.readouterr().out


def test_the_eval_command_with_bad_flags(tmp_path):
    with pytest.raises(InputError, match="--n: found 0"):
        main(["eval", "micro", "--n", "0", "--out", str(tmp_path)])
    with pytest.raises(InputError, match="--seed: found -1, expected at least 0"):
        main(["micro", "sheet", "--seed", "-1"])
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="found a file"):
        main(["eval", "micro", "--out", str(tmp_path / "file")])
    with pytest.raises(InputError, match="no such folder"):
        main(["eval", "micro", "--model", str(tmp_path / "none"), "--out", str(tmp_path)])
    for flags in (["eval", "micro"], ["eval", "micro", "--out", "x", "--nn", "3"], ["micro"]):
        with pytest.raises(SystemExit) as stop:
            main(flags)
        assert stop.value.code == 2


def test_an_unknown_training_method():
    with pytest.raises(InputError, match="training method: found 'grpoo', expected one of pretrain"):
        main(["train", "grpoo"])
