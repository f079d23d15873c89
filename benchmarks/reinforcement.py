"""Minutes to a strict accuracy on the micro model, for each way of reinforcement learning, from many seeds.

    python benchmarks/reinforcement.py [--task edit] [--target 0.7] [--minutes 10] [--methods cps nft ...]
    python benchmarks/reinforcement.py --target 0.85 --minutes 20 --every 20 --methods nft published --times 5

Every method starts from the pretrained weights, draws as many pictures for an update, and is stopped when the averaged
weights reach the target on held-out samples, or after `--minutes`. Looks are not in the time. With `--times 5` the
methods after the first have five times the minutes in which the first was there with that seed, if it was.
`published` is Flow-GRPO as published: noise in all steps but the last, guidance and KL in training; `nft` is what
`unipic2 train grpo` does by default, held by the `beta` of `grpo_micro.yaml`, and in `nft_current` the current weights
draw; `awm` has its authors' distance to an average. The rate is 2e-4, for `nft_current` and `awm` half of that: at
more they break down sooner. A look has the method's own guidance, so that they begin at different accuracies; gains
are to each one's own. Further flags are those of `unipic2 train grpo`, for all methods.
"""

import argparse
import statistics
import sys
import tempfile
import time

from diffusers.utils import logging
from transformers import TrainerCallback
from unipic2.trainer.grpo import make_trainer, parse
from unipic2.trainer.micro.evaluate import evaluate

METHODS = {
    "published": {
        "estimator": "flow_grpo", "dynamics": "flow_sde", "eta": 0.7, "sde_window": "fixed", "sde_window_size": 9,
        "sde_window_range": [0, 9], "guidance_scale": 1.5, "beta": 0.04, "epsilon": 1e-4, "ema_decay": 0.9,
    },
    "cps": {
        "estimator": "flow_grpo", "dynamics": "cps", "eta": 0.8, "sde_window_size": 3, "epsilon": 1e-3,
        "ema_decay": 0.9,
    },
    "nft_current": {
        "estimator": "diffusion_nft", "old_policy": "current", "nft_beta": 1.0, "ema_decay": 0.9,
        "learning_rate": 1e-4,
    },
    "nft": {"beta": 0.3},
    "awm": {
        "estimator": "awm", "advantage_clip": 1.0, "ema_beta": 1.0, "ema_decay": 0.3, "learning_rate": 1e-4,
    },
}  # fmt: skip
_EVAL_SEED = 99


class _Race(TrainerCallback):
    """Stops a run at the target or when its time is up; notes accuracy by minute."""

    def __init__(self, arguments, minutes: float, guidance: float):
        self.arguments, self.minutes, self.guidance, self.trainer = arguments, minutes, guidance, None
        self.curve, self.spent, self.started = [], 0.0, None

    def on_train_begin(self, args, state, control, **kwargs):
        self._look()
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.arguments.every:
            return
        self.spent += time.perf_counter() - self.started
        reached = self._look() >= self.arguments.target
        control.should_training_stop |= reached or self.spent >= 60 * self.minutes
        self.started = time.perf_counter()

    def _look(self) -> float:
        with self.trainer.drawing() as pipeline:
            scores, _ = evaluate(pipeline, self.arguments.samples, _EVAL_SEED, guidance_scale=self.guidance)
        self.curve.append((self.spent / 60, scores["t2i"]["strict"], scores["edit"]["strict"]))
        print(f"  {self.spent / 60:.1f} min: {self.curve[-1][1]:.3f} {self.curve[-1][2]:.3f}", file=sys.stderr)
        return scores[self.arguments.task]["strict"]


def flags(method: str, seed: int, task: str, folder: str) -> list[str]:
    """Return a run's flags of `unipic2 train grpo`."""
    settings = {
        "model_name_or_path": "micro-pretrained", "output_dir": folder, "reward_funcs": "micro_soft", "seed": seed,
        "edit_ratio": float(task == "edit"), "max_steps": 100_000, "per_device_train_batch_size": 96,
        "num_generations": 12, "num_inference_steps": 10, "learning_rate": 2e-4, "lr_scheduler_type": "constant",
        "bf16": True, "save_strategy": "no", "report_to": "none", "preview_steps": 0,
        "logging_steps": 50, "disable_tqdm": True, "use_cpu": True, **METHODS[method],
    }  # fmt: skip
    argv: list[str] = []
    for name, value in settings.items():
        argv += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return argv


def race(
    method: str, seed: int, minutes: float, arguments, extra: list[str], folder: str
) -> list[tuple[float, float, float]]:
    """Return `(minutes, strict text-to-image, strict edit)` of each look."""
    script_args, args = parse([*flags(method, seed, arguments.task, folder), *extra])
    runner = _Race(arguments, minutes, args.guidance_scale)
    runner.trainer = make_trainer(script_args, args, resumed=False)
    runner.trainer.add_callback(runner)
    runner.trainer.train()
    return runner.curve


def minutes_to(curve: list[tuple[float, float, float]], place: int, target: float) -> float | None:
    """Return when a curve first reaches the target, None where it does not."""
    return next((minutes for minutes, *scores in curve[1:] if scores[place] >= target), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="default: all")
    parser.add_argument("--task", default="t2i", choices=("t2i", "edit"), help="what is trained (default t2i)")
    parser.add_argument("--target", type=float, default=0.6, help="strict accuracy to reach (default 0.6)")
    parser.add_argument("--minutes", type=float, default=6, help="training time of a run at most (default 6)")
    parser.add_argument(
        "--times", type=float, help="minutes of the methods after the first, in times of its own to the target"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="seeds of training (default 1 2 3)")
    parser.add_argument("--every", type=int, default=10, help="optimizer steps between looks (default 10)")
    parser.add_argument("--samples", type=int, default=256, help="prompts, and edits, of a look (default 256)")
    arguments, extra = parser.parse_known_args()
    logging.disable_progress_bar()
    place = ("t2i", "edit").index(arguments.task)
    curves: dict[str, list] = {method: [] for method in arguments.methods}
    for seed in arguments.seeds:
        limit = arguments.minutes
        for method in arguments.methods:
            with tempfile.TemporaryDirectory() as folder:
                curve = race(method, seed, limit, arguments, extra, folder)
            curves[method].append(curve)
            first = minutes_to(curve, place, arguments.target) if method == arguments.methods[0] else None
            if arguments.times and first:
                limit = arguments.times * first
            shown = "  ".join(f"{minutes:.1f}: {t2i:.3f} {edit:.3f}" for minutes, t2i, edit in curve)
            print(f"{method} seed {seed}  (minutes: t2i edit)  {shown}", flush=True)
    for method, runs in curves.items():
        best = [max(scores[place] for _, *scores in curve) for curve in runs]
        gains = [curve[-1][1 + place] - curve[0][1 + place] for curve in runs]
        reached = [minutes_to(curve, place, arguments.target) for curve in runs]
        told = ", ".join("never" if minutes is None else f"{minutes:.1f}" for minutes in reached)
        gained = ", ".join(f"{gain:+.3f}" for gain in gains)
        figures = (
            f"best {statistics.mean(best):.3f} ({best}); gain at the end {statistics.mean(gains):+.3f} ({gained})"
        )
        print(f"{method}: minutes to {arguments.target:g}: {told}; {figures}")


if __name__ == "__main__":
    main()
