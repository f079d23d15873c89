"""The gate of a stage: both tasks are looked at while it trains, so that neither falls for the other's sake."""

import json
import sys
from pathlib import Path

from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file
from transformers import TrainerCallback

from ..core.checkpoint import save_tensors
from ..core.files import write_file
from .held_out import HeldOut, Measurement
from .interference import has_fallen
from .kontext_trainer import last_checkpoint

GATE_ACTIONS = ("rollback", "stop", "warn")
_UNKNOWN = -1.0  # a score below all others
GATE_FILE, _BEST = "gate.json", "gate-best-{}.safetensors"


def _best_of(looks: list[dict]) -> dict | None:
    """Return the look with the best score, the first of equals, of those where no task had fallen."""
    good = [look for look in looks if not look["fell"]]
    return max(good, key=lambda look: (look["score"], -look["step"]), default=None)


class GateCallback(TrainerCallback):
    """Looks at both tasks every `steps` optimizer steps, with the averaged weights.

    A stage ends when each of its own tasks reaches `target`, or when a task has fallen since the stage began by more
    than `max_drop` and not by chance (`interference.has_fallen`): `stop` keeps the weights, `rollback` goes back to
    the best that were looked at, `warn` goes on. Looks are kept in `output_dir/gate.json`: a resumed run decides as if
    never stopped.

    Args:
        trainer: a `KontextTrainer`.
        held_out: how to measure; preferably on other samples than in the end, as this takes part in training.
        own: names of the tasks that the stage trains for.
        steps, max_drop, target, action: see above; `target` None is none.
    """

    def __init__(
        self,
        trainer,
        held_out: HeldOut,
        own: tuple[str, ...],
        steps: int,
        max_drop: float,
        target: float | None,
        action: str,
    ):
        self.trainer, self.held_out, self.own, self.steps = trainer, held_out, own, steps
        self.max_drop, self.target, self.action = max_drop, target, action
        self.folder = Path(trainer.args.output_dir)
        self.looks: list[dict] = []

    def on_train_begin(self, args, state, control, **kwargs):
        path = self.folder / GATE_FILE
        if state.global_step and path.is_file():
            looks = json.loads(path.read_text(encoding="utf-8"))
            self.looks = [look for look in looks if look["step"] <= state.global_step]
        if not self.looks:
            self._look(state.global_step)
        elif self.looks[-1]["step"] == state.global_step:  # it may have been killed after the decision to end
            control.should_training_stop = self.looks[-1]["ends"]

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.steps == 0:
            control.should_training_stop |= self._look(state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        if self.looks[-1]["step"] != state.global_step and not self.looks[-1]["ends"]:
            self._look(state.global_step)  # a stage need not end at a multiple of `steps`
        if self.fell and self.action == "rollback":
            step = _best_of([look for look in self.looks if self._is_kept(look)])["step"]
            self.trainer.restore(load_file(self.folder / _BEST.format(step)), step)
            if self.trainer.is_world_process_zero():
                self.looks[-1]["back_to"] = step
                write_file(self.folder / GATE_FILE, json.dumps(self.looks))
                self._say(f"back to the weights of step {step}")

    @property
    def fell(self) -> bool:
        """Whether a task had fallen when they were last looked at."""
        return bool(self.looks[-1]["fell"])

    def _look(self, step: int) -> bool:
        """Measure, in the first process; returns, in all of them, whether the stage ends."""
        if self.trainer.is_world_process_zero():
            self._decide(step)
        if self.trainer.args.world_size > 1:
            shared = [self.looks]
            broadcast_object_list(shared)
            self.looks = shared[0]
        return self.looks[-1]["ends"]

    def _decide(self, step: int) -> None:
        with self.trainer.drawing() as pipeline:
            measured, _ = self.held_out(pipeline)
        shares = {task: round(now.mean(), 4) for task, now in measured.items()}
        own = [measured[task].mean() for task in self.own if task in measured]
        first = self._baseline()
        # Scores of other tasks are not comparable: where one of its own is not known, a look is no best one.
        known = all(task in measured for task in self.own if task in first)
        score = sum(own) / len(own) if own and known else _UNKNOWN
        if self.looks and any(task in measured and task not in first for task in self.own):
            for look in self.looks:
                look["score"] = _UNKNOWN
        fallen = [
            task for task, now in measured.items()
            if task in first and has_fallen(first[task].strict, now.strict, self.max_drop)
        ]  # fmt: skip
        best = _best_of(self.looks)
        reached = self.target is not None and step > 0 and score != _UNKNOWN and min(own) >= self.target
        ends = reached or (bool(fallen) and self.action != "warn")
        look = {"step": step, "score": score, "fell": fallen, "ends": ends, **shares}
        look["measured"] = {task: now.to_json() for task, now in measured.items() if task not in first}
        self.looks.append(look)
        if not fallen and (best is None or score > best["score"]):
            self._keep(step)
        write_file(self.folder / GATE_FILE, json.dumps(self.looks))
        self._say(f"step {step}: " + ", ".join(f"{task} {share:.3f}" for task, share in shares.items()))
        for task in fallen:
            self._say(f"negative transfer: {task} fell from {first[task].mean():.3f} to {shares[task]:.3f}")
        if reached:
            self._say(f"the stage's target of {self.target} is reached")

    def _baseline(self) -> dict[str, Measurement]:
        """Return how each task was when it was first looked at: a judge may have been down as the stage began."""
        kept = {task: found for look in reversed(self.looks) for task, found in look.get("measured", {}).items()}
        return {task: Measurement.from_json(found) for task, found in kept.items()}

    def _keep(self, step: int) -> None:
        """Keep the averaged weights of this look, and the best ones up to the checkpoint where a run would go on."""
        path = self.folder / _BEST.format(step)
        path.parent.mkdir(parents=True, exist_ok=True)
        with self.trainer.averaged_weights():
            save_tensors(self.trainer.trained_weights(), path)
        checkpoint = last_checkpoint(self.folder, self.trainer.args.use_ema)
        last = -1 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
        before = _best_of([look for look in self.looks if look["step"] <= last and self._is_kept(look)])
        needed = {path, *([] if before is None else [self.folder / _BEST.format(before["step"])])}
        for other in self.folder.glob(_BEST.format("*")):
            if other not in needed:
                other.unlink()

    def _is_kept(self, look: dict) -> bool:
        """Whether its weights are there; of looks that stopped being comparable they need not be those of the best."""
        return (self.folder / _BEST.format(look["step"])).is_file()

    def _say(self, text: str) -> None:
        sys.stderr.write(f"[gate] {text}\n")
