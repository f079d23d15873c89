"""Online reinforcement learning of a Kontext model: Flow-GRPO and its kin, on groups of pictures and their rewards.

A row of the data is a dict with `prompt`, `size` (width, height), for an edit `source_image` (PIL), and columns for
the reward functions. A group is the pictures of one draw of one row, and is known by a number. Groups stay within a
process.
"""

import copy
import math
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate.utils import gather_object
from peft import LoraConfig
from PIL import Image

from .advantages import advantages
from .batches import DRAW_SEED, SeededDraws, TaskBlockSampler, derived_seed
from .flow_grpo_config import POLICY_GRADIENTS, FlowGRPOConfig
from .kontext_pipeline import StableDiffusion3KontextPipeline, resized
from .kontext_trainer import KontextTrainer
from .matching import Matching
from .noisy_steps import NoisySteps
from .rewards import RewardFunction, columns_of, looked_through, names_of
from .rewards.beside import Beside
from .rollouts import rollout, snapped
from .sheets import Cell, contact_sheet, save_sheet

_GENERATION = 3  # purpose of a seed
_SHOWN = 6  # best, and worst, pictures of a sheet
_THUMBNAIL = 192


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


class _Remembered(torch.utils.data.Dataset):
    """Draws of which the last ones are kept: a generation's rows come again with each of its batches."""

    def __init__(self, draws: SeededDraws, count: int):
        self.draws, self.count, self.kept = draws, count, {}

    def __len__(self) -> int:
        return len(self.draws)

    def __getitem__(self, draw: tuple[int, int]) -> dict:
        if draw not in self.kept:
            if len(self.kept) >= self.count:
                del self.kept[next(iter(self.kept))]
            self.kept[draw] = self.draws[draw]
        return self.kept[draw]


def _of_each_prompt(order: list[int], prompts: list[str]) -> list[int]:
    """Return the first places of an order, as many as are shown: first one of each prompt, then others."""
    first = list({prompts[i]: i for i in reversed(order)}.values())
    chosen = sorted(first, key=order.index)[:_SHOWN]
    return chosen + [i for i in order if i not in chosen][: _SHOWN - len(chosen)]


def _best_and_worst(rewards: torch.Tensor, prompts: list[str], images: list, sources: list) -> Image.Image:
    """Return a sheet of pictures: those with the best rewards (N,) above, the worst below, each with its reward.

    It shows one of each prompt, and more of a prompt only where there are too few.
    """
    order = rewards.nan_to_num(nan=-torch.inf).argsort(descending=True, stable=True).tolist()
    cells = []
    for i in [*_of_each_prompt(order, prompts), *_of_each_prompt(order[::-1], prompts)]:
        pair = [images[i]] if sources[i] is None else [sources[i], images[i]]
        cells.append(Cell(f"{rewards[i]:.3f} {prompts[i]}", pair))
    return contact_sheet(cells, columns=_SHOWN, edge=_THUMBNAIL)


class _Drawing(torch.nn.Module):
    """A model for rollouts: with a `forward` of its own torch.compile keeps their shapes apart from training's."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *inputs) -> torch.Tensor:
        return self.model(*inputs)


class FlowGRPOTrainer(KontextTrainer):
    """Draws groups of pictures, has them scored, and makes the better ones more likely, as `args.estimator` does it.

    Args:
        pipeline, args, previews, callbacks, peft_config: as for `KontextTrainer`.
        reward_funcs: one or more, see `rewards`.
        train_dataset: map-style dataset of rows (module docstring) with `is_edit`, one bool for each row, and, if
            sizes differ, `buckets`, one hashable for each.

    Raises:
        InputError: see `KontextTrainer`.
    """

    can_be_sharded = False  # rollouts run outside the pass that gathers sharded weights

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
        for warning in args.warnings() if args.process_index == 0 else ():
            sys.stderr.write(f"{warning}\n")
        self.method = args.estimator
        super().__init__(pipeline, args, train_dataset, previews, callbacks, peft_config)
        self.reference = None
        logs_kl = args.log_kl if args.log_kl is not None else peft_config is not None  # which needs no copy
        self._logs_kl = logs_kl and args.logging_strategy == "steps"
        if (args.beta or self._logs_kl) and peft_config is None:
            self.reference = copy.deepcopy(pipeline.transformer).requires_grad_(False).eval()
        self.learner = (NoisySteps if args.estimator in POLICY_GRADIENTS else Matching)(self)
        # The old model is the one that is trained while a generation has trained nothing yet.
        whole = args.num_iterations == 1 and args.gradient_accumulation_steps % args.steps_per_generation == 0
        self._on_policy = whole and args.old_policy == "current"
        self._compiled: torch.nn.Module | None = None

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
            # So that optimizer steps say how many batches were done.
            turns = args.gradient_accumulation_steps // math.gcd(args.gradient_accumulation_steps, self._repeats)
            blocks = TaskBlockSampler(
                data.is_edit, rows, args.edit_ratio, args.draw_seed, buckets, args.world_size, turns
            )
            return _RepeatedTurns(blocks, rows * args.world_size, self._repeats)

        return self._get_dataloader(_Remembered(SeededDraws(data), rows), "Training", rows, sampler, True)

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

    def _generate(self, inputs: dict) -> dict:
        """Return everything about a process's pictures, drawn by the old policy."""
        with self.averaged_weights() if self.args.old_policy == "average" else nullcontext():
            return self._draw(inputs)

    @torch.no_grad()
    def _draw(self, inputs: dict) -> dict:
        """Return everything about a process's pictures: N samples, S noisy steps."""
        args, device, rows = self.args, self.args.device, inputs["rows"]
        for row in rows:
            for index, reason in row.get("broken", {}).items():
                self.train_dataset.note_broken(index, reason)
        generator = torch.Generator().manual_seed(inputs["seed"])
        groups = torch.arange(len(rows)).repeat_interleave(args.num_generations)
        width, height = rows[0]["size"]
        is_edit = rows[0].get("source_image") is not None
        pictures = None
        if is_edit and self.pipeline.sees_pictures:
            pictures = torch.stack([resized(row["source_image"], height, width) for row in rows])
        states, pooled = self.encode_text([row["prompt"] for row in rows], device, pictures)
        # Conditions are kept once for each row, so that they take no more memory for larger groups.
        generation = {"groups": groups, "text": {"states": states, "pooled": pooled}}
        if args.guidance_scale > 1:
            # Guidance drops the words alone: each edit's empty prompt still sees its picture.
            empty = self.encode_text([""] if pictures is None else [""] * len(rows), device, pictures)
            empty_states, empty_pooled = (part.expand(len(rows), *part.shape[1:]) for part in empty)
            generation["text"] |= {"empty_states": empty_states, "empty_pooled": empty_pooled}
        if is_edit:
            self.pipeline.vae.to(device)
            reference = self.pipeline.encode_reference([row["source_image"] for row in rows], height, width)
            generation["text"]["reference"] = reference.float()
        scale = self.pipeline.vae_scale_factor
        shape = (len(groups), self.pipeline.transformer.config.in_channels, height // scale, width // scale)
        noise = torch.randn(shape, generator=generator)
        shift = {"mu": math.log(self.shift_for(noise))} if args.dynamic_shift else {}
        self.pipeline.scheduler.set_timesteps(args.num_inference_steps, **shift)
        generation["sigmas"] = snapped(self.pipeline.scheduler.sigmas.cpu())
        window = self.learner.window(self._batches_done // self._repeats)
        step_noise = torch.randn(len(window), *shape, generator=generator)
        model = self._drawing_model()
        parts, samples = [], [rows[i] for i in groups.tolist()]
        prompts, columns = [sample["prompt"] for sample in samples], columns_of(samples)
        with Beside(self.reward_funcs, prompts, columns, args.num_generations) as beside:
            for part in torch.arange(len(groups)).split(self._train_batch_size):
                text = self._text(generation, part)
                drawn = rollout(
                    lambda latents, sigmas, text=text: self.velocity(model, latents, sigmas, text).float(),
                    noise[part].to(device), generation["sigmas"], args.dynamics, args.eta, window, step_noise[:, part],
                    getattr(torch, args.storage_dtype),
                )  # fmt: skip
                beside.drawn(self._decode(drawn.latents))
                parts.append(drawn.cpu())
            rewards, missing = beside.all()
        generation["steps"] = parts[0].steps
        generation["kept"] = self.learner.keep(parts, generation["sigmas"], generator)
        generation["advantages"] = self._advantages(
            rewards, missing, groups, prompts, beside.images, columns["source_image"]
        ).to(device)
        order = torch.randperm(len(groups), generator=generator)
        generation["batches"] = self._batches(order, generation["advantages"].cpu() != 0)
        if not self._on_policy:
            generation["kept"] |= self._of_batches(self.learner.old, model, generation, len(groups))
        if args.ema_beta:
            with nullcontext() if args.old_policy == "average" else self.averaged_weights():
                generation["kept"] |= self._of_batches(self.learner.average, model, generation, len(groups))
        return generation

    def _of_batches(self, function, model, generation: dict, count: int) -> dict[str, torch.Tensor]:
        """Return what `function(model, batch)` names, (_, B, ...), of all samples (_, N, ...), 0 of those in no batch.

        Batches are those of the loss: with others a GPU's last digits differ, and a first ratio would not be 1.
        """
        parts, named = generation["batches"], defaultdict(list)
        for part in parts:
            for name, values in function(model, self._batch(part, generation)).items():
                named[name].append(values.cpu())
        places, found = torch.cat(list(parts)), {}
        for name, each in named.items():
            values = torch.cat(each, dim=1)
            found[name] = values.new_zeros(len(values), count, *values.shape[2:])
            found[name][:, places] = values
        return found

    def _batches(self, order: torch.Tensor, teaches: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return the samples of each of a generation's batches.

        Those that teach nothing, such as a group of equal rewards, cost no pass where the loss of theirs is nothing,
        too. Each batch has one at least, as processes go through their batches together.

        Args:
            order: (N,), all samples.
            teaches: (N,) bool, by sample.
        """
        args, count = self.args, self.args.steps_per_generation
        if args.estimator == "diffusion_nft" or args.beta or args.ema_beta or args.torch_compile:
            return order.split(self._train_batch_size)
        order = order[teaches[order].long().argsort(descending=True, stable=True)]  # those that teach come first
        return order[: max(count, int(teaches.sum()))].tensor_split(count)

    def _text(self, generation: dict, part: torch.Tensor) -> dict:
        """Return the conditions of some samples."""
        rows = generation["groups"][part].to(self.args.device)
        return {name: of_rows[rows] for name, of_rows in generation["text"].items()}

    def _drawing_model(self) -> torch.nn.Module:
        """Return the trained model as rollouts run it, in evaluation mode and compiled where training is.

        That of training is compiled under wrappers of several processes, which wait for gradients.
        """
        model, args = self.trained_model().eval(), self.args
        if not args.torch_compile:
            return model
        if self._compiled is None:
            backend, mode = args.torch_compile_backend, args.torch_compile_mode
            self._compiled = torch.compile(_Drawing(model), backend=backend, mode=mode)
        return self._compiled

    def velocity(self, model, latents: torch.Tensor, sigmas: torch.Tensor, text: dict) -> torch.Tensor:
        """Return the velocity (B, C, H, W) that sampling follows, with guidance if there is any."""
        states, pooled, reference = text["states"], text["pooled"], text.get("reference")
        with self.attention():
            if "empty_states" not in text:
                return model(latents, sigmas, (states, pooled), reference)
            both = torch.cat([text["empty_states"], states]), torch.cat([text["empty_pooled"], pooled])
            twice = [None if part is None else torch.cat([part, part]) for part in (latents, sigmas, reference)]
            without, with_text = model(twice[0], twice[1], both, twice[2]).chunk(2)
        return without + self.args.guidance_scale * (with_text - without)

    def _decode(self, latents: torch.Tensor) -> list:
        vae = self.pipeline.vae.to(latents.device)
        latents = (latents / vae.config.scaling_factor + vae.config.shift_factor).to(vae.dtype)
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=self.args.bf16):
            pixels = vae.decode(latents, return_dict=False)[0].float()
        return self.pipeline.image_processor.postprocess(pixels, output_type="pil")

    def _advantages(
        self, rewards: torch.Tensor, missing: torch.Tensor, groups: torch.Tensor, prompts: list[str], images: list,
        sources: list,
    ) -> torch.Tensor:  # fmt: skip
        """Return the advantages (N,) of this process's pictures, compared with those of all processes.

        Args:
            rewards: (N, R).
            missing: (N, R), those that could not be found out.
            groups: (N,), which of the process's groups each belongs to.
            prompts, images, sources: N each, for the sheet; a source may be None.
        """
        args = self.args
        scores = looked_through(self.reward_funcs, rewards, missing)
        for warning in scores.warnings:
            sys.stderr.write(f"step {self.state.global_step}: {warning}\n")
        rewards = self.accelerator.gather(scores.rewards.float().to(args.device)).cpu()
        missing = self.accelerator.gather(missing.float().to(args.device)).cpu().bool()
        numbers = self.accelerator.gather(
            (groups + args.process_index * (int(groups.max()) + 1)).to(args.device)
        ).cpu()
        weights = None if args.reward_weights is None else torch.tensor(args.reward_weights)
        found = advantages(
            rewards,
            numbers,
            weights,
            args.scale_rewards,
            args.multi_objective_aggregation,
            args.advantage_clip,
            missing,
        )
        self.note(found.metrics)
        for name, column in zip(names_of(self.reward_funcs), rewards.T, strict=True):
            values = column[~column.isnan()]
            if len(values):
                self.note({f"rewards/{name}/mean": values.mean().item()})
        start = args.process_index * len(groups)
        step, every = self.state.global_step, args.preview_steps
        before = (self._batches_done - self._repeats) // args.gradient_accumulation_steps  # the generation before
        if args.log_completions and every and step // every > before // every and self.is_world_process_zero():
            sheet = _best_and_worst(found.rewards[: len(groups)], prompts, images, sources)
            folder = Path(args.output_dir) / "completions"
            folder.mkdir(parents=True, exist_ok=True)
            save_sheet(sheet, folder / f"step_{step:06d}.png")
        return found.values[start : start + len(groups)]

    def _batch(self, part: torch.Tensor, generation: dict | None = None) -> dict:
        """Return what a loss needs of some samples, on the device."""
        generation = self._generation if generation is None else generation
        batch = {"text": self._text(generation, part), "steps": generation["steps"], "sigmas": generation["sigmas"]}
        batch |= {name: kept[:, part].to(self.args.device) for name, kept in generation["kept"].items()}
        return batch | {"advantages": generation["advantages"][part.to(self.args.device)]}

    @staticmethod
    def repeated(text: dict, count: int) -> dict:
        """Return the conditions `count` times over, for as many passes in one."""
        return {name: part.repeat(count, *[1] * (part.ndim - 1)) for name, part in text.items()}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the estimator's loss of a batch, see `NoisySteps` and `Matching`."""
        loss = self.learner.loss(model, inputs)
        loss = loss * (len(inputs["advantages"]) / self._train_batch_size)  # samples that were left out count as 0
        return (loss, None) if return_outputs else loss

    @property
    def measures_kl(self) -> bool:
        """Whether the loss of this step looks at the starting model: always for its KL, else before each log."""
        args, step = self.args, self.state.global_step + 1
        logged = step % self.state.logging_steps == 0 or (step == 1 and args.logging_first_step)
        return bool(args.beta or (self._logs_kl and logged))

    @torch.no_grad()
    def reference_velocity(self, latents: torch.Tensor, sigmas: torch.Tensor, text: dict) -> torch.Tensor:
        """Return the velocity (B, C, H, W), float32, of the starting model, with LoRA of the model without any."""
        own = self.trained_model()
        if self.reference is None:
            own.transformer.disable_adapters()
            try:
                return self.velocity(own, latents, sigmas, text).float()
            finally:
                own.transformer.enable_adapters()
        self.reference.to(self.args.device)
        trained, own.transformer = own.transformer, self.reference
        try:
            return self.velocity(own, latents, sigmas, text).float()
        finally:
            own.transformer = trained

    def note(self, values: dict[str, float]) -> None:
        """Keep values for the next log, which has their means."""
        for name, value in values.items():
            if value == value:  # nan: there was nothing to measure
                self._metrics[name].append(value)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Add the means of what was noted since the last log, in all processes."""
        if "loss" in logs:
            noted = [{name: (sum(values), len(values)) for name, values in self._metrics.items()}]
            sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
            for each in gather_object(noted):
                for name, (total, count) in each.items():
                    sums[name][0] += total
                    sums[name][1] += count
            logs |= {name: round(total / count, 6) for name, (total, count) in sums.items()}
            self._metrics.clear()
        super().log(logs, *args, **kwargs)
