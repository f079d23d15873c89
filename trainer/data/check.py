"""`unipic2 data check`: look at a dataset before paying for a training run on it."""

import hashlib
import json
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

from PIL import Image

from ...core.files import write_file
from ..sheets import Cell, contact_sheet, save_sheet
from .buckets import nearest_bucket
from .sources import ROLES, BrokenRow, Source, TransparentMask, measure, picture_of, read_pair

_LISTED = 200  # broken rows written to the report
_THUMBNAIL = 160
_CELLS = 24
_WHITE = 128  # what is darker everywhere masks out the whole picture


def inspect_row(row: dict, columns, root: Path) -> dict:
    """Decode a row and return what `check` counts: as `measure`, with the source's size, a digest of it all, and
    whether its mask has no white (`dark_mask`, such as masks of the values 0 and 1) or is not opaque.
    """
    found = {**measure(row, columns, root), "source_width": 0, "source_height": 0, "digest": ""}
    found |= {"dark_mask": False, "transparent_mask": False}
    if found["error"]:
        return found
    try:
        try:
            pair = read_pair(row, columns, root)
        except TransparentMask:  # no fault where masks are not read
            found["transparent_mask"] = True
            pair = read_pair(row, replace(columns, mask=None), root)
    except BrokenRow as broken:
        return {**found, "error": str(broken)}
    digest = hashlib.blake2b(pair.prompt.encode(), digest_size=16)
    for column in (columns.target, columns.source):
        place = picture_of(row[column], column, root) if column else None
        if place is not None:
            digest.update(place[0].read_bytes() if isinstance(place[0], Path) else place[0].getvalue())
    if pair.source is not None:
        found |= {"source_width": pair.source.width, "source_height": pair.source.height}
    if pair.mask is not None:
        found["dark_mask"] = pair.mask.getextrema()[1] < _WHITE
    return {**found, "digest": digest.hexdigest()}


def check(sources: list[Source], buckets: list[tuple[int, int]], num_proc: int | None = None) -> dict:
    """Read every row of every source.

    Args:
        sources: opened datasets.
        buckets: sizes from `aspect_buckets`.
        num_proc: processes that decode; None decodes in this one.

    Returns:
        A report, ready for JSON: counts, sizes in pixels, buckets, upscaled rows, edits whose source has another
        shape, masks without white, duplicates, broken rows by reason and one by one (the first 200).
    """
    report: dict = {"sources": [], "rows": 0, "t2i": 0, "edits": 0, "broken": 0, "broken_rows": []}
    kinds: dict[str, Counter] = {"t2i": Counter(), "edits": Counter()}
    reasons, digests = Counter(), defaultdict(list)
    widths, heights, upscaled, reshaped, dark, transparent = [], [], 0, 0, 0, 0
    for source in sources:
        found = source.map(inspect_row, "reading rows", num_proc)
        columns = {role: getattr(source.columns, role) for role in ROLES}
        report["sources"].append({"name": source.name, "rows": len(found), "columns": columns})
        for number, row in enumerate(found):
            report["rows"] += 1
            if row["error"]:
                report["broken"] += 1
                reasons[_kind_of(row["error"])] += 1
                if len(report["broken_rows"]) < _LISTED:
                    report["broken_rows"].append({"source": source.name, "row": number, "reason": row["error"]})
                continue
            task = "edits" if row["is_edit"] else "t2i"
            size = nearest_bucket(row["width"], row["height"], buckets)
            report[task] += 1
            kinds[task]["{}x{}".format(*size)] += 1
            digests[row["digest"]].append((source.name, number))
            if source.columns.target is None and not row["is_edit"]:
                continue  # a prompt without any picture
            widths.append(row["width"])
            heights.append(row["height"])
            upscaled += row["width"] < size[0] or row["height"] < size[1]
            dark += row["dark_mask"]
            transparent += row["transparent_mask"]
            if row["is_edit"]:
                reshaped += nearest_bucket(row["source_width"], row["source_height"], buckets) != size
    repeated = [places for places in digests.values() if len(places) > 1]
    report["width"], report["height"] = _spread(widths), _spread(heights)
    report["buckets"] = {task: dict(sizes.most_common()) for task, sizes in kinds.items()}
    report["upscaled"] = upscaled
    report["edits_with_another_shape"] = reshaped
    report["masks_without_white"], report["masks_with_transparency"] = dark, transparent
    report["duplicates"] = sum(len(places) - 1 for places in repeated)
    report["duplicate_examples"] = [[f"{name}:{row}" for name, row in places[:4]] for places in repeated[:20]]
    report["broken_reasons"] = dict(reasons.most_common())
    return report


def _kind_of(reason: str) -> str:
    """Return a reason without the file that it names, so that equal reasons are counted together."""
    if reason.startswith("no file "):
        return "no file"
    return reason.rpartition(": ")[2] if ": " in reason else reason


def _spread(values: list[int]) -> dict[str, int]:
    if not values:
        return {}
    ordered = sorted(values)
    return {"min": ordered[0], "median": ordered[len(ordered) // 2], "max": ordered[-1]}


def summary(report: dict) -> str:
    """Return the report as text for a terminal."""
    lines = [f"rows: {report['rows']} (text-to-image {report['t2i']}, edits {report['edits']})"]
    for source in report["sources"]:
        named = ", ".join(f"{role} {name}" for role, name in source["columns"].items() if name)
        lines.append(f"  {source['name']}: {source['rows']} rows; {named}")
    for axis in ("width", "height"):
        if report[axis]:
            lines.append("{}: {min} to {max}, median {median} pixels".format(axis, **report[axis]))
    for task, sizes in report["buckets"].items():
        if sizes:
            lines.append(f"buckets, {task}: " + ", ".join(f"{size} {count}" for size, count in sizes.items()))
    lines.append(f"smaller than their bucket, would be enlarged: {report['upscaled']}")
    if report["edits"]:
        lines.append(f"edits whose source has another shape than the target: {report['edits_with_another_shape']}")
    if report["masks_without_white"]:
        lines.append(f"masks without white, which learn nothing (0 and 1?): {report['masks_without_white']}")
    if report["masks_with_transparency"]:
        found = f"masks with transparency, broken where masks are read: {report['masks_with_transparency']}"
        lines.append(found)
    lines.append(f"duplicates: {report['duplicates']}")
    lines.append(f"broken: {report['broken']}")
    lines += [f"  {count} x {reason}" for reason, count in report["broken_reasons"].items()]
    lines += [f"  {r['source']} row {r['row']}: {r['reason']}" for r in report["broken_rows"][:10]]
    return "\n".join(lines)


def preview(sources: list[Source]) -> Image.Image | None:
    """Return a sheet of whole rows, evenly spread over the sources: edits with the source beside the target."""
    cells = []
    each = -(-_CELLS // len(sources))
    for source in sources:
        count = len(source.rows)
        for row in dict.fromkeys(i * count // each for i in range(each)):
            try:
                pair = read_pair(source.rows[row], source.columns, source.root)
            except BrokenRow:
                continue
            pictures = [picture for picture in (pair.source, pair.target) if picture is not None]
            if pictures:
                cells.append(Cell(pair.prompt, pictures))
    return contact_sheet(cells, columns=4, edge=_THUMBNAIL) if cells else None


def write_report(report: dict, sheet: Image.Image | None, folder: Path) -> None:
    """Write `report.json` and `sheet.png` to a folder, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    if sheet is not None:
        save_sheet(sheet, folder / "sheet.png")
