"""Scenes of the micro world and their renderer.

A scene is a light ground with up to four flat shapes that do not touch. Coordinates are in pixels of a
64x64 picture, origin top left, x to the right, y down; `radius` is half the edge of the shape's box.
Everything is drawn from a `numpy.random.Generator`, so the same seed gives the same picture.
"""

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

from ...core.micro import IMAGE_SIZE

SHAPES = ("circle", "square", "triangle", "cross")

COLORS = {
    "red": (216, 40, 44),
    "green": (38, 150, 62),
    "blue": (44, 84, 220),
    "yellow": (244, 204, 30),
    "purple": (148, 56, 186),
    "black": (36, 36, 40),
}

GROUNDS = {
    "white": (248, 248, 248),
    "gray": (200, 200, 204),
    "beige": (238, 220, 188),
}

MIN_RADIUS, MAX_RADIUS = 8, 11
MAX_OBJECTS = 4
_BORDER = 2  # pixels between a shape's box and the picture's edge
_GAP = 4  # pixels between two shapes' boxes
_SUPERSAMPLE = 4
CROSS_ARM = 0.36  # half width of a cross's arm, as a share of its radius


@dataclass(frozen=True, slots=True)
class Thing:
    """One shape. Example: `Thing("circle", "red", x=20, y=32, radius=9)`."""

    shape: str
    """One of `SHAPES`."""
    color: str
    """One of `COLORS`."""
    x: int
    """Centre of the box, pixels from the left."""
    y: int
    """Centre of the box, pixels from the top."""
    radius: int
    """Half the edge of the box, pixels."""

    @property
    def name(self) -> str:
        """Colour and shape, such as "red circle"."""
        return f"{self.color} {self.shape}"

    def clear_of(self, other: "Thing") -> bool:
        """Whether the two boxes keep the gap that makes every shape its own connected component."""
        reach = self.radius + other.radius + _GAP
        return abs(self.x - other.x) >= reach or abs(self.y - other.y) >= reach


@dataclass(frozen=True, slots=True)
class Scene:
    """A ground and its things. Example: `Scene("white", (Thing("circle", "red", 20, 32, 9),))`."""

    ground: str
    """One of `GROUNDS`."""
    things: tuple[Thing, ...]
    """Up to `MAX_OBJECTS` things that do not touch, in no meaningful order."""

    def replace_thing(self, index: int, **changes) -> "Scene":
        """Return a copy with fields of thing `index` changed."""
        things = list(self.things)
        things[index] = replace(things[index], **changes)
        return Scene(self.ground, tuple(things))


def place(
    rng: np.random.Generator, others: list[Thing], shape: str, color: str, max_radius: int = MAX_RADIUS
) -> Thing | None:
    """Return a thing at a free random place, or None when 60 tries found no room."""
    for _ in range(60):
        radius = int(rng.integers(MIN_RADIUS, max_radius + 1))
        low, high = _BORDER + radius, IMAGE_SIZE - _BORDER - radius
        thing = Thing(shape, color, int(rng.integers(low, high)), int(rng.integers(low, high)), radius)
        if all(thing.clear_of(other) for other in others):
            return thing
    return None


def sample_scene(rng: np.random.Generator, looks: list[tuple[str, str]], ground: str | None = None) -> Scene:
    """Return a scene with one thing for each `(shape, color)` in `looks`; a crowded try starts again."""
    max_radius = MAX_RADIUS if len(looks) <= 2 else 9
    while True:
        things: list[Thing] = []
        for shape, color in looks:
            thing = place(rng, things, shape, color, max_radius)
            if thing is None:
                break
            things.append(thing)
        else:
            return Scene(ground or str(rng.choice(list(GROUNDS))), tuple(things))


def sample_looks(rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    """Return `count` different `(shape, color)` pairs."""
    pairs = [(shape, color) for shape in SHAPES for color in COLORS]
    return [pairs[i] for i in rng.choice(len(pairs), size=count, replace=False)]


def outline(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Return the polygon of a shape (not for circles), in the same units as its arguments."""
    left, right, top, bottom = x - radius, x + radius, y - radius, y + radius
    if shape == "square":
        return [(left, top), (right, top), (right, bottom), (left, bottom)]
    if shape == "triangle":
        return [(x, top), (right, bottom), (left, bottom)]
    arm = CROSS_ARM * radius
    return [
        (x - arm, top), (x + arm, top), (x + arm, y - arm), (right, y - arm), (right, y + arm), (x + arm, y + arm),
        (x + arm, bottom), (x - arm, bottom), (x - arm, y + arm), (left, y + arm), (left, y - arm), (x - arm, y - arm),
    ]  # fmt: skip


def draw_shape(draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, fill) -> None:
    """Draw one shape with its box centred on `(x, y)`."""
    if shape == "circle":
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=fill)
    else:
        draw.polygon(outline(shape, x, y, radius), fill=fill)


def render(scene: Scene) -> Image.Image:
    """Return the scene as a 64x64 RGB picture, antialiased by drawing four times larger."""
    edge = IMAGE_SIZE * _SUPERSAMPLE
    canvas = Image.new("RGB", (edge, edge), GROUNDS[scene.ground])
    draw = ImageDraw.Draw(canvas)
    for thing in scene.things:
        x, y, radius = (v * _SUPERSAMPLE for v in (thing.x, thing.y, thing.radius))
        draw_shape(draw, thing.shape, x, y, radius, COLORS[thing.color])
    return canvas.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
