"""Results of the same benchmark side by side: differences item by item, with intervals, and the pictures."""

from pathlib import Path

import numpy as np
from PIL import Image

from ...core.errors import InputError
from ...core.files import read_json
from ..interference import paired_difference
from ..sheets import Cell, contact_sheet
from .run import RESULTS_FILE

COMPARISON_FILE, SHEET_FILE = "comparison.json", "comparison.png"


def read_results(folder: Path) -> dict:
    """Return a folder's `results.json`.

    Raises:
        InputError: there is none, or it is none of a benchmark.
    """
    if not (folder / RESULTS_FILE).is_file():
        remedy = f"Score it first: unipic2 eval micro --model MODEL --out {folder}"
        expected = "a benchmark's folder"
        raise InputError(f"results {folder}", found=f"no {RESULTS_FILE}", expected=expected, remedy=remedy)
    results = read_json(folder / RESULTS_FILE, "a benchmark's results")
    if not isinstance(results.get("items"), list) or "prompts" not in results:
        expected = "results with their items"
        raise InputError(f"{folder / RESULTS_FILE}", found="none", expected=expected, remedy="Score the folder again.")
    return results


def compare(folders: list[Path]) -> dict:
    """Return the figures of all folders, and the differences of each to the first.

    Returns:
        `{"folders": [name, ...], "tasks": {task or "task: kind": [{"strict", "n", "difference", "interval"}, ...]}}`;
        differences are means over the items that all of them have, with intervals of 95 %; the first folder has None.

    Raises:
        InputError: the folders were not asked for the same pictures, or share none.
    """
    found = [read_results(folder) for folder in folders]
    for folder, results in zip(folders, found, strict=True):
        for name in ("benchmark", "prompts"):
            if results.get(name) != found[0].get(name):
                raise InputError(
                    f"{folder}, {name}",
                    found=results.get(name),
                    expected=f"{found[0].get(name)}, as in {folders[0]}",
                    remedy="Only results of the same benchmark, --n and --seed can be compared.",
                )
    strict = [{item["id"]: item["strict"] for item in results["items"]} for results in found]
    items = [item for item in found[0]["items"] if all(item["id"] in of_folder for of_folder in strict)]
    if not items:
        raise InputError("results", found="no item that all of them have", expected="some")
    groups: dict[str, list[str]] = {}
    for item in items:
        for name in (item["task"], f"{item['task']}: {item['kind']}"):
            groups.setdefault(name, []).append(item["id"])
    tasks = {}
    for name, ids in sorted(groups.items(), key=lambda group: (group[0].partition(":")[0], ":" in group[0])):
        values = [np.array([of_folder[i] for i in ids], float) for of_folder in strict]
        tasks[name] = []
        for number, of_folder in enumerate(values):
            entry = {"strict": round(float(of_folder.mean()), 4), "n": len(ids), "difference": None, "interval": None}
            if number:
                difference, interval = paired_difference(values[0], of_folder)
                entry |= {"difference": round(difference, 4), "interval": [round(edge, 4) for edge in interval]}
            tasks[name].append(entry)
    return {"folders": [str(folder) for folder in folders], "tasks": tasks}


def table(comparison: dict) -> str:
    """Return a comparison as a Markdown table."""
    names = [Path(folder).name for folder in comparison["folders"]]
    lines = [f"| | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for name, entries in comparison["tasks"].items():
        cells = []
        for entry in entries:
            text = f"{entry['strict']:.3f}"
            if entry["difference"] is not None:
                low, high = entry["interval"]
                text += f" ({entry['difference']:+.3f}, {low:+.3f} to {high:+.3f})"
            cells.append(text)
        label = f"**{name}**" if ":" not in name else name.partition(": ")[2]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def comparison_sheet(folders: list[Path], limit: int = 48) -> Image.Image:
    """Return the first items of each kind, each with the pictures of all folders side by side, sources first."""
    found = [read_results(folder) for folder in folders]
    strict = [{item["id"]: item["strict"] for item in results["items"]} for results in found]
    taken: dict[tuple[str, str], int] = {}
    cells, kinds = [], {(item["task"], item["kind"]) for item in found[0]["items"]}
    for item in found[0]["items"]:
        kind = (item["task"], item["kind"])
        paths = [folder / "images" / f"{item['id']}.png" for folder in folders]
        if taken.get(kind, 0) >= max(1, limit // len(kinds)) or not all(path.is_file() for path in paths):
            continue
        taken[kind] = taken.get(kind, 0) + 1
        source = folders[0] / "sources" / f"{item['id']}.png"
        images = []
        for path in [*([source] if source.is_file() else []), *paths]:
            with Image.open(path) as image:
                images.append(image.convert("RGB"))
        marks = "".join("+" if of_folder.get(item["id"]) == 1 else "-" for of_folder in strict)
        cells.append(Cell(f"{marks} {item['prompt']}", images))
    return contact_sheet(cells, max(1, 12 // max(len(cell.images) for cell in cells)))
