"""Rows for reinforcement learning from one's own data: prompts, and for edits the pictures they start from."""

from collections.abc import Iterator

from PIL import Image, ImageOps

from .pairs import PairDataset
from .sources import PROMPT_COLUMNS, read_pair


class PromptDataset(PairDataset):
    """Rows for `FlowGRPOTrainer`: `prompt`, `size`, for edits `source_image`, and the data's other columns as is.

    Sources are opened with `needs_target=False`. A source is scaled to cover its bucket and centre cropped; prompts
    without one are drawn square. Broken rows, arguments and errors are those of `PairDataset`.
    """

    CHECK = "unipic2 data check --no-target"

    def read(self, index: int) -> dict:
        """Return a row. Raises BrokenRow where it cannot be read."""
        number, place = self.places[index]
        source, size = self.sources[number], self.buckets[index]
        row = source.rows[place]
        pair = read_pair(row, source.columns, source.root)
        others = {k: v for k, v in row.items() if k not in (source.columns.prompt, source.columns.source)}
        if isinstance(row[source.columns.prompt], dict):  # the .json of a webdataset has the others
            others |= {k: v for k, v in row[source.columns.prompt].items() if k not in PROMPT_COLUMNS}
        others.pop("broken", None)  # says of a row which ones it stands for
        found = {**others, "prompt": pair.prompt, "size": size}
        if pair.source is None:
            return found
        return {**found, "source_image": ImageOps.fit(pair.source, size, Image.Resampling.BICUBIC)}

    def values(self, name: str) -> Iterator[tuple[str, object]]:
        """Yield what a column says of each whole row that has it, after its name, such as `row 3 of edits.jsonl`."""
        for number, source in enumerate(self.sources):
            rows, prompt = source.rows, source.columns.prompt
            inside = name not in rows.column_names  # the .json of a webdataset
            if inside and not isinstance(rows.features[prompt], dict):
                continue
            for row, value in enumerate(rows[prompt if inside else name]):
                found = value.get(name) if inside and value is not None else value
                if found is not None and (number, row) not in self.broken:
                    yield f"row {row} of {source.name}", found
