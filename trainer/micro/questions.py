"""Questions about the micro world, with their only right answers: what Micro Qwen2.5-VL learns to understand."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...core.micro import IMAGE_SIZE
from .tasks import EDIT_KINDS, RELATIONS, SIDES, T2I_KINDS, T2ITask, relation_of, sample_edit, sample_t2i
from .world import COLORS, SHAPES, Scene, Thing, sample_looks, sample_scene

PICTURE_KINDS = ("what", "how_many", "color", "where", "at", "beside", "exists", "describe")
"""Questions about a picture."""
TASK_KINDS = ("prompt", "order", "layout", "edit", "moved")
"""What a prompt asks for and on which side, without a picture; what an instruction makes of one, and where: the words
of both tasks."""
KINDS = (*PICTURE_KINDS, *TASK_KINDS)
_NUMBERS = ("none", "one", "two", "three", "four")
_QUARTERS = ("top left", "top right", "bottom left", "bottom right")
_CLEAR = 6  # pixels from the middle before a quarter of the picture is named


@dataclass(frozen=True, slots=True)
class Question:
    """One question. Example: `Question("color", "what color is the circle?", "red", scene)`."""

    kind: str
    """One of `KINDS`."""
    text: str
    """The words."""
    answer: str
    """The right answer, word for word."""
    scene: Scene | None
    """The picture; None for a question about a prompt."""


def listed(names: Sequence[str]) -> str:
    """Return names of things in the one order that answers have: by the alphabet, each with its article."""
    return ", ".join(f"a {name}" for name in sorted(names)) if names else "nothing"


def describe_scene(scene: Scene) -> str:
    """Return what is in a picture, and its ground, in words."""
    return f"{listed([thing.name for thing in scene.things])} on {scene.ground}"


def ask(rng: np.random.Generator, kind: str, held_out: bool = False) -> Question:
    """Return a new question of a kind; `held_out` chooses the side of the split of prompts and instructions."""
    while True:
        if kind == "prompt":
            return _about_prompt(rng, held_out)
        if kind == "order":
            return _about_order(rng, held_out)
        if kind == "layout":
            return _about_layout(rng, held_out)
        if kind == "edit":
            task = sample_edit(rng, EDIT_KINDS[rng.integers(len(EDIT_KINDS))], held_out)
            return Question(kind, f"{task.prompt}. what is there then?", describe_scene(task.target), task.source)
        if kind == "moved":
            task = sample_edit(rng, "move", held_out)
            thing = task.target.things[task.index]
            if (quarter := _quarter(thing)) is None:
                continue
            return Question(kind, f"{task.prompt}. where is the {thing.name} then?", quarter, task.source)
        scene = _scene(rng)
        found = _about_picture(rng, kind, scene)
        if found is not None:
            return Question(kind, *found, scene)


def _scene(rng: np.random.Generator) -> Scene:
    count = int(rng.integers(1, 5))
    if rng.random() < 0.2:  # the same thing several times, as prompts that count ask for it
        return sample_scene(rng, [sample_looks(rng, 1)[0]] * count)
    return sample_scene(rng, sample_looks(rng, count))


def _about_prompt(rng: np.random.Generator, held_out: bool) -> Question:
    task = sample_t2i(rng, T2I_KINDS[rng.integers(len(T2I_KINDS))], held_out)[0]
    names = [shape if color is None else f"{color} {shape}" for shape, color in task.looks]
    return Question("prompt", f"{task.prompt}. what is there?", listed(names), None)


def _about_order(rng: np.random.Generator, held_out: bool) -> Question:
    """Ask what is at one side, of a prompt that says how two things stand to each other."""
    task = sample_t2i(rng, "position", held_out)[0]
    at = RELATIONS.index(task.relation)
    chosen = int(rng.integers(2))
    side = SIDES[at if chosen == 0 else at ^ 1]  # the second thing is at the other one
    return Question("order", f"{task.prompt}. what is at the {side}?", f"a {task.looks[chosen][0]}", None)


def _about_layout(rng: np.random.Generator, held_out: bool) -> Question:
    """Ask what a prompt wants as a whole, in the words that stand before MetaQuery's queries."""
    kind = "position" if rng.random() < 0.3 else T2I_KINDS[rng.integers(len(T2I_KINDS))]
    task = sample_t2i(rng, kind, held_out)[0]
    return Question("layout", f"Generate an image: {task.prompt}", layout_of(task), None)


def layout_of(task: T2ITask) -> str:
    """Return what is at each side, and the things in the prompt's order: as many words for any prompt."""
    sides = dict.fromkeys(SIDES, "nothing")
    if task.relation is not None:
        at = RELATIONS.index(task.relation)
        sides[SIDES[at]], sides[SIDES[at ^ 1]] = (shape for shape, _ in task.looks)
    things = [f"{color or 'any'} {shape}" for shape, color in task.looks]
    things += ["no shape"] * (4 - len(things))
    return " ".join([*(f"{side} {what}" for side, what in sides.items()), *things])


def _quarter(thing: Thing) -> str | None:
    """Return the quarter of the picture in which a thing is, None near the middle."""
    x, y = thing.x - IMAGE_SIZE // 2, thing.y - IMAGE_SIZE // 2
    if min(abs(x), abs(y)) < _CLEAR:
        return None
    return _QUARTERS[2 * (y > 0) + (x > 0)]


def _about_picture(rng: np.random.Generator, kind: str, scene: Scene) -> tuple[str, str] | None:
    """Return question and answer, or None where this scene has no single answer to such a question."""
    things = scene.things
    thing: Thing = things[rng.integers(len(things))]
    if kind == "what":
        if sum(t.color == thing.color for t in things) > 1:
            return None
        return f"what shape is {thing.color}?", thing.shape
    if kind == "how_many":
        shape, color = str(rng.choice(SHAPES)), str(rng.choice(list(COLORS)))
        if rng.random() < 0.6:  # mostly about what is there
            shape, color = thing.shape, thing.color
        plural = f"{shape}es" if shape == "cross" else f"{shape}s"
        choices = {
            "shapes": len(things),
            plural: sum(t.shape == shape for t in things),
            f"{color} shapes": sum(t.color == color for t in things),
        }
        words = list(choices)[rng.integers(3)]
        return f"how many {words} are there?", _NUMBERS[choices[words]]
    if kind == "color":
        if rng.random() < 0.2:
            return "what color is the background?", scene.ground
        if sum(t.shape == thing.shape for t in things) > 1:
            return None
        return f"what color is the {thing.shape}?", thing.color
    if kind == "where":
        quarter = _quarter(thing)
        if quarter is None or sum(t.name == thing.name for t in things) > 1:
            return None
        return f"where is the {thing.name}?", quarter
    if kind == "at":
        quarters = [_quarter(t) for t in things]
        if None in quarters:
            return None
        quarter = quarters[rng.integers(len(things))] if rng.random() < 0.8 else str(rng.choice(_QUARTERS))
        there = [t.name for t, at in zip(things, quarters, strict=True) if at == quarter]
        return f"what is at the {quarter}?", listed(there)
    if kind == "beside":
        if len(things) != 2 or things[0].name == things[1].name:
            return None
        first, second = (things[i] for i in rng.permutation(2))
        relation = relation_of(first, second)
        return None if relation is None else (f"what is {relation} the {second.name}?", f"a {first.name}")
    if kind == "exists":
        shape, color = sample_looks(rng, 1)[0]
        if rng.random() < 0.5:
            shape, color = thing.shape, thing.color
        elif rng.random() < 0.6:  # nearly right: the harder "no"
            shape, color = (shape, thing.color) if rng.random() < 0.5 else (thing.shape, color)
        there = any((t.shape, t.color) == (shape, color) for t in things)
        return f"is there a {color} {shape}?", "yes" if there else "no"
    return "describe the picture.", describe_scene(scene)
