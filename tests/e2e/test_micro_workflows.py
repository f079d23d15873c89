"""The micro workflows through `unipic2 run` on a real ComfyUI server, judged by the verifier.

ComfyUI and the trainer draw the same noise from the same seed, so beside the accuracies the pictures themselves
are compared with the trainer's own sampling of the same weights.
"""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from unipic2.cli import main
from unipic2.cli.comfyui import Server, resolve_install
from unipic2.core.micro import EDIT_GUIDANCE_SCALE, weights_dir
from unipic2.trainer import MetaQueryPipeline, StableDiffusion3KontextPipeline
from unipic2.trainer.micro.evaluate import draw, eval_edit_tasks, eval_t2i_tasks, judge
from unipic2.trainer.micro.verifier import read_scene
from unipic2.trainer.micro.world import GROUNDS, render

from ..benchmark_file import benchmark

pytestmark = pytest.mark.comfyui

comfyui_benchmark = benchmark("comfyui")
run_workflow, distance = comfyui_benchmark.run_workflow, comfyui_benchmark.distance
COUNT = 24  # four of each kind
SEED = 4321


@pytest.fixture(scope="module")
def server():
    with Server(resolve_install(), cpu=True) as running:
        yield running


@pytest.fixture(scope="module")
def pipeline():
    return StableDiffusion3KontextPipeline.from_pretrained(weights_dir(), torch_dtype=torch.float32)


@pytest.fixture(scope="module")
def metaquery():
    return MetaQueryPipeline.from_pretrained("micro-metaquery", torch_dtype=torch.float32)


def accuracy(images, tasks):
    return np.mean([verdict.strict for verdict in judge(images, tasks)])


def compare(comfyui, trainer, tasks, at_least):
    """Assert that the two sets of pictures score alike, well, and look alike."""
    ours, theirs, apart = accuracy(comfyui, tasks), accuracy(trainer, tasks), distance(comfyui, trainer)
    print(f"strict: ComfyUI {ours:.3f}, trainer {theirs:.3f}; mean pixel distance {apart:.3f} of 255")
    assert abs(ours - theirs) <= 0.1
    assert ours >= at_least
    assert apart < 2.0


def test_text_to_image(server, pipeline, tmp_path):
    tasks = eval_t2i_tasks(COUNT, SEED)
    comfyui = [run_workflow(server, "micro_text_to_image", task, SEED + i, tmp_path) for i, task in enumerate(tasks)]
    compare(comfyui, draw(pipeline, tasks, SEED), tasks, at_least=0.5)


def test_edit(server, pipeline, tmp_path):
    tasks = eval_edit_tasks(COUNT, SEED)
    comfyui = [
        run_workflow(server, "micro_edit", task, SEED + i, tmp_path, render(task.source))
        for i, task in enumerate(tasks)
    ]
    trainer = draw(pipeline, tasks, SEED, guidance_scale=EDIT_GUIDANCE_SCALE)
    compare(comfyui, trainer, tasks, at_least=0.6)


@pytest.mark.parametrize("name", ["t2i", "edit"])
def test_the_benchmark_of_their_accuracy(server, pipeline, name):
    """On few of its samples, without guidance, as by default."""
    found = comfyui_benchmark.measure(server, pipeline, name, 6, 1234, 1.0)
    assert (found["comfyui"] != found["trainer"]).sum() <= 1 and found["comfyui"].mean() >= 0.5
    assert 0 < found["apart"] < 2.0
    assert comfyui_benchmark.told(found).startswith(f"ComfyUI {found['comfyui'].mean():.3f}")


def test_text_to_image_with_skip_layer_guidance(server, tmp_path):
    """The stock node acts on the micro model, and its pictures are as right as those without it."""
    tasks = eval_t2i_tasks(12, SEED)
    plain, guided = (
        [run_workflow(server, name, task, SEED + i, tmp_path) for i, task in enumerate(tasks)]
        for name in ("micro_text_to_image", "micro_text_to_image_slg")
    )
    before, after, apart = accuracy(plain, tasks), accuracy(guided, tasks), distance(plain, guided)
    print(f"strict: {before:.3f}, with Skip Layer Guidance {after:.3f}; mean pixel distance {apart:.3f} of 255")
    assert apart > 0.1
    assert after >= before - 0.2


def test_edit_with_easycache(server, tmp_path):
    """Steps are left out, and the edits are as right as those with every step, and close to them."""
    tasks = eval_edit_tasks(12, SEED)
    start = server.log.stat().st_size
    plain, fast = (
        [run_workflow(server, name, task, SEED + i, tmp_path, render(task.source)) for i, task in enumerate(tasks)]
        for name in ("micro_edit", "micro_edit_fast")
    )
    skipped = [int(n) for n in re.findall(rb"EasyCache - skipped (\d+)/20 steps", server.log.read_bytes()[start:])]
    before, after, apart = accuracy(plain, tasks), accuracy(fast, tasks), distance(plain, fast)
    print(f"strict: {before:.3f}, with EasyCache {after:.3f}; mean pixel distance {apart:.3f} of 255; of 20 {skipped}")
    assert len(skipped) == len(tasks) and min(skipped) > 0
    assert after >= before - 0.2
    assert apart < 20


def test_edit_with_lora(server, tmp_path):
    """The bundled LoRA brings edits onto beige, by the stock loader; at strength 0 they are those without it."""
    tasks = [task for task in eval_edit_tasks(24, SEED) if task.kind != "background" and task.source.ground != "beige"]
    with_lora, without, plain = (
        [run_workflow(server, name, task, SEED + i, tmp_path, render(task.source), *options)
         for i, task in enumerate(tasks[:count])]
        for name, count, options in (
            ("micro_edit_lora", 12, ()),
            ("micro_edit_lora", 2, ("--set", "LoraLoaderModelOnly.strength_model=0")),
            ("micro_edit", 2, ()),
        )
    )  # fmt: skip
    on_beige = [replace(task, target=replace(task.target, ground="beige")) for task in tasks[:12]]
    grounds = [read_scene(image).ground for image in with_lora]
    right = accuracy(with_lora, on_beige)
    print(f"strict with the LoRA {right:.3f}; grounds {grounds}")
    assert grounds.count("beige") >= 11 and right >= 0.5
    assert distance(without, plain) == 0


def test_edit_at_full_size(server, tmp_path):
    """The edit comes back at the picture's size, four times the model's, and is as right as a small one."""
    tasks = eval_edit_tasks(12, SEED)
    edited = [
        run_workflow(server, "micro_edit_full_size", task, SEED + i, tmp_path, render(task.source).resize((256, 256)))
        for i, task in enumerate(tasks)
    ]
    assert {image.size for image in edited} == {(256, 256)}
    right = accuracy([image.resize((64, 64)) for image in edited], tasks)
    print(f"strict at full size: {right:.3f}")
    assert right >= 0.5


def with_hole(task):
    """Return the picture of an edit, 256 pixels wide, transparent around the thing that it is about, and where."""
    thing = task.source.things[task.index]
    picture = render(task.source).resize((256, 256)).convert("RGBA")
    alpha = np.full((256, 256), 255, np.uint8)
    left, right, top, bottom = (4 * edge for edge in (thing.x - 12, thing.x + 12, thing.y - 12, thing.y + 12))
    rows, columns = (slice(max(0, int(low)), int(high)) for low, high in ((top, bottom), (left, right)))
    alpha[rows, columns] = 0
    picture.putalpha(Image.fromarray(alpha))
    return picture, rows, columns


def test_local_edit(server, tmp_path):
    """What is transparent in the picture changes, as it was asked, and its fading border; beyond that not a pixel."""
    tasks = [task for task in eval_edit_tasks(COUNT, SEED) if task.kind in ("recolor", "reshape", "remove")]
    edited = []
    for i, task in enumerate(tasks):
        source, rows, columns = with_hole(task)
        edited.append(run_workflow(server, "micro_edit_local", task, SEED + i, tmp_path, source))
        out, before = (np.asarray(image.convert("RGB"), int) for image in (edited[-1], source))
        hole = Image.fromarray(255 - np.asarray(source)[..., 3])
        near = np.asarray(hole.filter(ImageFilter.MaxFilter(2 * 17 + 1))) > 0
        assert np.array_equal(out[~near], before[~near]), task.prompt
        assert np.abs(out - before)[rows, columns].mean() > 5, task.prompt
    right = accuracy([image.resize((64, 64)) for image in edited], tasks)
    print(f"strict, edits inside a mask: {right:.3f} of {len(tasks)}")
    assert right >= 0.5


def test_local_edit_wants_a_mask(server, tmp_path, capsys):
    """A picture without one would come back as it was."""
    task = eval_edit_tasks(1, SEED)[0]
    render(task.source).save(tmp_path / "opaque.png")
    arguments = ["run", "micro_edit_local", "--server", server.url, "--image", str(tmp_path / "opaque.png")]
    assert main([*arguments, "-o", str(tmp_path / "out.png")]) == 2
    assert "opaque.png: found none (mode RGB), expected transparency" in capsys.readouterr().err


def test_batch_edit(server, tmp_path):
    """One instruction, two pictures, each with its own result."""
    sources = [task.source for task in eval_edit_tasks(6, SEED) if task.kind in ("recolor", "background")][:2]
    paths = [tmp_path / f"source_{i}.png" for i in range(2)]
    for path, scene in zip(paths, sources, strict=True):
        render(scene).save(path)
    given = [part for node, path in zip(("2", "3"), paths, strict=True) for part in ("--image", f"{node}={path}")]
    out = tmp_path / "out.png"
    arguments = ["run", "micro_edit_batch", "--server", server.url, "--prompt", "make the background beige", *given]
    assert main([*arguments, "--seed", "1", "-o", str(out)]) == 0
    drawn = [np.asarray(Image.open(tmp_path / f"out_0000{i}.png").convert("RGB"), int) for i in (1, 2)]
    for picture, scene in zip(drawn, sources, strict=True):
        assert np.abs(picture[:3].mean((0, 1)) - GROUNDS["beige"]).max() < 12
        unchanged = np.abs(picture - np.asarray(render(replace(scene, ground="beige")), int)).mean()
        assert unchanged < 12


def test_metaquery_text_to_image(server, metaquery, tmp_path):
    tasks = eval_t2i_tasks(COUNT, SEED)
    name = "micro_metaquery_text_to_image"
    comfyui = [run_workflow(server, name, task, SEED + i, tmp_path) for i, task in enumerate(tasks)]
    compare(comfyui, draw(metaquery, tasks, SEED), tasks, at_least=0.4)


def test_metaquery_edit(server, metaquery, tmp_path):
    tasks = eval_edit_tasks(COUNT, SEED)
    name = "micro_metaquery_edit"
    comfyui = [
        run_workflow(server, name, task, SEED + i, tmp_path, render(task.source)) for i, task in enumerate(tasks)
    ]
    compare(comfyui, draw(metaquery, tasks, SEED), tasks, at_least=0.5)


def test_metaquery_understands_and_edits(server, metaquery, tmp_path):
    """The answer completes the instruction: the one red thing goes, the others stay."""
    edits = [task for task in eval_edit_tasks(240, SEED) if task.kind == "remove"]
    tasks = [
        task for task in edits
        if task.source.things[task.index].color == "red" and sum(t.color == "red" for t in task.source.things) == 1
    ]  # fmt: skip
    assert len(tasks) >= 4
    drawn = []
    for i, task in enumerate(tasks):
        answer = metaquery.answer("what shape is red?", render(task.source))
        assert answer == task.source.things[task.index].shape
        source, out = tmp_path / f"source_{i}.png", tmp_path / f"out_{i}.png"
        render(task.source).save(source)
        arguments = ["run", "micro_metaquery_understand_edit", "--server", server.url, "--image", str(source)]
        assert main([*arguments, "--seed", str(SEED + i), "-o", str(out)]) == 0
        drawn.append(Image.open(out).convert("RGB"))
    right = accuracy(drawn, tasks)
    print(f"understand, then remove: {right:.3f} of {len(tasks)}")
    assert right >= 0.5
