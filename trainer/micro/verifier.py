"""The verifier: reads a picture of the micro world and judges, clause by clause, whether it is what was asked.

Reading: find the ground, take the connected components that differ from it, give each the colour that most of its
inside has, and the shape whose ideal drawing overlaps best with how much of each pixel it covers. Judging is exact
on what was read.
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
_MOST_SPECKS = 64  # pixels of all specks together; more is something that was not asked for
_LEAST_OVERLAP = 0.78  # intersection over union with the ideal shape; half-drawn shapes stay under it
_LEAST_PURITY = 0.8  # share of the inside that must have one colour
_LEAST_GROUND = 0.85  # share of the light pixels that must have one ground's colour
_MOST_FADED = 90.0  # RGB distance of a thing's median from its colour
_LEAST_EDGE = 2 * MIN_RADIUS - 4  # pixels; a shape drawn smaller is no shape
_MOST_ASPECT = 1.35  # longer over shorter edge of the box
_SAME_PLACE = 4.0  # pixels that the centre of an untouched thing may shift
_SAME_RADIUS = 2.5  # pixels that its radius may change
_TEMPLATE_EDGE = 96
_MARGIN = 2  # pixels kept around a component's box
_TRIES = [(shape, 0, 0) for shape in SHAPES] + [("triangle", top, side) for top in (0, 1, 2) for side in (0, 1)]
# (shape, pixels that its box reaches above the component's, and to either side)


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


@lru_cache(maxsize=4096)
def _template(shape: str, height: int, width: int) -> np.ndarray:
    """Return the ideal coverage (height, width), 0 to 1, of a shape that fills its box."""
    image = Image.new("L", (_TEMPLATE_EDGE, _TEMPLATE_EDGE), 0)
    half = _TEMPLATE_EDGE / 2
    draw_shape(ImageDraw.Draw(image), shape, half - 0.5, half - 0.5, half, 255)
    return np.asarray(image.resize((width, height), Image.Resampling.BOX), dtype=np.float32) / 255


def _shape_of(coverage: np.ndarray) -> str | None:
    """Return the shape that a coverage map (H, W), 0 to 1, with a free border of `_MARGIN`, holds, or None.

    A codec blunts a triangle's corners, which makes its box too small, so larger boxes are tried for it.
    """
    height, width = (edge - 2 * _MARGIN for edge in coverage.shape)
    if max(height, width) > _MOST_ASPECT * min(height, width) or max(height, width) < _LEAST_EDGE:
        return None
    best, best_overlap = None, _LEAST_OVERLAP
    for shape, top, side in _TRIES:
        box = coverage[_MARGIN - top : _MARGIN + height, _MARGIN - side : _MARGIN + width + side]
        ideal = _template(shape, *box.shape)
        outside = coverage.sum() - box.sum()
        overlap = np.minimum(box, ideal).sum() / (np.maximum(box, ideal).sum() + outside)
        if overlap >= best_overlap:
            best, best_overlap = shape, overlap
    return best


def _distances(pixels: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> np.ndarray:
    """Return the RGB distances (..., P) of pixels (..., 3) to the P colours of a palette."""
    return np.linalg.norm(pixels[..., None, :] - np.array(list(palette.values()), dtype=np.float32), axis=-1)


def _color_of(pixels: np.ndarray) -> tuple[str | None, np.ndarray]:
    """Return the colour of most of these pixels (N, 3), None when they are mixed or faded, and their median RGB."""
    shade = np.median(pixels, axis=0)
    nearest = _distances(pixels, COLORS).argmin(-1)
    counts = np.bincount(nearest, minlength=len(COLORS))
    best = int(counts.argmax())
    pure = counts[best] >= _LEAST_PURITY * len(pixels)
    full = _distances(shade, COLORS)[best] <= _MOST_FADED
    return list(COLORS)[best] if pure and full else None, shade


def read_scene(image: Image.Image) -> Scene:
    """Read a 64x64 picture. A component whose shape or colour fits nothing is kept with "unknown" in its place.

    So is a ground of several colours, and specks that together cover as much as a thing are one unknown thing.

    Raises:
        InputError: the picture is not 64x64 pixels.
    """
    if image.size != (IMAGE_SIZE, IMAGE_SIZE):
        expected = f"{IMAGE_SIZE}x{IMAGE_SIZE} pixels"
        raise InputError("picture for the verifier", found=f"{image.width}x{image.height}", expected=expected)
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    to_ground, to_color = _distances(pixels, GROUNDS), _distances(pixels, COLORS)
    light = to_ground.min(-1) < to_color.min(-1)
    counts = np.bincount(to_ground.argmin(-1)[light], minlength=len(GROUNDS))
    ground = list(GROUNDS)[int(counts.argmax())]
    is_plain = counts.max() >= _LEAST_GROUND * counts.sum()
    from_ground = to_ground[..., int(counts.argmax())]
    # Nearer to a colour, so that the blur between two close things stays ground; and clearly off the ground.
    thing_mask = (to_color.min(-1) < from_ground) & (from_ground > _GROUND_DISTANCE)
    labels, _ = ndimage.label(thing_mask)
    things, specks = [], 0
    for i, box in enumerate(ndimage.find_objects(labels), start=1):
        mask = labels[box] == i
        if mask.sum() < _LEAST_AREA:
            specks += int(mask.sum())
            continue
        inside = ndimage.binary_erosion(mask)
        color, shade = _color_of(pixels[box][inside if inside.any() else mask])
        top, left = box[0].start, box[1].start
        height, width = mask.shape
        coverage = _coverage(pixels, labels, i, np.array(GROUNDS[ground], dtype=np.float32), shade)
        padded = np.pad(coverage, _MARGIN)[top : top + height + 2 * _MARGIN, left : left + width + 2 * _MARGIN]
        things.append(
            Thing(
                shape=_shape_of(padded) or "unknown",
                color=color or "unknown",
                x=round(left + width / 2),
                y=round(top + height / 2),
                radius=round((height + width) / 4),
            )
        )
    if specks > _MOST_SPECKS:
        things.append(Thing("unknown", "unknown", IMAGE_SIZE // 2, IMAGE_SIZE // 2, MIN_RADIUS))
    return Scene(ground if is_plain else "unknown", tuple(things))


def _coverage(pixels: np.ndarray, labels: np.ndarray, label: int, ground: np.ndarray, shade: np.ndarray) -> np.ndarray:
    """Return how much of each pixel (H, W) component `label` covers, 0 to 1: its place between ground and shade."""
    toward = shade - ground
    coverage = ((pixels - ground) @ toward / (toward @ toward)).clip(0, 1)
    near = ndimage.binary_dilation(labels == label, iterations=1)
    return np.where(near & np.isin(labels, (0, label)), coverage, 0)


def verify_t2i(image: Image.Image, task: T2ITask) -> Verdict:
    """Judge a generated picture against a prompt."""
    read = read_scene(image)
    found = list(read.things)
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
    alone = len(found) == len(task.looks) and read.ground != "unknown"
    clauses.append(Clause("nothing else", alone, f"{len(found)} things on {read.ground}"))
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
