"""The checkpoint contract on real files: headers, formats, configs, shards, single files, and a full disk."""

import errno
import json
import os
import pickle
import shutil
import struct
import subprocess

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file, save_file
from unipic2.core import checkpoint
from unipic2.core.checkpoint import (
    COMFYUI_SD3,
    CONNECTOR,
    DIFFUSERS_SD3,
    LORA,
    TRANSFORMER_FILE,
    UNKNOWN,
    cast_file,
    check_transformer_config,
    component_files,
    detect_format,
    export_single_file,
    import_single_file,
    read_component,
    read_header,
    save_tensors,
    transformer_config,
)
from unipic2.core.errors import InputError
from unipic2.core.files import write_file
from unipic2.trainer import SD3Transformer2DKontextModel

PAIR = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4)}


def shapes_of(tensors):
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def assert_same_tensors(left, right):
    assert left.keys() == right.keys()
    assert all(left[k].dtype == right[k].dtype and torch.equal(left[k], right[k]) for k in left)


@pytest.fixture
def model_folder(saved, tmp_path):
    """Return a copy of the published layout that a test may break."""
    return shutil.copytree(saved, tmp_path / "model")


# Headers


def test_header_of_a_real_file(tmp_path):
    save_file(PAIR, tmp_path / "x.safetensors", metadata={"step": "3"})
    header = read_header(str(tmp_path / "x.safetensors"))
    assert header.shapes == {"a": (2, 3), "b": (4,)}
    assert header.metadata == {"step": "3"}


def test_header_of_a_file_without_tensors(tmp_path):
    save_file({}, tmp_path / "x.safetensors")
    assert read_header(tmp_path / "x.safetensors").shapes == {}


def test_header_of_a_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"nothing\.safetensors: found no such file, expected a \.safetensors"):
        read_header(tmp_path / "nothing.safetensors")


def test_header_of_a_folder(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_header(tmp_path)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin", ".PTH"])
def test_pickles_are_named_and_not_opened(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    torch.save(PAIR, path)
    with pytest.raises(InputError, match="can run code when it is opened"):
        read_header(path)


def test_a_pickle_under_a_safetensors_name(tmp_path):
    torch.save(PAIR, tmp_path / "zip.safetensors")
    (tmp_path / "plain.safetensors").write_bytes(pickle.dumps({"a": [1, 2]}))
    for name in ("zip", "plain"):
        with pytest.raises(InputError, match="no safetensors header"):
            read_header(tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize("cut", [1, 5])
def test_weights_that_were_cut_off(tmp_path, cut):
    path = tmp_path / "x.safetensors"
    save_file(PAIR, path)
    size = path.stat().st_size
    os.truncate(path, size - cut)
    with pytest.raises(InputError, match=f"found {size - cut} bytes, expected {size} bytes.*fetch it again"):
        read_header(path)


@pytest.mark.parametrize("length", [0, 4, 8, 30])
def test_headers_that_were_cut_off(tmp_path, length):
    path = tmp_path / "x.safetensors"
    save_file(PAIR, path)
    os.truncate(path, length)
    with pytest.raises(InputError, match="safetensors header"):
        read_header(path)


def test_a_huge_header_length_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(InputError, match="no safetensors header"):
        read_header(path)


@pytest.mark.parametrize(
    "header",
    [
        b"not json at all", b"\xff\xfe\xfd", b"[]", b"17", b'"text"', b"null", b'{"a": 3}', b'{"a": {}}',
        b'{"a": {"shape": [1], "data_offsets": []}}', b'{"a": {"shape": 1, "data_offsets": [0, 0]}}',
        b'{"a": {"shape": [1], "data_offsets": ["x", "y"]}}',
    ],
)  # fmt: skip
def test_garbage_headers(tmp_path, header):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(InputError, match="a broken safetensors header"):
        read_header(path)


# Formats and configs


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        ({"pos_embed.proj.weight", "transformer_blocks.0.attn.add_q_proj.weight"}, DIFFUSERS_SD3),
        ({"model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight", "x"}, COMFYUI_SD3),
        ({"joint_blocks.0.context_block.attn.qkv.weight"}, COMFYUI_SD3),
        ({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight"}, LORA),
        ({"base_model.model.transformer_blocks.0.attn.to_q.lora_B.default.weight"}, LORA),
        ({"lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight"}, LORA),
        ({"transformer_blocks.0.attn.to_q.lora.up.weight"}, LORA),
        ({"meta_queries", "connector.layers.0.mlp.fc1.weight", "projector_1.weight"}, CONNECTOR),
        ({"meta_queries"}, UNKNOWN),
        ({"pos_embed.proj.weight"}, UNKNOWN),  # PixArt has this one too
        ({"my_lora_A.weight_norm"}, UNKNOWN),
        (set(), UNKNOWN),
    ],
)
def test_format_by_keys(keys, kind):
    assert detect_format(keys) == kind
    assert detect_format(dict.fromkeys(keys)) == kind


def test_a_saved_model_is_recognised(saved):
    assert detect_format(read_header(saved / "transformer" / TRANSFORMER_FILE).shapes) == DIFFUSERS_SD3


def test_config_from_shapes_is_the_saved_config(saved):
    written = json.loads((saved / "transformer" / "config.json").read_text())
    derived = transformer_config(read_header(saved / "transformer" / TRANSFORMER_FILE).shapes)
    written = {name: value for name, value in written.items() if not name.startswith("_")}
    assert derived == {**written, "sample_size": 128}
    rebuilt = SD3Transformer2DModel(**derived)
    assert rebuilt.load_state_dict(load_file(saved / "transformer" / TRANSFORMER_FILE), strict=True)


def test_config_from_shapes_without_dual_attention_and_norms():
    model = SD3Transformer2DModel(
        num_layers=2, num_attention_heads=1, joint_attention_dim=8, caption_projection_dim=64,
        pooled_projection_dim=8, pos_embed_max_size=4, sample_size=4, in_channels=16, out_channels=16,
    )  # fmt: skip
    derived = transformer_config(shapes_of(model.state_dict()))
    assert derived["dual_attention_layers"] == [] and derived["qk_norm"] is None and derived["num_layers"] == 2


def test_config_from_shapes_of_something_else():
    with pytest.raises(InputError, match="transformer weights: found LoRA, expected diffusers SD3 transformer"):
        transformer_config({"x.lora_A.weight": (4, 4)})


@pytest.mark.parametrize(
    "key",
    ["proj_out.weight", "context_embedder.weight", "pos_embed.pos_embed"],
)
def test_weights_with_a_missing_tensor(transformer, key):
    shapes = shapes_of(transformer.state_dict())
    shapes.pop(key)
    with pytest.raises(InputError, match=key.replace(".", r"\.")):
        check_transformer_config(transformer.config, shapes, "config.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_layers", 24), ("in_channels", 16), ("out_channels", 16), ("patch_size", 4), ("num_attention_heads", 24),
        ("attention_head_dim", 32), ("joint_attention_dim", 4096), ("caption_projection_dim", 1536),
        ("pooled_projection_dim", 2048), ("pos_embed_max_size", 384), ("dual_attention_layers", [0, 1, 2]),
        ("qk_norm", None),
    ],
)  # fmt: skip
def test_a_config_that_disagrees_names_the_field(transformer, field, value):
    shapes = shapes_of(transformer.state_dict())
    config = dict(transformer.config)
    check_transformer_config(config, shapes, "config.json")
    with pytest.raises(InputError, match=rf"^{field} in some/config\.json: found .*which is what the weights have"):
        check_transformer_config({**config, field: value}, shapes, "some/config.json")


def test_sample_size_may_be_anything(transformer):
    check_transformer_config({**transformer.config, "sample_size": 7}, shapes_of(transformer.state_dict()), "x")


# Folders


@pytest.fixture(scope="module")
def sharded(transformer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    transformer.save_pretrained(folder / "transformer", max_shard_size="1MB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 2
    return folder


def test_shards_read_as_one(saved, sharded, transformer):
    tensors = read_component(sharded / "transformer")
    assert_same_tensors(tensors, read_component(saved / "transformer"))
    loaded = SD3Transformer2DKontextModel.from_pretrained(sharded, subfolder="transformer")
    assert_same_tensors(loaded.state_dict(), transformer.state_dict())


def test_a_missing_shard_is_named(sharded, tmp_path):
    folder = shutil.copytree(sharded / "transformer", tmp_path / "transformer")
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(InputError, match=f"found no {gone.name}, expected . shards"):
        component_files(folder)


def test_a_truncated_shard_is_found_before_anything_is_loaded(sharded, tmp_path):
    folder = shutil.copytree(sharded / "transformer", tmp_path / "transformer")
    last = sorted(folder.glob("*.safetensors"))[-1]
    os.truncate(last, last.stat().st_size - 9)
    with pytest.raises(InputError, match=last.name):
        read_component(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": null}'])
def test_a_broken_shard_index(sharded, tmp_path, text):
    folder = shutil.copytree(sharded / "transformer", tmp_path / "transformer")
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError, match=r"index\.json"):
        component_files(folder)


def test_an_index_cannot_lead_out_of_its_folder(tmp_path):
    save_file(PAIR, tmp_path / "secret.safetensors")
    folder = tmp_path / "transformer"
    folder.mkdir()
    index = {"weight_map": {"a": "../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="secret"):
        component_files(folder)


def test_folders_without_safetensors(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        component_files(tmp_path / "nowhere")
    with pytest.raises(InputError, match="found no safetensors file, expected safetensors weights"):
        component_files(tmp_path)
    torch.save(PAIR, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(InputError, match=r"only diffusion_pytorch_model\.bin, which can run code"):
        component_files(tmp_path)


# Single files


@pytest.mark.parametrize("source", ["saved", "sharded"])
def test_single_file_round_trip_is_bit_equal(request, tmp_path, transformer, source):
    folder = request.getfixturevalue(source)
    export_single_file(folder, tmp_path / "one.safetensors", {"unipic2.step": "7"})
    metadata = read_header(tmp_path / "one.safetensors").metadata
    assert metadata == {"format": "pt", "unipic2.format": DIFFUSERS_SD3, "unipic2.step": "7"}
    import_single_file(tmp_path / "one.safetensors", tmp_path / "back" / "model")
    assert_same_tensors(read_component(tmp_path / "back/model/transformer"), transformer.state_dict())
    loaded = SD3Transformer2DKontextModel.from_pretrained(tmp_path / "back/model", subfolder="transformer")
    assert_same_tensors(loaded.state_dict(), transformer.state_dict())
    assert dict(loaded.config)["dual_attention_layers"] == [0, 2]


def test_export_of_something_else_writes_nothing(tmp_path):
    (tmp_path / "transformer").mkdir()
    save_file(PAIR, tmp_path / "transformer" / TRANSFORMER_FILE)
    with pytest.raises(InputError, match="found unknown"):
        export_single_file(tmp_path, tmp_path / "one.safetensors")
    assert not (tmp_path / "one.safetensors").exists()


def test_import_of_something_else_writes_nothing(tmp_path):
    save_file({"x.lora_A.weight": torch.zeros(2)}, tmp_path / "lora.safetensors")
    with pytest.raises(InputError, match="found LoRA"):
        import_single_file(tmp_path / "lora.safetensors", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_import_never_overwrites(model_folder, saved, tmp_path):
    before = read_component(model_folder / "transformer")
    with pytest.raises(InputError, match="it exists already"):
        import_single_file(saved / "transformer" / TRANSFORMER_FILE, model_folder)
    assert_same_tensors(read_component(model_folder / "transformer"), before)


# Writing


def fill_the_disk(monkeypatch, error):
    """Make every safetensors write stop after a few bytes."""

    def write_a_bit(tensors, path, metadata=None):
        with open(path, "wb") as file:
            file.write(b"half of it")
        raise error

    monkeypatch.setattr(checkpoint, "save_file", write_a_bit)


def test_equal_files_are_equal_bytes(tmp_path):
    """The library writes metadata in a random order."""
    metadata = {f"unipic2.{name}": f'\u00e9 \u4e2d "{name}"\n' for name in "abcdefgh"}
    files = [tmp_path / f"{i}.safetensors" for i in range(6)]
    for file in files:
        save_tensors(PAIR, file, metadata)
    assert len({file.read_bytes() for file in files}) == 1
    assert read_header(files[0]).metadata == {"format": "pt", **metadata}
    assert all(torch.equal(tensor, PAIR[key]) for key, tensor in load_file(files[0]).items())


def test_save_tensors_replaces_as_a_whole(tmp_path):
    path = tmp_path / "x.safetensors"
    save_tensors(PAIR, path, {"step": "1"})
    save_tensors({"c": torch.zeros(1)}, path)
    assert read_header(path).metadata == {"format": "pt"}
    assert list(load_file(path)) == ["c"]
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_what_a_killed_process_of_the_same_number_left_is_no_hindrance(tmp_path):
    """In a container a program has the same number each time it is started."""
    for name in ("x.safetensors", "x.json"):
        (tmp_path / f".{name}.{os.getpid()}.tmp").write_bytes(b"cut off")
    save_tensors(PAIR, tmp_path / "x.safetensors")
    write_file(tmp_path / "x.json", "{}")
    assert_same_tensors(load_file(tmp_path / "x.safetensors"), PAIR)
    assert sorted(os.listdir(tmp_path)) == ["x.json", "x.safetensors"] and (tmp_path / "x.json").read_text() == "{}"


def test_a_full_disk_leaves_the_old_file_and_no_partial_one(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    save_tensors(PAIR, path)
    fill_the_disk(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(InputError, match=r"writing .*x\.safetensors: found a full disk\. Free some space"):
        save_tensors({"c": torch.zeros(1)}, path)
    assert os.listdir(tmp_path) == ["x.safetensors"]
    assert_same_tensors(load_file(path), PAIR)


def test_other_write_errors_keep_their_words(tmp_path, monkeypatch):
    fill_the_disk(monkeypatch, OSError(errno.EIO, "Input/output error"))
    with pytest.raises(InputError, match="Input/output error"):
        save_tensors(PAIR, tmp_path / "x.safetensors")
    assert os.listdir(tmp_path) == []


def test_a_full_disk_during_import_leaves_no_folder(tmp_path, saved, monkeypatch):
    fill_the_disk(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(InputError, match="a full disk"):
        import_single_file(saved / "transformer" / TRANSFORMER_FILE, tmp_path / "new")
    assert not (tmp_path / "new" / "transformer").exists()


def test_a_really_full_disk(tmp_path):
    """Needs the right to mount; where that is missing the case above stands alone."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and os.geteuid() == 0
    mounted = (
        mounted
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True
        ).returncode
    )
    if not mounted:
        pytest.skip("no right to mount a small tmpfs here")
    try:
        save_tensors(PAIR, disk / "x.safetensors")
        with pytest.raises(InputError, match="found a full disk"):
            save_tensors({"big": torch.zeros(1_000_000)}, disk / "x.safetensors")
        assert os.listdir(disk) == ["x.safetensors"]
        assert_same_tensors(load_file(disk / "x.safetensors"), PAIR)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_save_into_a_missing_folder(tmp_path):
    with pytest.raises(InputError, match="found no such folder, expected an existing folder"):
        save_tensors(PAIR, tmp_path / "no" / "x.safetensors")


def test_cast_file_keeps_integers_and_metadata(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(PAIR, path, metadata={"format": "pt", "step": "9"})
    cast_file(path, torch.float16)
    tensors = load_file(path)
    assert tensors["a"].dtype == torch.float16 and tensors["b"].dtype == torch.int64
    assert torch.equal(tensors["a"].float(), PAIR["a"])
    assert read_header(path).metadata == {"format": "pt", "step": "9"}
    assert os.listdir(tmp_path) == ["x.safetensors"]


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such modes")
def test_written_files_have_the_users_mode(tmp_path):
    """Others of a group read a checkpoint as they read any file that the user makes."""
    save_tensors({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    (tmp_path / "plain").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
