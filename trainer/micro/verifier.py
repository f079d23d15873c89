"""The verifier: reads a picture of the micro world and judges, clause by clause, whether it is what was asked.

Reading: find the ground, take the connected components that differ from it, give each the colour that most of
its inside has, and the shape whose ideal drawing in its box overlaps best. Judging is exact on what was read.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from ...core.errors import InputError
from ...core.micro import IMAGE_SIZE
from .tasks import EditTask, T2ITask, relation_holds
from .world import COLORS, GROUNDS, MIN_RADIUS, SHAPES, Scene, Thing, draw_shape

_GROUND_DISTANCE = 60.0  # RGB distance from the ground at which a pixel belongs to a thing: half-covered edges do
_LEAST_AREA = 16  # pixels; smaller specks are codec noise, the smallest shape covers about 90
_LEAST_OVERLAP = 0.78  # intersection over union with the ideal shape; half-drawn shapes stay under it
_LEAST_PURITY = 0.8  # share of the inside that must have one colour
_MOST_ASPECT = 1.35  # longer over shorter edge of the box
_SAME_PLACE = 4.0  # pixels that the centre of an untouched thing may shift
_SAME_RADIUS = 2.5  # pixels that its radius may change
_TEMPLATE_EDGE = 96


@dataclass(frozen=True, slots=True)
class Clause:
    """One thing that was asked and whether it holds. Example: `Clause("a red circle", False, "0 found")`."""

    name: str
    passed: bool
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """All clauses of one picture."""

    clauses: tuple[Clause, ...]

    @property
    def strict(self) -> bool:
        """Everything that was asked holds, and nothing else is there."""
        return all(c.passed for c in self.clauses)

    @property
    def soft(self) -> float:
        """Share of the clauses that hold, 0 to 1."""
        return sum(c.passed for c in self.clauses) / len(self.clauses)


@lru_cache(maxsize=len(SHAPES))
def _template(shape: str) -> np.ndarray:
    image = Image.new("L", (_TEMPLATE_EDGE, _TEMPLATE_EDGE), 0)
    half = _TEMPLATE_EDGE / 2
    draw_shape(ImageDraw.Draw(image), shape, half - 0.5, half - 0.5, half, 255)
    return np.asarray(image)


def _shape_of(mask: np.ndarray) -> str | None:
    """Return the shape that a component's box (H, W, bool) holds, or None when none fits."""
    height, width = mask.shape
    if max(height, width) > _MOST_ASPECT * min(height, width):
        return None
    overlaps = {}
    for shape in SHAPES:
        ideal = Image.fromarray(_template(shape)).resize((width, height), Image.Resampling.BOX)
        ideal = np.asarray(ideal) >= 128
        overlaps[shape] = (mask & ideal).sum() / max(1, (mask | ideal).sum())
    best = max(overlaps, key=overlaps.get)
    return best if overlaps[best] >= _LEAST_OVERLAP else None


def _color_of(pixels: np.ndarray) -> str | None:
    """Return the colour of most of these pixels (N, 3), or None when they are mixed."""
    names = list(COLORS)
    palette = np.array([COLORS[n] for n in names], dtype=np.float32)
    nearest = np.linalg.norm(pixels[:, None] - palette[None], axis=-1).argmin(1)
    counts = np.bincount(nearest, minlength=len(names))
    best = int(counts.argmax())
    return names[best] if counts[best] >= _LEAST_PURITY * len(pixels) else None


def read_scene(image: Image.Image) -> Scene:
    """Read a 64x64 picture. A component whose shape or colour fits nothing is kept with "unknown" in its place.

    Raises:
        InputError: the picture is not 64x64 pixels.
    """
    if image.size != (IMAGE_SIZE, IMAGE_SIZE):
        expected = f"{IMAGE_SIZE}x{IMAGE_SIZE} pixels"
        raise InputError("picture for the verifier", found=f"{image.width}x{image.height}", expected=expected)
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    names = [*GROUNDS, *COLORS]
    palette = np.array([*GROUNDS.values(), *COLORS.values()], dtype=np.float32)
    nearest = np.linalg.norm(pixels[:, :, None] - palette, axis=-1).argmin(-1)
    ground = names[int(np.bincount(nearest.ravel(), minlength=len(names))[: len(GROUNDS)].argmax())]
    thing_mask = np.linalg.norm(pixels - np.array(GROUNDS[ground], dtype=np.float32), axis=-1) > _GROUND_DISTANCE
    labels, _ = ndimage.label(thing_mask)
    things = []
    for i, box in enumerate(ndimage.find_objects(labels), start=1):
        mask = labels[box] == i
        if mask.sum() < _LEAST_AREA:
            continue
        inside = ndimage.binary_erosion(mask)
        inside = inside if inside.any() else mask
        top, left = box[0].start, box[1].start
        height, width = mask.shape
        things.append(
            Thing(
                shape=_shape_of(mask) or "unknown",
                color=_color_of(pixels[box][inside]) or "unknown",
                x=round(left + width / 2),
                y=round(top + height / 2),
                radius=round((height + width) / 4),
            )
        )
    return Scene(ground, tuple(things))


def verify_t2i(image: Image.Image, task: T2ITask) -> Verdict:
    """Judge a generated picture against a prompt."""
    found = list(read_scene(image).things)
    clauses = []
    asked = {look: task.looks.count(look) for look in task.looks}
    for (shape, color), count in asked.items():
        n = sum(t.shape == shape and color in (None, t.color) for t in found)
        name = f"{count} x {color or 'any'} {shape}"
        clauses.append(Clause(name, n == count, f"{n} found"))
    if task.relation is not None:
        (first,), (second,) = ([t for t in found if t.shape == shape][:1] or [None] for shape, _ in task.looks)
        holds = first is not None and second is not None and relation_holds(first, second, task.relation)
        clauses.append(Clause(f"first is {task.relation} second", holds))
    clauses.append(Clause("nothing else", len(found) == len(task.looks), f"{len(found)} things"))
    return Verdict(tuple(clauses))


def _match(thing: Thing, found: list[Thing]) -> Thing | None:
    """Return and take out of `found` the thing that stands where `thing` should, looking as it should."""
    for other in found:
        same_place = np.hypot(other.x - thing.x, other.y - thing.y) <= _SAME_PLACE
        if same_place and other.name == thing.name and abs(other.radius - thing.radius) <= _SAME_RADIUS:
            found.remove(other)
            return other
    return None


def verify_edit(image: Image.Image, task: EditTask) -> Verdict:
    """Judge an edited picture: what was asked is there, what was not asked is unchanged, nothing else is there."""
    read = read_scene(image)
    found = list(read.things)
    wanted = list(task.target.things)
    edited = None
    if task.kind == "add":
        edited = wanted.pop()
    elif task.index is not None and task.kind != "remove":
        edited = wanted.pop(task.index)
    clauses = []
    for thing in wanted:
        clauses.append(Clause(f"{thing.name} unchanged", _match(thing, found) is not None))
    if task.kind == "add":
        new = next((t for t in found if t.name == edited.name and t.radius >= MIN_RADIUS - 2), None)
        if new is not None:
            found.remove(new)
        clauses.append(Clause(f"a new {edited.name}", new is not None))
    elif edited is not None:
        clauses.append(Clause(f"{task.kind}: {edited.name}", _match(edited, found) is not None))
    ground = "background" if task.kind == "background" else "ground unchanged"
    clauses.append(Clause(ground, read.ground == task.target.ground, read.ground))
    clauses.append(Clause("nothing else", not found, ", ".join(t.name for t in found)))
    return Verdict(tuple(clauses))
