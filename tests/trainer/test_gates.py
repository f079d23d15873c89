"""Gates: a stage stops or goes back when a task falls, stops when its own is good enough, and resumes as it was."""

import json
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from unipic2.trainer.gates import GateCallback
from unipic2.trainer.held_out import Measurement
from unipic2.trainer.pdtr import gate_table

N = 100


class FakeTrainer:
    """Weights that a test sets; what a gate needs of a trainer."""

    def __init__(self, folder):
        self.args = SimpleNamespace(output_dir=str(folder), world_size=1, use_ema=False)
        self.model, self.pipeline = torch.nn.Linear(1, 1, bias=False), None
        torch.nn.init.zeros_(self.model.weight)

    def is_world_process_zero(self):
        return True

    def averaged_weights(self):
        return nullcontext()

    @contextmanager
    def drawing(self):
        self.draws = True
        yield self.pipeline
        self.draws = False

    def trained_weights(self):
        return {"weight": self.model.weight.detach()}

    def restore(self, tensors, step):
        self.restored_step = step
        with torch.no_grad():
            self.model.weight.copy_(tensors["weight"])


@pytest.fixture
def run_gate(tmp_path):
    """Return a function that runs a gate over `(t2i, edit)` shares of looks 10 steps apart, the first before training.

    The weight is the number of the step; training is up to step `last`.

    Returns the gate, the trainer and the step at which training stopped.
    """

    def run(shares, own=("t2i",), target=None, action="rollback", from_step=0, last=None):
        trainer, place = FakeTrainer(tmp_path), iter(shares)

        def held_out(pipeline):
            assert trainer.draws, "measured as it will be used"
            right = next(place)
            found = {
                task: Measurement([""] * N, (np.arange(N) < share * N).astype(float), np.ones(N))
                for task, share in zip(("t2i", "edit"), right, strict=True)
                if share is not None
            }
            return found, None

        gate = GateCallback(trainer, held_out, own, steps=10, max_drop=0.02, target=target, action=action)
        control, state = SimpleNamespace(should_training_stop=False), SimpleNamespace(global_step=from_step)
        gate.on_train_begin(None, state, control)
        last = last or from_step + 10 * (len(shares) - (0 if from_step else 1))
        while not control.should_training_stop and state.global_step < last:
            state.global_step += 1
            with torch.no_grad():
                trainer.model.weight.fill_(state.global_step)
            control.should_training_stop = state.global_step == last  # as transformers' own callback says it
            gate.on_step_end(None, state, control)
        gate.on_train_end(None, state, control)
        return gate, trainer, state.global_step

    return run


def test_a_good_stage_goes_on_to_its_end(run_gate, tmp_path, capsys):
    gate, trainer, step = run_gate([(0.5, 0.8), (0.6, 0.79), (0.7, 0.8)])
    assert step == 20 and trainer.model.weight.item() == 20 and not gate.fell
    assert [look["step"] for look in json.loads((tmp_path / "gate.json").read_text())] == [0, 10, 20]
    assert "[gate] step 20: t2i 0.700, edit 0.800" in capsys.readouterr().err


def test_negative_transfer_goes_back_to_the_best(run_gate, tmp_path, capsys):
    _, trainer, step = run_gate([(0.5, 0.8), (0.6, 0.8), (0.55, 0.8), (0.9, 0.5), (1, 1)])
    assert step == 30 and trainer.model.weight.item() == trainer.restored_step == 10
    looks = json.loads((tmp_path / "gate.json").read_text())
    assert [look.get("back_to") for look in looks] == [None, None, None, 10]
    table = gate_table(looks)
    assert "<td>30<td>0.900<td>0.500<td><b>negative transfer: edit</b>, back to the weights of step 10" in table
    said = capsys.readouterr().err
    assert "negative transfer: edit fell from 0.800 to 0.500" in said and "back to the weights of step 10" in said


def test_its_own_task_may_not_fall_either(run_gate):
    _, trainer, step = run_gate([(0.5, 0.8), (0.2, 0.8), (0.9, 0.9)], action="stop")
    assert step == 10 and trainer.model.weight.item() == 10


def test_a_warning_stops_nothing(run_gate, capsys):
    _, trainer, step = run_gate([(0.5, 0.8), (0.6, 0.5), (0.7, 0.5)], action="warn")
    assert step == 20 and trainer.model.weight.item() == 20
    assert capsys.readouterr().err.count("negative transfer: edit") == 2


def test_a_stage_that_is_good_enough_ends(run_gate, capsys):
    _, _, step = run_gate([(0.5, 0.8), (0.7, 0.8), (0.9, 0.8), (1, 1)], target=0.85)
    assert step == 20 and "target of 0.85 is reached" in capsys.readouterr().err
    _, _, step = run_gate([(0.95, 0.8), (0.5, 0.95), (0.9, 0.9)], own=("t2i", "edit"), target=0.9, action="warn")
    assert step == 20, "both tasks of a joint stage, and not before it has trained"
    _, _, step = run_gate([(0.5, 0.8), (0.84, 0.97), (0.9, 0.9)], own=("t2i", "edit"), target=0.9)
    assert step == 20, "each of them, not their mean"


def test_a_resumed_stage_remembers_its_looks(run_gate, tmp_path):
    """Looks later than the checkpoint are taken again; the baseline is the one before training."""
    run_gate([(0.5, 0.8), (0.6, 0.8), (0.7, 0.8)])
    gate, trainer, step = run_gate([(0.65, 0.8), (0.9, 0.6)], from_step=10)
    assert [look["step"] for look in gate.looks] == [0, 10, 20, 30]
    assert step == 30 and trainer.model.weight.item() == 20
    (kept,) = tmp_path.glob("gate-best-*.safetensors")
    assert kept.stem == "gate-best-20" and load_file(kept)["weight"].item() == 20


def test_the_weights_that_a_stage_ends_with_are_looked_at(run_gate):
    """Also where it does not end with a look, or has none on the way."""
    gate, trainer, step = run_gate([(0.5, 0.8), (0.6, 0.8), (0.7, 0.6)], last=15)
    assert [look["step"] for look in gate.looks] == [0, 10, 15] and step == 15
    assert gate.fell and trainer.model.weight.item() == 10
    gate, trainer, _ = run_gate([(0.5, 0.8), (0.6, 0.8)], last=5)
    assert [look["step"] for look in gate.looks] == [0, 5] and trainer.model.weight.item() == 5


def test_a_run_that_goes_on_at_its_checkpoint_can_still_go_back(run_gate, tmp_path):
    """The best weights up to the last checkpoint stay: later looks may turn out otherwise the second time."""
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-10/trainer_state.json").write_text('{"step": 10}')
    run_gate([(0.5, 0.8), (0.6, 0.8), (0.7, 0.8)])
    assert sorted(file.stem for file in tmp_path.glob("gate-best-*")) == ["gate-best-10", "gate-best-20"]
    _, trainer, _ = run_gate([(0.9, 0.5)], from_step=10)
    assert trainer.model.weight.item() == 10


def test_a_task_that_could_not_be_judged_at_first_is_guarded_from_then_on(run_gate):
    gate, trainer, _ = run_gate([(0.5, None), (0.6, 0.8), (0.7, 0.5)])
    assert gate.looks[0].keys().isdisjoint({"edit"}) and gate.fell and trainer.model.weight.item() == 10


def test_a_look_without_one_of_its_own_tasks_is_no_best_one(run_gate):
    """The other task's score alone would be neither better nor good enough."""
    gate, trainer, step = run_gate([(0.5, 0.5), (0.6, 0.6), (0.9, None), (0.6, 0.3)], own=("t2i", "edit"), target=0.85)
    assert step == 30 and trainer.model.weight.item() == 10
    gate, trainer, step = run_gate([(0.9, None), (0.9, 0.6), (0.9, 0.3)], own=("t2i", "edit"))
    assert step == 20 and trainer.model.weight.item() == 10


def test_it_goes_back_to_weights_that_are_there(run_gate):
    """The first look's were let go for better ones before its score stopped being comparable."""
    gate, trainer, step = run_gate([(0.5, None), (0.6, None), (0.1, 0.6)], own=("t2i", "edit"))
    assert step == 20 and gate.fell and trainer.model.weight.item() == 10


def test_a_stage_that_ended_before_its_export_stays_ended(run_gate):
    run_gate([(0.5, 0.8), (0.9, 0.5)])
    gate, trainer, step = run_gate([(1, 1)], from_step=10)
    assert step == 10 and gate.fell and trainer.model.weight.item() == 0, "back to the best, the start"


def test_what_could_not_be_judged_is_no_fall(tmp_path):
    """A judge that is down must not roll a stage back."""
    trainer, answers = FakeTrainer(tmp_path), iter([1.0, np.nan, 1.0])

    def held_out(pipeline):
        strict = np.full(N, next(answers))
        return ({} if np.isnan(strict).all() else {"edit": Measurement([""] * N, strict, strict)}), None

    gate = GateCallback(trainer, held_out, ("edit",), 10, 0.02, None, "stop")
    control = SimpleNamespace(should_training_stop=False)
    gate.on_train_begin(None, SimpleNamespace(global_step=0), control)
    for step in (10, 20):
        gate.on_step_end(None, SimpleNamespace(global_step=step), control)
    assert not control.should_training_stop and [look["fell"] for look in gate.looks] == [[], [], []]
