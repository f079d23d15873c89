"""What contrastive flow matching does to the micro model: strict accuracy by step, with and without, from many seeds.

    python benchmarks/contrastive.py [--weights 0 0.05] [--seeds 1 2 3] [--steps 1500] [--batch-size 64]

Each run trains a fresh transformer and text encoder on the bundled codec with the settings of
`trainer/configs/pretrain_micro.yaml`, shortened. A seed has the same starting weights, samples, noise and sigmas under
every weight. The averaged weights draw held-out prompts and edits, which the verifier judges. Further flags are those
of `unipic2 train pretrain`, such as `--torch_compile`.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from diffusers.utils import logging
from transformers import TrainerCallback
from unipic2.core.micro import weights_dir
from unipic2.trainer import FlowMatchingTrainer, StableDiffusion3KontextPipeline
from unipic2.trainer.micro.build import build_pipeline
from unipic2.trainer.micro.evaluate import evaluate
from unipic2.trainer.pretrain import load_dataset, parse

_CONFIG = Path(__file__).resolve().parent.parent / "trainer" / "configs" / "pretrain_micro.yaml"
_EVAL_SEED = 99
_TASKS = ("t2i", "edit")


class _Accuracy(TrainerCallback):
    """Notes strict accuracy of the averaged weights every so many steps."""

    def __init__(self, every: int, count: int):
        self.every, self.count, self.curve, self.trainer = every, count, {}, None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every and state.global_step != state.max_steps:
            return
        with self.trainer.drawing() as pipeline:
            scores, _ = evaluate(pipeline, self.count, _EVAL_SEED)
        self.curve[state.global_step] = [scores[task]["strict"] for task in _TASKS]


def flags(weight: float, seed: int, steps: int, batch_size: int, folder: str) -> list[str]:
    """Return a run's flags of `unipic2 train pretrain`."""
    return [
        "--config", str(_CONFIG), "--model_name_or_path", str(weights_dir()), "--output_dir", folder, "--use_cpu",
        "--seed", str(seed), "--contrastive_weight", str(weight), "--max_steps", str(steps),
        "--per_device_train_batch_size", str(batch_size), "--warmup_steps", "100", "--ema_decay", "0.99",
        "--lr_scheduler_kwargs", json.dumps({"num_decay_steps": steps // 2, "min_lr_ratio": 0.02}),
        "--save_strategy", "no", "--report_to", "none", "--preview_steps", "0",
    ]  # fmt: skip


def train(weight: float, seed: int, arguments, extra: list[str], folder: str, shared: dict) -> dict[int, list[float]]:
    """Return strict accuracies (text-to-image, edit) by step."""
    script_args, args = parse([*flags(weight, seed, arguments.steps, arguments.batch_size, folder), *extra])
    if "dataset" not in shared:  # the pool is the same for all runs: only its encoding takes long
        bundled = StableDiffusion3KontextPipeline.from_pretrained(weights_dir())
        shared["dataset"] = load_dataset(script_args, args, bundled)
        shared["vae"], shared["tokenizer"] = bundled.vae, bundled.tokenizer
    pipeline = build_pipeline(shared["vae"], shared["tokenizer"], seed)
    accuracy = _Accuracy(arguments.every, arguments.samples)
    accuracy.trainer = FlowMatchingTrainer(pipeline, args, shared["dataset"])
    accuracy.trainer.add_callback(accuracy)  # behind the average's, which is to have this step
    accuracy.trainer.train()
    return accuracy.curve


def steps_to(curve: dict[int, list[float]], task: int, wanted: float) -> float | None:
    """Return the step at which a curve first reaches an accuracy, between evaluations by a straight line."""
    before = (0, 0.0)
    for step, scores in curve.items():
        if scores[task] >= wanted:
            share = (wanted - before[1]) / (scores[task] - before[1])
            return before[0] + share * (step - before[0])
        before = (step, scores[task])
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=float, nargs="+", default=[0.0, 0.05], help="contrastive weights to compare")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="seeds of training (default 1 2 3)")
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps of a run (default 1500)")
    parser.add_argument("--batch-size", type=int, default=64, help="samples of a batch (default 64)")
    parser.add_argument("--every", type=int, default=300, help="steps between evaluations (default 300)")
    parser.add_argument("--samples", type=int, default=128, help="prompts, and edits, of an evaluation (default 128)")
    parser.add_argument("--wanted", type=float, nargs=2, default=[0.15, 0.3], help="accuracies whose step is reported")
    arguments, extra = parser.parse_known_args()
    logging.disable_progress_bar()
    shared: dict = {}
    curves: dict[float, list[dict]] = {weight: [] for weight in arguments.weights}
    for seed in arguments.seeds:
        for weight in arguments.weights:
            with tempfile.TemporaryDirectory() as folder:
                curve = train(weight, seed, arguments, extra, folder, shared)
            curves[weight].append(curve)
            shown = "  ".join(f"{step}: {t2i:.3f} {edit:.3f}" for step, (t2i, edit) in curve.items())
            print(f"weight {weight:g} seed {seed}  (step: t2i edit)  {shown}", flush=True)
    for weight, runs in curves.items():
        last = [list(curve.values())[-1] for curve in runs]
        for number, task in enumerate(_TASKS):
            mean = statistics.mean(scores[number] for scores in last)
            reached = [steps_to(curve, number, arguments.wanted[number]) for curve in runs]
            told = ", ".join("never" if step is None else f"{step:.0f}" for step in reached)
            print(f"weight {weight:g} {task}: {mean:.3f} at the end; steps to {arguments.wanted[number]:g}: {told}")


if __name__ == "__main__":
    main()
