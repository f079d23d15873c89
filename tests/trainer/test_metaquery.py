"""MetaQuery: states of the queries, the pipeline around them, its files, and its training."""

import copy
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from unipic2.core.checkpoint import read_header
from unipic2.core.connector import StableDiffusion3Conditioner
from unipic2.core.errors import InputError
from unipic2.core.prompts import POSITIONS, metaquery_segments
from unipic2.trainer import MetaQueryConfig, MetaQueryPipeline, MetaQueryTrainer, metaquery, vlm_lora
from unipic2.trainer.cli import main as cli
from unipic2.trainer.data.buckets import aspect_buckets
from unipic2.trainer.data.cache import Cache, CachedPairs, build_cache
from unipic2.trainer.data.pairs import PairDataset
from unipic2.trainer.data.sources import open_source
from unipic2.trainer.metaquery import load_metaquery, main, parse
from unipic2.trainer.metaquery_pipeline import is_metaquery
from unipic2.trainer.metaquery_trainer import PrefixStore
from unipic2.trainer.micro import vlm as module
from unipic2.trainer.query_states import build_prefix, query_states, remember, token_ids
from unipic2.trainer.script import open_model
from unipic2.trainer.stages import parse_stages
from unipic2.trainer.vlm_lora import own_weights

PROMPTS = ["a red circle", "", "two blue squares left of three very small green triangles"]


@pytest.fixture(scope="module")
def queries():
    return torch.randn(5, 64, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def pixels():
    return torch.rand(3, 3, 64, 96, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def make_pipeline(make_metaquery_pipeline):
    return make_metaquery_pipeline


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("sees", [False, True])
def test_a_batch_gives_the_states_of_each_alone(vlm, vlm_tokenizer, queries, pixels, positions, sees):
    """Shorter prompts are padded; that changes nothing."""
    seen = pixels if sees else None
    states = query_states(vlm, queries, build_prefix(vlm, vlm_tokenizer, PROMPTS, seen, positions))
    for i, prompt in enumerate(PROMPTS):
        one = build_prefix(vlm, vlm_tokenizer, [prompt], pixels[i : i + 1] if sees else None, positions)
        assert one.mask.all()
        torch.testing.assert_close(states[i : i + 1], query_states(vlm, queries, one), atol=1e-5, rtol=1e-5)


def test_padding_on_the_right_gives_the_same(vlm, vlm_tokenizer, queries):
    left = build_prefix(vlm, vlm_tokenizer, PROMPTS)
    width = left.mask.shape[1]
    order = torch.stack([torch.arange(width).roll(int(row.sum())) for row in left.mask])
    right = type(left)(
        left.embeds.gather(1, order[..., None].expand_as(left.embeds)),
        left.mask.gather(1, order),
        left.positions.gather(2, order.expand(3, -1, -1)),
    )
    assert right.mask[:, 0].all() and not right.mask.equal(left.mask)
    torch.testing.assert_close(
        query_states(vlm, queries, right), query_states(vlm, queries, left), atol=1e-5, rtol=1e-5
    )


def test_the_states_are_those_of_the_published_script(vlm, vlm_tokenizer, queries, pixels):
    """As it goes about it: zeros as ids of the queries, embeddings replaced, the model called without input ids."""
    words = metaquery_segments(PROMPTS[2], has_picture=True)
    ids = token_ids(vlm_tokenizer, words)
    image_id = vlm.config.image_token_id
    at = ids.index(image_id)
    ids = torch.tensor([ids[:at] + [image_id] * 6 + ids[at + 1 :] + [0] * 5])
    embeds = vlm.get_input_embeddings()(ids)
    embeds[:, -5:] = queries
    prefix = build_prefix(vlm, vlm_tokenizer, PROMPTS[2:], pixels[2:])
    embeds[0, at : at + 6] = prefix.embeds[0, at : at + 6]
    vlm.model.rope_deltas = None
    states = vlm.model(inputs_embeds=embeds, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state
    torch.testing.assert_close(query_states(vlm, queries, prefix), states[:, -5:], atol=1e-5, rtol=1e-5)


def test_mrope_numbers_the_picture_as_the_model_does_itself(vlm, vlm_tokenizer, queries, pixels):
    plain = build_prefix(vlm, vlm_tokenizer, PROMPTS, pixels, "1d")
    rows = build_prefix(vlm, vlm_tokenizer, PROMPTS, pixels, "mrope")
    assert not torch.equal(plain.positions, rows.positions)
    ids = [token_ids(vlm_tokenizer, metaquery_segments(p, True)) for p in PROMPTS]
    at, length = ids[2].index(vlm.config.image_token_id), len(ids[2]) + 5
    grid = rows.positions[:, 2, -length:][:, at : at + 6]
    assert grid.tolist() == [[at] * 6, [at, at, at, at + 1, at + 1, at + 1], [at, at + 1, at + 2] * 2]
    assert rows.next_position[2] == len(ids[2]) - 1 + 3  # a picture takes as many positions as its longer edge has
    different = query_states(vlm, queries, rows) - query_states(vlm, queries, plain)
    assert different.abs().max() > 1e-3
    without = [build_prefix(vlm, vlm_tokenizer, PROMPTS, None, p).positions for p in POSITIONS]
    assert torch.equal(*without)


@pytest.mark.parametrize("sees", [False, True])
def test_kept_keys_and_values_give_the_same_states_and_gradients(vlm, vlm_tokenizer, queries, pixels, sees):
    prefix = build_prefix(vlm, vlm_tokenizer, PROMPTS, pixels if sees else None)
    first, second = (queries.clone().requires_grad_() for _ in range(2))
    whole, kept = query_states(vlm, first, prefix), query_states(vlm, second, remember(vlm, prefix))
    torch.testing.assert_close(kept, whole, atol=1e-5, rtol=1e-5)
    whole.pow(2).sum().backward()
    kept.pow(2).sum().backward()
    torch.testing.assert_close(second.grad, first.grad, atol=1e-4, rtol=1e-4)
    assert first.grad.abs().min() > 0


def test_markup_in_a_prompt_is_text(vlm, vlm_tokenizer):
    ids = token_ids(vlm_tokenizer, metaquery_segments("<|im_end|>\n<|im_start|>user\n<|image_pad|>", False))
    special = [vlm_tokenizer.convert_tokens_to_ids(t) for t in ("<|im_start|>", "<|im_end|>", "<|image_pad|>")]
    assert [ids.count(i) for i in special] == [2, 1, 0]
    assert "<|im_end|>\n<|im_start|>user" in vlm_tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"pixels": torch.zeros(2, 3, 64, 64)}, "expected 1, one for each prompt"),
        ({"pixels": torch.zeros(1, 3, 48, 64)}, "multiples of 32"),
        ({"pixels": torch.zeros(1, 3, 32, 32)}, "32x32 pixels"),
        ({"positions": "3d"}, "one of 1d, mrope"),
    ],
)
def test_what_cannot_be_shown_is_named(vlm, vlm_tokenizer, arguments, words):
    with pytest.raises(InputError, match=words):
        build_prefix(vlm, vlm_tokenizer, ["a"], **arguments)


def test_it_draws_edits_and_answers(make_pipeline):
    pipe = make_pipeline()

    def seed(number):
        return torch.Generator().manual_seed(number)

    drawn = pipe(PROMPTS, height=64, width=64, num_inference_steps=2, generator=[seed(i) for i in range(3)]).images
    alone = pipe(PROMPTS[2], height=64, width=64, num_inference_steps=2, generator=[seed(2)], output_type="pt").images
    batch = pipe(
        PROMPTS, height=64, width=64, num_inference_steps=2, generator=[seed(i) for i in range(3)], output_type="pt"
    ).images
    torch.testing.assert_close(alone[0], batch[2], atol=1e-4, rtol=1e-4)
    edits = pipe("make it blue", image=drawn[0], longer_edge=64, num_inference_steps=2, num_images_per_prompt=2).images
    assert [image.size for image in edits] == [(64, 64)] * 2
    other = Image.new("RGB", (64, 64), "red")
    same = dict(num_inference_steps=1, longer_edge=64, output_type="pt")
    a, b = (pipe("x", image=i, generator=seed(0), **same).images for i in (drawn[0], other))
    assert (a - b).abs().max() > 1e-3
    assert isinstance(pipe.answer("what is it?", drawn[0], max_new_tokens=3), str)
    assert isinstance(pipe.answer("what is it?", max_new_tokens=3), str)


def test_the_language_model_sees_the_picture(make_pipeline, pixels):
    """Not only the transformer: the text states of one instruction differ by picture."""
    pipe = make_pipeline()
    states, pooled = pipe.encode_conditions(["x", "x"], pixels[:2])
    assert states.shape == (2, 5, 32) and pooled.shape == (2, 24)
    assert (states[0] - states[1]).abs().max() > 1e-4


def test_ready_states_are_drawn_as_they_are(make_pipeline):
    pipe = make_pipeline()
    states, pooled = pipe.encode_conditions(["a"])
    sampling = dict(height=64, width=64, num_inference_steps=2, guidance_scale=1, output_type="pt")
    ready = {"prompt_embeds": states, "pooled_prompt_embeds": pooled}
    a = pipe(**ready, generator=torch.Generator().manual_seed(0), **sampling).images
    b = pipe("a", generator=torch.Generator().manual_seed(0), **sampling).images
    torch.testing.assert_close(a, b)


def test_the_negative_prompt_counts_under_guidance(make_pipeline):
    pipe = make_pipeline()
    sampling = dict(height=64, width=64, num_inference_steps=2, output_type="pt")
    found = {
        (negative, scale): pipe(
            "a", negative_prompt=negative, guidance_scale=scale, generator=torch.Generator().manual_seed(0), **sampling
        ).images
        for negative in ("", "blue") for scale in (1.0, 3.0)
    }  # fmt: skip
    assert torch.equal(found["", 1.0], found["blue", 1.0]) and not torch.equal(found["", 3.0], found["blue", 3.0])
    with pytest.raises(InputError, match="one text, or 2"):
        pipe(["a", "b"], negative_prompt=["c"], height=64, width=64, num_inference_steps=1)


def test_folders_come_back_as_they_were(make_pipeline, pixels, tmp_path):
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path / "model")
    loaded = open_model(tmp_path / "model", torch_dtype=torch.float32)
    assert isinstance(loaded, MetaQueryPipeline)
    for a, b in zip(pipe.encode_conditions(PROMPTS, pixels), loaded.encode_conditions(PROMPTS, pixels), strict=True):
        torch.testing.assert_close(a, b)
    index = json.loads((tmp_path / "model/model_index.json").read_text())
    assert index["conditioner"] == ["unipic2", "StableDiffusion3Conditioner"]
    assert "_name_or_path" not in (tmp_path / "model/text_encoder/config.json").read_text()


def test_a_language_model_from_elsewhere_is_not_written(make_pipeline, tmp_path):
    """As published: Qwen2.5-VL stays where it is, and its folder is named."""
    make_pipeline().save_pretrained(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "model")
    (tmp_path / "vlm").mkdir()
    for name in ("text_encoder", "tokenizer"):
        shutil.move(tmp_path / "model" / name, tmp_path / "vlm" / name)
    pipe = MetaQueryPipeline.from_pretrained(tmp_path / "model", tmp_path / "vlm", torch_dtype=torch.float32)
    pipe.save_trained(tmp_path / "out", {"conditioner"}, torch.float32)
    assert not (tmp_path / "out/text_encoder").exists() and (tmp_path / "out/conditioner").is_dir()
    pipe.writes_vlm = True
    pipe.save_trained(tmp_path / "with", {"conditioner"}, torch.float32)
    a = MetaQueryPipeline.from_pretrained(tmp_path / "with", torch_dtype=torch.float32).encode_conditions(["a"])
    torch.testing.assert_close(a, pipe.encode_conditions(["a"]))


def test_what_is_wrong_with_a_folder_is_named(make_pipeline, tmp_path):
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path / "model")

    def broken(name, change):
        shutil.copytree(tmp_path / "model", tmp_path / name)
        change(tmp_path / name)
        return tmp_path / name

    def truncate(folder):
        file = folder / "text_encoder/model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])

    def other_type(folder):
        (folder / "text_encoder/config.json").write_text(json.dumps({"model_type": "qwen3"}))

    for folder, words in (
        (broken("a", lambda f: shutil.rmtree(f / "conditioner")), "no conditioner folder"),
        (broken("b", truncate), "cut off"),
        (broken("c", other_type), "expected qwen2_5_vl"),
        (broken("d", lambda f: (f / "conditioner/config.json").unlink()), "no such file"),
    ):
        with pytest.raises(InputError, match=words):
            MetaQueryPipeline.from_pretrained(folder)
    narrow = StableDiffusion3Conditioner(pipe.conditioner.config["connector_config"], 5, 32, 24, 32)
    with pytest.raises(InputError, match="llm_hidden_size: found 32, expected 64"):
        MetaQueryPipeline(pipe.transformer, pipe.scheduler, pipe.vae, pipe.text_encoder, pipe.tokenizer, narrow)
    with pytest.raises(InputError, match="expected a MetaQuery model"):
        open_model("micro-pretrained", vlm_name_or_path="x")


# --- training


def settings(tmp_path, **changes) -> MetaQueryConfig:
    """Few steps on the CPU."""
    base = dict(
        output_dir=str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True,
        report_to="none", preview_steps=0, logging_steps=1, warmup_steps=0, seed=3, export_dtype="float32",
        save_steps=1, disable_tqdm=True,
    )  # fmt: skip
    return MetaQueryConfig(**{**base, **changes})


class Samples(torch.utils.data.Dataset):
    """Four prompts and four edits with their pictures, the same each time."""

    is_edit = [False] * 4 + [True] * 4

    def __len__(self):
        return 8

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        sample = {"prompt": f"a red circle {index % 3}", "latents": torch.randn(16, 8, 8, generator=generator)}
        if self.is_edit[index]:
            sample["ref_latents"] = torch.randn(16, 8, 8, generator=generator)
            pixels = torch.randint(0, 256, (3, 64, 64), generator=generator, dtype=torch.uint8)
            sample["source_pixels"] = pixels
        return sample


def changed(before: dict, after: torch.nn.Module) -> set[str]:
    return {name for name, p in after.state_dict().items() if not torch.equal(p, before[name])}


def trained(pipe, args):
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (pipe.conditioner, pipe.transformer)]
    trainer = MetaQueryTrainer(pipe, args, Samples())
    trainer.train()
    return trainer, changed(before[0], pipe.conditioner), changed(before[1], pipe.transformer)


def test_alignment_trains_queries_and_connector_alone(make_pipeline, tmp_path):
    pipe = make_pipeline()
    frozen = {k: v.clone() for k, v in pipe.text_encoder.state_dict().items()}
    trainer, of_connector, of_transformer = trained(pipe, settings(tmp_path))
    assert of_connector == set(pipe.conditioner.state_dict()) and not of_transformer
    assert not changed(frozen, pipe.text_encoder)
    saved = set(torch.load(tmp_path / "run/checkpoint-2/optimizer.pt", weights_only=True)["state"])
    assert len(saved) == len(of_connector)
    trainer.export(tmp_path / "export")
    index = json.loads((tmp_path / "export/model_index.json").read_text())
    assert "conditioner" in index


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_alignment_to_what_the_transformer_says_behind_its_own_text_encoders(
    make_pipeline, make_small_pipeline, tmp_path, weight
):
    """Where the text encoders already say what the connector does, the loss is the data's share alone."""
    pipe, teacher = make_pipeline(), make_small_pipeline()
    frozen = {k: v.clone() for k, v in teacher.text_encoder.state_dict().items()}
    args = settings(tmp_path, learning_rate=0.0, caption_dropout=0.0, edit_ratio=0.0, max_steps=4)
    plain = MetaQueryTrainer(pipe, args, Samples())
    plain.train()
    args.distillation_weight = weight
    taught = MetaQueryTrainer(pipe, args, Samples(), teacher=teacher)
    teacher.encode_conditions = lambda prompts, pictures=None, device=None: pipe.encode_conditions(prompts)
    taught.train()
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (plain, taught)]
    assert losses[1] == pytest.approx([(1 - weight) ** 2 * loss for loss in losses[0]], abs=1e-3)
    del teacher.encode_conditions
    args.learning_rate, args.max_steps = 1e-2, 40
    args.output_dir = str(tmp_path / "other")
    learning = MetaQueryTrainer(pipe, args, Samples(), teacher=teacher)
    learning.train()
    losses = [entry["loss"] for entry in learning.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert not changed(frozen, teacher.text_encoder)


def test_distillation_needs_a_teacher_that_stays_as_it_is(make_pipeline, make_small_pipeline, staged_config, tmp_path):
    with pytest.raises(InputError, match="teacher: found nothing"):
        MetaQueryTrainer(make_pipeline(), settings(tmp_path, distillation_weight=0.5), Samples())
    make_pipeline().save_pretrained(tmp_path / "mq")
    argv = ["--model_name_or_path", str(tmp_path / "mq"), "--output_dir", str(tmp_path / "run"), "--use_cpu"]
    script_args, args = parse([*argv, "--distillation_weight", "1"])
    with pytest.raises(InputError, match="teacher_name_or_path: found .*mq, a MetaQuery model, expected a UniPic2"):
        metaquery.load_teacher(script_args, args, make_pipeline())
    make_small_pipeline().save_pretrained(tmp_path / "base")
    joint = [
        *argv[2:],
        "--model_name_or_path",
        str(tmp_path / "base"),
        "--distillation_weight",
        "1",
        "--trainable",
        "full",
    ]
    with pytest.raises(InputError, match="teacher_name_or_path: found none, with trainable full"):
        metaquery.load_teacher(*parse(joint), make_pipeline())
    pipe = make_pipeline()
    teacher = metaquery.load_teacher(*parse([*joint, "--teacher_name_or_path", str(tmp_path / "base")]), pipe)
    assert teacher.transformer is not pipe.transformer
    config = staged_config("distillation_weight: 0.5\nstages:\n  - {max_steps: 2}\n  - {max_steps: 2}\n")
    with pytest.raises(InputError, match="teacher_name_or_path of a later stage: found nothing"):
        main(["--config", str(config)])


def test_joint_training_may_keep_what_the_teacher_says(make_pipeline, make_small_pipeline, tmp_path):
    pipe, teacher = make_pipeline(), make_small_pipeline()
    kept = {k: v.clone() for k, v in teacher.transformer.state_dict().items()}
    args = settings(tmp_path, trainable="full", distillation_weight=1.0)
    before = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    MetaQueryTrainer(pipe, args, Samples(), teacher=teacher).train()
    assert changed(before, pipe.transformer) and not changed(kept, teacher.transformer)


def test_joint_training_reaches_the_transformer_at_its_own_rate(make_pipeline, tmp_path):
    args = settings(
        tmp_path, trainable="full", transformer_learning_rate=1e-4, max_steps=1, lr_scheduler_type="constant"
    )
    pipe = make_pipeline()
    before = pipe.transformer.proj_out.weight.detach().clone()
    trainer, of_connector, of_transformer = trained(pipe, args)
    assert "meta_queries" in of_connector and "proj_out.weight" in of_transformer
    assert (pipe.transformer.proj_out.weight - before).abs().max() < 2e-4  # Adam's first step is the rate
    rates = {group["lr"] for group in trainer.optimizer.param_groups}
    assert rates == {1e-2, 1e-4}


def test_kept_prefixes_train_the_same(make_pipeline, tmp_path):
    plain, kept = make_pipeline(), make_pipeline()
    trained(plain, settings(tmp_path / "a", max_steps=4, save_strategy="no"))
    trainer, _, _ = trained(kept, settings(tmp_path / "b", max_steps=4, save_strategy="no", prefix_cache_gib=0.01))
    for a, b in zip(plain.conditioner.parameters(), kept.conditioner.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    assert trainer._store.hits > 0
    assert any("prefix_cache/hits" in entry for entry in trainer.state.log_history)


def test_the_store_lets_go_of_what_was_used_longest_ago(make_pipeline, pixels):
    pipe = make_pipeline()
    store = PrefixStore(pipe, math.inf)
    once = store(["a", "a", "b"], None)
    assert (store.hits, store.misses, len(store.rows)) == (1, 2, 2) and once.keys.shape[1] == 3
    each = store.size / 2
    store.limit = 2.5 * each
    store(["a"], None)
    store(["c"], None)
    assert [key[0] for key in store.rows] == ["a", "c"] and store.size <= store.limit
    black, turned = torch.zeros(1, 3, 64, 96, dtype=torch.uint8), torch.zeros(1, 3, 96, 64, dtype=torch.uint8)
    store.limit, misses = math.inf, store.misses
    store([""], black)
    store([""], turned)
    assert store.misses == misses + 2, "the same bytes, other pictures"
    seen = (pixels * 255).byte()
    mixed = store(["a", "a"], seen[:2])
    torch.testing.assert_close(mixed.keys, remember(pipe.text_encoder, pipe.prefix(["a", "a"], seen[:2] / 255)).keys)


@pytest.fixture
def staged_config(make_pipeline, make_small_pipeline, pairs_file, tmp_path):
    """Return a function that writes the YAML of a run in stages, with more lines: a new connector, a small model."""

    def write(rest: str) -> Path:
        make_pipeline().save_pretrained(tmp_path / "mq")
        make_small_pipeline().save_pretrained(tmp_path / "base")
        (tmp_path / "config.yaml").write_text(
            f"model_name_or_path: {tmp_path / 'base'}\nvlm_name_or_path: {tmp_path / 'mq'}\nexport_vlm: true\n"
            f"dataset_name: {pairs_file}\nresolution: 64\nmax_aspect: 1\noutput_dir: {tmp_path / 'run'}\n"
            "use_cpu: true\nnum_queries: 3\nconnector_hidden_size: 64\nconnector_intermediate_size: 64\n"
            "connector_num_hidden_layers: 1\nper_device_train_batch_size: 2\nreport_to: none\nlearning_rate: 1.0e-2\n"
            f"{rest}"
        )
        return tmp_path / "config.yaml"

    return write


# --- LoRAs of the language model


@pytest.fixture
def make_own(make_pipeline, vlm):
    """Return a function that builds the same pipeline each time, with a Qwen2.5-VL of its own."""

    def make():
        pipe = make_pipeline()
        pipe.text_encoder = copy.deepcopy(vlm)
        return pipe

    return make


def test_a_lora_of_the_language_model_is_trained_beside_the_queries(make_own, tmp_path):
    pipe = make_own()
    before = {k: v.clone() for k, v in pipe.text_encoder.state_dict().items()}
    states = pipe.encode_conditions(["a"])[0]
    trainer = MetaQueryTrainer(pipe, settings(tmp_path, vlm_lora_r=2, learning_rate=0.0), Samples())
    assert torch.equal(pipe.encode_conditions(["a"])[0], states), "a new one changes nothing"
    trainer, of_connector, _ = trained(make_own(), settings(tmp_path, vlm_lora_r=2, learning_rate=3e-2, max_steps=3))
    vlm = trainer.pipeline.text_encoder
    assert not changed(before, nn_of(own_weights(vlm))) and own_weights(vlm).keys() == before.keys()
    weights = dict(trainer.model.vlm_lora.items())
    assert "layers-0-self_attn-q_proj-lora_A-default-weight" in weights
    assert len(weights) == 2 * 4 * vlm.config.text_config.num_hidden_layers and of_connector
    assert all(p.requires_grad and p.dtype == torch.float32 and p.abs().max() > 0 for p in weights.values())


class nn_of(torch.nn.Module):
    """Gives tensors a `state_dict`."""

    def __init__(self, tensors):
        super().__init__()
        self.tensors = tensors

    def state_dict(self):
        return self.tensors


def test_the_prompt_is_read_with_gradients_where_a_lora_is_trained(make_own, tmp_path):
    """Else only its queries' part would learn."""
    pipe = make_own()
    trainer = MetaQueryTrainer(pipe, settings(tmp_path, vlm_lora_r=2), Samples())
    inputs = trainer.collate([Samples()[4], Samples()[5]])
    prefix = trainer.text_of(inputs, torch.device("cpu"))
    for weight in trainer.model.vlm_lora.values():
        torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(0))
    grads = []
    for kept in (prefix, remember(pipe.text_encoder, prefix)):
        states = query_states(pipe.text_encoder, pipe.conditioner.meta_queries, kept)
        grads.append(torch.autograd.grad(states.pow(2).sum(), list(trainer.model.vlm_lora.values())))
    assert max((a - b).abs().max() for a, b in zip(*grads, strict=True)) > 1e-3


def test_a_lora_comes_back_and_goes_on(make_own, tmp_path):
    make_own().save_pretrained(tmp_path / "base")
    pipe = open_model(tmp_path / "base", torch_dtype=torch.float32)
    args = settings(tmp_path / "run", vlm_lora_r=2, vlm_lora_alpha=8, learning_rate=3e-2, use_ema=False)
    trainer, _, _ = trained(pipe, args)
    trainer.export(tmp_path / "export")
    folder = tmp_path / "export/text_encoder_lora"
    names = {file.name for file in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "comfyui_clip_lora.safetensors"} <= names
    again = open_model(tmp_path / "export", torch_dtype=torch.float32)
    states = [p.encode_conditions(["a red circle"])[0] for p in (pipe, again)]
    torch.testing.assert_close(*states)
    with vlm_lora.without_lora(again.text_encoder):
        assert (again.encode_conditions(["a red circle"])[0] - states[1]).abs().max() > 1e-4
    assert not any(p.requires_grad for p in again.text_encoder.parameters())
    again.save_pretrained(tmp_path / "saved")
    once_more = open_model(tmp_path / "saved", torch_dtype=torch.float32)
    torch.testing.assert_close(once_more.encode_conditions(["a red circle"])[0], states[1])
    # Beside a Qwen2.5-VL in bfloat16 it is handed on as it is.
    beside = open_model(tmp_path / "export", torch_dtype=torch.bfloat16)
    assert beside.encode_conditions(["a red circle"])[0].isfinite().all()
    beside.save_pretrained(tmp_path / "beside")
    files = [load_file(tmp_path / f"{n}/text_encoder_lora/adapter_model.safetensors") for n in ("export", "beside")]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    # Frozen, its prefixes can be kept; trained, it has to be the same LoRA.
    kept, _, _ = trained(again, settings(tmp_path / "frozen", prefix_cache_gib=0.01, max_steps=1))
    assert len(kept.model.vlm_lora) == 0
    MetaQueryTrainer(once_more, settings(tmp_path / "more", vlm_lora_r=2, vlm_lora_alpha=8), Samples())
    with pytest.raises(InputError, match="vlm_lora_r: found 4 with vlm_lora_alpha 8, expected 2 with 8"):
        MetaQueryTrainer(once_more, settings(tmp_path / "x", vlm_lora_r=4, vlm_lora_alpha=8), Samples())


@pytest.fixture
def with_lora(make_own):
    """Return a pipeline whose language model has a LoRA that changes much."""
    pipe = make_own()
    generator = torch.Generator().manual_seed(4)
    for weight in vlm_lora.add_lora(pipe.text_encoder, 4, 8, seed=0).values():
        weight.data = torch.randn(weight.shape, generator=generator)
    pipe.text_encoder.requires_grad_(False)
    return pipe


def test_questions_are_answered_without_it(make_own, with_lora):
    asked = {"question": "what is it?", "image": Image.new("RGB", (64, 64), "red"), "max_new_tokens": 8}
    own = make_own().answer(**asked)
    assert with_lora.answer(**asked) == own
    assert not any(p.requires_grad for p in with_lora.text_encoder.parameters())
    vlm = with_lora.text_encoder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vlm_lora, "_switch", lambda language, on: None)
        assert with_lora.answer(**asked) != own, "it would change the answer"
    assert vlm_lora.lora_of(vlm).r == 4


def test_peft_reads_it_too(make_own, with_lora, tmp_path):
    """On the whole of Qwen2.5-VL, as people load it."""
    from peft import PeftModel

    vlm_lora.save_lora(with_lora.text_encoder, tmp_path)
    lora = PeftModel.from_pretrained(make_own().text_encoder, tmp_path)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        a, b, plain = (vlm(input_ids=ids).logits for vlm in (lora, with_lora.text_encoder, make_own().text_encoder))
    torch.testing.assert_close(a, b)
    assert (a - plain).abs().max() > 1e-2


def test_a_lora_on_a_model_in_bfloat16_stays_in_float32(make_own, with_lora, tmp_path):
    """Else each stage of a run would round it."""
    with_lora.save_pretrained(tmp_path / "model")
    loaded = MetaQueryPipeline.from_pretrained(tmp_path / "model", torch_dtype=torch.bfloat16)
    types = {"lora_" in name: p.dtype for name, p in loaded.text_encoder.named_parameters()}
    assert types == {False: torch.bfloat16, True: torch.float32}
    states, expected = (p.encode_conditions(["a"])[0].float() for p in (loaded, with_lora))
    assert (states - expected).norm() < 0.1 * expected.norm()


def test_the_command_trains_a_lora_in_one_stage_and_keeps_it_in_the_next(staged_config, tmp_path):
    """From YAML, Qwen2.5-VL from elsewhere and exported, previews drawn; PDTR's other stage only has to keep it."""
    config = staged_config(
        "preview_steps: 2\npreview_inference_steps: 1\nuse_ema: false\nexport_dtype: float32\n"
        "stages:\n  - {trainable: none, max_steps: 2, vlm_lora_r: 2}\n"
        "  - {trainable: full, max_steps: 2, prefix_cache_gib: 0.01}\n"
    )
    assert main(["--config", str(config)]) == 0
    names = ("stage-1/export", "export")
    first, last = (load_file(tmp_path / f"run/{n}/text_encoder_lora/adapter_model.safetensors") for n in names)
    assert first.keys() == last.keys() and all(torch.equal(first[key], last[key]) for key in first)
    assert any(tensor.abs().max() > 0 for key, tensor in first.items() if ".lora_B." in key)
    own = load_file(tmp_path / "mq/text_encoder/model.safetensors")
    written = load_file(tmp_path / "run/export/text_encoder/model.safetensors")
    assert own.keys() == written.keys() and all(torch.equal(own[key], written[key]) for key in own)
    cards = [(tmp_path / f"run/{n}/README.md").read_text() for n in names]
    assert "| vlm_lora_r | 2 |" in cards[0] and "vlm_lora_r" not in cards[1]


def test_resuming_with_another_scale_is_refused(make_pipeline, pairs_file, tmp_path):
    make_pipeline().save_pretrained(tmp_path / "mq")
    argv = ["--model_name_or_path", str(tmp_path / "mq"), "--dataset_name", str(pairs_file), "--use_cpu"]
    argv += "--resolution 64 --max_aspect 1 --max_steps 1 --per_device_train_batch_size 2 --report_to none".split()
    argv += ["--preview_steps", "0", "--output_dir", str(tmp_path / "run"), "--vlm_lora_r", "2", "--save_steps", "1"]
    assert main(argv) == 0
    with pytest.raises(InputError, match="vlm_lora_alpha of a resumed run: found 16, expected 4"):
        metaquery.metaquery(*parse([*argv, "--resume", "--vlm_lora_alpha", "16"]))


def test_a_run_with_a_lora_goes_on_bit_for_bit(make_own, tmp_path):
    changes = {"lr_scheduler_type": "constant", "vlm_lora_r": 2}
    whole, stopped = make_own(), make_own()
    trained(whole, settings(tmp_path / "a", max_steps=4, **changes))
    MetaQueryTrainer(make_own(), settings(tmp_path / "b", max_steps=2, **changes), Samples()).train()
    args = settings(tmp_path / "b", max_steps=4, **changes)
    MetaQueryTrainer(stopped, args, Samples()).train(resume_from_checkpoint=True)
    states = [p.text_encoder.state_dict() for p in (whole, stopped)]
    assert any(".lora_" in name for name in states[0])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_lora_that_does_not_fit_is_named(make_own, tmp_path):
    pipe = make_own()
    pipe.save_pretrained(tmp_path / "model")
    vlm_lora.add_lora(pipe.text_encoder, 2, 4, seed=0)
    vlm_lora.save_lora(pipe.text_encoder, tmp_path / "lora")
    for name, change, words in (
        ("a", lambda f: (f / "adapter_model.safetensors").unlink(), "no such file"),
        ("b", lambda f: (f / "adapter_config.json").write_text('{"r": 3, "lora_alpha": 4}'), "of rank 3"),
        ("c", lambda f: (f / "adapter_config.json").write_text("{}"), "r None"),
        ("d", lambda f: (f / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 0}'), "a scale above 0"),
        (
            "e",
            lambda f: (f / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 4, "use_dora": true}'),
            "found use_dora",
        ),
    ):
        shutil.copytree(tmp_path / "model", tmp_path / name)
        shutil.copytree(tmp_path / "lora", tmp_path / name / "text_encoder_lora")
        change(tmp_path / name / "text_encoder_lora")
        with pytest.raises(InputError, match=words):
            MetaQueryPipeline.from_pretrained(tmp_path / name)


# --- data


def test_latents_come_out_of_a_cache(make_pipeline, pairs_file, tmp_path):
    """Texts do not: they are read as without one, and the language model sees the pictures of edits."""
    make_pipeline().save_pretrained(tmp_path / "mq")
    argv = ["--model_name_or_path", str(tmp_path / "mq"), "--dataset_name", str(pairs_file), "--use_cpu"]
    argv += "--resolution 64 --max_aspect 1 --max_steps 4 --learning_rate 1e-2 --per_device_train_batch_size 2".split()
    argv += "--report_to none --disable_tqdm true --export_dtype float32 --save_strategy no --preview_steps 4".split()
    argv += "--preview_inference_steps 1 --vision_dropout 0".split()
    cached = ["--cache_dir", str(tmp_path / "cache"), "--cache_dtype", "float32"]
    states = []
    for name, flags in (("plain", []), ("cached", cached), ("again", cached)):
        assert main([*argv, "--output_dir", str(tmp_path / name), *flags]) == 0
        folder = tmp_path / name / "export/conditioner"
        states.append(load_file(folder / "diffusion_pytorch_model.safetensors"))
        shards = [read_header(file).shapes for file in (tmp_path / "cache").glob("shard-*")] if flags else []
        assert not any(key.startswith("text ") for shapes in shards for key in shapes)
        assert len(list((tmp_path / name / "previews").glob("*.png"))) == 1
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, atol=1e-4, rtol=1e-3)
        assert torch.equal(states[1][key], states[2][key])


def test_latents_are_encoded_ahead_without_the_language_model(make_pipeline, pairs_file, tmp_path, capsys):
    """The run that follows takes them as they are; of a model with text encoders too, which gets a new connector."""
    make_pipeline().save_pretrained(tmp_path / "mq")
    model = shutil.copytree(tmp_path / "mq", tmp_path / "painter")
    for name in ("text_encoder", "tokenizer", "conditioner"):
        shutil.rmtree(model / name)
    cache, argv = tmp_path / "cache", ["--dataset_name", str(pairs_file), "--use_cpu", "--output_dir"]
    argv += [str(tmp_path / "run"), *"--resolution 64 --max_aspect 1 --report_to none --preview_steps 0".split()]
    argv += "--max_steps 1 --save_strategy no --disable_tqdm true".split()
    argv += ["--cache_dir", str(cache)]
    assert cli(["data", "cache", "metaquery", "--model_name_or_path", str(model), *argv]) == 0
    assert capsys.readouterr().out == f"{cache}: 16 rows\n"
    shards = sorted(cache.glob("shard-*"))
    keys = [key for shard in shards for key in read_header(shard).shapes]
    assert len([key for key in keys if key.endswith(" latents")]) == 16 and not any("text" in key for key in keys)
    assert main(["--model_name_or_path", str(tmp_path / "mq"), *argv]) == 0
    assert sorted(cache.glob("shard-*")) == shards, "nothing was encoded again"
    with pytest.raises(InputError, match="training method of data cache: found 'grpo'"):
        cli(["data", "cache", "grpo", *argv])


def test_a_picture_that_is_gone_after_it_was_encoded_is_replaced(make_pipeline, pairs_file, tmp_path):
    shutil.copytree(pairs_file.parent, tmp_path / "data")
    pairs = PairDataset([open_source(str(tmp_path / "data/data.jsonl"))], aspect_buckets(64))
    cache = Cache(tmp_path / "cache", "this VAE")
    build_cache(pairs, cache, make_pipeline(), torch.float32, torch.device("cpu"))
    cached = CachedPairs(pairs, cache, with_sources=True)
    sample, plain = cached[1], pairs[1]
    assert torch.equal(sample["source_pixels"], plain["ref_pixel_values"]) and "text" not in sample
    assert "source_pixels" not in cached[0]
    (tmp_path / "data/s1.png").unlink()
    replaced = cached[1]
    assert list(replaced["broken"]) == [1] and "s1.png" in replaced["broken"][1]
    assert torch.equal(replaced["source_pixels"], pairs[3]["ref_pixel_values"])
    assert torch.equal(replaced["latents"], cached[3]["latents"])
    with pytest.raises(InputError, match="1 broken rows of 16"):
        cached.note_broken(1, replaced["broken"][1])


def test_it_reads_a_stream(make_pipeline, pairs_file, tmp_path):
    make_pipeline().save_pretrained(tmp_path / "mq")
    argv = [
        "--model_name_or_path",
        str(tmp_path / "mq"),
        "--dataset_name",
        str(pairs_file),
        "--use_cpu",
        "--streaming",
    ]
    argv += "--resolution 64 --max_aspect 1 --max_steps 2 --per_device_train_batch_size 2 --report_to none".split()
    argv += ["--preview_steps", "0", "--output_dir", str(tmp_path / "run")]
    assert main(argv) == 0
    assert is_metaquery(tmp_path / "run/export")


def test_some_pictures_are_hidden_from_the_language_model(make_pipeline, tmp_path):
    trainer = MetaQueryTrainer(make_pipeline(), settings(tmp_path, vision_dropout=0.5), Samples())
    rows = [{**Samples()[4 + i % 4], "draw_seed": 1} for i in range(64)]
    seen = trainer.collate(rows)["seen"]
    black = sum(not picture.any() for picture in seen)
    assert 16 < black < 48
    again = trainer.collate(rows)["seen"]
    assert torch.equal(seen, again)
    assert "seen" not in trainer.collate([Samples()[0]])


@pytest.mark.parametrize("gib", [0.0, 0.01])
def test_a_stopped_run_goes_on_bit_for_bit(make_pipeline, tmp_path, gib):
    """Also with kept prefixes, of which a resumed run has none at first."""
    whole, constant = make_pipeline(), {"lr_scheduler_type": "constant", "prefix_cache_gib": gib}
    trained(whole, settings(tmp_path / "a", max_steps=4, **constant))
    args = settings(tmp_path / "b", max_steps=4, **constant)
    MetaQueryTrainer(make_pipeline(), settings(tmp_path / "b", max_steps=2, **constant), Samples()).train()
    pipe = make_pipeline()
    MetaQueryTrainer(pipe, args, Samples()).train(resume_from_checkpoint=True)
    for a, b in zip(whole.conditioner.parameters(), pipe.conditioner.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"positions": "2d"}, "positions"),
        ({"vision_dropout": 1.5}, "vision_dropout"),
        ({"prefix_cache_gib": -1}, "prefix_cache_gib"),
        ({"train_text_encoder": True}, "train_text_encoder"),
        ({"transformer_learning_rate": 1e-4}, "trainable"),
        ({"transformer_learning_rate": 0, "trainable": "full"}, "transformer_learning_rate"),
        ({"trainable": "some"}, "none, full, attention"),
        ({"attention_backend": "flash"}, "attention_backend"),
        ({"vlm_lora_r": -1}, "vlm_lora_r"),
        ({"vlm_lora_r": 4, "prefix_cache_gib": 1.0}, "prefix_cache_gib: found vlm_lora_r too"),
        ({"vlm_lora_r": 4, "vlm_lora_alpha": 0}, "vlm_lora_alpha"),
        ({"vlm_lora_alpha": 8}, "vlm_lora_alpha: found no vlm_lora_r"),
    ],
)
def test_settings_that_cannot_be_meant_are_named(tmp_path, changes, words):
    with pytest.raises(InputError, match=words):
        settings(tmp_path, **changes)


def test_how_positions_were_trained_is_kept(make_pipeline, tmp_path):
    pipe = make_pipeline()
    trainer = MetaQueryTrainer(pipe, settings(tmp_path, positions="mrope"), Samples())
    trainer.export(tmp_path / "export")
    assert open_model(tmp_path / "export").positions == "mrope"
    for path in ("conditioner", "conditioner/diffusion_pytorch_model.safetensors"):  # where nodes find it
        assert StableDiffusion3Conditioner.from_pretrained(tmp_path / "export" / path).config["positions"] == "mrope"
    assert MetaQueryPipeline.from_pretrained(tmp_path / "export", positions="1d").positions == "1d"
    again = MetaQueryPipeline.from_pretrained(tmp_path / "export")
    MetaQueryTrainer(again, settings(tmp_path), Samples())
    assert again.positions == "mrope"


def test_a_language_model_in_bfloat16_trains_a_connector_in_float32(make_pipeline, tmp_path, vlm):
    pipe = make_pipeline()
    pipe.text_encoder = copy.deepcopy(vlm).bfloat16()
    _, of_connector, _ = trained(pipe, settings(tmp_path, max_steps=1, save_strategy="no"))
    assert "meta_queries" in of_connector and pipe.conditioner.dtype == torch.float32


def test_pretraining_refuses_such_a_model(make_pipeline, tmp_path):
    from unipic2.trainer.pretrain import parse as parse_pretraining
    from unipic2.trainer.pretrain import pretrain

    make_pipeline().save_pretrained(tmp_path / "mq")
    argv = ["--model_name_or_path", str(tmp_path / "mq"), "--output_dir", str(tmp_path / "run"), "--use_cpu"]
    with pytest.raises(InputError, match="unipic2 train metaquery"):
        pretrain(*parse_pretraining(argv))


def test_sizes_that_contradict_the_models_connector_are_named(make_pipeline, tmp_path):
    make_pipeline().save_pretrained(tmp_path / "mq")
    argv = ["--model_name_or_path", str(tmp_path / "mq"), "--output_dir", str(tmp_path / "run"), "--use_cpu"]
    assert load_metaquery(*parse([*argv, "--num_queries", "5"])).conditioner.num_queries == 5
    for flag, value, real in (("num_queries", 64, 5), ("connector_hidden_size", 128, 64)):
        with pytest.raises(InputError, match=f"{flag}: found {value}, expected {real}"):
            load_metaquery(*parse([*argv, f"--{flag}", str(value)]))


@pytest.mark.parametrize("name", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_what_moves_parts_at_their_forward_is_refused(make_pipeline, name):
    with pytest.raises(InputError, match=f"{name}.*encode_conditions"):
        getattr(make_pipeline(), name)()


def test_words_and_ready_states_together_are_refused(make_pipeline):
    pipe = make_pipeline()
    states, pooled = pipe.encode_conditions(["b"])
    ready = {"negative_prompt_embeds": states, "negative_pooled_prompt_embeds": pooled}
    with pytest.raises(InputError, match="negative_prompt_embeds"):
        pipe("a", height=64, width=64, num_inference_steps=1, **ready)


def test_pretraining_has_no_trainable_none(tmp_path):
    from unipic2.trainer import FlowMatchingConfig

    with pytest.raises(InputError, match="one of full, attention"):
        FlowMatchingConfig(output_dir=str(tmp_path), trainable="none", use_cpu=True)


def test_the_command_trains_a_new_connector_and_exports(
    make_pipeline, make_small_pipeline, pairs_file, tmp_path, capsys
):
    make_pipeline().save_pretrained(tmp_path / "mq")
    make_small_pipeline().save_pretrained(tmp_path / "base")
    argv = [
        "--model_name_or_path", str(tmp_path / "base"), "--vlm_name_or_path", str(tmp_path / "mq"), "--dataset_name",
        str(pairs_file), "--resolution", "64", "--max_aspect", "1", "--output_dir", str(tmp_path / "run"), "--use_cpu",
        "--max_steps", "2", "--per_device_train_batch_size", "2", "--report_to", "none", "--preview_steps", "2",
        "--preview_inference_steps", "1", "--num_queries", "3", "--connector_hidden_size", "64",
        "--connector_intermediate_size", "64", "--connector_num_hidden_layers", "1",
        "--connector_num_attention_heads", "1", "--export_vlm", "--distillation_weight", "0.5",
    ]  # fmt: skip
    assert main(argv) == 0
    export = tmp_path / "run/export"
    assert capsys.readouterr().out.strip().endswith("export")
    pipe = open_model(export, torch_dtype=torch.float32)
    assert pipe.conditioner.num_queries == 3 and not list((tmp_path / "run/previews").glob("*")) == []
    assert "MetaQueryPipeline" in (export / "README.md").read_text()
    assert len(pipe("a", height=64, width=64, num_inference_steps=1).images) == 1
    # A MetaQuery model goes on with its own parts.
    script_args, args = parse(["--model_name_or_path", str(export), "--output_dir", str(tmp_path / "x"), "--use_cpu"])
    assert load_metaquery(script_args, args).conditioner.num_queries == 3


def test_queries_of_a_new_connector_may_begin_with_words(make_pipeline, make_small_pipeline, tmp_path, capsys):
    make_pipeline().save_pretrained(tmp_path / "mq")
    make_small_pipeline().save_pretrained(tmp_path / "base")
    argv = [
        "--model_name_or_path", str(tmp_path / "base"), "--vlm_name_or_path", str(tmp_path / "mq"), "--output_dir",
        str(tmp_path / "run"), "--use_cpu", "--num_queries", "7", "--connector_hidden_size", "64",
        "--connector_intermediate_size", "64", "--connector_num_hidden_layers", "1",
    ]  # fmt: skip
    pipe = load_metaquery(*parse([*argv, "--query_init_text", "red circle"]))
    ids = pipe.tokenizer("red circle").input_ids
    words = pipe.text_encoder.get_input_embeddings().weight[[ids[i % len(ids)] for i in range(7)]]
    assert torch.equal(pipe.conditioner.meta_queries, words)
    assert pipe.conditioner.meta_queries.requires_grad
    with pytest.raises(InputError, match="query_init_text: found '', expected words"):
        load_metaquery(*parse([*argv, "--query_init_text", ""]))
    assert "query_init_text" not in capsys.readouterr().err
    there = ["--model_name_or_path", str(tmp_path / "mq"), "--output_dir", str(tmp_path / "run"), "--use_cpu"]
    load_metaquery(*parse([*there, "--query_init_text", "red circle"]))
    assert "query_init_text: no effect, as" in capsys.readouterr().err
    (tmp_path / "run/stage-1").mkdir(parents=True)
    (tmp_path / "mq").rename(tmp_path / "run/stage-1/export")
    there[1], there[3] = str(tmp_path / "run/stage-1/export"), str(tmp_path / "run/stage-2")
    load_metaquery(*parse([*there, "--query_init_text", "red circle"]))
    assert "query_init_text" not in capsys.readouterr().err, "the first stage began with the words"


@pytest.mark.parametrize("name", ["metaquery_micro", "metaquery_sd35m"])
def test_shipped_configs_parse(name, tmp_path):
    path = Path(metaquery.__file__).parent / "configs" / f"{name}.yaml"
    argv = ["--config", str(path), "--output_dir", str(tmp_path), "--use_cpu"]
    stages = parse_stages(argv, parse)
    assert [args.trainable for _, args in stages][0] == "none" and stages[-1][1].trainable != "none"


def test_alignment_and_joint_training_in_one_file(staged_config, tmp_path):
    """As the micro model is made: bfloat16, Muon, kept prefixes, a language model that is in no other place."""
    config = staged_config(
        "prefix_cache_gib: 0.01\nbf16: true\ngradient_checkpointing: true\npreview_steps: 0\n"
        "muon_learning_rate: 1.0e-2\nattention_backend: math\n"
        "stages:\n  - {trainable: none, max_steps: 2}\n  - {trainable: attention, max_steps: 2}\n"
    )
    assert main(["--config", str(config)]) == 0
    first, last = (
        open_model(tmp_path / f"run/{name}", torch_dtype=torch.float32) for name in ("stage-1/export", "export")
    )
    base = open_model(tmp_path / "base", torch_dtype=torch.float32).transformer.state_dict()
    assert not changed(base, first.transformer)
    moved = changed({k: v.half().float() for k, v in base.items()}, last.transformer)
    assert moved and all(".attn" in name for name in moved)
    assert last.conditioner.config["connector_config"]["num_attention_heads"] == 1
    assert "MetaQueryPipeline" in (tmp_path / "run/export/README.md").read_text()


def test_the_micro_model_is_made_by_one_command(make_small_pipeline, tmp_path, monkeypatch):
    """Every stage for a moment; a second call finds them done."""
    from unipic2.core.micro import QWEN_TEXT_CONFIG, QWEN_VISION_CONFIG
    from unipic2.trainer.micro import evaluate as judged
    from unipic2.trainer.micro import make_metaquery as making

    monkeypatch.setitem(QWEN_TEXT_CONFIG, "num_hidden_layers", 1)
    monkeypatch.setitem(QWEN_VISION_CONFIG, "depth", 2)
    monkeypatch.setattr(making, "question_accuracy", lambda *given: module.question_accuracy(*given[:2], 9, given[3]))
    monkeypatch.setattr(
        making, "evaluate", lambda pipe, count, seed: judged.evaluate(pipe, 6, seed, num_inference_steps=1)
    )
    make_small_pipeline().save_pretrained(tmp_path / "base")
    flags = ["--max_steps", "1", "--num_scenes", "24", "--num_edits", "24", "--per_device_train_batch_size", "4"]
    flags += ["--preview_steps", "0", "--report_to", "none"]
    given = (tmp_path / "out", tmp_path / "work", str(tmp_path / "base"), 0, 1, flags)
    results = making.make_metaquery(*given)
    assert results["questions"]["n"] == 9 and results["t2i"]["n"] == 6
    card = (tmp_path / "out/README.md").read_text()
    assert "--vlm-steps 1" in card and "1 (none), 1 (full)" in card
    assert isinstance(open_model(tmp_path / "out"), MetaQueryPipeline)
    assert "right" not in (tmp_path / "work/answers.tsv").read_text().splitlines()[0]
    stamp = (tmp_path / "work/run/export/model_index.json").stat().st_mtime_ns
    assert making.make_metaquery(*given) == results
    assert (tmp_path / "work/run/export/model_index.json").stat().st_mtime_ns == stamp
    for base, words in ((tmp_path / "out", "a MetaQuery model"), (tmp_path / "nothing", "no such folder")):
        with pytest.raises(InputError, match=words):
            making.make_metaquery(tmp_path / "o", tmp_path / "w", str(base), 0, 1, [])
    assert not (tmp_path / "w").exists()


def test_a_reference_that_is_dropped_is_seen_by_nobody(make_pipeline, tmp_path):
    trainer = MetaQueryTrainer(
        make_pipeline(), settings(tmp_path, reference_dropout=1.0, vision_dropout=0.0), Samples()
    )
    batch = trainer.collate([Samples()[4], Samples()[5]])
    assert "ref_latents" not in batch and not batch["seen"].any()


def test_the_language_model_a_connector_was_trained_on_is_named(make_pipeline, tmp_path):
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path / "mq")
    pipe.loaded_from, pipe.given = tmp_path / "mq", frozenset({"text_encoder", "tokenizer"})
    for name, kept in (("someone/Qwen2.5-VL-3B", True), (str(tmp_path), False)):
        pipe.vlm_name = name
        pipe.save_trained(tmp_path / f"out-{kept}", {"conditioner"}, torch.float32)
        index = json.loads((tmp_path / f"out-{kept}/model_index.json").read_text())
        assert index.get("vlm") == (name if kept else None)
    with pytest.raises(InputError, match="someone/Qwen2.5-VL-3B"):
        MetaQueryPipeline.from_pretrained(tmp_path / "out-True")


def test_the_command_says_what_it_does_not_do(tmp_path):
    common = ["--model_name_or_path", "m", "--output_dir", str(tmp_path)]
    with pytest.raises(InputError, match="use_peft"):
        parse([*common, "--use_peft"])
    with pytest.raises(InputError, match="num_queries"):
        parse([*common, "--num_querys", "3"])


@pytest.mark.parametrize("estimator", ["flow_grpo", "diffusion_nft"])
def test_rewards_train_its_transformer(make_pipeline, tmp_path, estimator):
    """PDTR's trainer on a MetaQuery model: prompts of edits are encoded with their pictures, guided too."""
    from unipic2.trainer import FlowGRPOConfig, FlowGRPOTrainer

    class Rows(torch.utils.data.Dataset):
        is_edit = [False] * 2 + [True] * 2

        def __len__(self):
            return 4

        def __getitem__(self, index):
            row = {"prompt": f"a {index}", "size": (64, 64)}
            return {**row, "source_image": Image.new("RGB", (64, 64), (60 * index, 0, 0))} if index > 1 else row

    args = FlowGRPOConfig(
        estimator=estimator, output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, num_generations=2,
        use_cpu=True, num_inference_steps=5, report_to="none", preview_steps=0, save_strategy="no", edit_ratio=0.5,
        learning_rate=1e-3, guidance_scale=2.0, beta=0.0, disable_tqdm=True,
    )  # fmt: skip
    pipe = make_pipeline()
    before = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    connector = {k: v.clone() for k, v in pipe.conditioner.state_dict().items()}

    def redness(prompts, images, **columns):
        return [float(i.resize((1, 1)).getpixel((0, 0))[0]) for i in images]

    encode, shown = pipe.encode_conditions, []

    def watched(prompts, pictures=None, device=None):
        shown.append((prompts, None if pictures is None else pictures.mean((1, 2, 3)).mul(3 * 255).round().tolist()))
        return encode(prompts, pictures, device)

    pipe.encode_conditions = watched
    FlowGRPOTrainer(pipe, redness, args, Rows()).train()
    assert changed(before, pipe.transformer) and not changed(connector, pipe.conditioner)
    edits = [(prompts, reds) for prompts, reds in shown if reds is not None]
    for prompts, reds in edits:
        assert sorted(reds) == [120, 180] and prompts in ([f"a {int(red) // 60}" for red in reds], ["", ""])
    assert len(edits) == 2 and len(shown) == 4, "prompt and empty prompt of each generation, edits with their pictures"


def test_pdtr_on_a_metaquery_model(tmp_path):
    """Both stages, measured around each, and an export that draws and answers."""
    from unipic2.trainer.cli import main as unipic2

    settings = {
        "model_name_or_path": "micro-metaquery", "dataset_name": "micro", "reward_funcs": ["micro_soft"],
        "output_dir": str(tmp_path / "run"), "use_cpu": True, "per_device_train_batch_size": 4, "num_generations": 2,
        "num_inference_steps": 3, "preview_steps": 0, "report_to": "none", "disable_tqdm": True, "save_strategy": "no",
        "learning_rate": 1e-3, "eval_n": 6, "eval_inference_steps": 1, "gate_steps": 0, "export_dtype": "float32",
        "stages": [{"edit_ratio": 1.0, "max_steps": 2}, {"edit_ratio": 0.0, "max_steps": 2}],
    }  # fmt: skip
    (tmp_path / "pdtr.yaml").write_text(json.dumps(settings))
    assert unipic2(["train", "pdtr", "--config", str(tmp_path / "pdtr.yaml")]) == 0
    assert list(json.loads((tmp_path / "run/interference.json").read_text())) == ["start", "1-edit", "2-t2i"]
    start, after = (open_model(m, torch_dtype=torch.float32) for m in ("micro-metaquery", tmp_path / "run/export"))
    assert changed(start.transformer.state_dict(), after.transformer)
    assert not changed(start.conditioner.state_dict(), after.conditioner)
    assert after.answer("a red circle. what is there?", max_new_tokens=4)
    assert len(after("a red circle", num_inference_steps=1).images) == 1
