"""Streaming: what every format gives, how blocks are made, and that a stopped run goes on exactly where it was."""

import io
import json
import shutil

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from unipic2.core.errors import InputError
from unipic2.trainer.batches import DRAW_SEED
from unipic2.trainer.data import stream
from unipic2.trainer.data.buckets import aspect_buckets
from unipic2.trainer.data.sources import open_source
from unipic2.trainer.data.stream import StreamedPairs, open_stream
from unipic2.trainer.pretrain import parse, pretrain

from .conftest import write_tar

TRANSFORMER = "transformer/diffusion_pytorch_model"
FORMATS = ["jsonl", "parquet", "webdataset", "imagefolder"]


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (number, 255 - number, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def write(folder, kind: str, count: int = 12, edits: bool = True):
    """Write `count` rows, every second one an edit, as two shards where the format has shards and edits."""
    folder.mkdir()
    if kind == "jsonl":
        rows = []
        for i in range(count):
            (folder / f"{i}.png").write_bytes(png(i))
            source = {"src_img": f"{i}.png"} if i % 2 and edits else {}  # text-to-image rows lack the column
            rows.append(json.dumps({"prompt": f"p{i}", "edited_img": f"{i}.png", **source}))
        for name, part in (("a", rows[: count // 2]), ("b", rows[count // 2 :])):
            (folder / f"{name}.jsonl").write_text("\n".join(part))
    elif kind == "parquet":
        rows = [
            {"prompt": f"p{i}", "edited_img": {"bytes": png(i)}, "src_img": {"bytes": png(i)} if i % 2 else None}
            for i in range(count)
        ]
        features = datasets.Features(
            {"prompt": datasets.Value("string"), "edited_img": datasets.Image(), "src_img": datasets.Image()}
        )
        for name, part in (("a", rows[: count // 2]), ("b", rows[count // 2 :])):
            datasets.Dataset.from_list(part, features=features).to_parquet(folder / f"{name}.parquet")
    elif kind == "webdataset":
        samples = [((f"{i:04d}.png", png(i)), (f"{i:04d}.txt", f"p{i}".encode())) for i in range(count)]
        write_tar(folder / "a.tar", [member for sample in samples for member in sample])
    else:
        for i in range(count):
            (folder / f"{i:03d}.png").write_bytes(png(i))
        rows = [json.dumps({"file_name": f"{i:03d}.png", "text": f"p{i}"}) for i in range(count)]
        (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def pairs_of(*folders, pool_size=4, **options) -> StreamedPairs:
    return StreamedPairs([open_stream(str(f)) for f in folders], aspect_buckets(64), pool_size=pool_size, **options)


def sampler_of(pairs, block_size=2, edit_ratio=0.5, seed=0, num_processes=1, lookahead=4):
    return pairs.sampler(block_size, edit_ratio, seed, num_processes, lookahead)


def blocks(sampler, count, block_size=2):
    draws = iter(sampler)
    return [[next(draws) for _ in range(block_size)] for _ in range(count)]


def told(block) -> list:
    return [(entry.where, seed) for entry, seed in block]


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_its_rows(tmp_path, kind):
    pairs = pairs_of(write(tmp_path / "data", kind))
    seen = {}
    for block in blocks(sampler_of(pairs), 12):
        assert len({(entry.is_edit, entry.bucket) for entry, _ in block}) == 1
        for (entry, seed), sample in zip(block, pairs.__getitems__(block), strict=True):
            number = int(sample["prompt"].removeprefix("p"))
            assert sample["pixel_values"].shape == (3, 64, 64) and sample["pixel_values"][0, 0, 0] == number
            assert ("ref_pixel_values" in sample) == entry.is_edit and sample[DRAW_SEED] == seed
            seen[number] = entry.is_edit
    assert len(seen) >= 8, "one pass has 12 rows"
    if kind in ("jsonl", "parquet"):
        assert all(edit == bool(number % 2) for number, edit in seen.items()) and set(seen.values()) == {False, True}
    else:
        assert not any(seen.values()), "text-to-image only, whatever edit_ratio says"


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("turns", [1, 5, 9])
def test_a_saved_stream_goes_on_exactly(tmp_path, kind, turns):
    """Rows in the pool, rows to come, random choices; also over the end of a pass, and when more was drawn ahead."""
    data = write(tmp_path / "data", kind)
    whole = blocks(sampler_of(pairs_of(data)), 16)
    first = sampler_of(pairs_of(data))
    blocks(first, turns + 2)
    (tmp_path / "state").mkdir()
    first.save(tmp_path / "state", turns)
    second = sampler_of(pairs_of(data))
    second.load(tmp_path / "state")
    again = blocks(second, 16 - turns)
    assert [told(block) for block in again] == [told(block) for block in whole[turns:]]
    assert again == whole[turns:], "to the last byte"


def test_a_stream_goes_on_twice_and_on_another_number_of_processes(tmp_path):
    """Readers that were not read between two saves keep their place, too."""
    data = [write(tmp_path / "one", "jsonl", 40, edits=False), write(tmp_path / "two", "jsonl", 40)]
    options = {"edit_ratio": 0.25, "num_processes": 2}
    whole = blocks(sampler_of(pairs_of(*data), **options), 24)
    sampler, again = sampler_of(pairs_of(*data), **options), []
    for number, count in enumerate((8, 2, 2, 4)):
        again += blocks(sampler, count)
        folder = tmp_path / f"state-{number}"
        folder.mkdir()
        sampler.save(folder, len(again))
        sampler = sampler_of(pairs_of(*data), **options)
        sampler.load(folder)
    again += blocks(sampler, 8)
    assert again == whole
    alone = sampler_of(pairs_of(*data), edit_ratio=0.25)
    alone.load(folder)
    assert sorted(map(told, blocks(alone, 8))) == sorted(map(told, whole[16:]))


def test_a_closed_stream_can_go_on(tmp_path):
    data = write(tmp_path / "data", "parquet", 20)
    whole = blocks(sampler_of(pairs_of(data)), 8)
    sampler = sampler_of(pairs_of(data))
    first = blocks(sampler, 3)
    sampler.close()
    assert all(reader.iterator is None for reader in sampler.readers)
    assert first + blocks(sampler, 5) == whole


def test_a_stream_that_changed_is_refused(tmp_path):
    data = write(tmp_path / "data", "jsonl")
    first = sampler_of(pairs_of(data))
    blocks(first, 2)
    (tmp_path / "state").mkdir()
    first.save(tmp_path / "state", 2)
    other = StreamedPairs([open_stream(str(data))], aspect_buckets(96), pool_size=4)
    with pytest.raises(InputError, match="found other resolution, bucket_mode or max_aspect"):
        sampler_of(other).load(tmp_path / "state")
    (data / "c.jsonl").write_text((data / "a.jsonl").read_text())
    with pytest.raises(InputError, match="found other datasets, files or columns"):
        sampler_of(pairs_of(data)).load(tmp_path / "state")
    with pytest.raises(InputError, match="found no stream.json"):
        sampler_of(pairs_of(data)).load(tmp_path)


def test_a_stray_row_of_a_task_is_not_waited_for(tmp_path):
    edits = write(tmp_path / "edits", "jsonl", 100)
    lines = [json.loads(line) for name in "ab" for line in (edits / f"{name}.jsonl").read_text().splitlines()]
    for line in lines[1:]:
        line["src_img"] = "1.png"
    (edits / "b.jsonl").unlink()
    (edits / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    pairs = pairs_of(write(tmp_path / "pictures", "jsonl", 300, edits=False), edits, pool_size=20)
    drawn = blocks(sampler_of(pairs), 200)
    assert sum(block[0][0].is_edit for block in drawn) == 100
    assert pairs.counts.rows < 2 * 400, "about as many as were drawn"


def test_pictures_in_an_archive_are_read(tmp_path):
    folder = write(tmp_path / "data", "imagefolder", 6)
    shutil.make_archive(str(tmp_path / "zipped" / "pictures"), "zip", folder)
    pairs = pairs_of(tmp_path / "zipped")
    (block,) = blocks(sampler_of(pairs), 1)
    for sample in pairs.__getitems__(block):
        assert sample["pixel_values"][0, 0, 0] == int(sample["prompt"].removeprefix("p"))


def test_half_an_emoji_is_a_broken_row(tmp_path, capsys):
    folder = write(tmp_path / "data", "jsonl", 12)
    (folder / "0.jsonl").write_text(r'{"prompt": "a \ud83d", "edited_img": "1.png"}')
    blocks(sampler_of(pairs_of(folder, max_broken=0.5)), 12)
    assert "text in prompt that is no Unicode" in capsys.readouterr().err


def test_tasks_follow_the_ratio_and_passes_differ(tmp_path):
    pairs = pairs_of(write(tmp_path / "data", "jsonl", 40))
    sampler = sampler_of(pairs, edit_ratio=0.25)
    drawn = blocks(sampler, 40)
    assert sum(block[0][0].is_edit for block in drawn) == 10
    assert sampler.readers[0].number >= 1 and pairs.counts.rows > 40, "over the end of a pass"
    other = blocks(sampler_of(pairs_of(tmp_path / "data"), edit_ratio=0.25, seed=1), 5)
    assert [told(block) for block in other] != [told(block) for block in drawn[:5]]


def test_shards_change_their_order(tmp_path):
    data = write(tmp_path / "data", "jsonl", 4)
    reader = stream._Reader(open_stream(str(data)), seed=0)
    firsts = {json.loads([reader.next() for _ in range(4)][0]["text"])["prompt"] for _ in range(12)}
    assert firsts == {"p0", "p2"}


def test_processes_share_the_blocks_of_one(tmp_path):
    data = write(tmp_path / "data", "jsonl", 30)
    alone = blocks(sampler_of(pairs_of(data)), 12)
    shared = blocks(sampler_of(pairs_of(data), num_processes=2), 12)
    for turn in range(0, 12, 2):
        pair = [sorted(map(told, each[turn : turn + 2])) for each in (alone, shared)]
        assert pair[0] == pair[1]
    assert {shared[i][0][0].is_edit for i in range(0, 12, 2)} == {False, True}, "each process gets both tasks"


def test_streams_take_turns_at_a_task(tmp_path):
    pairs = pairs_of(write(tmp_path / "one", "jsonl", 30, edits=False), write(tmp_path / "two", "jsonl", 30))
    drawn = [entry for block in blocks(sampler_of(pairs), 80) for entry, _ in block]
    assert 0.25 < np.mean([entry.source for entry in drawn if not entry.is_edit]) < 0.75
    assert {entry.source for entry in drawn if entry.is_edit} == {1}


def test_surplus_of_a_task_does_not_fill_the_memory(tmp_path, capsys):
    folder = write(tmp_path / "data", "jsonl", 60)
    lines = [json.loads(line) for name in "ab" for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    for i, line in enumerate(lines):
        line["src_img"] = None if i % 30 == 0 else "1.png"
    (folder / "b.jsonl").unlink()
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    sampler = sampler_of(pairs_of(folder, pool_size=30), edit_ratio=0.5)
    drawn = blocks(sampler, 60)
    assert sum(block[0][0].is_edit for block in drawn) == 30
    assert sum(map(len, sampler.pools[True].values())) <= 2 * 30 and sampler.pairs.counts.surplus > 0
    assert capsys.readouterr().err.count("more edits than edit_ratio 0.5 takes") == 1


def test_a_stream_sorted_by_task_says_what_it_wastes(tmp_path, capsys):
    folder = write(tmp_path / "data", "jsonl", 200)
    lines = [line for name in "ab" for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    (folder / "b.jsonl").unlink()
    (folder / "a.jsonl").write_text("\n".join(sorted(lines, key=lambda line: "src_img" in line)))
    with pytest.raises(
        InputError, match="src_img, which the first 100 rows do not have: name it with --source_column"
    ):
        blocks(sampler_of(pairs_of(folder, pool_size=10)), 150)
    named = StreamedPairs([open_stream(str(folder), source="src_img")], aspect_buckets(64), pool_size=10)
    drawn = blocks(sampler_of(named), 150)
    assert {block[0][0].is_edit for block in drawn} == {True, False}
    assert "most rows are passed over; where its rows are sorted by task" in capsys.readouterr().err


def test_tars_of_which_some_have_edits(tmp_path):
    """The library would take the first tar's members for those of all, in each pass that of another tar."""
    (tmp_path / "data").mkdir()
    for name, edits in (("a", False), ("b", True), ("c", False)):
        samples = []
        for i in range(10):
            samples += [
                (f"{name}{i}.jpg", png(i)),
                (f"{name}{i}.json", json.dumps({"caption": f"{name}{i}"}).encode()),
            ]
            samples += [(f"{name}{i}.source_image.png", png(i))] if edits else []
        write_tar(tmp_path / f"data/{name}.tar", samples)
    pairs = pairs_of(tmp_path / "data", pool_size=30)
    drawn = [entry for block in blocks(sampler_of(pairs), 90) for entry, _ in block]
    assert pairs.counts.rows > 100 and not pairs.counts.broken, "some passes"
    assert all(entry.is_edit == entry.row["json"]["caption"].startswith("b") for entry in drawn)
    source = open_source(str(tmp_path / "data"))
    assert source.columns.source == "source_image.png" and len(source.rows) == 30
    assert sum(row["source_image.png"] is not None for row in source.rows) == 10


@pytest.mark.parametrize("size", [0, 1, 700, -1500])
def test_a_tar_that_was_cut_off_is_named(tmp_path, size):
    folder = write(tmp_path / "data", "webdataset", 40)
    whole = (folder / "a.tar").read_bytes()
    (folder / "b.tar").write_bytes((whole if size >= 0 else whole.rstrip(b"\0"))[:size])
    for open_one in (open_stream, open_source):
        with pytest.raises(InputError, match="b.tar: found no whole tar"):
            open_one(str(folder))


def test_broken_rows_are_left_out_and_too_many_stop(tmp_path, capsys):
    folder = write(tmp_path / "data", "jsonl", 20)
    good = (folder / "a.jsonl").read_text()
    (folder / "a.jsonl").write_text('{"prompt": "x", "edited_img": "none.png"}\n[1]\n{"broken\n' + good)
    pairs = pairs_of(folder, max_broken=0.5)
    blocks(sampler_of(pairs), 12)
    err = capsys.readouterr().err
    for reason in ("no file", "list instead of a JSON object", "broken JSON"):
        assert reason in err
    assert pairs.counts.broken >= 3
    with pytest.raises(InputError, match="training data: found 11 broken rows of .* share of 0.01"):
        blocks(sampler_of(pairs_of(folder)), 50)


def test_a_row_that_cannot_be_decoded_is_replaced_by_its_block(tmp_path):
    folder = write(tmp_path / "data", "jsonl", 12)
    (folder / "3.png").write_bytes(png(3)[:60])
    pairs = pairs_of(folder)
    drawn = blocks(sampler_of(pairs), 30)
    cut = next(b for b in drawn if [e.row["prompt"] == "p3" for e, _ in b].count(True) == 1)
    samples = pairs.__getitems__(cut)
    assert len(samples) == 2 and samples[0]["prompt"] == samples[1]["prompt"] != "p3"
    ((where, reason),) = samples[0]["broken"].items()
    assert "3.png" in reason and where.startswith("row ")
    bad = next(draw for draw in cut if draw[0].row["prompt"] == "p3")
    with pytest.raises(InputError, match="a batch of broken rows, such as row"):
        pairs.__getitems__([bad, bad])


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, "no such file or folder"),
        ({"a.json": "[]"}, "a .json file"),
        ({"a.jsonl": ""}, "no rows"),
        ({"a.jsonl": '{"x": 1}'}, "expected a prompt"),
    ],
)
def test_what_cannot_be_streamed(tmp_path, files, found):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=found):
        open_stream(str(tmp_path / next(iter(files), "none.jsonl")))


def run(tmp_path, data, name, *flags):
    argv = ["--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(data), "--use_cpu"]
    argv += ["--output_dir", str(tmp_path / name), *"--resolution 64 --max_steps 6 --learning_rate 1e-3".split()]
    argv += "--per_device_train_batch_size 2 --report_to none --disable_tqdm true --export_dtype float32".split()
    argv += "--preview_steps 6 --streaming --shuffle_buffer_size 6 --save_steps 2 --preview_inference_steps 1".split()
    export = pretrain(*parse([*argv, *flags]))
    return weights_of(export)


def weights_of(export):
    file = "pytorch_lora_weights" if (export / "comfyui_lora.safetensors").exists() else TRANSFORMER
    return load_file(export / f"{file}.safetensors")


@pytest.mark.parametrize(
    "flags",
    [
        "--dataloader_num_workers 0",
        "--dataloader_num_workers 2 --gradient_accumulation_steps 2",
        "--use_peft --lora_r 2 --lora_dropout 0.5",
    ],
)
def test_a_stopped_run_equals_one_that_was_not(make_small_pipeline, tmp_path, monkeypatch, flags):
    make_small_pipeline().save_pretrained(tmp_path / "model")
    data, flags = write(tmp_path / "data", "parquet", 20), flags.split()
    whole = run(tmp_path, data, "whole", *flags)
    assert (tmp_path / "whole/previews/step_000006.png").is_file()
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoint-6")
    shutil.rmtree(tmp_path / "cut/export")
    read, rows = stream._Reader.next, []
    monkeypatch.setattr(stream._Reader, "next", lambda self: rows.append(self.row) or read(self))
    resumed = run(tmp_path, data, "cut", *flags, "--resume")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert rows and rows[0] > 0, "what was read before is not read again"


def test_what_streaming_does_not_go_with(tmp_path):
    argv = ["--model_name_or_path", "m", "--dataset_name", "d", "--streaming", "--use_cpu"]
    argv += ["--output_dir", str(tmp_path)]
    with pytest.raises(InputError, match="streaming: found cache_dir too"):
        parse([*argv, "--cache_dir", "c"])
    with pytest.raises(InputError, match="shuffle_buffer_size: found 0"):
        parse([*argv, "--shuffle_buffer_size", "0"])


def test_a_stream_needs_max_steps(make_small_pipeline, tmp_path):
    make_small_pipeline().save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="max_steps: found -1"):
        run(tmp_path, write(tmp_path / "data", "jsonl"), "run", "--max_steps", "-1")


def test_previews_show_the_first_rows(tmp_path):
    cases = pairs_of(write(tmp_path / "data", "jsonl")).previews(2)
    assert [prompt for prompt, _, _ in cases] == ["p0", "p2", "p1", "p3"]
    assert [source is not None for _, source, _ in cases] == [False, False, True, True]
    assert {size for _, _, size in cases} == {(64, 64)}
