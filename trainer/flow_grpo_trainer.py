"""Online reinforcement learning of a Kontext model by policy gradients on noisy sampling steps (Flow-GRPO and kin).

A row of the data is a dict with `prompt`, `size` (width, height), for an edit `source_image` (PIL), and columns for
the reward functions. A group is the pictures of one draw of one row, and is known by a number. Groups stay within a
process.
"""

import asyncio
import copy
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from peft import LoraConfig

from .advantages import advantages
from .batches import DRAW_SEED, SeededDraws, TaskBlockSampler, derived_seed
from .estimators.flow_grpo import policy_loss, step_weights
from .estimators.grpo_guard import guarded_loss
from .flow_grpo_config import FlowGRPOConfig
from .kontext_pipeline import StableDiffusion3KontextPipeline
from .kontext_trainer import KontextTrainer
from .rewards import RewardFunction, name_of, score
from .rollouts import Transition, kl, log_prob, rollout, snapped, transition, window_start

_GENERATION, _WINDOW = 3, 4  # purposes of seeds
_ROW = ("prompt", "size", "source_image", DRAW_SEED)


class _RepeatedTurns(torch.utils.data.Sampler):
    """Yields each turn of blocks (one for each process) several times: once for each batch that is made of it."""

    def __init__(self, sampler: TaskBlockSampler, turn: int, repeats: int):
        self.sampler, self.turn, self.repeats = sampler, turn, repeats

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.sampler) * self.repeats

    def __iter__(self) -> Iterator:
        draws: list = []
        for draw in self.sampler:
            draws.append(draw)
            if len(draws) == self.turn:
                for _ in range(self.repeats):
                    yield from draws
                draws = []


class FlowGRPOTrainer(KontextTrainer):
    """Draws groups of pictures, has them scored, and makes the steps that led to the better ones more likely.

    Args:
        pipeline, args, previews, callbacks, peft_config: as for `KontextTrainer`.
        reward_funcs: one or more, see `rewards`.
        train_dataset: map-style dataset of rows (module docstring) with `is_edit`, one bool for each row, and, if
            sizes differ, `buckets`, one hashable for each.

    Raises:
        InputError: see `KontextTrainer`.
    """

    method = "flow grpo"

    def __init__(
        self,
        pipeline: StableDiffusion3KontextPipeline,
        reward_funcs: RewardFunction | Sequence[RewardFunction],
        args: FlowGRPOConfig,
        train_dataset,
        previews=None,
        callbacks: list | None = None,
        peft_config: LoraConfig | None = None,
    ):
        self.reward_funcs = [reward_funcs] if callable(reward_funcs) else list(reward_funcs)
        self._metrics: dict[str, list[float]] = defaultdict(list)
        self._generation: dict | None = None
        self._batches_done: int | None = None
        super().__init__(pipeline, args, train_dataset, previews, callbacks, peft_config)
        self.reference = None
        if args.beta and peft_config is None:
            self.reference = copy.deepcopy(pipeline.transformer).requires_grad_(False).eval()
        # Old probabilities are those of the batch itself while its generation has trained nothing yet.
        self._on_policy = (
            args.num_iterations == 1 and args.gradient_accumulation_steps % args.steps_per_generation == 0
        )

    @property
    def _repeats(self) -> int:
        return self.args.steps_per_generation * self.args.num_iterations

    def collate(self, samples: list[dict]) -> dict:
        """Keep rows as they are; `seed` is what their pictures are drawn from."""
        return {"rows": samples, "seed": derived_seed(samples[0][DRAW_SEED], _GENERATION)}

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """Return transformers' loader, whose batches are the rows of one generation."""
        args, data = self.args, self.train_dataset
        rows = self._train_batch_size * args.steps_per_generation // args.num_generations

        def sampler(_dataset) -> _RepeatedTurns:
            buckets = getattr(data, "buckets", None)
            blocks = TaskBlockSampler(data.is_edit, rows, args.edit_ratio, args.seed, buckets, args.world_size)
            return _RepeatedTurns(blocks, rows * args.world_size, self._repeats)

        return self._get_dataloader(SeededDraws(data), "Training", rows, sampler, True)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """Draw a new generation when it is time, and train on the next batch of it."""
        if self._batches_done is None:
            self._batches_done = self.state.global_step * self.args.gradient_accumulation_steps
        place = self._batches_done % self._repeats
        if place == 0:
            self._generation = self._generate(inputs)
        self._batches_done += 1
        order = self._generation["batches"][place % self.args.steps_per_generation]
        return super().training_step(model, self._batch(order), num_items_in_batch)

    @torch.no_grad()
    def _generate(self, inputs: dict) -> dict:
        """Return everything about a process's pictures: N samples, S noisy steps."""
        args, device, rows = self.args, self.args.device, inputs["rows"]
        generator = torch.Generator().manual_seed(inputs["seed"])
        groups = torch.arange(len(rows)).repeat_interleave(args.num_generations)
        width, height = rows[0]["size"]
        states, pooled = self.encode_text([row["prompt"] for row in rows], device)
        generation = {"states": states[groups.to(device)], "pooled": pooled[groups.to(device)]}
        if args.guidance_scale > 1:
            generation["empty"] = self.encode_text([""], device)
        if rows[0].get("source_image") is not None:
            self.pipeline.vae.to(device)
            reference = self.pipeline.encode_reference([row["source_image"] for row in rows], height, width)
            generation["reference"] = reference.float()[groups.to(device)]
        self.pipeline.scheduler.set_timesteps(args.num_inference_steps)
        generation["sigmas"] = snapped(self.pipeline.scheduler.sigmas.cpu())
        number = self._batches_done // self._repeats
        rng = np.random.default_rng(derived_seed(args.seed + number, _WINDOW))
        start = window_start(args.sde_window, number, args.sde_window_size, *args.sde_window_range, rng)
        window = range(start, start + args.sde_window_size)
        scale = self.pipeline.vae_scale_factor
        shape = (len(groups), self.pipeline.transformer.config.in_channels, height // scale, width // scale)
        noise = torch.randn(shape, generator=generator)
        step_noise = torch.randn(len(window), *shape, generator=generator)
        model = self._trained_model().eval()
        parts, images = [], []
        for part in torch.arange(len(groups)).split(self._train_batch_size):
            text = self._text(generation, part)
            drawn = rollout(
                lambda latents, sigmas, text=text: self._velocity(model, latents, sigmas, text).float(),
                noise[part].to(device), generation["sigmas"], args.dynamics, args.eta, window, step_noise[:, part],
                getattr(torch, args.storage_dtype), keep_means=args.estimator == "grpo_guard",
            )  # fmt: skip
            parts.append(drawn)
            images += self._decode(drawn.latents)
        for name in ("before", "after", "means"):
            if getattr(parts[0], name) is not None:
                generation[name] = torch.cat([getattr(drawn, name).cpu() for drawn in parts], dim=1)
        generation["steps"] = parts[0].steps
        generation["advantages"] = self._score(rows, groups, images).to(device)
        order = torch.randperm(len(groups), generator=generator)
        generation["batches"] = order.split(self._train_batch_size)
        if not self._on_policy:
            old = torch.empty(len(window), len(groups))
            for part in generation["batches"]:
                steps, _ = self._steps(model, self._batch(part, generation))
                after = generation["after"][:, part].to(device)
                old[:, part] = torch.stack([log_prob(a, s) for a, s in zip(after, steps, strict=True)]).cpu()
            generation["old_log_probs"] = old
        return generation

    def _text(self, generation: dict, part: torch.Tensor) -> dict:
        """Return the conditions of some samples."""
        part = part.to(self.args.device)
        names = [name for name in ("states", "pooled", "reference") if name in generation]
        return {name: generation[name][part] for name in names} | {"empty": generation.get("empty")}

    def _velocity(self, model, latents: torch.Tensor, sigmas: torch.Tensor, text: dict) -> torch.Tensor:
        """Return the velocity (B, C, H, W) that sampling follows, with guidance if there is any."""
        states, pooled, reference = text["states"], text["pooled"], text.get("reference")
        if text["empty"] is None:
            return model(latents, sigmas, (states, pooled), reference)
        empty_states, empty_pooled = (part.expand(len(latents), *part.shape[1:]) for part in text["empty"])
        both = torch.cat([empty_states, states]), torch.cat([empty_pooled, pooled])
        twice = [None if part is None else torch.cat([part, part]) for part in (latents, sigmas, reference)]
        without, with_text = model(twice[0], twice[1], both, twice[2]).chunk(2)
        return without + self.args.guidance_scale * (with_text - without)

    def _decode(self, latents: torch.Tensor) -> list:
        vae = self.pipeline.vae.to(latents.device)
        latents = (latents / vae.config.scaling_factor + vae.config.shift_factor).to(vae.dtype)
        return self.pipeline.image_processor.postprocess(vae.decode(latents, return_dict=False)[0], output_type="pil")

    def _score(self, rows: list[dict], groups: torch.Tensor, images: list) -> torch.Tensor:
        """Return the advantages (N,) of this process's pictures, compared with those of all processes."""
        args = self.args
        prompts = [rows[i]["prompt"] for i in groups.tolist()]
        names = dict.fromkeys(name for row in rows for name in row if name not in _ROW)
        columns = {name: [rows[i].get(name) for i in groups.tolist()] for name in names}
        columns["source_image"] = [rows[i].get("source_image") for i in groups.tolist()]
        scores = asyncio.run(score(self.reward_funcs, prompts, images, columns))
        for warning in scores.warnings:
            sys.stderr.write(f"step {self.state.global_step}: {warning}\n")
        rewards = self.accelerator.gather(scores.rewards.float().to(args.device)).cpu()
        numbers = self.accelerator.gather((groups + args.process_index * len(rows)).to(args.device)).cpu()
        weights = None if args.reward_weights is None else torch.tensor(args.reward_weights)
        found = advantages(
            rewards, numbers, weights, args.scale_rewards, args.multi_objective_aggregation, args.advantage_clip
        )
        self._note(found.metrics)
        for function, column in zip(self.reward_funcs, rewards.T, strict=True):
            values = column[~column.isnan()]
            if len(values):
                self._note({f"rewards/{name_of(function)}/mean": values.mean().item()})
        start = args.process_index * len(groups)
        return found.values[start : start + len(groups)]

    def _batch(self, part: torch.Tensor, generation: dict | None = None) -> dict:
        """Return what a loss needs of some samples, on the device."""
        generation = self._generation if generation is None else generation
        batch = {"text": self._text(generation, part), "steps": generation["steps"], "sigmas": generation["sigmas"]}
        for name in ("before", "after", "means", "old_log_probs"):
            if name in generation:
                batch[name] = generation[name][:, part].to(self.args.device)
        return batch | {"advantages": generation["advantages"][part.to(self.args.device)]}

    def _steps(self, model, batch: dict) -> tuple[list[Transition], dict]:
        """Return the Gaussians of all S noisy steps, by one pass, and its inputs for the reference model."""
        before, sigmas = batch["before"].float(), batch["sigmas"].tolist()
        count, size = before.shape[:2]
        text = {
            name: part if name == "empty" or part is None else part.repeat(count, *[1] * (part.ndim - 1))
            for name, part in batch["text"].items()
        }
        levels = torch.tensor([sigmas[i] for i in batch["steps"]], device=before.device).repeat_interleave(size)
        inputs = {"latents": before.flatten(0, 1), "sigmas": levels, "text": text}
        velocity = self._velocity(model, **inputs).float().unflatten(0, (count, size))
        return self._transitions(batch, velocity), inputs

    def _transitions(self, batch: dict, velocity: torch.Tensor) -> list[Transition]:
        args, sigmas, before = self.args, batch["sigmas"].tolist(), batch["before"].float()
        return [
            transition(args.dynamics, x, v, sigmas[i], sigmas[i + 1], args.eta, sigmas[1])
            for x, v, i in zip(before, velocity, batch["steps"], strict=True)
        ]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Policy-gradient loss of a batch's noisy steps, all of them alike or by their noise, plus the weighted KL."""
        args = self.args
        steps, passed = self._steps(model, inputs)
        reference = self._reference_steps(inputs, passed) if args.beta else [None] * len(steps)
        weights = step_weights(inputs["sigmas"], inputs["steps"]) if args.noise_weighting else [1.0] * len(steps)
        total = 0.0
        for place, (step, weight) in enumerate(zip(steps, weights, strict=True)):
            new = log_prob(inputs["after"][place], step)
            old = inputs["old_log_probs"][place] if "old_log_probs" in inputs else new.detach()
            if args.estimator == "grpo_guard":
                number = inputs["steps"][place]
                length = (inputs["sigmas"][number] - inputs["sigmas"][number + 1]).item()
                mean = inputs["means"][place]
                found = guarded_loss(new, old, step, mean, length, inputs["advantages"], args.epsilon)
            else:
                found = policy_loss(new, old, inputs["advantages"], args.epsilon, args.epsilon_high)
            loss = float(weight) * found.loss.mean()
            if args.beta:
                distance = kl(step, reference[place], args.kl_scaling).mean()
                loss = loss + args.beta * distance
                self._note({"kl": distance.item()})
            total = total + loss / len(steps)
            self._note({
                "ratio": found.ratio.mean().item(),
                "clip_ratio/low_mean": found.clipped_low.float().mean().item(),
                "clip_ratio/high_mean": found.clipped_high.float().mean().item(),
            })  # fmt: skip
        return (total, None) if return_outputs else total

    @torch.no_grad()
    def _reference_steps(self, batch: dict, passed: dict) -> list[Transition]:
        """Return the steps' Gaussians under the model that training began with."""
        own = self._trained_model()
        if self.reference is None:
            own.transformer.disable_adapters()
            try:
                velocity = self._velocity(own, **passed)
            finally:
                own.transformer.enable_adapters()
        else:
            self.reference.to(self.args.device)
            trained, own.transformer = own.transformer, self.reference
            try:
                velocity = self._velocity(own, **passed)
            finally:
                own.transformer = trained
        return self._transitions(batch, velocity.float().unflatten(0, batch["before"].shape[:2]))

    def _note(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            if value == value:  # nan: there was nothing to measure
                self._metrics[name].append(value)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Add the means of what was noted since the last log."""
        if "loss" in logs:
            logs |= {name: round(sum(values) / len(values), 6) for name, values in self._metrics.items()}
            self._metrics.clear()
        super().log(logs, *args, **kwargs)
