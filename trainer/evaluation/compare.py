"""Results of the same benchmark side by side: differences item by item, with intervals, and the pictures."""

from pathlib import Path

from PIL import Image

from ...core.errors import InputError
from ...core.files import read_json
from ..sheets import Cell, contact_sheet
from .figures import figures_of_kinds, grouped
from .items import Item, Score
from .run import RESULTS_FILE

_JUDGE = ("model", "prompts", "detector", "clip")
"""What makes a judge the judge it is."""
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
    if not isinstance(results.get("items"), list) or not {"prompts", "measures", "mean_of_kinds"} <= results.keys():
        expected = "results with their items"
        raise InputError(f"{folder / RESULTS_FILE}", found="none", expected=expected, remedy="Score the folder again.")
    return results


def compare(folders: list[Path]) -> dict:
    """Return the figures of all folders, and the differences of each to the first.

    Returns:
        `{"folders": [name, ...], "measure": name, "tasks": {task or "task: kind": [{"mean", "n", "difference",
        "interval"}, ...]}}`; means are over the items that all of them have, as the benchmark takes them, and
        intervals, of 95 %, are of the differences item by item; the first folder has None.

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
        judges = [{k: r.get("judge", {}).get(k) for k in _JUDGE} for r in (found[0], results)]
        if judges[0] != judges[1]:
            expected = f"{judges[0]}, as in {folders[0]}"
            raise InputError(f"{folder}, judge", found=judges[1], expected=expected, remedy="Score one of them again.")
    measure, mean_of_kinds = found[0]["measures"][0], found[0]["mean_of_kinds"]
    scores = [{item["id"]: item[measure] for item in results["items"]} for results in found]
    shared = [
        Item(item["id"], item["task"], item["kind"], item["prompt"], item["seed"], (0, 0), group=item["group"])
        for item in found[0]["items"]
        if all(item["id"] in of_folder for of_folder in scores)
    ]
    if not shared:
        raise InputError("results", found="no item that all of them have", expected="some")
    tasks: dict[str, list[dict]] = {}
    for number, own in enumerate(scores):
        # The interval is of the first measure.
        rows = [(item, Score((own[item.id] - scores[0][item.id], own[item.id]))) for item in shared]
        for task, of_task in sorted(grouped(rows, lambda item: item.task).items()):
            figures = figures_of_kinds(of_task, ("difference", "mean"), mean_of_kinds)
            for name, entry in ((task, figures), *((f"{task}: {k}", v) for k, v in sorted(figures["kinds"].items()))):
                entry = {key: entry[key] for key in ("mean", "n", "difference", "interval")}
                tasks.setdefault(name, []).append(entry if number else {**entry, "difference": None, "interval": None})
    return {"folders": [str(folder) for folder in folders], "measure": measure, "tasks": tasks}


def table(comparison: dict) -> str:
    """Return a comparison as a Markdown table."""
    names = [Path(folder).name for folder in comparison["folders"]]
    names = names if len(set(names)) == len(names) else comparison["folders"]
    lines = [f"| | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for name, entries in comparison["tasks"].items():
        cells = []
        for entry in entries:
            text = f"{entry['mean']:.3f}"
            if entry["difference"] is not None:
                low, high = entry["interval"]
                text += f" ({entry['difference']:+.3f}, {low:+.3f} to {high:+.3f})"
            cells.append(text)
        label = f"**{name}**" if ":" not in name else name.partition(": ")[2]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def comparison_sheet(folders: list[Path], limit: int = 48) -> Image.Image | None:
    """Return the first items of each kind, each with the pictures of all folders side by side, sources first.

    None where the folders share no picture.
    """
    found = [read_results(folder) for folder in folders]
    measure, passing = found[0]["measures"][0], found[0]["passing"]
    passed = [{item["id"]: item[measure] >= passing for item in results["items"]} for results in found]
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
        marks = "".join("+" if of_folder.get(item["id"]) else "-" for of_folder in passed)
        cells.append(Cell(f"{marks} {item['prompt']}", images))
    return contact_sheet(cells, max(1, 12 // max(len(cell.images) for cell in cells))) if cells else None
