"""A reward like GenEval (arXiv 2310.11513): detect objects, count them, tell colours and places. No mmcv.

A row says what is asked in GenEval's own form, as a list or as JSON text: `include`, such as
`[{"class": "cup", "count": 2, "color": "red", "position": ["left of", 0]}]` (position: to which entry), and `exclude`,
such as `[{"class": "cup", "count": 3}]` (so many are too many). Other than in the benchmark counts are exact.
"""

import difflib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForUniversalSegmentation, Mask2FormerImageProcessorPil

from ...core.errors import InputError
from .clip import DEFAULT_CLIP, Clip, loading

DEFAULT_DETECTOR = "facebook/mask2former-swin-small-coco-instance"
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
PLACES = ("left of", "right of", "above", "below")
_GENEVAL_NAMES = {
    "mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard", "motorbike": "motorcycle",
    "aeroplane": "airplane", "sofa": "couch", "pottedplant": "potted plant", "diningtable": "dining table",
    "tvmonitor": "tv",
}  # fmt: skip
"""COCO's names of three classes, and Pascal VOC's of six, which the default detector has, and GenEval's own."""
SHORTEST_EDGE, LONGEST_EDGE = 800, 1333
"""Pixels that GenEval's detector sees; the default one's own settings squash pictures to 384 x 384."""
_COLOR_TEXTS = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
_LEAST_SCORE = 0.3
_LEAST_SCORE_COUNTING = 0.9
_MOST_OBJECTS = 16
_GREY = (153, 153, 153)
_POSITION_MARGIN = 0.1
_DIAGONAL = 0.5


@dataclass(frozen=True, slots=True)
class Found:
    """One detected object. Example: `Found("cup", 0.97, (10, 10, 60, 80), mask)`."""

    name: str
    """Its class."""
    score: float
    """0 to 1."""
    box: tuple[float, float, float, float]
    """Left, top, right, bottom in pixels."""
    mask: np.ndarray | None = None
    """(height, width) bool; None where a detector has boxes only."""


Detector = Callable[[list[Image.Image]], list[list[Found]]]
"""`detector(images)` returns what it found in each, at least what scores 0.3 or more."""


class Mask2Former:
    """Instances of a Mask2Former model's classes, with masks. Pictures are brought to 800 pixels, at most 1333 long.

    Args:
        model: hub repository or folder; its weights must be safetensors.
        device: where it runs.
        batch_size: pictures at a time.

    Raises:
        InputError: it cannot be loaded.
    """

    def __init__(self, model: str = DEFAULT_DETECTOR, device: str | torch.device = "cpu", batch_size: int = 4):
        self.device, self.batch_size = device, batch_size
        with loading("detector", model, "a Mask2Former model"):
            loaded = AutoModelForUniversalSegmentation.from_pretrained(model, use_safetensors=True)
            size = {"shortest_edge": SHORTEST_EDGE, "longest_edge": LONGEST_EDGE}
            self.processor = Mask2FormerImageProcessorPil.from_pretrained(model, size=size)
        self.model = loaded.eval().requires_grad_(False).to(device)
        self.classes = set(loaded.config.id2label.values())

    @torch.no_grad()
    def __call__(self, images: list[Image.Image]) -> list[list[Found]]:
        """Return the instances of each picture that score at least 0.3."""
        found: list[list[Found]] = [[] for _ in images]
        by_size: dict[tuple[int, int], list[int]] = defaultdict(list)
        for place, image in enumerate(images):  # padding to a common size would shift what is found
            by_size[image.height, image.width].append(place)
        for size, places in by_size.items():
            for start in range(0, len(places), self.batch_size):
                part = places[start : start + self.batch_size]
                inputs = self.processor([images[i].convert("RGB") for i in part], return_tensors="pt").to(self.device)
                results = self.processor.post_process_instance_segmentation(
                    self.model(**inputs), threshold=_LEAST_SCORE, target_sizes=[size] * len(part),
                    return_binary_maps=True,
                )  # fmt: skip
                for i, result in zip(part, results, strict=True):
                    found[i] = self._objects(result)
        return found

    def _objects(self, result: dict) -> list[Found]:
        objects = []
        for mask, segment in zip(_masks(result), result["segments_info"], strict=True):
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            box = float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
            objects.append(Found(self.model.config.id2label[segment["label_id"]], segment["score"], box, mask))
        return objects


def _masks(result: dict) -> np.ndarray:
    """Return the masks (N, height, width) bool of a picture's segments, none where there are no segments."""
    if not result["segments_info"]:
        return np.zeros((0, 1, 1), dtype=bool)
    maps = result["segmentation"].cpu().numpy().astype(bool)
    return maps if maps.ndim == 3 else maps[None]


def relations(box: tuple, other: tuple) -> set[str]:
    """Return how a box stands to another: of `left of`, `right of`, `above`, `below`, by GenEval's rule.

    Centres have to be apart by more than a tenth of both boxes' sizes; a direction counts from 30 degrees on.
    """
    size, other_size = (np.array([b[2] - b[0], b[3] - b[1]]) for b in (box, other))
    offset = np.array([box[0] + box[2] - other[0] - other[2], box[1] + box[3] - other[1] - other[3]]) / 2
    clear = np.maximum(np.abs(offset) - _POSITION_MARGIN * (size + other_size), 0) * np.sign(offset)
    if not clear.any():
        return set()
    x, y = clear / np.linalg.norm(offset)
    holds = x < -_DIAGONAL, x > _DIAGONAL, y < -_DIAGONAL, y > _DIAGONAL
    return {place for place, held in zip(PLACES, holds, strict=True) if held}


class GenEval:
    """Reward function: the mean of what holds of each clause, 0 to 1, or under `strict` 1 where all do, else 0.

    A count of n for k asked gives `1 - |n - k| / k`, at least 0, so do colours; a place holds or does not, with no
    credit for objects in the wrong place (a public implementation gives half). Rows without `include` get None.

    Args:
        detector: see `Detector`; default Mask2Former.
        clip: for colours.
        strict: see above.
    """

    columns = ("include", "exclude")
    """Those of a dataset that are read, see `check_column`."""

    def __init__(self, detector: Detector, clip: Clip, strict: bool = False):
        self.detector, self.clip, self.strict = detector, clip, strict
        self.__name__ = "geneval_strict" if strict else "geneval"
        self._directions: dict[str, torch.Tensor] = {}

    @classmethod
    def from_pretrained(
        cls, detector: str = DEFAULT_DETECTOR, clip: str = DEFAULT_CLIP, device="cpu", strict: bool = False
    ) -> "GenEval":
        """Return the reward with models of the hub. Raises InputError where they cannot be loaded."""
        return cls(Mask2Former(detector, device), Clip(clip, device), strict)

    def __call__(self, prompts, images, include=None, exclude=None, tag=None, **columns) -> list[float | None]:
        """Return the reward of each sample that has `include`, None for the others."""
        asked = [read_clauses(value, "include of a row") for value in include or [None] * len(images)]
        too_many = [read_clauses(value, "exclude of a row") for value in exclude or [None] * len(images)]
        tags = tag or [None] * len(images)
        chosen = [i for i, clauses in enumerate(asked) if clauses]
        self.check_classes(
            (c["class"] for i in chosen for c in (*asked[i], *too_many[i])), "include or exclude of a row"
        )
        found = self.detector([images[i] for i in chosen]) if chosen else []
        rewards: list[float | None] = [None] * len(images)
        for i, objects in zip(chosen, found, strict=True):
            scores = self._clauses(images[i], objects, asked[i], too_many[i], tags[i] == "counting")
            rewards[i] = float(min(scores) == 1) if self.strict else sum(scores) / len(scores)
        return rewards

    def check_column(self, name: str, values: Iterable[tuple[str, object]]) -> None:
        """Raise InputError for a value of one of `columns` that cannot be meant; each comes with its row's name."""
        for row, value in values:
            what = f"{name} of {row}"
            self.check_classes((clause["class"] for clause in read_clauses(value, what)), what)

    def check_classes(self, names: Iterable[str], what: str) -> None:
        """Raise InputError for a class that the detector does not know: it would count as never there."""
        classes = getattr(self.detector, "classes", None)
        if classes is None:
            return
        known = {geneval_name(name) for name in classes}
        unknown = set(names) - known
        if unknown:
            near = difflib.get_close_matches(min(unknown), known, n=3)
            remedy = f"Did you mean {' or '.join(near)}?" if near else "Take another detector_name_or_path."
            found, expected = repr(min(unknown)), "a class that the detector knows"
            raise InputError(what, found=found, expected=expected, remedy=remedy)

    def _clauses(self, image, objects: list[Found], include, exclude, counting: bool) -> list[float]:
        by_class = by_name(objects, {clause["class"] for clause in [*include, *exclude]}, counting)
        scores, groups = [], []
        for clause in include:
            mine, count = by_class[clause["class"]], clause["count"]
            if clause.get("color"):
                colored = [o for o in mine if self.color_of(image, o) == clause["color"]]
                scores.append(_near(len(mine), count))
                mine = colored
            scores.append(_near(len(mine), count))
            groups.append((mine or by_class[clause["class"]])[:count])
        for number, clause in enumerate(include):
            if clause.get("position"):
                relation, other = clause["position"]
                pairs = [(one, two) for one in groups[number] for two in groups[int(other)]]
                holds = bool(pairs) and all(relation in relations(one.box, two.box) for one, two in pairs)
                scores.append(float(holds))
        # A class that is asked for is counted above, exactly; twice, none would be better than one too many.
        counted = {clause["class"] for clause in include}
        others = [clause for clause in exclude if clause["class"] not in counted]
        scores += [float(len(by_class[clause["class"]]) < clause["count"]) for clause in others]
        return scores

    def color_of(self, image: Image.Image, found: Found) -> str:
        """Return the colour of an object, all but it made grey, as CLIP sees it."""
        picture = image.convert("RGB")
        if found.mask is not None:
            mask = Image.fromarray(found.mask.astype(np.uint8) * 255)
            picture = Image.composite(picture, Image.new("RGB", picture.size, _GREY), mask)
        crop = picture.crop(tuple(round(edge) for edge in found.box))
        name = geneval_name(found.name)
        if name not in self._directions:
            texts = [text.format(color=color, name=name) for color in COLORS for text in _COLOR_TEXTS]
            each = self.clip.texts(texts).unflatten(0, (len(COLORS), len(_COLOR_TEXTS))).mean(dim=1)
            self._directions[name] = torch.nn.functional.normalize(each, dim=-1)
        return COLORS[int((self._directions[name] @ self.clip.images([crop])[0]).argmax())]


def geneval_name(name: str) -> str:
    """Return GenEval's name of a class, such as `couch` for `sofa`; a name that it has no other one for stays."""
    return _GENEVAL_NAMES.get(name, name)


def by_name(objects: list[Found], names: Iterable[str], counting: bool) -> dict[str, list[Found]]:
    """Return each class's objects that count, surest first, 16 at most: scores from 0.3 on, to be counted from 0.9.

    Classes are asked for by GenEval's names, see `geneval_name`; a detector may say others.
    """
    least = _LEAST_SCORE_COUNTING if counting else _LEAST_SCORE
    ordered = sorted((o for o in objects if o.score >= least), key=lambda o: -o.score)
    return {name: [o for o in ordered if geneval_name(o.name) == name][:_MOST_OBJECTS] for name in names}


def _near(found: int, asked: int) -> float:
    return max(0.0, 1 - abs(found - asked) / asked)


def read_clauses(value, what: str) -> list[dict]:
    """Return the clauses of one row, [] where it has none.

    Raises:
        InputError: no list of clauses with a class and a count; a colour or a place that there is no word for, and
            that would never hold.
    """
    try:
        clauses = json.loads(value) if isinstance(value, str) and value else value or []
        clauses = [dict(clause) for clause in clauses]
        for clause in clauses:
            count = float(clause["count"])
            if not isinstance(clause["class"], str) or count < 1 or count != int(count):
                raise ValueError
            clause["count"] = int(count)
            clause["class"] = geneval_name(clause["class"])
            if clause.get("position"):
                _relation, other = clause["position"]
                if not 0 <= int(other) < len(clauses):
                    raise ValueError
    except (ValueError, OverflowError, TypeError, LookupError, AttributeError):
        expected = 'GenEval\'s form, such as [{"class": "cup", "count": 2}]'
        raise InputError(what, found=repr(value)[:120], expected=expected) from None
    for number, clause in enumerate(clauses):
        if clause.get("color") and clause["color"] not in COLORS:
            raise InputError(what, found=f"colour {clause['color']!r}", expected=f"one of {', '.join(COLORS)}")
        relation, other = clause.get("position") or (PLACES[0], None)
        if relation not in PLACES:
            raise InputError(what, found=f"position {relation!r}", expected=f"one of {', '.join(PLACES)}")
        if other is not None and int(other) == number:
            raise InputError(what, found=f"a position to itself, entry {number}", expected="another entry's number")
    return clauses
