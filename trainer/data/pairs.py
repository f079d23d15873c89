"""The training set made of one or more sources: sizes read once, pictures decoded when they are drawn."""

import sys
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageOps

from ...core.errors import InputError
from .buckets import nearest_bucket
from .sources import BrokenRow, Pair, Source, measure, read_pair, read_picture

_LATENT_FACTOR = 8  # pixels of a latent's edge


def measure_sources(sources: list[Source], num_proc: int | None = None) -> list[dict[str, list]]:
    """Return what `measure` says of each source's rows, as columns; headers are read in `num_proc` processes."""
    return [source.map(measure, "reading sizes", num_proc).to_dict() for source in sources]


class PairDataset(torch.utils.data.Dataset):
    """Samples for `FlowMatchingTrainer`: `prompt`, `pixel_values`, for edits `ref_pixel_values`, `source_id`.

    Pixels are uint8 tensors (3, height, width) of the row's bucket: scaled to cover it, centre cropped; source, target
    and mask alike. Masks are floats (1, height / 8, width / 8) in 0..1.

    Rows that headers show to be broken are left out at once. One that turns out so later is replaced by its neighbour
    in the same bucket, whose sample says so under `broken`, for `note_broken`.

    Args:
        sources: opened datasets, mixed.
        buckets: sizes from `aspect_buckets`.
        max_broken: share of broken rows, 0 to 1, above which training stops.
        measured: what `measure_sources` says of the sources; None asks it now.

    Raises:
        InputError: too many broken rows, or none whole.
    """

    CHECK = "unipic2 data check"
    """The command that lists broken rows."""

    def __init__(
        self,
        sources: list[Source],
        buckets: list[tuple[int, int]],
        max_broken: float = 0.01,
        measured: list[dict[str, list]] | None = None,
    ):
        self.sources, self.max_broken = sources, max_broken
        self.places: list[tuple[int, int]] = []
        self.is_edit: list[bool] = []
        self.buckets: list[tuple[int, int]] = []
        self.source_ids: list[int] = []
        self.prompts: list[str] = []
        self.keys: list[str] = []
        self.broken: dict[tuple[int, int], str] = {}
        self.num_rows = sum(len(source.rows) for source in sources)
        for number, columns in enumerate(measure_sources(sources) if measured is None else measured):
            self._take(number, columns, buckets)
        self._check_broken()
        self.groups = defaultdict(list)
        for index, key in enumerate(zip(self.is_edit, self.buckets, strict=True)):
            self.groups[key].append(index)

    def _take(self, number: int, columns: dict[str, list], buckets: list[tuple[int, int]]) -> None:
        for row, values in enumerate(zip(*columns.values(), strict=True)):
            found = dict(zip(columns, values, strict=True))
            if found["error"]:
                self.broken[number, row] = found["error"]
                continue
            self.places.append((number, row))
            self.is_edit.append(found["is_edit"])
            self.buckets.append(nearest_bucket(found["width"], found["height"], buckets))
            self.source_ids.append(found["source_id"])
            self.prompts.append(found["prompt"])
            self.keys.append(found["key"])

    def _check_broken(self) -> None:
        if not self.places or len(self.broken) > self.max_broken * self.num_rows:
            (number, row), reason = next(reversed(self.broken.items()))
            example = f"row {row} of {self.sources[number].name}: {reason}"
            raise InputError(
                "training data",
                found=f"{len(self.broken)} broken rows of {self.num_rows}, such as {example}",
                expected=f"at most a share of {self.max_broken}",
                remedy=f"`{self.CHECK}` lists them all; mend them, or raise max_broken.",
            )

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict:
        size = self.buckets[index]
        return whole_sample(self.groups[self.is_edit[index], size], index, size, self.read)

    def read(self, index: int) -> dict:
        """Return a row's own sample.

        Raises:
            BrokenRow: it cannot be read.
        """
        number, row = self.places[index]
        source = self.sources[number]
        pair = read_pair(source.rows[row], source.columns, source.root)
        return {**sample_of(pair, self.buckets[index]), "source_id": self.source_ids[index]}

    def read_source(self, index: int) -> torch.Tensor:
        """Return the picture that an edit starts from, as a sample's `ref_pixel_values`.

        Raises:
            BrokenRow: it cannot be read.
        """
        number, row = self.places[index]
        source = self.sources[number]
        column = source.columns.source
        picture = read_picture(source.rows[row][column], column, source.root)
        if picture is None:
            raise BrokenRow(f"no picture in {column}")
        return _pixels(picture, self.buckets[index])

    def note_broken(self, index: int, reason: str) -> None:
        """Count a row as broken, and say so once.

        Raises:
            InputError: that makes too many.
        """
        number, row = self.places[index]
        if (number, row) not in self.broken:
            sys.stderr.write(f"left out row {row} of {self.sources[number].name}: {reason}\n")
        self.broken[number, row] = reason
        self._check_broken()

    def summary(self) -> str:
        """Return one line for each task: rows and the sizes they fill."""
        lines = []
        for task, name in ((False, "text-to-image"), (True, "edits")):
            sizes = Counter(size for edit, size in zip(self.is_edit, self.buckets, strict=True) if edit == task)
            filled = ", ".join(f"{w}x{h}: {count}" for (w, h), count in sizes.most_common(6))
            more = f", {len(sizes) - 6} more sizes" if len(sizes) > 6 else ""
            lines.append(f"{name}: {sum(sizes.values())} rows ({filled}{more})" if sizes else f"{name}: none")
        return "\n".join([*lines, f"broken rows left out: {len(self.broken)} of {self.num_rows}"])


def whole_sample(group: list[int], index: int, size: tuple[int, int], read: Callable[[int], dict]) -> dict:
    """Return the sample that `read` makes of a row, or of the next whole one in its sorted group.

    Its `broken` then says which rows cannot be read, and why. All rows of a group have one `size`, in pixels.

    Raises:
        InputError: no row of the group can be read.
    """
    first, broken = bisect_left(group, index), {}
    for offset in range(len(group)):
        at = group[(first + offset) % len(group)]
        try:
            sample = read(at)
        except BrokenRow as error:
            broken[at] = str(error)
        else:
            return {**sample, "broken": broken} if broken else sample
    raise InputError("training data", found="no whole row of {}x{} pixels left".format(*size))


def sample_of(pair: Pair, size: tuple[int, int]) -> dict:
    """Return what `PairDataset` says of a pair at a bucket's size, but for its `source_id`."""
    sample = {"prompt": pair.prompt, "pixel_values": _pixels(pair.target, size)}
    if pair.source is not None:
        sample["ref_pixel_values"] = _pixels(pair.source, size)
    if pair.mask is not None:
        mask = ImageOps.fit(pair.mask, size, Image.Resampling.BICUBIC)
        mask = mask.resize((size[0] // _LATENT_FACTOR, size[1] // _LATENT_FACTOR), Image.Resampling.BOX)
        sample["loss_mask"] = torch.from_numpy(np.array(mask)).float().div(255)[None]
    return sample


def _pixels(image: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    fitted = ImageOps.fit(image, size, Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).contiguous()
