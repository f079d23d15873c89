"""Cached latents and texts: the same training as without, resumable, and never of other encoders."""

import errno
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextModelWithProjection
from unipic2.core.errors import InputError
from unipic2.trainer import StableDiffusion3KontextPipeline
from unipic2.trainer.data.buckets import aspect_buckets
from unipic2.trainer.data.cache import Cache, CachedPairs, build_cache, fingerprint, is_complete, row_key
from unipic2.trainer.data.pairs import PairDataset
from unipic2.trainer.data.sources import open_source
from unipic2.trainer.pretrain import cache, parse, pretrain

CPU = torch.device("cpu")


def open_pairs(pairs_file, **options):
    return PairDataset([open_source(str(pairs_file))], aspect_buckets(64), **options)


def build(pairs, pipe, folder, dtype=torch.float32, **options):
    cache = Cache(folder, "these encoders")
    build_cache(pairs, cache, pipe, dtype, CPU, **options)
    assert is_complete(cache, pairs, pipe)
    return CachedPairs(pairs, cache)


@torch.no_grad()
def test_it_holds_what_the_encoders_say(make_small_pipeline, pairs_file, tmp_path):
    pipe, pairs = make_small_pipeline(), open_pairs(pairs_file)
    cached = build(pairs, pipe, tmp_path / "cache", batch_size=3)
    assert len(cached) == len(pairs) == 16 and cached.is_edit == pairs.is_edit
    for i in (0, 1, 15):
        sample, plain = cached[i], pairs[i]
        for name in ("", "ref_") if pairs.is_edit[i] else ("",):
            pixels = plain[f"{name}pixel_values"][None].float() / 127.5 - 1
            torch.testing.assert_close(sample[f"{name}latents"], pipe.encode_pixels(pixels)[0], atol=1e-5, rtol=1e-5)
        assert ("ref_latents" in sample) == pairs.is_edit[i] and sample["source_id"] == plain["source_id"]
        states, _, pooled, _ = pipe.encode_prompt([plain["prompt"]], None, None, do_classifier_free_guidance=False)
        torch.testing.assert_close(sample["text"][0], states[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(sample["text"][1], pooled[0], atol=1e-5, rtol=1e-5)


def run(tmp_path, pipe_folder, pairs_file, name, *flags):
    argv = ["--model_name_or_path", str(pipe_folder), "--dataset_name", str(pairs_file), "--use_cpu"]
    argv += ["--output_dir", str(tmp_path / name), *"--resolution 64 --max_steps 4 --learning_rate 1e-3".split()]
    argv += "--per_device_train_batch_size 2 --report_to none --disable_tqdm true --export_dtype float32".split()
    argv += "--caption_dropout 0.5 --edit_caption_dropout 0.5 --save_strategy no".split()
    export = pretrain(*parse([*argv, *flags]))
    return load_file(export / "transformer/diffusion_pytorch_model.safetensors")


def test_training_is_the_same_with_and_without(make_small_pipeline, pairs_file, tmp_path):
    make_small_pipeline().save_pretrained(tmp_path / "model")
    flags = ["--cache_dir", str(tmp_path / "cache"), "--cache_dtype", "float32"]
    plain = run(tmp_path, tmp_path / "model", pairs_file, "plain", "--preview_steps", "0")
    cached = run(tmp_path, tmp_path / "model", pairs_file, "cached", *flags, "--preview_steps", "4")
    assert (tmp_path / "cached/previews/step_000004.png").is_file()
    worst = max((plain[key] - cached[key]).abs().max().item() for key in plain)
    start = load_file(tmp_path / "model/transformer/diffusion_pytorch_model.safetensors")
    moved = max((plain[key] - start[key]).abs().max().item() for key in plain)
    assert worst < 1e-4 < 1e-3 < moved, (worst, moved)
    workers = run(
        tmp_path, tmp_path / "model", pairs_file, "workers", *flags, "--preview_steps", "0",
        "--dataloader_num_workers", "1",
    )  # fmt: skip
    assert all(torch.equal(workers[key], cached[key]) for key in cached)


def test_a_stopped_build_goes_on(make_small_pipeline, pairs_file, tmp_path, monkeypatch):
    pipe, pairs = make_small_pipeline(), open_pairs(pairs_file)
    monkeypatch.setattr("unipic2.trainer.data.cache._ROWS", 4)
    calls, encode = [], pipe.encode_pixels

    def stop(pixels):
        calls.append(len(pixels))
        if sum(calls) > 9:
            raise KeyboardInterrupt
        return encode(pixels)

    pipe.encode_pixels = stop
    with pytest.raises(KeyboardInterrupt):
        build(pairs, pipe, tmp_path / "cache", batch_size=4)
    kept = len(list((tmp_path / "cache").glob("shard-*")))
    assert kept >= 1
    pipe.encode_pixels = lambda pixels: (calls.append(len(pixels)), encode(pixels))[1]
    calls.clear()
    assert len(build(pairs, pipe, tmp_path / "cache", batch_size=4)) == 16
    pictures = 16 + sum(pairs.is_edit)
    assert 0 < sum(calls) < pictures
    calls.clear()
    build(pairs, pipe, tmp_path / "cache")
    assert not calls, "nothing is encoded twice"


def test_a_disk_that_is_too_small_is_told_first(make_small_pipeline, pairs_file, tmp_path, monkeypatch, capsys):
    pipe, pairs = make_small_pipeline(), open_pairs(pairs_file)
    pipe.encode_pixels = lambda pixels: pytest.fail("encoded")
    monkeypatch.setattr("unipic2.trainer.data.cache.shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match="cache_dir .*: found 0.00 GB to write, expected at most the 0.00 GB"):
        build(pairs, pipe, tmp_path / "cache")
    texts = len({"", *pairs.prompts, pipe.default_negative_prompt(is_edit=True)})
    assert f"16 rows and {texts} texts to encode" in capsys.readouterr().err


@pytest.mark.parametrize("gone", [True, False])
def test_a_disk_that_was_away_is_asked_again(make_small_pipeline, pairs_file, tmp_path, monkeypatch, gone):
    """A row is broken for good by what is in its file, not by a file that cannot be reached."""
    pipe, pairs = make_small_pipeline(), open_pairs(pairs_file)
    read, is_file = Image.open, Path.is_file

    def fails(where, *args):
        if str(where).endswith("t3.png"):
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(where, *args)

    cache = Cache(tmp_path / "cache", "these encoders")
    with monkeypatch.context() as patched:
        if gone:
            patched.setattr(Path, "is_file", lambda path: path.name != "t3.png" and is_file(path))
        else:
            patched.setattr("unipic2.trainer.data.sources.Image.open", fails)
        with pytest.raises(InputError, match=r"cache_dir .*t3.png.*the same command goes on"):
            build_cache(pairs, cache, pipe, torch.float32, CPU)
    assert not any(key.endswith(" broken") for key in cache.places)
    assert len(build(open_pairs(pairs_file), pipe, tmp_path / "cache")) == 16


def test_only_what_is_new_is_encoded(make_small_pipeline, tmp_path, pairs_file):
    pipe = make_small_pipeline()
    folder = pairs_file.parent
    rows = pairs_file.read_text().splitlines()
    (folder / "some.jsonl").write_text("\n".join(rows[:10]))
    (folder / "more.jsonl").write_text("\n".join(reversed(rows)))
    build(open_pairs(folder / "some.jsonl"), pipe, tmp_path / "cache")
    before = {shard.name for shard in (tmp_path / "cache").glob("shard-*")}
    cached = build(open_pairs(folder / "more.jsonl"), pipe, tmp_path / "cache")
    new = [s for s in (tmp_path / "cache").glob("shard-*") if s.name not in before]
    assert sum(key.endswith(" latents") and "ref" not in key for s in new for key in load_file(s)) == 6
    assert len(cached) == 16 and cached[0]["prompt"] == json.loads(rows[-1])["prompt"]


def test_other_encoders_are_refused(make_small_pipeline, tmp_path):
    pipe, types = make_small_pipeline(), (torch.float16, torch.float32)
    pipe.save_pretrained(tmp_path / "model")
    first = fingerprint(tmp_path / "model", *types)
    assert first != fingerprint(tmp_path / "model", torch.float32, torch.float32)
    assert first != fingerprint(tmp_path / "model", torch.float16, torch.bfloat16)
    loaded = StableDiffusion3KontextPipeline.from_pretrained(tmp_path / "model")
    loaded.save_trained(tmp_path / "exported", {"transformer"}, torch.float16)
    assert first == fingerprint(tmp_path / "exported", *types), "the same encoders in the next stage of a run"
    for name in ("vocab.json", "merges.txt"):  # as plain diffusers leaves them out with transformers 5
        (tmp_path / "model/tokenizer" / name).unlink()
    assert first == fingerprint(tmp_path / "model", *types)
    Cache(tmp_path / "cache", first)
    with torch.no_grad():
        next(pipe.text_encoder.parameters()).view(-1)[0] += 1
    pipe.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="cache_dir .*: found a cache of other encoders"):
        Cache(tmp_path / "cache", fingerprint(tmp_path / "other", *types))
    config = tmp_path / "exported/vae/config.json"
    config.write_text(config.read_text().replace('"scaling_factor": ', '"scaling_factor": 2'))
    assert first != fingerprint(tmp_path / "exported", *types)
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers/thesis.txt").touch()
    with pytest.raises(InputError, match="something that is no cache"):
        Cache(tmp_path / "papers", first)


def test_a_whole_cache_needs_no_text_encoder(make_small_pipeline, pairs_file, tmp_path, monkeypatch):
    model = tmp_path / "model"
    make_small_pipeline().save_pretrained(model)
    flags = ["--cache_dir", str(tmp_path / "cache"), "--preview_steps", "4"]
    first = run(tmp_path, model, pairs_file, "first", *flags)
    monkeypatch.setattr(CLIPTextModelWithProjection, "from_pretrained", lambda *args, **kwargs: 1 / 0)
    again = run(tmp_path, model, pairs_file, "again", *flags)
    assert all(torch.equal(first[key], again[key]) for key in first)
    grids = [(tmp_path / name / "previews/step_000004.png").read_bytes() for name in ("first", "again")]
    assert grids[0] == grids[1]
    monkeypatch.undo()
    for part in ("text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors", "tokenizer/vocab.json"):
        assert (tmp_path / "again/export" / part).read_bytes() == (model / part).read_bytes(), part
    drawn = StableDiffusion3KontextPipeline.from_pretrained(tmp_path / "again/export")("a", height=64, width=64)
    assert drawn.images[0].size == (64, 64)


def test_a_shard_that_was_cut_off_is_named(make_small_pipeline, tmp_path):
    Cache(tmp_path / "cache", "x").add({"a": torch.zeros(1000)})
    (shard,) = (tmp_path / "cache").glob("shard-*")
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(InputError, match="shard-000000-.*safetensors"):
        Cache(tmp_path / "cache", "x")


def test_rows_found_broken_while_encoding_are_left_out(make_small_pipeline, pairs_file, tmp_path):
    rows = [json.loads(row) for row in pairs_file.read_text().splitlines()]
    for row in rows:
        row["edited_img"] = str(pairs_file.parent / row["edited_img"])
        row["src_img"] = row["src_img"] and str(pairs_file.parent / row["src_img"])
    cut = tmp_path / "cut.png"
    cut.write_bytes((pairs_file.parent / "t3.png").read_bytes()[:300])
    rows[3]["edited_img"] = str(cut)
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs = open_pairs(tmp_path / "d.jsonl", max_broken=0.1)
    cached = build(pairs, make_small_pipeline(), tmp_path / "cache")
    assert len(pairs) == 16 and len(cached) == 15 and 3 not in cached.rows
    assert f"{row_key(pairs, 3)} latents" not in cached.cache and list(pairs.broken) == [(0, 3)]
    later = open_pairs(tmp_path / "d.jsonl", max_broken=0.1)
    again = CachedPairs(later, cached.cache)
    assert again.rows == cached.rows and later.broken == pairs.broken, "without opening the picture again"


def test_the_command_encodes_ahead(make_small_pipeline, pairs_file, tmp_path, capsys):
    make_small_pipeline().save_pretrained(tmp_path / "model")
    argv = ["--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(pairs_file), "--use_cpu"]
    argv += ["--output_dir", str(tmp_path / "run"), "--resolution", "64", "--report_to", "none"]
    assert cache([*argv, "--cache_dir", str(tmp_path / "cache")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'cache'}: 16 rows\n"
    shards = list((tmp_path / "cache").glob("shard-*"))
    assert shards and all(t.dtype == torch.float16 for s in shards for t in load_file(s).values())
    with pytest.raises(InputError, match="cache_dir: found none"):
        cache(argv)
    with pytest.raises(InputError, match="cache_dtype: found 'fp8'"):
        parse([*argv, "--cache_dtype", "fp8"])
    with pytest.raises(InputError, match="cache_dir: found train_text_encoder too"):
        pretrain(*parse([*argv, "--cache_dir", str(tmp_path / "cache"), "--train_text_encoder"]))
