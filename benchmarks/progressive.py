"""What the order of PDTR's stages does to the micro model: both tasks, edit only, text-to-image only, joint, reversed.

    python benchmarks/progressive.py [--updates 240] [--orders edit,t2i joint ...] [--seeds 0 1 2]

Every run starts from `micro-pretrained`, makes as many optimizer steps by the settings of `pdtr_micro.yaml`, and is
measured on the same held-out samples. All stages have the settings of its first one, but for the kinds that are drawn
more often there; their rate falls over the last quarter, and no gate ends them. Both orders and `joint` have 40 %
edits. A second call goes on where a stopped one was.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import unipic2
import yaml
from unipic2.trainer.interference import INTERFERENCE_FILE, figure_text

CONFIG = Path(unipic2.__file__).parent / "trainer" / "configs" / "pdtr_micro.yaml"
ORDERS = {
    "edit,t2i": ((0.75, 0.3), (0.25, 0.7)),
    "t2i,edit": ((0.25, 0.7), (0.75, 0.3)),
    "edit": ((1.0, 1.0),),
    "t2i": ((0.0, 1.0),),
    "joint": ((0.4, 1.0),),
}
"""Stages: share of edits among the generations, and share of the optimizer steps."""


def settings(order: str, updates: int, n: int, seed: int) -> dict:
    """Return the YAML of a run."""
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    stages = []
    left = updates
    for edit_ratio, share in ORDERS[order]:
        last = len(stages) + 1 == len(ORDERS[order])
        steps = left if last else max(1, round(share * updates))
        left -= steps
        schedule = {"num_decay_steps": steps // 4, "min_lr_ratio": 0.1}
        stages.append({"edit_ratio": edit_ratio, "max_steps": steps, "lr_scheduler_kwargs": schedule})
    return {**config, "stages": stages, "eval_n": n, "seed": seed, "gate_steps": 0, "report_to": "none"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--orders", nargs="+", default=list(ORDERS), choices=ORDERS, help="default: all")
    parser.add_argument("--updates", type=int, default=240, help="optimizer steps of a run (default 240)")
    parser.add_argument("--n", type=int, default=1024, help="held-out prompts, and edits (default 1024)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of training (default 0)")
    parser.add_argument("--out", type=Path, default=Path("runs/progressive"), help="folder of the runs")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for seed in arguments.seeds:
        for order in arguments.orders:
            run(order, seed, arguments)


def run(order: str, seed: int, arguments: argparse.Namespace) -> None:
    """Train one order from one seed, unless that is done, and print both tasks after each stage."""
    name = f"{order.replace(',', '-')}-{seed}"
    path, folder = arguments.out / f"{name}.yaml", arguments.out / name
    text = yaml.safe_dump(settings(order, arguments.updates, arguments.n, seed))
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise SystemExit(f"{path}: found other settings of an earlier run; name another folder with --out")
    path.write_text(text, encoding="utf-8")
    command = ["train", "pdtr", "--config", str(path), "--model_name_or_path", "micro-pretrained"]
    command = [sys.executable, "-m", "unipic2.cli", *command, "--output_dir", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    figures = json.loads((folder / INTERFERENCE_FILE).read_text(encoding="utf-8"))
    for stage, tasks in figures.items():
        shown = "  ".join(f"{task} {figure_text(entry)}" for task, entry in tasks.items())
        print(f"{order:9} seed {seed}  {stage:8} {shown}", flush=True)


if __name__ == "__main__":
    main()
