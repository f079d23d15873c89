"""Saving and loading pipelines in the published layout, and everything that can be wrong with a folder."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from unipic2.core.errors import InputError
from unipic2.core.micro import BUNDLED_MODELS, component_dir, weights_dir
from unipic2.trainer import SD3Transformer2DKontextModel, StableDiffusion3KontextPipeline
from unipic2.trainer.cli import main
from unipic2.trainer.micro.codec import sample_scenes
from unipic2.trainer.micro.world import render
from unipic2.trainer.script import open_model

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(model, tmp_path):
    """Return a copy that a test may break."""
    return shutil.copytree(model, tmp_path / "model")


def load(folder, **options):
    pipe = StableDiffusion3KontextPipeline.from_pretrained(folder, torch_dtype=torch.float32, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def read(file):
    """Return copies: safetensors maps the file, and writing over a mapped file pulls the ground from under it."""
    return {key: tensor.clone() for key, tensor in load_file(file).items()}


def edit(pipe):
    generator = torch.Generator().manual_seed(0)
    picture = render(sample_scenes(1, seed=2)[0])
    sampling = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "np"}
    return pipe("make the circle red", image=picture, generator=generator, **sampling).images


def assert_draws_the_same(loaded, original):
    """To rounding: weights that lie elsewhere in memory may take another path through the processor."""
    np.testing.assert_allclose(edit(loaded), edit(original), atol=1e-5, rtol=0)


def rewrite_json(path, **changes):
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({key: value for key, value in content.items() if value != "REMOVE"}))


def test_save_and_load_draws_the_same(pipeline, folder):
    loaded = load(folder)
    assert type(loaded.transformer) is SD3Transformer2DKontextModel
    assert loaded.text_encoder_2 is None and loaded.tokenizer_3 is None
    assert loaded.scheduler.config.shift == 3.0
    assert_draws_the_same(loaded, pipeline)


def test_saved_configs_do_not_tell_where_they_came_from(folder, tmp_path):
    load(folder).save_pretrained(tmp_path / "again")
    texts = [path.read_text() for path in (tmp_path / "again").glob("**/*.json")]
    assert len(texts) > 5 and not any("_name_or_path" in text or str(tmp_path) in text for text in texts)


def test_the_tokenizer_is_saved_for_old_and_new_readers(pipeline, folder):
    """ComfyUI's tokenizer reads `vocab.json` and `merges.txt`, which transformers 5 no longer writes."""
    vocabulary = json.loads((folder / "tokenizer/vocab.json").read_text())
    assert vocabulary == pipeline.tokenizer.get_vocab()
    header, *merges = (folder / "tokenizer/merges.txt").read_text().splitlines()
    stored = json.loads((folder / "tokenizer/tokenizer.json").read_text())["model"]["merges"]
    assert header == "#version: 0.2" and [m.split(" ") for m in merges] == [list(m) for m in stored]


def test_strings_and_given_components_work(pipeline, folder):
    loaded = load(str(folder), transformer=pipeline.transformer)
    assert loaded.transformer is pipeline.transformer


@pytest.mark.parametrize(
    "entry",
    [
        ["transformer_sd3_kontext", "SD3Transformer2DKontextModel"],
        ["diffusers", "SD3Transformer2DModel"],
        ["unipic2", "SD3Transformer2DKontextModel"],
    ],
)
def test_published_model_index_entries(pipeline, folder, entry):
    rewrite_json(folder / "model_index.json", transformer=entry, _class_name="StableDiffusion3KontextPipeline")
    loaded = load(folder)
    assert type(loaded.transformer) is SD3Transformer2DKontextModel
    assert_draws_the_same(loaded, pipeline)


def test_a_repository_of_stability_ai(pipeline, folder, tmp_path):
    """What SD3.5-Medium's looks like: the classes of plain SD3, and weights several times."""
    index = {
        "_class_name": "StableDiffusion3Pipeline",
        "image_encoder": [None, None],
        "feature_extractor": [None, None],
    }
    rewrite_json(folder / "model_index.json", transformer=["diffusers", "SD3Transformer2DModel"], **index)
    rewrite_json(folder / "transformer/config.json", _class_name="SD3Transformer2DModel")
    (folder / "sd3.5_medium.safetensors").write_bytes(b"")
    for name, stem in (("transformer", "diffusion_pytorch_model"), ("text_encoder", "model")):
        (folder / name / f"{stem}.fp16.safetensors").write_bytes(b"not read")
    loaded = load(folder)
    assert_draws_the_same(loaded, pipeline)
    loaded.save_trained(tmp_path / "export", {"transformer"}, torch.float32)
    files = [str(f.relative_to(tmp_path / "export")) for f in sorted((tmp_path / "export").rglob("*.safetensors"))]
    assert files == [
        f"{name}.safetensors"
        for name in ("text_encoder/model", "transformer/diffusion_pytorch_model", "vae/diffusion_pytorch_model")
    ]
    assert_draws_the_same(load(tmp_path / "export"), pipeline)


def test_sharded_components(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "model", max_shard_size="4MB")
    assert len(list((tmp_path / "model/transformer").glob("*.safetensors"))) > 2
    assert_draws_the_same(load(tmp_path / "model"), pipeline)


def test_half_precision(folder):
    pipe = StableDiffusion3KontextPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    assert {pipe.transformer.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.bfloat16}


def test_a_hub_repository_is_fetched_without_pickles_or_code(pipeline, folder, monkeypatch):
    asked = {}

    def snapshot(name, **options):
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr("unipic2.trainer.kontext_pipeline.snapshot_download", snapshot)
    loaded = load("someone/model", revision="v1", text_encoder=pipeline.text_encoder)
    assert_draws_the_same(loaded, pipeline)
    assert asked["name"] == "someone/model" and asked["revision"] == "v1"
    assert "text_encoder/*" in asked["ignore_patterns"]
    assert not any(p.endswith((".bin", ".pt", ".ckpt", ".py", "*")) for p in asked["allow_patterns"])
    files = ["model_index.json", "transformer/a.safetensors", "vae/b.json", "tokenizer/merges.txt"]
    wanted = [
        *files,
        "model-00001-of-00002.safetensors",
        "text_encoder_2/m.safetensors",
    ]  # Qwen2.5-VL's are at the root
    files = [*wanted, "sd3.5_medium.safetensors"]
    files += ["text_encoder_2/model.fp16.safetensors", "text_encoders/t5.safetensors"]
    asked = {name: asked[name] for name in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects(files, **asked)) == wanted


# Folders that cannot be loaded


def error_of(folder, **options) -> str:
    with pytest.raises(InputError) as caught:
        load(folder, **options)
    return str(caught.value)


@pytest.mark.parametrize("name", BUNDLED_MODELS)
def test_bundled_weights_have_names(name, tmp_path, monkeypatch):
    """They mean the same in every folder; a path with a slash is one's own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    assert StableDiffusion3KontextPipeline.find_folder(name) == weights_dir(name)
    open_model(name)
    assert StableDiffusion3KontextPipeline.find_folder(f"./{name}") == Path(name)


def test_bundled_models_share_what_none_of_them_changed():
    """PDTR trains the transformer alone, MetaQuery the transformer and what stands before it."""
    files = {name: list(weights_dir(name).rglob("*.safetensors")) for name in BUNDLED_MODELS}
    own = {name: {file.parent.name for file in found} for name, found in files.items()}
    assert own["micro-pretrained"] == {"transformer", "text_encoder", "vae"}
    assert own["micro"] == {"transformer"}
    assert own["micro-metaquery"] == {"transformer", "text_encoder", "conditioner"}
    assert sum(file.stat().st_size for found in files.values() for file in found) < 40e6


def test_exports_of_bundled_models_are_whole(tmp_path):
    pipe = load("micro")
    pipe.save_trained(tmp_path / "export", {"transformer"}, torch.float16)
    again = load(tmp_path / "export")
    for name in ("vae", "text_encoder"):
        files = [weights_dir("micro-pretrained") / name, tmp_path / "export" / name]
        assert len({next(folder.glob("*.safetensors")).read_bytes() for folder in files}) == 1, name
    assert again.tokenizer.get_vocab() == pipe.tokenizer.get_vocab()


def test_one_file_of_a_bundled_model_by_name(tmp_path):
    assert main(["export", "--model", "micro", "--out", str(tmp_path / "m.safetensors")]) == 0
    exported, kept = load_file(tmp_path / "m.safetensors"), load_file(weights_dir("micro") / TRANSFORMER)
    assert exported.keys() == kept.keys() and all(torch.equal(exported[name], kept[name]) for name in kept)
    with pytest.raises(InputError, match="model no: found no such folder"):
        main(["export", "--model", "no", "--out", str(tmp_path / "n.safetensors")])


def test_only_bundled_models_share(tmp_path):
    """Somebody's copy of one must say what it lacks, not take it from here."""
    shutil.copytree(weights_dir("micro"), tmp_path / "micro")
    assert "no text_encoder folder" in error_of(tmp_path / "micro")
    assert component_dir(tmp_path / "micro", "vae") == tmp_path / "micro/vae"
    assert component_dir(weights_dir("micro"), "text_encoder_2") == weights_dir("micro") / "text_encoder_2"


def test_a_missing_folder(tmp_path, monkeypatch):
    assert "no such folder" in error_of(tmp_path / "nothing")
    monkeypatch.chdir(tmp_path)
    assert "no such folder" in error_of("nothing")
    assert "no such folder" in error_of("./nothing/here/at/all")


def test_a_missing_relative_folder_that_looks_like_a_repository(tmp_path, monkeypatch):
    """`runs/micro` mistyped is as likely as a repository of the hub; whatever was tried must be said in one line."""
    monkeypatch.chdir(tmp_path)
    assert "runs/nothing" in error_of("runs/nothing", local_files_only=True)


def test_an_empty_folder(tmp_path):
    assert "model_index.json: found no such file" in error_of(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "\x00"])
def test_a_broken_model_index(folder, text):
    (folder / "model_index.json").write_text(text)
    assert "broken JSON" in error_of(folder)


@pytest.mark.parametrize("text", ["[]", "3", "null"])
@pytest.mark.parametrize("name", ["model_index.json", "transformer/config.json"])
def test_json_of_another_kind(folder, name, text):
    (folder / name).write_text(text)
    error_of(folder)


def test_a_missing_transformer_folder(folder):
    shutil.rmtree(folder / "transformer")
    assert "no transformer folder" in error_of(folder)


@pytest.mark.parametrize("component", ["vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_component_folder(folder, component):
    shutil.rmtree(folder / component)
    assert component in error_of(folder)


def test_a_missing_config(folder):
    (folder / "transformer" / "config.json").unlink()
    assert "config.json: found no such file, expected the settings of the transformer" in error_of(folder)


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder"])
def test_truncated_weights(folder, component):
    (file,) = (folder / component).glob("*.safetensors")
    os.truncate(file, file.stat().st_size // 2)
    message = error_of(folder)
    assert f"{component}/{file.name}" in message and "fetch it again" in message


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder"])
def test_weights_in_a_pickle_only(folder, component):
    (file,) = (folder / component).glob("*.safetensors")
    torch.save(read(file), file.with_suffix(".bin"))
    file.unlink()
    message = error_of(folder)
    assert f"only {file.stem}.bin" in message and "can run code" in message


def test_a_pickle_under_a_safetensors_name(folder):
    torch.save(read(folder / TRANSFORMER), folder / TRANSFORMER)
    assert "no safetensors header" in error_of(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_layers", 24), ("pooled_projection_dim", 2048), ("dual_attention_layers", [0]), ("pos_embed_max_size", 384)],
)
def test_a_config_that_disagrees_with_its_weights(folder, field, value):
    rewrite_json(folder / "transformer" / "config.json", **{field: value})
    message = error_of(folder)
    assert message.startswith(f"{field} in ") and f"found {value}" in message


@pytest.mark.parametrize("field", ["hidden_size", "vocab_size"])
def test_a_text_encoders_config_that_disagrees(folder, field):
    rewrite_json(folder / "text_encoder" / "config.json", **{field: 64})
    message = error_of(folder)
    assert message.startswith(f"{field} in ") and "found 64, expected" in message


def test_a_vaes_config_that_disagrees(folder):
    rewrite_json(folder / "vae" / "config.json", latent_channels=4)
    assert "expected shape" in error_of(folder)


@pytest.mark.parametrize("field", ["num_layers", "qk_norm", "dual_attention_layers"])
def test_a_config_without_a_field_that_matters(folder, field):
    """diffusers would fill in its own default (18 layers, no norm, no dual attention)."""
    rewrite_json(folder / "transformer" / "config.json", **{field: "REMOVE"})
    try:
        loaded = load(folder)
    except InputError as error:
        assert field in str(error)
    else:
        written = dict(read(folder / TRANSFORMER))
        assert loaded.transformer.state_dict().keys() == written.keys()


def test_another_models_weights(folder):
    save_file({"model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight": torch.zeros(2, 2)},
              folder / TRANSFORMER)  # fmt: skip
    assert "found ComfyUI SD3 transformer, expected diffusers SD3 transformer" in error_of(folder)


@pytest.mark.parametrize("key", ["proj_out.weight", "transformer_blocks.1.attn.to_q.weight"])
def test_weights_with_a_missing_tensor(folder, key):
    """Left alone, diffusers fills the gap with random numbers."""
    tensors = read(folder / TRANSFORMER)
    tensors.pop(key)
    save_file(tensors, folder / TRANSFORMER, metadata={"format": "pt"})
    assert key in error_of(folder)


def test_weights_with_a_tensor_of_another_shape(folder):
    key = "transformer_blocks.1.ff.net.2.weight"
    tensors = read(folder / TRANSFORMER)
    tensors[key] = tensors[key][:, :-8].contiguous()
    save_file(tensors, folder / TRANSFORMER, metadata={"format": "pt"})
    assert key in error_of(folder)
