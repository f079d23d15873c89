"""Online reinforcement learning on very small models: groups, ratios, rewards, KL, resumption."""

import asyncio
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from unipic2.core.errors import InputError
from unipic2.trainer import FlowGRPOConfig, FlowGRPOTrainer
from unipic2.trainer.adapters import lora_config
from unipic2.trainer.flow_grpo_trainer import _of_each_prompt
from unipic2.trainer.micro.rows import MicroTasks
from unipic2.trainer.micro.tasks import shares_color
from unipic2.trainer.noisy_steps import NoisySteps
from unipic2.trainer.rewards.judge import EditJudge
from unipic2.trainer.rewards.micro import micro_soft
from unipic2.trainer.rollouts import log_prob

from .judge_server import completion, good


def redness(prompts, images, **columns):
    """Red minus green, of -1 to 1."""
    pixels = [np.asarray(image, dtype=np.float64) / 255 for image in images]
    return [float(p[..., 0].mean() - p[..., 1].mean()) for p in pixels]


@pytest.fixture
def make_trainer(make_small_pipeline, tmp_path):
    def make(name="run", reward=redness, peft=False, dataset=None, **settings):
        settings = {
            "estimator": "flow_grpo", "max_steps": 2, "per_device_train_batch_size": 6, "num_generations": 3,
            "learning_rate": 1e-3, "num_inference_steps": 4, "sde_window_size": 2, "lr_scheduler_type": "constant",
            "report_to": "none",
            "save_strategy": "no", "logging_steps": 1, "use_cpu": True, "disable_tqdm": True, "seed": 5,
            "preview_steps": 0, **settings,
        }  # fmt: skip
        args = FlowGRPOConfig(output_dir=str(tmp_path / name), **settings)
        peft_config = lora_config(4, 8, 0.0, ["attention"]) if peft else None
        pipeline, data = make_small_pipeline(), dataset or MicroTasks(12, 12)
        return FlowGRPOTrainer(pipeline, reward, args, data, peft_config=peft_config)

    return make


def trained(trainer, **options):
    trainer.train(**options)
    return trainer


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def differences(left, right):
    assert left.keys() == right.keys() and left
    return [name for name in left if not torch.equal(left[name], right[name])]


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class Counted(MicroTasks):
    """Counts how often each row is read."""

    def __getitem__(self, index):
        self.reads = [*getattr(self, "reads", []), index]
        return super().__getitem__(index)


def test_rows_are_read_once_for_all_batches_of_a_generation(make_trainer):
    data = Counted(12, 12)
    settings = {"gradient_accumulation_steps": 4, "num_iterations": 2, "max_steps": 4}
    trained(make_trainer(dataset=data, **settings))
    assert len(data.reads) == 3 * 8, "two generations of 8 groups, and one that is loaded ahead"


# Rewards


def test_rewards_of_the_same_name_have_curves_of_their_own(make_trainer, capsys):
    def redness(prompts, images, **columns):
        return [0.5] * len(prompts)

    trainer = trained(make_trainer(reward=[globals()["redness"], redness], max_steps=1))
    assert logged(trainer, "rewards/redness_2/mean") == [0.5] != logged(trainer, "rewards/redness/mean")
    assert "reward redness_2 is 0.5 for all of 6 samples" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lasts", "batches", "steps"),
    [(1, 1, [0, 4, 8]), (3, 1, [0, 6]), (6, 1, [0, 6]), (1, 2, [0, 4, 8]), (3, 2, [0, 4, 9])],
)
def test_sheets_are_kept_once_for_each_preview_step(make_trainer, tmp_path, lasts, batches, steps):
    """Of the next generation, where the one that is trained on lasts beyond it."""
    settings = {"num_iterations": lasts, "steps_per_generation": 1, "gradient_accumulation_steps": batches}
    settings |= {"log_completions": True}
    trained(make_trainer(max_steps=12 if batches > 1 else 9, preview_steps=4, **settings))
    found = sorted(path.stem for path in (tmp_path / "run/completions").iterdir())
    assert found == [f"step_{step:06d}" for step in steps]


def test_coroutines_are_asked_while_the_next_pictures_are_drawn(make_trainer, monkeypatch):
    decoded, asked, whole = [], [], []
    decode = FlowGRPOTrainer._decode

    def noted(self, latents):
        decoded.append(len(latents))
        return decode(self, latents)

    async def patient(prompts, images, **columns):
        """Wait until more is drawn than what is asked about; were that only drawn later, it would end in vain."""
        asked.append(len(prompts))
        generation = (sum(asked) - 1) // 12
        deadline = time.monotonic() + 20
        while sum(asked) % 12 and sum(decoded) <= 12 * generation + sum(asked) % 12:
            assert time.monotonic() < deadline, "nothing is drawn while rewards are found out"
            await asyncio.sleep(0.005)
        assert not torch.is_grad_enabled() and threading.current_thread().name == "rewards"
        assert all(len({prompts[i + k] for k in range(3)}) == 1 for i in range(0, len(prompts), 3)), "whole groups"
        return redness(prompts, images)

    def plain(prompts, images, **columns):
        whole.append(len(prompts))
        assert threading.current_thread() is threading.main_thread()
        return [None if i % 2 else 1.0 * i for i in range(len(prompts))]

    monkeypatch.setattr(FlowGRPOTrainer, "_decode", noted)
    # Parts of 4 and groups of 3: a part ends inside a group.
    settings = {"per_device_train_batch_size": 4, "steps_per_generation": 3, "gradient_accumulation_steps": 3}
    trainer = trained(make_trainer(reward=[plain, patient], max_steps=2, **settings))
    assert decoded == [4] * 6 and asked == [3, 3, 6] * 2 and whole == [12, 12]
    assert len(logged(trainer, "rewards/patient/mean")) == len(logged(trainer, "rewards/plain/mean")) == 2
    assert logged(trainer, "rewards/plain/mean") == [5.0, 5.0], "columns are not mixed up"


def test_a_run_on_a_judge_that_misbehaves(make_trainer, server, capsys):
    """All that can go wrong in one generation: the run goes on, and pictures without an answer teach nothing."""
    wrong = [(500, b"out of memory"), "closed", 1.0, (200, b"<html>"), completion('{"scores": [NaN, 5]}'), good(1)]
    server.behave = lambda number, request: wrong[number] if number < len(wrong) else good(number % 11, 9)
    judge = EditJudge(server.url, "qwen", timeout=0.5, max_retries=0, concurrency=1, max_failures=100)
    trainer = trained(make_trainer(reward=judge, edit_ratio=1.0, max_steps=2))
    assert sum(judge.endpoint.failures.values()) == len(wrong) and len(server.requests) == 24, "two for each picture"
    said = capsys.readouterr().err
    assert "6 questions without an answer" in said and "could not be found out for 3 of 6 samples" in said
    assert all(np.isfinite(logged(trainer, name)).all() for name in ("reward", "grad_norm", "loss"))
    assert len(logged(trainer, "rewards/edit_judge/mean")) == 2
    assert all(torch.isfinite(p).all() for p in weights(trainer).values())


def test_a_run_whose_judge_is_down_changes_nothing_and_says_so(make_trainer, server, capsys):
    server.behave = lambda number, request: (500, b"")
    judge = EditJudge(server.url, "qwen", max_retries=0, concurrency=1, max_failures=3, cooldown=60)
    trainer = make_trainer(reward=judge, edit_ratio=1.0, weight_decay=0.0)
    before = weights(trainer)
    trained(trainer)
    assert not differences(before, weights(trainer)) and not logged(trainer, "reward")
    said = capsys.readouterr().err
    assert "server left alone after status 500" in said and "no reward for any of 6 samples" in said
    assert len(server.requests) == 3, "the second generation asks nothing"


def test_a_coroutine_that_fails_ends_the_run(make_trainer):
    async def broken(prompts, images, **columns):
        raise KeyError("label")

    with pytest.raises(InputError, match="reward broken: found KeyError: 'label'"):
        trained(make_trainer(reward=broken))


def test_a_reward_that_fails_ends_the_run(make_trainer):
    def broken(prompts, images, **columns):
        raise KeyError("label")

    with pytest.raises(InputError, match="reward broken: found KeyError: 'label'"):
        trained(make_trainer(reward=broken))


# Groups


def test_groups_are_of_one_prompt_and_one_source(make_trainer):
    seen = []

    def watch(prompts, images, source_image, task, **columns):
        seen.append((prompts, images, source_image, task))
        return redness(prompts, images)

    trained(make_trainer(reward=watch, max_steps=4))
    kinds = set()
    for prompts, images, sources, tasks in seen:
        assert len(prompts) == 6 and len({id(task) for task in tasks}) == 2
        for start in (0, 3):
            group = slice(start, start + 3)
            assert len(set(prompts[group])) == 1 and len({id(source) for source in sources[group]}) == 1
            assert tasks[start].prompt == prompts[start]
            assert len({image.tobytes() for image in images[group]}) == 3, "pictures of a group differ"
        kinds.add(sources[0] is not None)
        assert all((source is not None) == (sources[0] is not None) for source in sources)
    assert kinds == {False, True}


def test_no_two_groups_share_their_noise_or_prompt_draw(make_trainer):
    prompts = []

    def watch(texts, images, **columns):
        prompts.extend(texts)
        return redness(texts, images)

    trained(make_trainer(reward=watch, max_steps=6, edit_ratio=0.0))
    assert len(set(prompts)) > 4


# Probabilities


@pytest.mark.parametrize(
    "settings",
    [
        {"dynamics": "cps"},
        {"dynamics": "flow_sde", "eta": 0.7},
        {"dynamics": "flow_sde", "eta": 0.7, "estimator": "grpo_guard"},
        {"guidance_scale": 2.0},
        {"storage_dtype": "bfloat16"},
        {"steps_per_generation": 2},
        {"gradient_checkpointing": True},
        {"estimator": "awm"},
        {"estimator": "awm", "steps_per_generation": 2, "guidance_scale": 2.0},
    ],
    ids=str,
)
def test_the_first_ratio_is_one(make_trainer, settings):
    """With references in the batch. Old probabilities are computed, as a generation is trained on twice."""
    trainer = make_trainer(edit_ratio=1.0, max_steps=1, num_iterations=2, **settings)
    assert not trainer._on_policy
    trained(trainer)
    assert logged(trainer, "ratio") == [1.0]
    assert logged(trainer, "clip_ratio/high_mean") == [0.0]


def test_ratios_leave_one_when_a_generation_is_trained_on_again(make_trainer):
    trainer = trained(make_trainer(num_iterations=3, max_steps=3, learning_rate=1e-2, epsilon=1.0))
    ratios = logged(trainer, "ratio")
    assert ratios[0] == 1.0 and abs(ratios[2] - 1) > 1e-6


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_conditions_take_no_more_memory_for_larger_groups(make_trainer, guidance_scale):
    trainer = trained(make_trainer(num_generations=3, edit_ratio=1.0, max_steps=1, guidance_scale=guidance_scale))
    kept = trainer._generation["text"]
    assert len(kept) == (3 if guidance_scale == 1 else 5) and {len(of_rows) for of_rows in kept.values()} == {2}
    part = torch.tensor([4, 0])
    batch = trainer._batch(part)["text"]
    assert all(torch.equal(batch[name], of_rows[[1, 0]]) for name, of_rows in kept.items())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"edit_ratio": 1.0},
        {"edit_ratio": 1.0, "guidance_scale": 2.0},
        {"edit_ratio": 1.0, "storage_dtype": "bfloat16"},
        {"edit_ratio": 1.0, "dynamics": "flow_sde", "eta": 0.7},
        {"edit_ratio": 1.0, "steps_per_generation": 2},
    ],
    ids=str,
)
def test_log_probs_in_training_are_those_of_the_rollout(make_trainer, monkeypatch, settings):
    """So that the first ratio is one against what drew the pictures, not against the same pass done twice.

    Of rollouts step by step and in parts of a batch; in training all steps are one pass.
    """
    drawn, keep = [], NoisySteps.keep

    def noted(self, rollouts, *rest):
        drawn.append(torch.cat([rollout.log_probs for rollout in rollouts], dim=1))
        return keep(self, rollouts, *rest)

    monkeypatch.setattr(NoisySteps, "keep", noted)
    trainer = trained(make_trainer(max_steps=1, learning_rate=0.0, **settings))
    generation, model = trainer._generation, trainer.trained_model().eval()
    assert len(drawn) == 1 and len(generation["batches"]) == settings.get("steps_per_generation", 1)

    def log_probs(batch):
        with torch.no_grad():
            steps, _ = trainer.learner._steps(model, batch)
        return steps, NoisySteps._log_probs(batch, steps)

    for part in generation["batches"]:
        batch = trainer._batch(part)
        steps, found = log_probs(batch)
        for step, after, before in zip(steps, batch["after"], batch["before"], strict=True):
            spread = ((after - step.mean) / step.std).flatten(1)
            assert 0.8 < spread.std().item() < 1.2 and spread.mean().abs() < 0.2, "what was drawn is what was meant"
            assert torch.isfinite(log_prob(after, step)).all() and before.shape == after.shape
        torch.testing.assert_close(found, drawn[0][:, part], atol=2e-6, rtol=0)
        for name, of_samples in batch["text"].items():  # another sample's words or picture would be seen
            if not torch.equal(of_samples, of_samples.flip(0)):
                other = {**batch, "text": {**batch["text"], name: of_samples.flip(0)}}
                assert (log_probs(other)[1] - found).abs().max() > 1e-5, name


def test_what_is_rewarded_becomes_likelier(make_trainer):
    """One update on one generation: the drawn steps of better pictures gain probability on those of worse ones."""
    trainer = make_trainer(max_steps=1, learning_rate=3e-4, use_ema=False, max_grad_norm=0.0)
    trained(trainer)
    generation = trainer._generation
    everything = torch.arange(6)
    batch = trainer._batch(everything)
    fresh = make_trainer("fresh").trained_model().eval()
    with torch.no_grad():
        new, _ = trainer.learner._steps(trainer.trained_model().eval(), batch)
        old, _ = trainer.learner._steps(fresh, batch)
    gain = sum(log_prob(a, n) - log_prob(a, o) for a, n, o in zip(batch["after"], new, old, strict=True))
    assert (gain * generation["advantages"]).sum() > 0


# Training


@pytest.mark.parametrize(
    "settings",
    [
        {"dynamics": "cps", "eta": 0.8},
        {"dynamics": "flow_sde", "eta": 0.7},
        {"estimator": "diffusion_nft", "nft_beta": 1.0},
        {"estimator": "diffusion_nft", "use_ema": True},
        {"estimator": "awm"},
    ],
    ids=str,
)
def test_the_reward_rises(make_trainer, settings):
    """By current weights; DiffusionNFT also by the average, as is its default."""
    rates = {"max_steps": 24, "per_device_train_batch_size": 16, "num_generations": 8, "learning_rate": 3e-3}
    trainer = make_trainer(**{**rates, "use_ema": False, **settings})
    trained(trainer)
    rewards = logged(trainer, "reward")
    assert np.mean(rewards[-6:]) > np.mean(rewards[:6]) + 0.02, rewards


def test_a_lora_is_held_by_its_kl(make_trainer):
    free = trained(make_trainer("free", peft=True, max_steps=6, learning_rate=1e-2))
    held = trained(make_trainer("held", peft=True, max_steps=6, learning_rate=1e-2, beta=100.0, kl_scaling="exact"))
    assert logged(held, "kl")[0] == 0 and logged(held, "kl")[-1] > 0
    start = weights(make_trainer("start", peft=True))
    distance = [sum((w[n] - start[n]).square().sum() for n in start) for w in (weights(free), weights(held))]
    assert distance[1] < distance[0]


def test_full_weights_have_a_frozen_reference(make_trainer):
    trainer = trained(make_trainer(beta=0.1, max_steps=3, learning_rate=1e-2))
    start = make_trainer("start").pipeline.transformer.state_dict()
    kept = trainer.reference.state_dict()
    assert all(torch.equal(kept[key], start[key]) for key in start)
    assert differences(weights(trainer), weights(make_trainer("other")))
    assert logged(trainer, "kl")[0] == 0 and logged(trainer, "kl")[-1] > 0


@pytest.mark.parametrize("estimator", ["diffusion_nft", "awm", "flow_grpo"])
@pytest.mark.parametrize("peft", [False, True])
def test_the_distance_to_the_start_is_logged_without_a_beta(make_trainer, estimator, peft):
    """In the steps before logs alone, by themselves of LoRAs, and nothing else is changed by it."""
    settings = {"estimator": estimator, "peft": peft, "learning_rate": 1e-2, "logging_steps": 2, "max_steps": 4}
    logging = trained(make_trainer("logging", log_kl=None if peft else True, **settings))
    silent = trained(make_trainer("silent", log_kl=False if peft else None, **settings))
    assert not differences(weights(logging), weights(silent))
    assert not logged(silent, "kl") and silent.reference is None
    assert len(logged(logging, "kl")) == 2 and min(logged(logging, "kl")) > 0
    assert logging.args.log_kl is (None if peft else True), "settings stay what they were"
    passes = []
    logging.reference_velocity = lambda latents, **rest: passes.append(1) or torch.zeros_like(latents)
    trained(logging)
    assert len(passes) == 2


def test_the_micro_verifier_as_reward_is_logged(make_trainer):
    trainer = trained(make_trainer(reward=[micro_soft, redness], reward_weights=[1.0, 0.5]))
    for name in ("reward", "reward_std", "frac_reward_zero_std", "rewards/micro_soft/mean", "rewards/redness/mean"):
        assert len(logged(trainer, name)) == 2, name


def test_a_generation_without_differences_changes_nothing(make_trainer, capsys):
    trainer = make_trainer(reward=lambda prompts, images, **columns: [1.0] * len(prompts), weight_decay=0.0)
    before = weights(trainer)
    trained(trainer)
    assert not differences(before, weights(trainer))
    assert logged(trainer, "frac_reward_zero_std") == [1.0, 1.0]
    assert "is 1 for all of 6 samples" in capsys.readouterr().err


def first_group_is_equal(prompts, images, **columns):
    values = redness(prompts, images)
    return [0.5 if i % 6 < 3 else value for i, value in enumerate(values)]


@pytest.mark.parametrize("settings", [{}, {"estimator": "awm"}, {"guidance_scale": 2.0}], ids=str)
def test_samples_that_teach_nothing_cost_no_pass(make_trainer, monkeypatch, settings):
    """And the update is that of all samples."""
    settings = {
        "steps_per_generation": 2, "gradient_accumulation_steps": 2, "max_steps": 1, "edit_ratio": 1.0, **settings
    }  # fmt: skip
    short = trained(make_trainer("short", reward=first_group_is_equal, **settings))
    assert [len(part) for part in short._generation["batches"]] == [3, 3]
    assert logged(short, "frac_reward_zero_std") == [0.5]
    monkeypatch.setattr(FlowGRPOTrainer, "_batches", lambda self, order, teaches: order.split(6))
    whole = trained(make_trainer("whole", reward=first_group_is_equal, **settings))
    start, one, two = weights(make_trainer("start")), weights(short), weights(whole)
    assert max((one[n] - start[n]).abs().max() for n in one) > 5e-4
    apart = sum((one[n] - two[n]).abs().sum() for n in one)
    assert apart < 0.01 * sum((one[n] - start[n]).abs().sum() for n in one)
    assert logged(short, "loss")[0] == pytest.approx(logged(whole, "loss")[0], abs=1e-4)


def test_old_probabilities_are_of_the_batches_of_the_loss(make_trainer):
    """Also where samples were left out; with other batches a first ratio would not be 1 to the last digit."""
    trainer = make_trainer(
        reward=first_group_is_equal, steps_per_generation=2, num_iterations=2, max_steps=1, learning_rate=0.0
    )
    trained(trainer)
    batches = trainer._generation["batches"]
    assert [len(part) for part in batches] == [3, 3]
    with torch.no_grad():
        for part in batches:
            again = trainer.learner.old(trainer.trained_model().eval(), trainer._batch(part))["old"]
            assert torch.equal(again.cpu(), trainer._generation["kept"]["old"][:, part])
    left_out = sorted(set(range(12)) - set(torch.cat(list(batches)).tolist()))
    assert len(left_out) == 6 and not trainer._generation["kept"]["old"][:, left_out].any()


def test_what_grpo_guard_compares_with_is_of_the_batches_of_the_loss(make_trainer):
    settings = {"estimator": "grpo_guard", "dynamics": "flow_sde", "steps_per_generation": 2, "num_iterations": 2}
    trainer = trained(make_trainer(max_steps=1, learning_rate=0.0, **settings))
    kept, model = trainer._generation["kept"], trainer.trained_model().eval()
    with torch.no_grad():
        for part in trainer._generation["batches"]:
            again = trainer.learner.old(model, trainer._batch(part))["means"].cpu()
            assert torch.equal(again, kept["means"][:, part])
    assert logged(trainer, "ratio") == [1.0]


def test_samples_that_the_loss_still_uses_are_kept(make_trainer):
    """Those of a KL, and DiffusionNFT's, which draw to the old model."""
    for settings in ({"beta": 0.1}, {"estimator": "diffusion_nft"}, {"estimator": "awm", "ema_beta": 1.0}):
        trainer = trained(make_trainer(reward=first_group_is_equal, max_steps=1, **settings))
        assert [len(part) for part in trainer._generation["batches"]] == [6], settings


def test_awm_is_held_by_the_distance_to_its_average(make_trainer):
    """The average of the weights as it is when a generation is drawn; at the start it is the model itself."""
    settings = {"estimator": "awm", "max_steps": 6, "learning_rate": 3e-3, "ema_decay": 0.9}
    free, held = (trained(make_trainer(str(w), ema_beta=w, **settings)) for w in (0.0, 1e3))
    start = weights(make_trainer("start"))
    distance = [sum((w[n] - start[n]).square().sum() for n in start) for w in (weights(free), weights(held))]
    assert distance[1] < distance[0] and "average" not in free._generation["kept"]
    assert logged(held, "ema_distance")[0] == 0 and logged(held, "ema_distance")[-1] > 0
    batch = held._batch(torch.arange(6))
    again = make_trainer("again", ema_beta=1.0, **settings)
    assert again.learner.average(again.trained_model().eval(), batch)["average"].shape == batch["average"].shape


def test_a_sheet_shows_different_prompts():
    order, prompts = [3, 2, 1, 0, 4, 5, 6, 7], ["a", "a", "a", "b", "c", "c", "d", "d"]
    assert _of_each_prompt(order, prompts) == [3, 2, 4, 6, 1, 0]
    assert _of_each_prompt([1, 0], ["a", "a"]) == [1, 0]


def test_a_shift_by_size(make_trainer):
    """The schedule of rollouts is that of the pipeline for the size."""
    trainer = trained(make_trainer(dynamic_shift=True, max_steps=1))
    plain = trained(make_trainer("plain", max_steps=1))
    assert trainer._generation["sigmas"][0] == 1
    assert not torch.equal(trainer._generation["sigmas"], plain._generation["sigmas"])


def test_the_same_seed_gives_the_same_weights(make_trainer):
    one, two = (trained(make_trainer(name)) for name in ("one", "two"))
    assert not differences(weights(one), weights(two))


@pytest.mark.parametrize("estimator", ["flow_grpo", "diffusion_nft"])
def test_accumulation_equals_one_large_batch(make_trainer, estimator):
    """One generation of 12 pictures, in one batch of 12 or in four of 3."""
    settings = {"max_steps": 1, "edit_ratio": 1.0, "estimator": estimator}
    whole = make_trainer("whole", per_device_train_batch_size=12, **settings)
    parts = make_trainer("parts", per_device_train_batch_size=3, gradient_accumulation_steps=4, **settings)
    start = weights(whole)
    trained(whole), trained(parts)
    one, two = weights(whole), weights(parts)
    assert max((one[n] - start[n]).abs().max() for n in one) > 5e-4
    apart = sum((one[n] - two[n]).abs().sum() for n in one)
    assert apart < 0.01 * sum((one[n] - start[n]).abs().sum() for n in one)


@pytest.mark.parametrize("estimator", ["diffusion_nft", "awm"])
def test_old_velocities_are_those_of_the_model_that_drew(make_trainer, estimator):
    """A generation trained on twice: the first time the loss is what it is without old ones kept."""
    settings = {"estimator": estimator, "old_policy": "current", "max_steps": 1}
    kept = make_trainer("kept", num_iterations=2, **settings)
    alone = make_trainer("alone", **settings)
    assert not kept._on_policy and alone._on_policy
    trained(kept), trained(alone)
    assert "old" in kept._generation["kept"] and "old" not in alone._generation["kept"]
    one, two = weights(kept), weights(alone)
    assert max((one[n] - two[n]).abs().max() for n in one) < 1e-6


@pytest.mark.parametrize("estimator", ["diffusion_nft", "awm"])
def test_the_old_policy_may_be_the_average(make_trainer, estimator):
    """Pictures and old velocities are of the average; the weights that are trained come back afterwards."""
    settings = {"estimator": estimator, "old_policy": "average", "max_steps": 3, "learning_rate": 3e-3}
    trainer = make_trainer(ema_decay=0.9, **settings)
    generate, draw = trainer._generate, trainer._draw
    trained_ones, old_ones, generations = [], [], []

    def watch_generate(inputs):
        trained_ones.append(weights(trainer))
        generations.append((inputs, generate(inputs)))
        assert not differences(weights(trainer), trained_ones[-1])
        return generations[-1][1]

    def watch_draw(inputs):
        old_ones.append(weights(trainer))
        averages = dict(zip(trainer.ema.names, trainer.ema.ema.shadow_params, strict=True))
        assert not differences(old_ones[-1], averages)
        return draw(inputs)

    trainer._generate, trainer._draw = watch_generate, watch_draw
    trained(trainer)
    moved = [max((old[n] - new[n]).abs().max() for n in old) for old, new in zip(old_ones, trained_ones, strict=True)]
    assert moved[0] == 0 and moved[2] > 1e-4
    assert not trainer._on_policy
    # The same draw by a model that is the average: pictures and what the loss compares with are the same.
    inputs, generation = generations[2]
    trainer.trained_model().load_state_dict(old_ones[2], strict=False)
    again = draw(inputs)["kept"]
    for name in ("latents", "old"):
        torch.testing.assert_close(again[name], generation["kept"][name], rtol=0, atol=0)


@pytest.mark.parametrize("settings", [{"estimator": "flow_grpo"}, {"estimator": "awm", "use_ema": False}], ids=str)
def test_the_average_as_old_policy_needs_matching_and_an_average(make_trainer, settings):
    with pytest.raises(InputError, match="old_policy: found average with"):
        make_trainer(old_policy="average", **settings)


def test_rollouts_have_the_chosen_kernel_of_attention(make_trainer, monkeypatch):
    kernels = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def noted(*args, **kwargs):
        if not torch.is_grad_enabled():
            kernels.append((torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()))
        return attend(*args, **kwargs)

    trainer = make_trainer(attention_backend="math", max_steps=1, estimator="diffusion_nft")
    monkeypatch.setattr(trainer, "encode_text", lambda *args: (torch.zeros(2, 5, 32), torch.zeros(2, 24)))
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    trained(trainer)
    assert set(kernels) == {(False, True)}
    with pytest.raises(InputError, match="attention_backend: found cudnn, which torch does not have"):
        make_trainer(attention_backend="cudnn").train()


def test_rollouts_of_a_compiled_run_are_compiled(make_trainer, monkeypatch):
    """By torch.compile's backend that changes nothing: the weights are those of a plain run."""
    seen = []
    velocity = FlowGRPOTrainer.velocity

    def noted(self, model, *args, **rest):
        seen.append((torch.is_grad_enabled(), isinstance(model, torch._dynamo.OptimizedModule)))
        return velocity(self, model, *args, **rest)

    monkeypatch.setattr(FlowGRPOTrainer, "velocity", noted)
    settings = {"estimator": "diffusion_nft", "edit_ratio": 1.0}
    plain = trained(make_trainer("plain", **settings))
    assert set(seen) == {(False, False), (True, False)}
    seen.clear()
    fast = trained(make_trainer("fast", torch_compile=True, torch_compile_backend="eager", **settings))
    assert set(seen) == {(False, True), (True, True)}, "rollouts and training"
    assert not differences(weights(plain), dict(fast.trained_model().named_parameters()))


def test_matching_is_held_by_the_distance_to_the_start(make_trainer):
    settings = {"estimator": "diffusion_nft", "max_steps": 6, "learning_rate": 3e-3}
    free = trained(make_trainer("free", **settings))
    held = trained(make_trainer("held", beta=1e3, **settings))
    start = weights(make_trainer("start"))
    distance = [sum((w[n] - start[n]).square().sum() for n in start) for w in (weights(free), weights(held))]
    assert distance[1] < distance[0] and logged(held, "kl")[0] == 0 and logged(held, "kl")[-1] > 0


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_iterations": 2},
        {"peft": True, "beta": 0.1},
        {"estimator": "diffusion_nft", "num_iterations": 2},
        {"estimator": "diffusion_nft", "old_policy": "average", "ema_decay": 0.8},
        {"estimator": "diffusion_nft", "peft": True},
        {"gradient_accumulation_steps": 2, "steps_per_generation": 1, "dataset": MicroTasks(5, 5)},
    ],
    ids=str,
)
def test_a_stopped_run_equals_one_that_was_not(make_trainer, settings):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, **settings}
    whole = trained(make_trainer("whole", **settings))
    make_trainer("cut", **settings).train()
    resumed = make_trainer("cut", **settings)
    resumed.train(resume_from_checkpoint=f"{resumed.args.output_dir}/checkpoint-4")
    assert not differences(weights(whole), weights(resumed))
    assert logged(whole, "reward")[-2:] == logged(resumed, "reward")[-2:]


# Settings


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"num_generations": 4}, "num_generations: found 4 for 6 pictures"),
        ({"num_generations": 1}, "num_generations: found 1"),
        ({"estimator": "grpo_guard"}, "found grpo_guard with dynamics cps"),
        ({"estimator": "ppo"}, "estimator: found 'ppo'"),
        ({"sde_window_range": [0, 4]}, "sde_window_range: found"),
        ({"sde_window_range": [2, 3]}, "sde_window_range: found"),
        ({"save_strategy": "steps", "save_steps": 3, "num_iterations": 2}, "save_steps: found 3 steps"),
        ({"save_strategy": "steps", "save_steps": 2, "num_iterations": 2, "max_steps": 3}, "max_steps: found 3 steps"),
        ({"eta": 1.5}, "eta: found 1.5, expected at most 1 for cps"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size: found true"),
        ({"guidance_scale": 0.5}, "guidance_scale: found 0.5"),
        ({"beta": -1.0}, "beta: found -1"),
        ({"ema_beta": 1.0}, "ema_beta: found 1.0 with estimator flow_grpo"),
        ({"ema_beta": 1.0, "estimator": "awm", "use_ema": False}, "ema_beta: found 1.0 with use_ema: false"),
    ],
)
def test_settings_that_cannot_be(make_trainer, settings, found):
    with pytest.raises(InputError, match=found):
        make_trainer(**settings)


def test_the_default_is_diffusion_nft_by_the_average(tmp_path):
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "num_generations": 2}
    args = FlowGRPOConfig(**settings)
    assert (args.estimator, args.old_policy, args.ema_decay, args.nft_beta) == ("diffusion_nft", "average", 0.8, 0.1)
    for others in ({"estimator": "awm"}, {"use_ema": False}, {"estimator": "flow_grpo"}):
        assert FlowGRPOConfig(**settings, **others).old_policy == "current"
    assert not args.warnings()
    args = FlowGRPOConfig(**settings, eta=0.5, sde_window_size=2, epsilon=0.1, awm_power=0.5, train_timesteps=2)
    unread = "epsilon, eta, sde_window_size, awm_power: no effect with estimator diffusion_nft"
    assert args.warnings() == [unread]
    (unlogged,) = FlowGRPOConfig(**settings, log_kl=True, logging_strategy="epoch").warnings()
    assert unlogged == "log_kl: no effect with logging_strategy epoch"
    slow = {"ema_decay": 0.99, "log_completions": True, "preview_steps": 0}
    old, sheets = FlowGRPOConfig(**settings, **slow).warnings()
    assert "an average of about 100 updates" in old and sheets.startswith("log_completions: no sheets")


def test_rows_of_the_micro_world():
    rows = MicroTasks(6, 6)
    torch.manual_seed(0)
    first, second = rows[0], rows[0]
    assert first["prompt"] != second["prompt"] or first["task"] != second["task"]
    torch.manual_seed(0)
    assert rows[0]["prompt"] == first["prompt"] and "source_image" not in first
    edit = rows[7]
    assert isinstance(edit["source_image"], Image.Image) and edit["kind"] == edit["task"].kind


def test_kinds_are_drawn_as_often_as_they_are_named():
    rows = MicroTasks(6, 2, ["counting", "counting", "position"], ["move"])
    assert [rows[i]["kind"] for i in range(8)] == ["counting", "counting", "position"] * 2 + ["move"] * 2
    with pytest.raises(InputError, match="prompt_kinds: found 'places'"):
        MicroTasks(prompt_kinds=["places"])
    with pytest.raises(InputError, match="edit_kinds: found none"):
        MicroTasks(edit_kinds=[])


def test_hard_edits_are_drawn_as_often_as_asked():
    """Those in which another thing has the colour of the one that is edited; one in eight by chance."""

    def share(wanted, kinds=("recolor", "add", "remove")):
        torch.manual_seed(0)
        rows = MicroTasks(1, 300, edit_kinds=kinds, same_color_edits=wanted)
        return sum(shares_color(rows[1 + i]["task"]) for i in range(300)) / 300

    assert share(0.0) < 0.25 and share(1.0) == 1.0
    assert 0.45 < share(0.5) < 0.7
    assert share(1.0, ["background"]) == 0.0  # names no thing
    with pytest.raises(InputError, match="same_color_edits: found 1.5"):
        MicroTasks(same_color_edits=1.5)
