"""What the micro model is asked: text-to-image prompts in GenEval's six kinds, and six kinds of edits.

A task carries the words and, in a form a program can check, what they mean. The same scene can answer
several prompts, so prompts are drawn for a scene (`describe`) as well as from scratch (`sample_t2i`).
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...core.micro import IMAGE_SIZE
from .world import COLORS, GROUNDS, SHAPES, Scene, Thing, place, sample_looks, sample_scene

T2I_KINDS = ("single_object", "two_objects", "counting", "colors", "position", "color_attribution")
EDIT_KINDS = ("recolor", "reshape", "remove", "add", "move", "background")
RELATIONS = ("left of", "right of", "above", "below")
SIDES = ("left", "right", "top", "bottom")
NUMBERS = {2: "two", 3: "three", 4: "four"}
SIDE_MARGIN = 14  # pixels from the picture's edge to the centre of a thing moved to that side
_LEAST_OFFSET = 8  # pixels between centres before a relation is said
_PHRASINGS = {
    "recolor": ("make the {name} {new}", "change the color of the {name} to {new}"),
    "reshape": ("turn the {name} into a {new}", "replace the {name} with a {new}"),
    "remove": ("remove the {name}", "take away the {name}"),
    "add": ("add a {name}", "draw a {name}"),
    "move": ("move the {name} to the {new}",),
    "background": ("make the background {new}", "change the background to {new}"),
}
_SPLIT_BY_WORDS = ("recolor", "reshape", "add")
_OFFSET_SLACK = 3  # pixels by which a drawn relation may fall short of what a prompt needs to be said


@dataclass(frozen=True, slots=True)
class T2ITask:
    """A prompt and the things it asks for.

    Example: `T2ITask("colors", "a red circle", (("circle", "red"),))`.
    """

    kind: str
    """One of `T2I_KINDS`."""
    prompt: str
    """The words given to the model."""
    looks: tuple[tuple[str, str | None], ...]
    """Asked `(shape, color)`, one entry a thing; color None means any."""
    relation: str | None = None
    """For `position`: how the first thing stands to the second, one of `RELATIONS`."""


@dataclass(frozen=True, slots=True)
class EditTask:
    """An instruction, the scene it starts from and one right answer.

    Example: `EditTask("recolor", "make the red circle blue", source, target, index=0)`.
    """

    kind: str
    """One of `EDIT_KINDS`."""
    prompt: str
    """The instruction given to the model."""
    source: Scene
    """The picture given to the model."""
    target: Scene
    """A right answer; for `add` any free place is right, here what is added is the last thing."""
    index: int | None = None
    """Which thing of the source is edited; None for `add` and `background`."""
    side: str | None = None
    """For `move`: one of `SIDES`."""


def is_held_out(words: str) -> bool:
    """Whether these words are kept from training (about one in eight, by a checksum, the same everywhere)."""
    return zlib.crc32(words.encode()) % 8 == 0


def _phrase(rng: np.random.Generator, words: str) -> str:
    return f"a picture of {words}" if rng.random() < 0.25 else words


def relation_of(first: Thing, second: Thing) -> str | None:
    """Return how `first` stands to `second`, by the axis on which their centres differ more; None if near a tie."""
    dx, dy = first.x - second.x, first.y - second.y
    if max(abs(dx), abs(dy)) < _LEAST_OFFSET or abs(abs(dx) - abs(dy)) < 2:
        return None
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def relation_holds(first: Thing, second: Thing, relation: str) -> bool:
    """Whether `first` stands to `second` as said, judged along that axis alone, as GenEval does."""
    dx, dy = first.x - second.x, first.y - second.y
    offset = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation]
    return offset >= _LEAST_OFFSET - _OFFSET_SLACK


def in_reading_order(things: Sequence[Thing]) -> list[Thing]:
    """Return the things from left to right, or from top to bottom where two differ more in height.

    That is the order of `x + y`: of two things, the larger difference has its sign. At a tie they keep their order.
    """
    return sorted(things, key=lambda thing: thing.x + thing.y)


def describe(rng: np.random.Generator, scene: Scene, kind: str) -> T2ITask | None:
    """Return a prompt of `kind` that this scene answers strictly, or None where it answers none.

    Two things are named in reading order, as captions do, so that the words already settle which of them stands where.
    Only a relation is also said from the other end.
    """
    things = list(scene.things)
    shapes = {t.shape for t in things}
    if len(things) == 1 and kind in ("single_object", "colors"):
        thing = things[0]
        color = thing.color if kind == "colors" else None
        words = f"a {thing.name}" if color else f"a {thing.shape}"
        return T2ITask(kind, _phrase(rng, words), ((thing.shape, color),))
    if kind == "counting" and len(things) in NUMBERS and len(shapes) == 1:
        shape = things[0].shape
        plural = f"{shape}es" if shape == "cross" else f"{shape}s"
        return T2ITask(kind, _phrase(rng, f"{NUMBERS[len(things)]} {plural}"), ((shape, None),) * len(things))
    if len(things) != 2:
        return None
    first, second = in_reading_order(things)
    if kind == "position" and rng.random() < 0.5:  # else "right of" and "below" would never be said
        first, second = second, first
    if kind == "color_attribution":
        words = f"a {first.name} and a {second.name}"
        looks = ((first.shape, first.color), (second.shape, second.color))
        return T2ITask(kind, _phrase(rng, words), looks)
    if len(shapes) != 2:
        return None
    looks = ((first.shape, None), (second.shape, None))
    if kind == "two_objects":
        return T2ITask(kind, _phrase(rng, f"a {first.shape} and a {second.shape}"), looks)
    relation = relation_of(first, second)
    if kind == "position" and relation is not None:
        return T2ITask(kind, _phrase(rng, f"a {first.shape} {relation} a {second.shape}"), looks, relation)
    return None


def _scene_for(rng: np.random.Generator, kind: str) -> Scene:
    if kind == "counting":
        shape, color = str(rng.choice(SHAPES)), str(rng.choice(list(COLORS)))
        return sample_scene(rng, [(shape, color)] * int(rng.integers(2, 5)))
    looks = sample_looks(rng, 1 if kind in ("single_object", "colors") else 2)
    if kind in ("two_objects", "position") and looks[0][0] == looks[1][0]:
        return _scene_for(rng, kind)
    return sample_scene(rng, looks)


def sample_t2i(rng: np.random.Generator, kind: str, held_out: bool = False) -> tuple[T2ITask, Scene]:
    """Return a prompt of `kind` and a scene that answers it.

    Colour attributions are split by their words: `held_out` chooses the side. The other kinds have too few
    prompts to hold any back; there a held-out sample is one with a seed of its own.
    """
    while True:
        scene = _scene_for(rng, kind)
        task = describe(rng, scene, kind)
        if task is None:
            continue
        words = task.prompt.removeprefix("a picture of ")
        if kind != "color_attribution" or is_held_out(words) == held_out:
            return task, scene


def _pick(rng: np.random.Generator, options, but: str) -> str:
    return str(rng.choice([o for o in options if o != but]))


def _is_valid(scene: Scene) -> bool:
    things = scene.things
    inside = all(t.radius < t.x < IMAGE_SIZE - t.radius and t.radius < t.y < IMAGE_SIZE - t.radius for t in things)
    apart = all(a.clear_of(b) for i, a in enumerate(things) for b in things[:i])
    return inside and apart and len({t.name for t in things}) == len(things)


def phrasings(task: EditTask) -> tuple[str, ...]:
    """Return the instructions that mean this edit."""
    if task.kind == "add":
        values = {"name": task.target.things[-1].name}
    elif task.kind == "background":
        values = {"new": task.target.ground}
    else:
        values = {"name": task.source.things[task.index].name, "new": task.side}
        if task.kind in ("recolor", "reshape"):
            values["new"] = getattr(task.target.things[task.index], "color" if task.kind == "recolor" else "shape")
    return tuple(words.format(**values) for words in _PHRASINGS[task.kind])


def _try_edit(rng: np.random.Generator, kind: str, source: Scene) -> EditTask | None:
    index: int | None = int(rng.integers(len(source.things)))
    thing = source.things[index]
    say = rng.random() < 0.5
    side = None
    if kind == "recolor":
        target = source.replace_thing(index, color=_pick(rng, COLORS, thing.color))
    elif kind == "reshape":
        target = source.replace_thing(index, shape=_pick(rng, SHAPES, thing.shape))
    elif kind == "remove":
        target = Scene(source.ground, source.things[:index] + source.things[index + 1 :])
    elif kind == "add":
        index = None
        shape, color = str(rng.choice(SHAPES)), str(rng.choice(list(COLORS)))
        new = place(rng, list(source.things), shape, color, 9)
        if new is None:
            return None
        target = Scene(source.ground, (*source.things, new))
    elif kind == "move":
        side = str(rng.choice(SIDES))
        axis, at = ("x" if side in ("left", "right") else "y"), SIDE_MARGIN
        at = at if side in ("left", "top") else IMAGE_SIZE - at
        if abs(getattr(thing, axis) - at) < 2 * _LEAST_OFFSET:
            return None
        target = source.replace_thing(index, **{axis: at})
    else:
        index = None
        target = Scene(_pick(rng, GROUNDS, source.ground), source.things)
    task = EditTask(kind, "", source, target, index, side)
    words = phrasings(task)
    return replace(task, prompt=words[0 if say else -1]) if _is_valid(target) else None


def shares_color(task: EditTask) -> bool:
    """Whether another thing has the colour of the one that is edited, so that only the shape says which is meant."""
    if task.kind == "background":
        return False
    things = list(task.target.things if task.kind == "add" else task.source.things)
    edited = things.pop(-1 if task.index is None else task.index)
    return any(other.color == edited.color for other in things)


def reworded(rng: np.random.Generator, task: EditTask) -> EditTask:
    """Return the same edit in any of its words that are on the same side of the held-out split."""
    return _worded(rng, task, is_held_out(task.prompt))


def _worded(rng: np.random.Generator, task: EditTask, held_out: bool) -> EditTask | None:
    """Return an edit in words on one side of the held-out split, None where it has none there."""
    words = [w for w in phrasings(task) if task.kind not in _SPLIT_BY_WORDS or is_held_out(w) == held_out]
    return replace(task, prompt=words[int(rng.integers(len(words)))]) if words else None


def undone(rng: np.random.Generator, task: EditTask) -> EditTask | None:
    """Return the edit that leads back, in words that are not held out; None where no instruction says it.

    Moves have none, as things do not come from a side, nor has what would add to an empty ground.
    """
    kind = {"remove": "add", "add": "remove", "move": None}.get(task.kind, task.kind)
    source, target = task.target, task.source
    if kind is None or not source.things:
        return None
    index = task.index
    if kind == "add":  # what is added comes last
        target = Scene(target.ground, (*source.things, target.things[index]))
        index = None
    elif kind == "remove":
        index = len(source.things) - 1
    return _worded(rng, EditTask(kind, "", source, target, index), held_out=False)


def sample_edit(rng: np.random.Generator, kind: str, held_out: bool = False) -> EditTask:
    """Return an edit of `kind` on a scene of one to three different things.

    Recolourings, reshapings and additions are split by their words; the other kinds hold back scenes only.
    """
    while True:
        count = int(rng.choice([1, 2, 3], p=[0.25, 0.5, 0.25]))
        task = _try_edit(rng, kind, sample_scene(rng, sample_looks(rng, count)))
        if task is None:
            continue
        if kind not in _SPLIT_BY_WORDS or is_held_out(task.prompt) == held_out:
            return task


def sample_training_edit(rng: np.random.Generator, kind: str, same_color_edits: float = 0.0) -> EditTask:
    """Return an edit of `kind` to learn from, in words that are not held out.

    Args:
        rng: what draws it.
        kind: one of `EDIT_KINDS`.
        same_color_edits: share of the edits, 0 to 1, that are drawn until another thing has the colour of the one that
            is edited. Of the others it is about one in eight, by chance. Edits of backgrounds, which name no thing,
            have no part in it.
    """
    hard = same_color_edits and kind != "background" and rng.random() < same_color_edits
    task = sample_edit(rng, kind)
    while hard and not shares_color(task):
        task = sample_edit(rng, kind)
    return task
