"""The flow-matching trainer: batches, loss, resumption, averages and export, on real but very small models."""

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback
from unipic2.core.errors import InputError
from unipic2.core.flow import shift_sigmas
from unipic2.core.micro import MAX_TOKENS
from unipic2.trainer import FlowMatchingConfig, FlowMatchingTrainer, StableDiffusion3KontextPipeline
from unipic2.trainer.kontext_trainer import last_checkpoint
from unipic2.trainer.micro.dataset import MicroDataset
from unipic2.trainer.micro.tasks import sample_edit
from unipic2.trainer.micro.world import render

PROMPTS = ["a red circle", "two squares", "a blue cross", "make the red circle blue", "remove the cross"]


class Samples(torch.utils.data.Dataset):
    """Fixed latents; the last `edits` samples have a reference."""

    def __init__(self, t2i: int = 6, edits: int = 6):
        generator = torch.Generator().manual_seed(3)
        self.latents = torch.randn(t2i + edits, 2, 16, 8, 8, generator=generator)
        self.is_edit = [False] * t2i + [True] * edits

    def __len__(self):
        return len(self.is_edit)

    def __getitem__(self, index):
        sample = {"prompt": PROMPTS[index % len(PROMPTS)], "latents": self.latents[index, 0]}
        return {**sample, "ref_latents": self.latents[index, 1]} if self.is_edit[index] else sample


@pytest.fixture
def make_trainer(make_small_pipeline, tmp_path):
    """Return a function that builds a trainer on a fresh small pipeline."""

    def make(name="run", dataset=None, previews=None, callbacks=None, **settings):
        settings = {
            "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "lr_scheduler_type": "linear",
            "train_text_encoder": True, "save_strategy": "no", "logging_steps": 1, "report_to": "none",
            "use_cpu": True, "disable_tqdm": True, "seed": 5, **settings,
        }  # fmt: skip
        args = FlowMatchingConfig(output_dir=str(tmp_path / name), **settings)
        return FlowMatchingTrainer(make_small_pipeline(), args, dataset or Samples(), previews, callbacks)

    return make


def trained(trainer):
    """Train at once: the trainer seeds the random numbers when it is made."""
    trainer.train()
    return trainer


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def averages(trainer):
    return dict(zip(trainer.ema.names, [t.clone() for t in trainer.ema.ema.shadow_params], strict=True))


def differences(left, right):
    assert left.keys() == right.keys() and left
    return [name for name in left if not torch.equal(left[name], right[name])]


# Batches


@pytest.mark.parametrize(("task", "field"), [(0, "caption_dropout"), (6, "edit_caption_dropout")])
def test_caption_dropout(make_trainer, task, field):
    empty = None
    for share in (1.0, 0.0):
        trainer = make_trainer(**{"caption_dropout": 0.5, "edit_caption_dropout": 0.5, field: share})
        samples = [trainer.train_dataset[task + i] for i in range(6)]
        batch = trainer.collate(samples)
        assert batch["text"].shape == (6, MAX_TOKENS) and batch["latents"].shape == (6, 16, 8, 8)
        assert ("ref_latents" in batch) == (task == 6)
        if share == 1.0:
            empty = batch["text"]
            assert (empty == empty[0]).all()
    tokenizer = trainer.pipeline.tokenizer
    texts = tokenizer.batch_decode(batch["text"], skip_special_tokens=True)
    assert [t.strip() for t in texts] == [s["prompt"] for s in samples]
    assert not (batch["text"] == empty).all(1).any()


def test_the_tokens_of_training_are_those_of_sampling(make_trainer):
    trainer = make_trainer(caption_dropout=0.0)
    seen = []
    hook = trainer.pipeline.text_encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    trainer.pipeline.encode_prompt(["a red circle"], None, None, do_classifier_free_guidance=False)
    hook.remove()
    batch = trainer.collate([trainer.train_dataset[0]])
    assert torch.equal(batch["text"], seen[0])


def test_dropped_references(make_trainer):
    """A batch keeps or loses its references as a whole, by its own seed, at the asked rate."""
    trainer = make_trainer(reference_dropout=0.25, edit_caption_dropout=0.0)
    samples = [trainer.train_dataset[6 + i] for i in range(3)]
    kept = []
    for seed in range(200):
        batch = trainer.collate([{**sample, "draw_seed": seed} for sample in samples])
        again = trainer.collate([{**sample, "draw_seed": seed} for sample in samples])
        assert batch.keys() == again.keys() and batch["is_edit"]
        kept.append("ref_latents" in batch)
    assert 0.65 < sum(kept) / len(kept) < 0.85


# Loss


def loss_by_hand(trainer, batch):
    """Return noise, sigmas (B,) and predicted velocity as the objective's definition has them."""
    pipe = trainer.pipeline
    generator = torch.Generator().manual_seed(batch["seed"])
    noise = torch.randn(batch["latents"].shape, generator=generator)
    u = torch.sigmoid(torch.normal(0.0, 1.0, (len(noise),), generator=generator))
    shift = trainer.args.shift
    sigma = (shift * u / (1 + (shift - 1) * u)).reshape(-1, 1, 1, 1)
    text = pipe.text_encoder(batch["text"], output_hidden_states=True)
    velocity = pipe.transformer(
        hidden_states=(1 - sigma) * batch["latents"] + sigma * noise,
        timestep=1000 * sigma.flatten(),
        encoder_hidden_states=text.hidden_states[-2],
        pooled_projections=text.text_embeds,
        ref_hidden_states=batch.get("ref_latents"),
    ).sample
    return noise, sigma.flatten(), velocity


def batch_of(trainer, start, count, **fields):
    samples = [{**trainer.train_dataset[start + i], **fields, "draw_seed": 11} for i in range(count)]
    return trainer.collate(samples)


@torch.no_grad()
@pytest.mark.parametrize("start", [0, 6])
def test_the_loss_by_hand(make_trainer, start):
    trainer = make_trainer(caption_dropout=0.0, edit_caption_dropout=0.0, shift=2.0)
    batch = batch_of(trainer, start, 3)
    loss, velocity = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    noise, _, expected = loss_by_hand(trainer, batch)
    torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=1e-5)
    assert loss.item() == pytest.approx((expected - (noise - batch["latents"])).square().mean().item(), rel=1e-5)


@torch.no_grad()
def test_the_loss_does_not_touch_the_global_random_numbers(make_trainer):
    trainer = make_trainer(contrastive_weight=0.05)
    batch, state = batch_of(trainer, 6, 3), torch.get_rng_state()
    first = trainer.compute_loss(trainer.model, batch).item()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    assert trainer.compute_loss(trainer.model, batch).item() == first


@torch.no_grad()
@pytest.mark.parametrize("weighting", ["sigma_sqrt", "cosmap"])
def test_the_weighted_loss_by_hand(make_trainer, weighting):
    trainer = make_trainer(caption_dropout=0.0, shift=2.0, loss_weighting=weighting)
    batch = batch_of(trainer, 0, 3)
    noise, sigma, velocity = loss_by_hand(trainer, batch)
    weight = sigma**-2 if weighting == "sigma_sqrt" else 2 / (np.pi * (1 - 2 * sigma + 2 * sigma**2))
    expected = weight * (velocity - (noise - batch["latents"])).square().mean(dim=(1, 2, 3))
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(expected.mean().item(), rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("start", [0, 6])
def test_the_contrastive_loss_by_hand(make_trainer, start):
    """With two samples each one's negative is the other."""
    trainer = make_trainer(caption_dropout=0.0, edit_caption_dropout=0.0, contrastive_weight=0.05)
    batch = batch_of(trainer, start, 2)
    noise, _, velocity = loss_by_hand(trainer, batch)
    target = noise - batch["latents"]
    pull = (velocity - target).square().mean(dim=(1, 2, 3))
    push = (velocity - target.flip(0)).square().mean(dim=(1, 2, 3))
    loss = trainer.compute_loss(trainer.model, batch).item()
    assert loss == pytest.approx((pull - 0.05 * push).mean().item(), rel=1e-4)
    assert loss < pull.mean().item()


@torch.no_grad()
def test_edits_of_one_source_are_not_contrasted(make_trainer):
    contrasted, plain = (make_trainer(edit_caption_dropout=0.0, contrastive_weight=w) for w in (0.5, 0.0))
    losses = [t.compute_loss(t.model, batch_of(t, 6, 3, source_id=7)).item() for t in (contrasted, plain)]
    assert losses[0] == losses[1]


@torch.no_grad()
def test_a_masked_loss_looks_inside_the_mask(make_trainer):
    mask = torch.zeros(1, 8, 8)
    mask[:, :4, 2:5] = 1
    inside, all_of_it = (make_trainer(edit_caption_dropout=0.0, unmasked_weight=w) for w in (0.0, 1.0))
    batch = batch_of(inside, 6, 3, loss_mask=mask)
    noise, _, velocity = loss_by_hand(inside, batch)
    error = (velocity - (noise - batch["latents"])).square()
    loss = inside.compute_loss(inside.model, batch).item()
    assert loss == pytest.approx(error[:, :, :4, 2:5].mean().item(), rel=1e-4)
    plain = all_of_it.compute_loss(all_of_it.model, batch_of(all_of_it, 6, 3, loss_mask=mask)).item()
    assert plain == pytest.approx(error.mean().item(), rel=1e-4)


@pytest.mark.parametrize("size", [8, 16])
def test_a_dynamic_shift_is_the_schedulers_own(make_trainer, size):
    """Training shifts sigmas by picture size as the exported scheduler does when it samples."""
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

    trainer = make_trainer(dynamic_shift=True, base_shift=0.4, max_shift=1.3)
    config = trainer.pipeline.scheduler.config
    tokens = (size // 2) ** 2
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    mu = calculate_shift(tokens, *(config[name] for name in names))
    sigmas = torch.linspace(0.05, 0.95, 7)
    shifted = shift_sigmas(sigmas, trainer.shift_for(torch.zeros(1, 16, size, size)))
    assert config.use_dynamic_shifting
    torch.testing.assert_close(shifted, trainer.pipeline.scheduler.time_shift(mu, 1.0, sigmas))
    static = make_trainer(shift=2.0)
    assert static.shift_for(torch.zeros(1, 16, size, size)) == static.pipeline.scheduler.config.shift == 2.0


@torch.no_grad()
def loss_on_fixed_noise(trainer):
    losses = []
    for start in (0, 6):
        for seed in range(4):
            batch = trainer.collate([{**trainer.train_dataset[start + i], "draw_seed": seed} for i in range(2)])
            losses.append(trainer.compute_loss(trainer.model, batch).item())
    return sum(losses) / len(losses)


def test_twelve_steps_reduce_the_loss(make_trainer):
    dropout = {"caption_dropout": 0.0, "edit_caption_dropout": 0.0}
    trainer = make_trainer(max_steps=12, learning_rate=3e-3, lr_scheduler_type="constant", **dropout)
    before, start = loss_on_fixed_noise(trainer), weights(trainer)
    trainer.train()
    assert loss_on_fixed_noise(trainer) < 0.85 * before
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(history) == 12 and any("loss/t2i" in h for h in history) and any("loss/edit" in h for h in history)
    assert all(h["samples_per_second"] > 0 and h["tokens_per_second"] > 0 for h in history)
    assert any(name.startswith("loss/sigma_") for h in history for name in h)
    changed = set(differences(start, weights(trainer)))
    assert any(n.startswith("text_encoder.") for n in changed) and any(n.startswith("transformer.") for n in changed)


def test_a_frozen_text_encoder_and_vae_stay(make_trainer):
    trainer = make_trainer(train_text_encoder=False)
    frozen = (trainer.pipeline.vae, trainer.pipeline.text_encoder)
    before, parts = weights(trainer), [copy.deepcopy(part.state_dict()) for part in frozen]
    trainer.train()
    assert all(name.startswith("transformer.") for name in before) and differences(before, weights(trainer))
    assert not any(differences(old, part.state_dict()) for old, part in zip(parts, frozen, strict=True))


def test_frozen_and_trained_encoders_read_the_same(make_trainer):
    losses = []
    for trained in (False, True):
        trainer = make_trainer(train_text_encoder=trained, edit_caption_dropout=0.0)
        batch = trainer.collate([trainer.train_dataset[6 + i] for i in range(3)])
        with torch.no_grad():
            losses.append(trainer.compute_loss(trainer.model, batch).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_gradient_checkpointing_trains_the_same(make_trainer):
    plain = trained(make_trainer("a"))
    checkpointed = trained(make_trainer("b", gradient_checkpointing=True))
    assert checkpointed.pipeline.transformer.gradient_checkpointing
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(checkpointed)[name], value, atol=1e-5, rtol=1e-4)


def test_gradient_accumulation_keeps_one_task_a_micro_batch(make_trainer):
    trainer = make_trainer(max_steps=2, gradient_accumulation_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2 and np.isfinite(trainer.state.log_history[0]["loss"])


# Determinism and resumption


def test_the_same_seed_gives_the_same_weights(make_trainer):
    first, again, other = (trained(make_trainer(name, seed=seed)) for name, seed in (("a", 5), ("b", 5), ("c", 6)))
    assert not differences(weights(first), weights(again))
    assert not differences(averages(first), averages(again))
    assert differences(weights(first), weights(other))


def test_previews_do_not_change_the_run(make_trainer, tmp_path):
    drawn = []

    def previews(pipe, step):
        generator = torch.Generator().manual_seed(0)
        sampling = {"num_inference_steps": 2, "height": 64, "width": 64, "generator": generator}
        drawn.append((step, pipe.transformer.training, {n: p.clone() for n, p in pipe.transformer.named_parameters()}))
        torch.rand(7)  # a preview may draw from the global generator
        return pipe("a red circle", **sampling).images[0]

    plain = trained(make_trainer("plain"))
    watched = trained(make_trainer("watched", previews=previews, preview_steps=2))
    assert not differences(weights(plain), weights(watched))
    assert not differences(averages(plain), averages(watched))
    assert [(step, training) for step, training, _ in drawn] == [(2, False), (4, False)]
    files = sorted(p.name for p in (tmp_path / "watched/previews").iterdir())
    assert files == ["step_000002.png", "step_000004.png"]
    shown = {f"transformer.{name}": value for name, value in drawn[-1][2].items()}
    average = {name: value for name, value in averages(watched).items() if name in shown}
    assert not differences(average, shown), "previews show the averaged weights"


class StopAt(TrainerCallback):
    """Ends training after a step, as a kill right after a checkpoint would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def assert_resumes_exactly(make_trainer, dataset, **settings):
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, **settings}
    whole = make_trainer("whole", dataset, **settings)
    whole.train()
    killed = make_trainer("killed", dataset, callbacks=[StopAt(4)], **settings)
    killed.train()
    assert killed.state.global_step == 4
    del killed
    torch.manual_seed(999)  # a new process starts with other random numbers
    resumed = make_trainer("killed", dataset, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8
    assert resumed.ema.ema.optimization_step == whole.ema.ema.optimization_step == 8
    assert not differences(weights(whole), weights(resumed))
    assert not differences(averages(whole), averages(resumed))


def test_kill_and_resume_equals_an_uninterrupted_run(make_trainer, vae):
    """Eight steps within one pass over the pool, whose prompts and dropout are random."""
    assert_resumes_exactly(make_trainer, MicroDataset(vae, 24, 12, seed=0))


def test_kill_and_resume_at_the_end_of_a_pass(make_trainer):
    """Eight samples in batches of two: the checkpoint after step 4 stands between two passes."""
    assert_resumes_exactly(make_trainer, Samples(4, 4))


def test_a_checkpoint_that_was_cut_off_is_passed_over(tmp_path):
    for step, names in ((9, ["trainer_state.json"]), (8, ["trainer_state.json", "ema.safetensors"]), (10, [])):
        (tmp_path / f"checkpoint-{step}").mkdir()
        for name in names:
            (tmp_path / f"checkpoint-{step}" / name).write_text('{"global_step": 9}')
    (tmp_path / "checkpoint-11").mkdir()
    (tmp_path / "checkpoint-11/trainer_state.json").write_text('{"global_step": 1')  # killed while it was written
    assert last_checkpoint(tmp_path, use_ema=True).name == "checkpoint-8"
    assert last_checkpoint(tmp_path, use_ema=False).name == "checkpoint-9"
    assert last_checkpoint(tmp_path / "none", use_ema=True) is None


def test_kill_and_resume_with_muon(make_trainer):
    """Its momentum is part of the checkpoint."""
    assert_resumes_exactly(make_trainer, Samples(12, 12), muon_learning_rate=1e-2)


# Muon


def test_muon_takes_the_blocks_matrices_and_adamw_the_rest(make_trainer):
    trainer = make_trainer(muon_learning_rate=2e-3, weight_decay=0.1)
    optimizer = trainer.create_optimizer()
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    by_muon = {names[id(p)] for group in optimizer.muon.param_groups for p in group["params"]}
    by_adamw = {names[id(p)] for group in optimizer.adamw.param_groups for p in group["params"]}
    assert by_muon.isdisjoint(by_adamw) and by_muon | by_adamw == set(names.values())
    assert "transformer.transformer_blocks.0.attn2.to_q.weight" in by_muon
    assert "transformer.transformer_blocks.1.ff.net.2.weight" in by_muon
    assert any(n.startswith("text_encoder.") for n in by_muon)
    assert {"transformer.transformer_blocks.0.norm1.linear.weight", "transformer.proj_out.weight"} <= by_adamw
    assert not any("embedding" in n or n.endswith("bias") for n in by_muon)
    rates = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert rates == [(2e-3, 0.1), (1e-3, 0.1), (1e-3, 0.0)]


def test_muon_steps_are_those_of_torch(make_trainer):
    """One step on known gradients equals `torch.optim.Muon` and `AdamW` on copies."""
    trainer = make_trainer(muon_learning_rate=2e-3, weight_decay=0.1)
    optimizer = trainer.create_optimizer()
    parameters = dict(trainer.model.named_parameters())
    matrix, bias = (parameters[f"transformer.transformer_blocks.0.attn.to_q.{n}"] for n in ("weight", "bias"))
    copies = [nn.Parameter(p.detach().clone()) for p in (matrix, bias)]
    for p, copied in zip((matrix, bias), copies, strict=True):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.ndim))
        copied.grad = p.grad.clone()
    optimizer.step()
    torch.optim.Muon([copies[0]], lr=2e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw").step()
    torch.optim.AdamW([copies[1]], lr=1e-3, weight_decay=0.0).step()
    torch.testing.assert_close(matrix, copies[0])
    torch.testing.assert_close(bias, copies[1])


def test_both_rates_follow_the_schedule(make_trainer):
    trainer = make_trainer(muon_learning_rate=4e-3, max_steps=4)
    trainer.train()
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [0.0, 0.0, 0.0]
    assert trainer.lr_scheduler.base_lrs == [4e-3, 1e-3, 1e-3]


# Averages and export


def test_a_compiled_run_is_the_plain_one_and_goes_on_without(make_trainer):
    """torch.compile's own backend is left out: here its wrapper counts, which changes the names of weights."""
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    saving = {"save_strategy": "steps", "save_steps": 2}
    plain, fast = trained(make_trainer("plain")), trained(make_trainer("fast", **compiled, **saving))
    assert weights(plain).keys() == dict(fast.trained_model().named_parameters()).keys()
    assert not differences(weights(plain), dict(fast.trained_model().named_parameters()))
    resumed = make_trainer("fast")
    resumed.train(resume_from_checkpoint=f"{resumed.args.output_dir}/checkpoint-2")
    assert not differences(weights(plain), weights(resumed)) and not differences(averages(plain), averages(resumed))


def test_each_of_a_processs_trainers_is_compiled_or_not(make_small_pipeline, tmp_path):
    """As in `unipic2 micro make`, which reads all settings before its VAE is trained."""
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    given = [
        FlowMatchingConfig(
            output_dir=str(tmp_path / str(i)), max_steps=1, per_device_train_batch_size=2, use_cpu=True,
            report_to="none", save_strategy="no", disable_tqdm=True, **settings,
        ) for i, settings in enumerate(({}, compiled, {}))
    ]  # fmt: skip
    found = []
    for args in given:
        trainer = trained(FlowMatchingTrainer(make_small_pipeline(), args, Samples()))
        found.append(isinstance(trainer.model_wrapped, torch._dynamo.OptimizedModule))
    assert found == [False, True, False]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_kernel_of_attention_is_chosen(make_trainer, checkpointing):
    settings = {"gradient_checkpointing": checkpointing, "max_steps": 2, "train_text_encoder": False}
    auto, math = (
        trained(make_trainer(name, attention_backend=name, **settings)) for name in ("auto", "math")
    )  # fmt: skip
    pairs = list(zip(weights(auto).values(), weights(math).values(), strict=True))
    assert any(not torch.equal(a, b) for a, b in pairs), "another kernel rounds in another way"
    assert all((a - b).abs().max() < 1e-3 for a, b in pairs)


def test_a_kernel_that_there_is_not(make_trainer):
    with pytest.raises(InputError, match="attention_backend: found cudnn, which torch does not have"):
        make_trainer(attention_backend="cudnn").train()
    with pytest.raises(InputError, match="attention_backend: found 'fast'"):
        make_trainer(attention_backend="fast")


@pytest.mark.parametrize("optim", ["adafactor", "schedule_free_adamw", "adamw_torch_fused"])
def test_optimizers_of_libraries(make_trainer, optim):
    settings = {"optim": optim, "lr_scheduler_type": "constant", "max_steps": 12, "learning_rate": 3e-3}
    trainer = make_trainer(use_ema=False, **settings)
    before = loss_on_fixed_noise(trainer)
    trainer.train()
    assert loss_on_fixed_noise(trainer) < before


def test_a_schedule_free_optimizer_exports_its_own_average(make_trainer, tmp_path):
    settings = {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant", "export_dtype": "float32"}
    trainer = trained(make_trainer(use_ema=False, **settings))
    current = weights(trainer)
    trainer.export(tmp_path / "out")
    file = load_file(tmp_path / "out/transformer/diffusion_pytorch_model.safetensors")
    file = {name: file[name.removeprefix("transformer.")] for name in current if name.startswith("transformer.")}
    assert not differences(current, weights(trainer)), "training could go on"
    assert any(not torch.equal(file[name], current[name]) for name in file)
    trainer.optimizer.eval()
    assert all(torch.equal(file[name], weights(trainer)[name]) for name in file)
    with pytest.raises(InputError, match="use_ema: found true .* averages the weights by itself"):
        make_trainer(**settings)


def test_packages_that_are_missing(make_trainer, monkeypatch):
    monkeypatch.setattr("transformers.trainer_optimizer.is_bitsandbytes_available", lambda *args: False)
    with pytest.raises(InputError, match="optim adamw_8bit: found .*bitsandbytes"):
        make_trainer(optim="adamw_8bit").train()
    monkeypatch.setattr("transformers.integrations.integration_utils.is_comet_available", lambda: False)
    with pytest.raises(InputError, match="report_to: found .*comet.*to be installed"):
        make_trainer(report_to="comet_ml")


def test_the_average_follows_its_formula(make_trainer):
    trajectory = []

    class Record(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            trajectory.append(model.transformer.proj_out.weight.detach().clone())

    trainer = make_trainer(max_steps=4, ema_decay=0.5, callbacks=[Record()])
    trainer.train()
    expected = trajectory[0]
    for step, value in enumerate(trajectory[1:], start=1):
        decay = min(0.5, 1 - (1 + step) ** -0.75)
        expected = decay * expected + (1 - decay) * value
    torch.testing.assert_close(averages(trainer)["transformer.proj_out.weight"], expected)


def test_an_average_on_the_cpu_at_intervals_is_the_same_formula(make_trainer):
    trajectory = []

    class Record(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            trajectory.append(model.transformer.proj_out.weight.detach().clone())

    settings = {"ema_decay": 0.5, "ema_update_steps": 2, "ema_on_cpu": True}
    trainer = make_trainer(max_steps=4, callbacks=[Record()], **settings)
    trainer.train()
    decay = min(0.5, 1 - 2**-0.75)
    expected = decay * trajectory[1] + (1 - decay) * trajectory[3]
    torch.testing.assert_close(averages(trainer)["transformer.proj_out.weight"], expected)


@pytest.fixture(scope="module")
def edit_task():
    return sample_edit(np.random.default_rng(0), "recolor")


def test_export_holds_the_averaged_weights(make_trainer, tmp_path, edit_task):
    trainer = make_trainer(shift=2.0)
    trainer.train()
    trained = weights(trainer)
    trainer.export(tmp_path / "export")
    assert not differences(trained, weights(trainer)), "exporting leaves the trained weights in place"
    files = {
        "transformer": load_file(tmp_path / "export/transformer/diffusion_pytorch_model.safetensors"),
        "text_encoder": load_file(tmp_path / "export/text_encoder/model.safetensors"),
    }
    stored = {f"{part}.{name}": value for part, tensors in files.items() for name, value in tensors.items()}
    average = averages(trainer)
    assert set(average) <= set(stored)
    assert not differences({n: v.half() for n, v in average.items()}, {n: stored[n] for n in average})
    assert {v.dtype for v in stored.values() if v.is_floating_point()} == {torch.float16}
    pipe = StableDiffusion3KontextPipeline.from_pretrained(tmp_path / "export", torch_dtype=torch.float32)
    assert pipe.scheduler.config.shift == 2.0
    pipe.set_progress_bar_config(disable=True)
    options = {"image": render(edit_task.source), "height": 64, "width": 64, "num_inference_steps": 1}
    assert pipe(edit_task.prompt, **options).images[0].size == (64, 64)
    assert sorted(p.name for p in tmp_path.iterdir() if "export" in p.name) == ["export"]


def test_export_without_an_average_and_over_an_old_one(make_trainer, tmp_path):
    trainer = make_trainer(use_ema=False, export_dtype="float32")
    trainer.train()
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "stale.txt").write_text("old")
    with pytest.raises(InputError, match="a folder without model_index.json"):
        trainer.export(tmp_path / "export")
    assert (tmp_path / "export" / "stale.txt").read_text() == "old"
    (tmp_path / "export" / "model_index.json").write_text("{}")
    trainer.export(tmp_path / "export")
    stored = load_file(tmp_path / "export/transformer/diffusion_pytorch_model.safetensors")
    ours = {n.removeprefix("transformer."): p for n, p in weights(trainer).items() if n.startswith("transformer.")}
    assert not differences(ours, {name: stored[name] for name in ours})
    assert not (tmp_path / "export" / "stale.txt").exists()


def test_a_failed_export_keeps_the_old_one(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer()
    trainer.export(tmp_path / "export")
    before = (tmp_path / "export/model_index.json").read_bytes()
    trained = weights(trainer)
    trainer.ema.ema.shadow_params[0].add_(1)

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(InputError, match="full disk"):
        trainer.export(tmp_path / "export")
    assert (tmp_path / "export/model_index.json").read_bytes() == before
    assert not differences(trained, weights(trainer))
    assert sorted(p.name for p in tmp_path.iterdir() if "export" in p.name) == ["export"], "nothing half-written"


# Settings


def test_several_text_encoders_are_not_trained(make_small_pipeline, tmp_path):
    pipe = make_small_pipeline()
    pipe.register_modules(text_encoder_2=copy.deepcopy(pipe.text_encoder))
    args = FlowMatchingConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", train_text_encoder=True)
    with pytest.raises(InputError, match="train_text_encoder: found true for a model with several"):
        FlowMatchingTrainer(pipe, args, Samples())
