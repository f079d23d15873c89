"""`unipic2 train pdtr`: Progressive Dual-Task Reinforcement (arXiv 2509.04548), in stages, both tasks measured.

One YAML has the settings of the run and under `stages` what each stage changes; without it edits are trained first,
then text-to-image. Before the first stage and after each of them both tasks are measured on held-out samples.
"""

import gc
import html
import json
import sys
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import torch

from ..core.errors import InputError, check_one_of, check_share
from ..core.files import COMFYUI_LORA, write_file
from ..core.micro import GUIDANCE_SCALE, NUM_INFERENCE_STEPS
from .flow_grpo_config import FlowGRPOConfig
from .gates import GATE_ACTIONS, GATE_FILE, GateCallback
from .grpo import GRPOArguments, check_columns, check_task, grpo, load_rows
from .held_out import TASKS, HeldOut, Measurement, bar_warning, micro_held_out, reward_held_out
from .interference import INTERFERENCE_FILE, figure_text, is_fall, matrix, write_matrix
from .kontext_pipeline import StableDiffusion3KontextPipeline
from .report import HISTORY_FILE, charts, pictures, table, write_page
from .rewards.registry import JUDGES, RewardArguments
from .script import MICRO, finish, load_pipeline, parse_settings, stages_card
from .sheets import save_sheet
from .stages import parse_stages, read_config, run_stages

DEFAULT_STAGES = [{"edit_ratio": 0.8}, {"edit_ratio": 0.2}]
"""Edits, then text-to-image, as published; a fifth of the generations keeps the other task."""
_MEASURED = "measured"
_START = "start"
_GATE_STREAM = 1_000_003  # added to eval_seed: what takes part in training is not what is measured at the end
_MOST_UNANSWERED = 0.5  # share of a task's samples; above it the judge is down
_COLORS = {"t2i": "#1f6feb", "edit": "#d1242f"}
_MEASURING = (
    "eval_dataset_name", "eval_n", "eval_seed", "eval_inference_steps", "eval_guidance_scale", "eval_reward_funcs",
    "eval_reward_weights", "eval_judge_base_url", "eval_judge_model", "strict_reward", "edit_strict_reward",
)  # fmt: skip
_PATIENCE = ("judge_timeout", "judge_max_retries", "judge_concurrency")  # of a judge; its answers are the same
_OF_THE_RUN = (*_MEASURING, "gate_n", "lora_r", "lora_alpha", "lora_target_modules")


@dataclass
class PDTRArguments(GRPOArguments):
    """What is trained, rewarded and measured; see `GRPOArguments`."""

    eval_dataset_name: list[str] | None = field(
        default=None,
        metadata={"help": "Held-out prompts and edits; default those of the micro world, for dataset_name micro."},
    )
    eval_n: int = field(default=1024, metadata={"help": "Held-out prompts, and as many edits, that are measured."})
    eval_seed: int = field(default=1234, metadata={"help": "Seed of held-out samples and their noise."})
    eval_inference_steps: int = field(
        default=NUM_INFERENCE_STEPS, metadata={"help": "Denoising steps of a measurement, without noise."}
    )
    eval_guidance_scale: float = field(
        default=GUIDANCE_SCALE, metadata={"help": "Guidance of a measurement; rollouts have guidance_scale."}
    )
    eval_reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Own data: rewards that measure, by name; default those of all stages. Others than are trained on "
            "find out a model that has learned to please them."
        },
    )
    eval_reward_weights: list[float] | None = field(
        default=None, metadata={"help": "One for each of eval_reward_funcs; default 1."}
    )
    eval_judge_base_url: str | None = field(
        default=None, metadata={"help": "Endpoint of the judge that measures; default judge_base_url."}
    )
    eval_judge_model: str | None = field(default=None, metadata={"help": "Its model; default judge_model."})
    strict_reward: float = field(
        default=1.0, metadata={"help": "Own data: the weighted mean reward from which a sample counts as right."}
    )
    edit_strict_reward: float | None = field(
        default=None, metadata={"help": "The same for edits; default strict_reward."}
    )
    gate_steps: int = field(
        default=100,
        metadata={"help": "Optimizer steps between checks of both tasks within a stage, and at its end; 0 is none."},
    )
    gate_n: int = field(default=192, metadata={"help": "Prompts, and as many edits, of such a check."})
    gate_max_drop: float = field(
        default=0.02,
        metadata={"help": "Strict accuracy, 0 to 1, that a task may lose before it is negative transfer."},
    )
    gate_target: float | None = field(
        default=None,
        metadata={
            "help": "Strict accuracy, 0 to 1, that ends a stage early when each of its own tasks has it; null is none."
        },
    )
    gate_action: str = field(
        default="rollback",
        metadata={"help": "On negative transfer: rollback to the stage's best weights, stop the stage, or warn."},
    )

    def __post_init__(self):
        super().__post_init__()
        for name, least in (("eval_n", 2), ("gate_n", 2), ("gate_steps", 0), ("eval_inference_steps", 1)):
            if getattr(self, name) < least:
                raise InputError(name, found=getattr(self, name), expected=f"at least {least}")
        check_share("gate_max_drop", self.gate_max_drop)
        if self.gate_target is not None:
            check_share("gate_target", self.gate_target)
        check_one_of("gate_action", self.gate_action, GATE_ACTIONS)
        if self.eval_dataset_name == self.dataset_name == [MICRO]:
            self.eval_dataset_name = None  # its rows are drawn anew each time, but not those that it is measured on
        if MICRO in (self.eval_dataset_name or ()):
            expected = "rows of one's own, as in dataset_name"
            raise InputError("eval_dataset_name", found=", ".join(self.eval_dataset_name), expected=expected)
        if self.eval_dataset_name is None and self.dataset_name != [MICRO]:
            raise InputError("eval_dataset_name", found="nothing", expected="held-out prompts and edits to measure on")
        if self.eval_dataset_name is None and self.eval_reward_funcs is not None:
            expected = "none: the verifier of the micro world measures"
            raise InputError("eval_reward_funcs", found=", ".join(self.eval_reward_funcs), expected=expected)
        if isinstance(self.eval_reward_weights, float | int):  # a YAML file may hold one number
            self.eval_reward_weights = [self.eval_reward_weights]
        weights = len(self.eval_reward_weights or ())
        if self.eval_reward_weights is not None and weights != len(self.eval_reward_funcs or ()):
            found = f"{weights} for {len(self.eval_reward_funcs or ())} rewards"
            raise InputError("eval_reward_weights", found=found, expected="one number for each of eval_reward_funcs")

    def measuring(self, names: list[str]) -> RewardArguments:
        """Return settings with other rewards, to measure with, and their judge."""
        settings = {own.name: getattr(self, own.name) for own in fields(RewardArguments)}
        judge = {
            "judge_base_url": self.eval_judge_base_url or self.judge_base_url,
            "judge_model": self.eval_judge_model or self.judge_model,
        }
        return RewardArguments(**{**settings, **judge, "reward_funcs": names})


def parse(argv: list[str]) -> tuple[PDTRArguments, FlowGRPOConfig]:
    """Read `--config FILE` and flags; flags win. Raises InputError, see `parse_settings`."""
    script_args, args = parse_settings(argv, PDTRArguments, FlowGRPOConfig, "pdtr")
    check_task(script_args, args)
    if script_args.eval_reward_funcs is not None:
        try:
            script_args.measuring(script_args.eval_reward_funcs).check_rewards()
        except InputError as error:
            raise InputError(f"eval_reward_funcs: {str(error).rstrip('.')}") from None
    if script_args.gate_steps and script_args.gate_action == "rollback" and "schedule_free" in args.optim.value:
        raise InputError(
            "gate_action", found=f"rollback with optim {args.optim.value}", expected="stop or warn for it"
        )
    return script_args, args


def own_tasks(args: FlowGRPOConfig) -> tuple[str, ...]:
    """Return what a stage trains for: the task that takes more of its generations, or both where they share them."""
    if args.edit_ratio == 0.5:
        return TASKS
    return ("edit",) if args.edit_ratio > 0.5 else ("t2i",)


def stage_name(number: int, args: FlowGRPOConfig) -> str:
    """Return the name of a stage, such as `1-edit`."""
    own = own_tasks(args)
    return f"{number}-{own[0] if len(own) == 1 else 'joint'}"


def _measured_rewards(stages: list[tuple[PDTRArguments, FlowGRPOConfig]]) -> dict[str, float]:
    """Return the rewards of each measuring with their weights: without own ones those of all stages together."""
    found: dict[str, float] = {}
    first = stages[0][0]
    if first.eval_reward_funcs is not None:
        weights = first.eval_reward_weights or [1.0] * len(first.eval_reward_funcs)
        return dict(zip(first.eval_reward_funcs, weights, strict=True))
    for script_args, args in stages:
        weights = args.reward_weights or [1.0] * len(script_args.reward_funcs)
        for name, weight in zip(script_args.reward_funcs, weights, strict=True):
            found.setdefault(name, weight)
    return found


def _held_out(stages, pipeline, gate: bool, loaded: dict | None = None) -> HeldOut:
    """Return the measuring of a run, or of its gates, which take other samples where they can.

    `loaded` holds rewards by name that need not be loaded again.
    """
    script_args, args = stages[0]
    count = script_args.gate_n if gate else script_args.eval_n
    seed = script_args.eval_seed + (_GATE_STREAM if gate else 0)
    sampling = {
        "num_inference_steps": script_args.eval_inference_steps,
        "guidance_scale": script_args.eval_guidance_scale,
    }
    if script_args.eval_dataset_name is None:
        return micro_held_out(count, seed, **sampling)
    rows = load_rows(script_args.eval_dataset_name, script_args, args, pipeline, alone=not gate)
    rewards = _measured_rewards(stages)
    loaded = {name: function for name, function in (loaded or {}).items() if name not in JUDGES}
    missing = [name for name in rewards if name not in loaded]
    if missing:  # a judge that is down for a while is waited for: figures of the others alone decide nothing
        functions = script_args.measuring(missing).load_rewards(args.device, patient=True)
        loaded |= zip(missing, functions, strict=True)
    functions = [loaded[name] for name in rewards]
    check_columns(functions, rows)
    strict, of_edits = script_args.strict_reward, script_args.edit_strict_reward
    return reward_held_out(
        rows, functions, list(rewards.values()),
        {"t2i": strict, "edit": strict if of_edits is None else of_edits}, count, seed,
        without=script_args.eval_n if gate else 0, most_unanswered=_MOST_UNANSWERED, is_optional=gate, **sampling,
    )  # fmt: skip


def train_stage(stages, script_args: PDTRArguments, args: FlowGRPOConfig) -> Path:
    """Train and export one of the stages, with its gate; returns the folder of the export."""

    def gate(trainer):
        if not script_args.gate_steps:
            return ()
        limits = script_args.gate_max_drop, script_args.gate_target, script_args.gate_action
        loaded = dict(zip(script_args.reward_funcs, trainer.reward_funcs, strict=True))
        held_out = _held_out(stages, trainer.pipeline, True, loaded)
        return (GateCallback(trainer, held_out, own_tasks(args), script_args.gate_steps, *limits),)

    return grpo(script_args, args, callbacks=gate)


class _Progress:
    """Measures the model after each stage and keeps what was found, so that a stopped run need not do it again."""

    def __init__(self, stages: list[tuple[PDTRArguments, FlowGRPOConfig]], output_dir: Path):
        self.stages, self.output_dir = stages, output_dir
        self.names = [_START, *(stage_name(number, args) for number, (_, args) in enumerate(stages, start=1))]

    def measure(self, number: int, folder: Path | str) -> None:
        """Measure what stage `number` exported, 0 for the model that training starts from, unless that is done."""
        args = self.stages[0][1]
        if args.process_index == 0:
            path = self.output_dir / _MEASURED / f"{self.names[number]}.json"
            identity = self._identity(Path(folder))
            if not path.is_file() or json.loads(path.read_text(encoding="utf-8"))["of"] != identity:
                self._measure(path, folder, identity)
            self._write(number)
        if args.world_size > 1:
            torch.distributed.barrier()

    def _identity(self, folder: Path) -> dict:
        """Return what a measuring depends on; with another model or other settings it is done again."""
        script_args = self.stages[0][0]
        weights = [file.stat() for file in sorted(folder.rglob("*.safetensors"))]
        settings = {name: getattr(script_args, name) for name in (*_MEASURING, "vlm_name_or_path")}
        rewards, judging = [], {}
        if script_args.eval_dataset_name is not None:
            found = _measured_rewards(self.stages)
            rewards, judging = list(found.items()), asdict(script_args.measuring(list(found)))
            judging = {name: value for name, value in judging.items() if name not in _PATIENCE}
        files = [[stat.st_size, stat.st_mtime_ns] for stat in weights]
        return json.loads(json.dumps({"weights": files, "rewards": rewards, **settings, **judging}))

    def _measure(self, path: Path, folder: Path | str, identity: dict) -> None:
        script_args, args = self.stages[0]
        sys.stderr.write(f"[measuring] {path.stem}: {script_args.eval_n} of each task\n")
        gc.collect()  # the trainer of the stage before, which refers to itself
        torch.cuda.empty_cache()
        is_lora = (Path(folder) / COMFYUI_LORA).is_file()
        start = script_args if is_lora else replace(script_args, model_name_or_path=str(folder))
        pipeline = load_pipeline(start, args, lora=True)
        if is_lora:
            pipeline.load_lora_weights(folder)
        pipeline.to(args.device)
        found, sheet = _held_out(self.stages, pipeline, gate=False)(pipeline)
        if not found:
            expected = "rewards of the held-out prompts and edits"
            raise InputError("measuring", found="no reward for any sample", expected=expected)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_sheet(sheet, path.with_suffix(".png"))
        tasks = {task: now.to_json() for task, now in found.items()}
        write_file(path, json.dumps({"of": identity, "tasks": tasks}))
        for task, now in found.items():
            sys.stderr.write(f"[measuring] {path.stem}: {task} strict {now.mean():.3f} of {len(now.strict)}\n")
            if script_args.eval_dataset_name is not None and (said := bar_warning(now)):
                name = "edit_strict_reward" if task == "edit" else "strict_reward"
                sys.stderr.write(f"[measuring] {path.stem}: {task}: {said}; set {name}\n")

    def measured(self, last: int) -> dict[str, dict[str, Measurement]]:
        """Return what was measured, in order, up to stage `last`: later files may be of an earlier run."""
        found = {}
        for name in self.names[: last + 1]:
            path = self.output_dir / _MEASURED / f"{name}.json"
            if path.is_file():
                content = json.loads(path.read_text(encoding="utf-8"))["tasks"]
                found[name] = {task: Measurement.from_json(kept) for task, kept in content.items()}
        return found

    def _write(self, last: int) -> None:
        script_args = self.stages[0][0]
        figures = matrix(self.measured(last), script_args.gate_max_drop)
        write_matrix(self.output_dir / INTERFERENCE_FILE, figures)
        for stage, tasks in figures.items():
            drift = tasks.get("edit", {}).get("drift")
            if drift is not None and is_fall(**drift, max_drop=script_args.gate_max_drop):
                less = f"{drift['difference']:+.3f} since the start"
                sys.stderr.write(f"{stage}: edits leave less of their source as it was ({less})\n")
            for task, entry in tasks.items():
                if entry.get("change", {}).get("negative_transfer"):
                    sys.stderr.write(f"negative transfer in {stage}: {task} {entry['change']['difference']:+.3f}\n")
        write_page(self.output_dir / "report.html", self.output_dir.resolve().name, self._parts(figures))

    def _parts(self, figures: dict) -> list[str]:
        parts = ["<h2>Interference</h2>", matrix_table(figures), matrix_plot(figures), kinds_table(figures)]
        for number, (_, args) in enumerate(self.stages, start=1):
            folder = Path(args.output_dir)
            if not (folder / HISTORY_FILE).is_file():
                continue
            history = json.loads((folder / HISTORY_FILE).read_text(encoding="utf-8"))
            parts += [f"<h2>Stage {html.escape(self.names[number])}</h2>", *charts(history)]
            if (folder / GATE_FILE).is_file():
                parts.append(gate_table(json.loads((folder / GATE_FILE).read_text(encoding="utf-8"))))
            last = max((folder / "completions").glob("*.png"), default=None)
            if last is not None:
                parts += ["<h3>Best and worst of the last generation that was kept</h3>"]
                parts += pictures(last.parent, last.name)
        parts += ["<h2>The same prompts, edits and noise after each stage</h2>"]
        parts += [picture for name in self.names for picture in pictures(self.output_dir / _MEASURED, f"{name}.png")]
        for number, (script_args, args) in enumerate(self.stages, start=1):
            settings = args.to_sanitized_dict() | vars(script_args)
            parts += [f"<h2>Settings of {self.names[number]}</h2>", table({k: settings[k] for k in sorted(settings)})]
        return parts


def matrix_table(figures: dict[str, dict[str, dict]]) -> str:
    """Return the interference matrix as an HTML table: strict accuracy, its interval, and what the stage changed."""
    keeps = any("preserved" in tasks.get("edit", {}) for tasks in figures.values())
    head = "".join(f"<td>{task}<td>change" for task in TASKS)
    rows = [f"<tr><td>stage{head}{'<td>kept' if keeps else ''}"]
    for stage, tasks in figures.items():
        cells = [f"<td>{html.escape(stage)}"]
        for task in TASKS:
            entry = tasks.get(task)
            if entry is None:
                cells.append("<td><td>")
                continue
            low, high = entry["interval"]
            cells.append(f"<td><b>{entry['strict']:.3f}</b> ({low:.3f} to {high:.3f}), n {entry['n']}")
            change = entry.get("change")
            alarm = " <b>negative transfer</b>" if change and change["negative_transfer"] else ""
            cells.append(f"<td>{_difference_text(change)}{alarm}")
        if keeps:
            edit = tasks.get("edit", {})
            share = edit.get("preserved")
            cells.append(f"<td>{'' if share is None else f'{share:.3f} '}{_difference_text(edit.get('drift'))}")
        rows.append("<tr>" + "".join(cells))
    notes = "Strict accuracy with intervals of 95 %; changes are paired."
    if keeps:
        notes += (
            " Kept is how much of their sources edits leave as it was, pixel by pixel, with its change to the start."
        )
    return f"<table>{''.join(rows)}</table><p>{notes}</p>"


def gate_table(looks: list[dict]) -> str:
    """Return the looks of a stage's gate as an HTML table: strict accuracy by step, what fell, where it went back."""
    rows = ["<tr><td>step" + "".join(f"<td>{task}" for task in TASKS) + "<td>"]
    for look in looks:
        cells = "".join(f"<td>{look[task]:.3f}" if task in look else "<td>" for task in TASKS)
        said = [f"<b>negative transfer: {' and '.join(look['fell'])}</b>"] if look["fell"] else []
        said += [f"back to the weights of step {look['back_to']}"] if "back_to" in look else []
        rows.append(f"<tr><td>{look['step']}{cells}<td>{', '.join(said)}")
    return f"<h3>Gate</h3><table>{''.join(rows)}</table>"


def kinds_table(figures: dict[str, dict[str, dict]]) -> str:
    """Return strict accuracy of each kind after each stage as an HTML table, "" where the data has no kinds."""
    known = {
        (task, kind): None for tasks in figures.values() for task in tasks for kind in tasks[task]["kinds"] if kind
    }
    if not known:
        return ""
    rows = ["<tr><td>kind" + "".join(f"<td>{html.escape(stage)}" for stage in figures)]
    for task, kind in known:
        shares = [tasks.get(task, {}).get("kinds", {}).get(kind) for tasks in figures.values()]
        cells = "".join("<td>" if share is None else f"<td>{share:.3f}" for share in shares)
        rows.append(f"<tr><td>{task}: {html.escape(kind)}{cells}")
    return f"<h3>By kind</h3><table>{''.join(rows)}</table>"


def _difference_text(change: dict | None) -> str:
    if change is None:
        return ""
    low, high = change["interval"]
    return f"{change['difference']:+.3f} ({low:+.3f} to {high:+.3f})"


def matrix_plot(figures: dict[str, dict[str, dict]]) -> str:
    """Return an SVG: strict accuracy of both tasks over the stages, with intervals of 95 %."""
    width, height, left, top, bottom = 640, 280, 48, 12, 236
    stages = list(figures)
    step = (width - left - 40) / max(1, len(stages) - 1)

    def y(share: float) -> float:
        return top + (bottom - top) * (1 - share)

    lines = [f'<svg width="{width}" height="{height}" font-size="11" font-family="sans-serif">']
    for share in (0, 0.25, 0.5, 0.75, 1):
        lines.append(f'<path d="M{left} {y(share):.1f}H{width - 8}" stroke="#d1d9e0"/>')
        lines.append(f'<text x="{left - 6}" y="{y(share) + 4:.1f}" text-anchor="end">{share:g}</text>')
    for place, stage in enumerate(stages):
        x = left + 16 + place * step
        lines.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{html.escape(stage)}</text>')
    for number, task in enumerate(TASKS):
        color, points = _COLORS[task], []
        for place, stage in enumerate(stages):
            if task not in figures[stage]:
                continue
            entry, x = figures[stage][task], left + 16 + place * step + 4 * number
            low, high = entry["interval"]
            points.append(f"{x:.1f},{y(entry['strict']):.1f}")
            lines.append(f'<path d="M{x:.1f} {y(low):.1f}V{y(high):.1f}" stroke="{color}" stroke-width="2"/>')
            lines.append(f'<circle cx="{x:.1f}" cy="{y(entry["strict"]):.1f}" r="3.5" fill="{color}"/>')
        lines.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{color}"/>')
        lines.append(f'<text x="{left + 16 + 60 * number}" y="{height - 8}" fill="{color}">{task}</text>')
    return "".join([*lines, "</svg>"])


def pdtr(stages: list[tuple[PDTRArguments, FlowGRPOConfig]]) -> Path:
    """Run all stages and measure both tasks around each; returns the folder of the last export, `output_dir/export`.

    Writes `interference.json` and `report.html` to `output_dir`.
    """
    output_dir = Path(stages[0][1].output_dir).parent
    progress = _Progress(stages, output_dir)
    first = stages[0][0]
    base = StableDiffusion3KontextPipeline.find_folder(first.model_name_or_path)
    progress.measure(0, first.lora_name_or_path or base)
    return run_stages(stages, partial(train_stage, stages), after=progress.measure)


def main(argv: list[str]) -> int:
    """Entry of `unipic2 train pdtr`."""
    if "stages" not in read_config(argv):
        parse(argv)  # what is wrong is no stage's fault
    stages = parse_stages(argv, parse, _OF_THE_RUN, lora_goes_on=True, default=DEFAULT_STAGES)
    first, args = stages[0][0], stages[-1][1]
    if first.eval_dataset_name is not None and first.eval_reward_funcs is None and args.process_index == 0:
        said = (
            "measured by the rewards that are trained on; eval_reward_funcs names others, that a model has not learned"
        )
        sys.stderr.write(f"{said} to please\n")
    folder = pdtr(stages)
    finish(folder, args, _card(stages, folder.parent))
    return 0


def _card(stages: list[tuple[PDTRArguments, FlowGRPOConfig]], output_dir: Path) -> str:
    counted = not any(script_args.gate_steps for script_args, _ in stages)  # a gate may end a stage early
    card = stages_card(stages, output_dir, "PDTR, staged online reinforcement learning", counted)
    figures = json.loads((output_dir / INTERFERENCE_FILE).read_text(encoding="utf-8"))
    rows = [
        f"| {' | '.join([stage, *(figure_text(tasks.get(task)) for task in TASKS)])} |"
        for stage, tasks in figures.items()
    ]
    settings = stages[0][0]
    measured = (
        f"Strict accuracy on {settings.eval_n} held-out samples of each (seed {settings.eval_seed}, "
        f"{settings.eval_inference_steps} steps, guidance {settings.eval_guidance_scale:g}), interval of 95 %:"
    )
    head = ["## Both tasks after each stage", "", measured, "", "| stage | t2i | edit |"]
    return "\n".join([card, *head, "|---|---|---|", *rows, ""])
