"""Training sets that are read as they come: no pass over all rows before training, and no room for them needed.

Rows go through a pool, from which blocks of one task and one bucket are drawn. Of where the readers are and of what is
in the pool a checkpoint keeps a copy, so a run goes on exactly where it was, without reading anything twice.
"""

import json
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import count, islice
from pathlib import Path

import datasets
import fsspec
import numpy as np
import torch
from safetensors.torch import load_file

from ...core.checkpoint import save_tensors
from ...core.errors import InputError
from ...core.files import write_file
from ..batches import DRAW_SEED, derived_seed, rotated, tasks_of_turn
from .buckets import nearest_bucket
from .pairs import sample_of
from .sources import (
    PICTURE_COLUMNS,
    ROLES,
    SOURCE_COLUMNS,
    TARGET_COLUMNS,
    BrokenRow,
    Columns,
    find_columns,
    find_files,
    find_root,
    known_features,
    measure,
    read_pair,
    unreadable_otherwise,
)

STATE_FILE, _BLOBS_FILE = "stream.json", "stream.safetensors"
_BLOB = "bytes in stream.safetensors"
_PEEKED = 100  # rows whose columns are looked at, where the format names none
_LINE = "text"  # `datasets`' column for a line of a text file
_ENOUGH = 1000  # rows that count as seen at least, when the share of broken ones is judged
_RARE = 0.2  # of the greatest share of a task in any stream; below it a stream is not read for that task
_MOST, _PASSED = 0.5, 4  # share of rows passed over that is worth a warning, once some pools of rows were read
_SURPLUS = 2  # times its size that a pool may grow, by rows of the task that is not asked for
_Bucket = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Stream:
    """One opened dataset. Example: `open_stream("shards/")`."""

    name: str
    """As the user gave it."""
    loader: str | None
    """The library's loader; None for a dataset of the hub."""
    files: list[str]
    """Files on this machine, or nothing for a dataset of the hub."""
    split: str
    """Split of a dataset of the hub."""
    columns: Columns
    """Meaning of the columns."""
    root: Path
    """Folder that relative picture paths start from."""
    features: datasets.Features | None = None
    """Columns, where the loader would guess them from the first file."""

    def open(self, order: list[int] | None = None) -> datasets.IterableDataset:
        """Return the rows from the first one on, files in `order`."""
        with unreadable_otherwise(self.name):
            if self.loader is None:
                rows = datasets.load_dataset(self.name, split=self.split, streaming=True)
            else:
                files = self.files if order is None else [self.files[i] for i in order]
                options = {"data_files": {"train": files}, "features": self.features, "streaming": True}
                rows = datasets.load_dataset(self.loader, split="train", **options)
            return rows if rows.features is None else rows.decode(False)

    def identity(self) -> list:
        """Return what a stream must have in common with the one that a checkpoint was made on."""
        files = [[Path(file).name, Path(file).stat().st_size] for file in self.files]
        return [self.loader, self.split, files, [getattr(self.columns, role) for role in ROLES]]

    def decoded(self, raw: dict) -> dict:
        """Return a row's columns: jsonl comes as lines of text.

        Raises:
            BrokenRow: a line that is no JSON object.
        """
        if self.loader != _LINE:
            return raw
        try:
            row = json.loads(raw[_LINE])
        except ValueError as error:
            raise BrokenRow(f"broken JSON ({error})") from None
        if not isinstance(row, dict):
            raise BrokenRow(f"{type(row).__name__} instead of a JSON object")
        return row

    def row(self, raw: dict) -> dict:
        """Return the columns of a row that mean something; pictures in archives or on a hub are read.

        Raises:
            BrokenRow: a line that is no JSON object, or a picture that cannot be fetched.
        """
        raw = self.decoded(raw)
        if self.loader == _LINE and self.columns.source is None:
            # Else an edit would be trained as text-to-image.
            late = next((name for name in SOURCE_COLUMNS if name != self.columns.target and raw.get(name)), None)
            if late is not None and (late != PICTURE_COLUMNS[0] or self.columns.target in TARGET_COLUMNS):
                raise BrokenRow(f"{late}, which the first {_PEEKED} rows do not have: name it with --source_column")
        names = (getattr(self.columns, role) for role in ROLES)
        return {name: _fetched(raw.get(name)) for name in names if name is not None}


def _fetched(value):
    """Return a picture in an archive or on a hub (`zip://...`, `hf://...`) with its bytes, all else as it is."""
    path = value.get("path") if isinstance(value, dict) else None
    if not isinstance(path, str) or "://" not in path or value.get("bytes") is not None:
        return value
    try:
        with fsspec.open(path, "rb") as file:
            return {"bytes": file.read(), "path": path}
    except Exception as error:  # of as many kinds as there are places
        raise BrokenRow(f"{path}: {' '.join(str(error).split())[:200] or type(error).__name__}") from None


def open_stream(name: str, image_root: str | None = None, split: str = "train", **columns: str | None) -> Stream:
    """Open a dataset for streaming; arguments and errors are those of `sources.open_source`.

    jsonl is read line by line, so rows need not have the same columns. A .json file cannot be streamed.
    """
    with unreadable_otherwise(name):
        found = find_files(name, split)
    loader, files = (None, []) if found is None else (found[0], [str(file) for file in found[1]])
    if loader == "json":
        if any(not file.endswith(".jsonl") for file in files):
            raise InputError(
                f"dataset {name}", found="a .json file", expected="jsonl, one object a line, to stream it"
            )
        loader = _LINE
    with unreadable_otherwise(name):
        features = known_features(loader, [Path(file) for file in files])
    stream = Stream(name, loader, files, split, Columns("", ""), find_root(name, image_root), features)
    rows = stream.open()
    with unreadable_otherwise(name):
        if rows.features is not None and loader != _LINE:
            names = list(rows.features)
        else:
            names = _names(stream, islice(rows, _PEEKED))
            if loader == _LINE and names:  # further rows may have more
                names += [name for name in columns.values() if name is not None and name not in names]
    if not names:
        raise InputError(f"dataset {name}", found="no rows", expected="at least one")
    return replace(stream, columns=find_columns(names, name, **columns))


def _names(stream: Stream, rows: Iterable[dict]) -> list[str]:
    names: dict[str, None] = {}
    for raw in rows:
        with suppress(BrokenRow):
            names |= dict.fromkeys(stream.decoded(raw))
    return list(names)


class _Reader:
    """Reads one stream over and over, each time with its files in another order, and knows where it is."""

    def __init__(self, stream: Stream, seed: int):
        self.stream, self.seed = stream, seed
        self.seen = {False: 0, True: 0}
        self._start(0)

    def _start(self, number: int) -> None:
        self.number, self.row = number, 0
        # Pictures of a folder come with their metadata, so their order is one.
        shuffled = self.stream.loader not in (None, "imagefolder")
        order = np.random.default_rng([self.seed, number]).permutation(len(self.stream.files)).tolist()
        self.rows = self.stream.open(order if shuffled else None)
        self.iterator = self.loaded = None

    def next(self) -> dict:
        """Return the next row as it comes; `number` and `row` then say which pass and row it was, from 0."""
        for _ in range(2):
            if self.iterator is None:
                self.iterator = iter(self.rows)
            with unreadable_otherwise(self.stream.name):
                raw = next(self.iterator, None)
            if raw is not None:
                self.row += 1
                return raw
            self._start(self.number + 1)
        raise InputError(f"dataset {self.stream.name}", found="no rows", expected="at least one")

    def close(self) -> None:
        """Let go of open files; reading can go on where it was."""
        self.load(self.state())

    def share(self, task: bool) -> float:
        """Return what part of the rows is of a task, as far as that can be told yet."""
        return (self.seen[task] + 1) / (self.seen[False] + self.seen[True] + 2)

    def state(self) -> dict:
        seen = [self.seen[False], self.seen[True]]
        # After loading, the library tells its place only once a row was read.
        rows = self.loaded if self.iterator is None else json.loads(json.dumps(self.rows.state_dict()))
        return {"pass": self.number, "row": self.row, "seen": seen, "rows": rows}

    def load(self, state: dict) -> None:
        self._start(state["pass"])
        self.row = state["row"]
        self.seen = dict(zip((False, True), state["seen"], strict=True))
        self.loaded = state["rows"]
        if self.loaded is not None:
            self.rows.load_state_dict(self.loaded)


@dataclass(frozen=True, slots=True)
class StreamedRow:
    """A row in the pool. Example: what `StreamSampler` yields with a seed."""

    source: int
    """Number of its stream."""
    row: dict
    """Columns that mean something; pictures are bytes or paths."""
    is_edit: bool
    """Whether it has a source picture."""
    bucket: _Bucket
    """Width and height in pixels."""
    source_id: int
    """The same for edits of one picture, and for pictures of one text."""
    where: str
    """Row, pass and dataset, for messages."""


@dataclass(slots=True)
class Counts:
    """What was read so far. Example: `Counts(max_broken=0.01)`."""

    max_broken: float
    """Share of broken rows above which training stops."""
    rows: int = 0
    """Rows read, in all passes."""
    broken: int = 0
    """Those of them that could not be used."""
    surplus: int = 0
    """Whole rows that were passed over, as their task came too often for `edit_ratio`."""
    told: set[str] = field(default_factory=set)
    """What was said once and is not repeated."""

    def note_broken(self, where: str, reason: str, quiet: bool = False) -> None:
        """Count a broken row, and say so unless `quiet`.

        Raises:
            InputError: that makes too many.
        """
        self.broken += 1
        self.tell(f"left out {where}: {reason}", quiet)
        if self.broken > self.max_broken * max(self.rows, _ENOUGH):
            raise InputError(
                "training data",
                found=f"{self.broken} broken rows of {self.rows}, such as {where}: {reason}",
                expected=f"at most a share of {self.max_broken}",
                remedy="`unipic2 data check` lists them all; mend them, or raise max_broken.",
            )

    def tell(self, message: str, quiet: bool = False) -> None:
        """Write a line, once."""
        if message not in self.told and not quiet:
            sys.stderr.write(f"{message}\n")
        self.told.add(message)


class StreamedPairs(torch.utils.data.Dataset):
    """Samples for `FlowMatchingTrainer` out of streams: those of `PairDataset`, for draws of its `sampler`.

    Args:
        streams: opened datasets. Those with rows of a task take turns at it.
        buckets: sizes from `aspect_buckets`.
        max_broken: share of broken rows, 0 to 1, above which training stops.
        pool_size: rows of a task among which blocks are drawn.
        quiet: of several processes one is enough to say what was left out when rows were read.
    """

    def __init__(
        self,
        streams: list[Stream],
        buckets: list[_Bucket],
        max_broken: float = 0.01,
        pool_size: int = 1000,
        quiet: bool = False,
    ):
        self.streams, self.buckets, self.pool_size = streams, buckets, pool_size
        self.counts, self.quiet = Counts(max_broken), quiet

    def sampler(
        self, block_size: int, edit_ratio: float, seed: int, num_processes: int, lookahead: int
    ) -> "StreamSampler":
        """Return the endless sequence of draws."""
        return StreamSampler(self, block_size, edit_ratio, seed, num_processes, lookahead)

    def note_broken(self, where: str, reason: str) -> None:
        """Count a row that turned out broken when it was decoded; see `Counts.note_broken`."""
        self.counts.note_broken(where, reason)

    def __getitems__(self, draws: list[tuple[StreamedRow, int]]) -> list[dict]:
        """Return the samples of one block. One that cannot be read is replaced by another of the block.

        Raises:
            InputError: none can be read.
        """
        samples, broken = [], {}
        for entry, seed in draws:
            stream = self.streams[entry.source]
            try:
                pair = read_pair(entry.row, stream.columns, stream.root)
            except BrokenRow as error:
                broken[entry.where] = str(error)
                continue
            sample = sample_of(pair, entry.bucket)
            samples.append({**sample, "source_id": entry.source_id, DRAW_SEED: seed})
        if not samples:
            where, reason = next(iter(broken.items()))
            raise InputError("training data", found=f"a batch of broken rows, such as {where}: {reason}")
        whole = len(samples)
        samples += [samples[i % whole] for i in range(len(draws) - whole)]
        if broken:
            samples[0] = {**samples[0], "broken": broken}
        return samples

    def previews(self, each: int, looked_at: int = 200) -> list[tuple]:
        """Return `(prompt, source or None, (width, height))` of the first whole rows of each task, `each` at most."""
        cases: dict[bool, list[tuple]] = {False: [], True: []}
        for stream in self.streams:
            for raw in islice(stream.open(), looked_at):
                try:
                    pair = read_pair(stream.row(raw), stream.columns, stream.root)
                except BrokenRow:
                    continue
                found = cases[pair.source is not None]
                if len(found) < each:
                    found.append((pair.prompt, pair.source, nearest_bucket(*pair.target.size, self.buckets)))
                if all(len(found) == each for found in cases.values()):
                    break
        return [case for task in (False, True) for case in cases[task]]


class StreamSampler(torch.utils.data.Sampler[tuple[StreamedRow, int]]):
    """Yields draws `(row, seed)` in blocks of one task and one bucket, without end.

    A block is drawn at random from the pool of its task, once that holds `pool_size` rows and some bucket of it a
    block. A pass over the data has no meaning here; streams are read again when they end.

    Args:
        pairs: the streams.
        block_size: samples of one process's batch.
        edit_ratio: share of the blocks that are edits; ignored where no stream has rows of a task.
        seed: the same seed gives the same draws.
        num_processes: as for `TaskBlockSampler`; each process reads all rows, and decodes its own.
        lookahead: turns that may be drawn ahead of what was trained on, for `save`.
    """

    def __init__(
        self, pairs: StreamedPairs, block_size: int, edit_ratio: float, seed: int, num_processes: int, lookahead: int
    ):
        self.pairs, self.block_size, self.edit_ratio, self.seed = pairs, block_size, edit_ratio, seed
        self.num_processes = num_processes
        self.readers = [_Reader(s, derived_seed(seed, i)) for i, s in enumerate(pairs.streams)]
        self.rng = np.random.default_rng([seed, len(self.readers)])
        self.pools: dict[bool, dict[_Bucket, list[StreamedRow]]] = {False: {}, True: {}}
        self.turn = 0
        self._identity = [stream.identity() for stream in pairs.streams]
        self._snapshots: deque[tuple[int, dict]] = deque(maxlen=lookahead + 1)

    def __iter__(self) -> Iterator[tuple[StreamedRow, int]]:
        start = derived_seed(self.seed, len(self.readers))
        for turn in count(self.turn):
            self._snapshots.append((turn, self._state()))
            # Drawn in one order for any number of processes, then handed out in another.
            blocks = [self._block(task) for task in tasks_of_turn(turn, self.edit_ratio, self.num_processes)]
            first = turn * self.num_processes
            blocks = [(first + i, block) for i, block in enumerate(blocks)]
            self.turn = turn + 1
            for number, block in rotated(blocks, turn):
                place = start + number * self.block_size
                yield from ((row, (place + i) % 2**63) for i, row in enumerate(block))

    def _block(self, task: bool) -> list[StreamedRow]:
        if not self._sources_of(task):
            task = not task
        pool = self.pools[task]
        while True:
            readers = self._sources_of(task)
            if not readers:  # found out just now
                return self._block(not task)
            seen = {i: self.readers[i].seen[task] for i in readers if not self._is_rare(task, i, readers)}
            last = min(seen, key=seen.get)
            # One that also has the other task would else be read for that one, and serve both.
            behind = seen[last] < max(seen.values()) - self.pairs.pool_size
            full = [bucket for bucket, rows in pool.items() if len(rows) >= self.block_size]
            if full and not behind and sum(map(len, pool.values())) >= self.pairs.pool_size:
                break
            self._read(last)
        sizes = np.array([len(pool[bucket]) for bucket in full])
        bucket = full[self.rng.choice(len(full), p=sizes / sizes.sum())]
        order = self.rng.permutation(len(pool[bucket])).tolist()
        chosen, left = order[: self.block_size], sorted(order[self.block_size :])
        rows, pool[bucket] = pool[bucket], [pool[bucket][i] for i in left]
        return [rows[i] for i in chosen]

    def _sources_of(self, task: bool) -> list[int]:
        """Return the readers that have rows of a task, or may have: a pool's worth of others says that they do not."""
        found = []
        for i, reader in enumerate(self.readers):
            possible = not task or reader.stream.columns.source is not None
            if possible and (reader.seen[task] or reader.seen[not task] < self.pairs.pool_size):
                found.append(i)
        return found

    def _is_rare(self, task: bool, number: int, readers: list[int]) -> bool:
        """Whether a reader's rows of a task come along when it is read for the other: waiting for them costs a lot."""
        reader, shares = self.readers[number], [self.readers[i].share(task) for i in readers]
        enough = sum(reader.seen.values()) >= self.pairs.pool_size
        return 0 < self.edit_ratio < 1 and enough and reader.share(task) < _RARE * max(shares)

    def _read(self, number: int) -> None:
        reader, counts = self.readers[number], self.pairs.counts
        stream = reader.stream
        raw = reader.next()
        counts.rows += 1
        where = f"row {reader.row - 1} of {stream.name}" + (f", pass {reader.number + 1}" if reader.number else "")
        try:
            row = stream.row(raw)
            found = measure(row, stream.columns, stream.root)
            if found["error"]:
                raise BrokenRow(found["error"])
        except BrokenRow as error:
            counts.note_broken(where, str(error), self.pairs.quiet)
            return
        task = found["is_edit"]
        reader.seen[task] += 1
        pool = self.pools[task]
        bucket = nearest_bucket(found["width"], found["height"], self.pairs.buckets)
        entry = StreamedRow(number, row, task, bucket, found["source_id"], where)
        pool.setdefault(bucket, []).append(entry)
        if sum(map(len, pool.values())) > _SURPLUS * max(self.pairs.pool_size, self.block_size * (len(pool) + 1)):
            largest = max(pool.values(), key=len)
            largest.pop(0)  # the oldest, so that all streams have their share
            counts.surplus += 1
            kind = "edits" if task else "text-to-image rows"
            message = f"{stream.name}: more {kind} than edit_ratio {self.edit_ratio} takes, some are passed over"
            counts.tell(message, self.pairs.quiet)
            if counts.surplus > _MOST * max(counts.rows, _PASSED * self.pairs.pool_size):
                remedy = "where its rows are sorted by task, name each task's files as a dataset of their own"
                counts.tell(f"{stream.name}: most rows are passed over; {remedy}, or shuffle them", self.pairs.quiet)

    def _state(self) -> dict:
        counts = self.pairs.counts
        return {
            "blocks": self.turn * self.num_processes,
            "readers": [reader.state() for reader in self.readers],
            "rng": self.rng.bit_generator.state,
            "counts": [counts.rows, counts.broken, counts.surplus],
            "pool": [entry for pool in self.pools.values() for rows in pool.values() for entry in rows],
            # An emptied bucket keeps its place, on which draws depend.
            "buckets": [(task, bucket) for task, pool in self.pools.items() for bucket in pool],
        }

    def close(self) -> None:
        """Let go of open files, when a run ends."""
        for reader in self.readers:
            reader.close()

    def save(self, folder: Path, blocks: int) -> None:
        """Write what is needed to go on after so many blocks: `stream.json`, and bytes of the pool's pictures.

        Blocks are those of all processes together, so their number may be another when training goes on.

        Raises:
            InputError: the folder cannot be written.
            KeyError: more turns than `lookahead` were drawn ahead.
        """
        states = {**dict(self._snapshots), self.turn: self._state()}
        state = {**states[blocks // self.num_processes], "streams": self._identity, "sizes": self.pairs.buckets}
        pool: list[StreamedRow] = state.pop("pool")
        blobs: dict[str, torch.Tensor] = {}
        state["pool"] = [[e.source, _packed(e.row, blobs), e.is_edit, e.bucket, e.source_id, e.where] for e in pool]
        save_tensors(blobs, folder / _BLOBS_FILE)
        write_file(folder / STATE_FILE, json.dumps(state))

    def load(self, folder: Path) -> None:
        """Go on where `save` was called.

        Raises:
            InputError: the state is missing or of other streams.
        """
        path = folder / STATE_FILE
        if not path.is_file():
            raise InputError(f"checkpoint {folder}", found=f"no {STATE_FILE}", expected="one of a run with streaming")
        state = json.loads(path.read_text(encoding="utf-8"))
        for kept, now, what in (
            (state["streams"], self._identity, "datasets, files or columns"),
            (state["sizes"], self.pairs.buckets, "resolution, bucket_mode or max_aspect"),
        ):
            if kept != json.loads(json.dumps(now)):
                remedy = "Name another output_dir, or take this run's own settings."
                raise InputError(f"checkpoint {folder}", found=f"other {what} than when it was written", remedy=remedy)
        for reader, saved in zip(self.readers, state["readers"], strict=True):
            reader.load(saved)
        self.turn = state["blocks"] // self.num_processes
        self.rng.bit_generator.state = state["rng"]
        counts = self.pairs.counts
        counts.rows, counts.broken, counts.surplus = state["counts"]
        blobs = load_file(folder / _BLOBS_FILE)
        self.pools = {False: {}, True: {}}
        for task, bucket in state["buckets"]:
            self.pools[task][tuple(bucket)] = []
        for source, row, is_edit, bucket, source_id, where in state["pool"]:
            entry = StreamedRow(source, _unpacked(row, blobs), is_edit, tuple(bucket), source_id, where)
            self.pools[is_edit][entry.bucket].append(entry)


def _packed(value, blobs: dict[str, torch.Tensor]):
    """Return a value of a row as JSON knows it, its bytes put among `blobs`."""
    if isinstance(value, bytes):
        name = str(len(blobs))
        if value:
            blobs[name] = torch.frombuffer(bytearray(value), dtype=torch.uint8)
        return {_BLOB: name if value else None}
    if isinstance(value, dict):
        return {key: _packed(item, blobs) for key, item in value.items()}
    return [_packed(item, blobs) for item in value] if isinstance(value, list) else value


def _unpacked(value, blobs: dict[str, torch.Tensor]):
    if isinstance(value, dict):
        if _BLOB in value:
            return blobs[value[_BLOB]].numpy().tobytes() if value[_BLOB] is not None else b""
        return {key: _unpacked(item, blobs) for key, item in value.items()}
    return [_unpacked(item, blobs) for item in value] if isinstance(value, list) else value
