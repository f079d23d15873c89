"""Latents and text states of a training set, encoded once into sharded safetensors.

A cache folder has `cache.json` (what encoded it) and shards of some hundred rows. Each row is found by a key made of
its text, its pictures and its size, so rows may be added, mended or reordered: only what is new is encoded. Building
can be stopped at any point; whole shards are kept.

MetaQuery's cache holds no texts: its queries are trained, and so are the states behind them.
"""

import hashlib
import json
import math
import secrets
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from tqdm import tqdm

from ...core.checkpoint import component_files, read_header, save_tensors
from ...core.errors import InputError
from ...core.files import write_file
from ...core.micro import component_dir
from .pairs import PairDataset, whole_sample
from .sources import BrokenRow

_INDEX = "cache.json"
_ROWS, _TEXTS = 256, 128  # entries of a shard
_ENCODERS = ("vae", *(f"{kind}{n}" for kind in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")))
_SETTINGS = (".json", ".txt", ".model")


def fingerprint(folder: Path, dtype: torch.dtype, encoder_dtype: torch.dtype, texts: bool = True) -> str:
    """Return a digest of all that a cache's contents depend on beside the rows. Nothing is loaded for it.

    Args:
        folder: pipeline in the published layout; files of its VAE, text encoders and tokenizers are read.
        dtype: type in which latents and text states are stored.
        encoder_dtype: type in which the encoders compute.
        texts: False leaves text encoders and tokenizers out, for a cache without texts.
    """
    digest = hashlib.blake2b(f"3 {dtype} {encoder_dtype}".encode(), digest_size=16)
    for name in _ENCODERS if texts else ("vae",):
        component = component_dir(folder, name)
        if not component.is_dir():
            continue
        files = sorted(f for f in component.iterdir() if f.suffix in _SETTINGS)
        if not name.startswith("tokenizer"):
            files += component_files(component)
        elif (component / "tokenizer.json").is_file():  # holds the others, which an export writes out for ComfyUI
            files = [file for file in files if file.name not in ("vocab.json", "merges.txt")]
        for file in files:
            digest.update(f"{name}/{file.name}".encode())
            _add_content(digest, file)
    return digest.hexdigest()


def _add_content(digest, file: Path) -> None:
    if file.suffix == ".json":
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict):  # "_name_or_path" and the like say where a file was, not what it does
            content = {key: value for key, value in content.items() if not key.startswith("_")}
        digest.update(json.dumps(content, sort_keys=True).encode())
        return
    with file.open("rb") as stream:
        while block := stream.read(1 << 24):
            digest.update(block)


class Cache:
    """A cache folder, opened for reading and for adding.

    Args:
        folder: made if need be.
        fingerprint: of the encoders in use.

    Raises:
        InputError: the folder holds something else, or a cache of other encoders; a shard is cut off.
    """

    def __init__(self, folder: Path, fingerprint: str):
        self.folder = folder
        index = folder / _INDEX
        if index.is_file():
            try:
                found = json.loads(index.read_text(encoding="utf-8"))["fingerprint"]
            except (ValueError, KeyError, TypeError):
                raise InputError(f"cache {index}", found="broken JSON", remedy="Delete the folder.") from None
            if found != fingerprint:
                remedy = "Name another cache_dir, or delete this one."
                found = "a cache of other encoders, another cache_dtype, or encoders that computed in another type"
                raise InputError(f"cache_dir {folder}", found=found, remedy=remedy)
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"cache_dir {folder}", found="something that is no cache", expected="a new folder")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_file(index, json.dumps({"fingerprint": fingerprint}) + "\n")
        self.places: dict[str, Path] = {}
        self._files: dict[Path, safe_open] = {}
        self.shards = sorted(folder.glob("shard-*.safetensors"))
        for shard in self.shards:
            self.places |= dict.fromkeys(read_header(shard).shapes, shard)

    def __contains__(self, key: str) -> bool:
        return key in self.places

    def add(self, tensors: dict[str, torch.Tensor]) -> None:
        """Write a shard."""
        number = int(self.shards[-1].stem.split("-")[1]) + 1 if self.shards else 0
        # Two runs that fill one cache at a time do not meet.
        shard = self.folder / f"shard-{number:06d}-{secrets.token_hex(4)}.safetensors"
        save_tensors({key: tensor.cpu().contiguous() for key, tensor in tensors.items()}, shard)
        self.shards.append(shard)
        self.places |= dict.fromkeys(tensors, shard)

    def __getitem__(self, key: str) -> torch.Tensor:
        shard = self.places[key]
        if shard not in self._files:
            self._files[shard] = safe_open(shard, framework="pt")
        return self._files[shard].get_tensor(key)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_files": {}}  # loader processes open their own


def row_key(dataset: PairDataset, index: int) -> str:
    """Return the key of a row at its size."""
    width, height = dataset.buckets[index]
    return f"{dataset.keys[index]} {width}x{height}"


def text_key(prompt: str) -> str:
    """Return the key of a text."""
    return f"text {hashlib.blake2b(prompt.encode(), digest_size=16).hexdigest()}"


def is_complete(cache: Cache, dataset: PairDataset, pipeline) -> bool:
    """Whether all that a run on a dataset needs of its pictures and texts is in the cache."""
    return not _missing_rows(cache, dataset) and not _missing_texts(cache, dataset, pipeline)


def _missing_rows(cache: Cache, dataset: PairDataset) -> list[int]:
    keys = (row_key(dataset, i) for i in range(len(dataset)))
    return [i for i, key in enumerate(keys) if f"{key} latents" not in cache and f"{key} broken" not in cache]


def _missing_texts(cache: Cache, dataset: PairDataset, pipeline) -> list[str]:
    if pipeline.sees_pictures:
        return []
    texts = ["", *dataset.prompts]  # the empty one for caption dropout
    if any(dataset.is_edit):
        texts.append(pipeline.default_negative_prompt(is_edit=True))  # for previews
    return [text for text in dict.fromkeys(texts) if f"{text_key(text)} states" not in cache]


@torch.no_grad()
def build_cache(
    dataset: PairDataset, cache: Cache, pipeline, dtype: torch.dtype, device: torch.device, batch_size: int = 8
) -> None:
    """Encode what is not in the cache yet.

    Args:
        dataset: the rows.
        cache: of this pipeline's encoders.
        pipeline: its VAE and text encoders encode, and are back on the CPU afterwards; of MetaQuery the VAE alone.
        dtype: type in which latents and text states are stored.
        device: where encoding runs.
        batch_size: pictures, or texts, encoded at a time.

    Raises:
        InputError: as `PairDataset`, or the cache cannot be written.
    """
    encoders = [pipeline.vae, *(() if pipeline.sees_pictures else pipeline.text_encoders)]
    for module in encoders:
        module.eval().to(device)
    try:
        rows, texts = _missing_rows(cache, dataset), _missing_texts(cache, dataset, pipeline)
        _check_room(cache, dataset, rows, texts, pipeline, dtype, device)
        _add_rows(cache, dataset, rows, pipeline, dtype, device, batch_size)
        _add_texts(cache, texts, pipeline, dtype, device, batch_size)
    finally:
        for module in encoders:
            module.to("cpu")


def _check_room(cache, dataset, rows, texts, pipeline, dtype, device) -> None:
    """Say how large the cache becomes, and refuse at once what the disk has no room for after hours."""
    size = pipeline.vae.config.latent_channels / pipeline.vae_scale_factor**2 * dtype.itemsize
    need = sum(size * math.prod(dataset.buckets[i]) * (2 if dataset.is_edit[i] else 1) for i in rows)
    if texts:
        states, _, pooled, _ = pipeline.encode_prompt(
            [""], None, None, device=device, do_classifier_free_guidance=False
        )
        need += len(texts) * (states.numel() + pooled.numel()) * dtype.itemsize
    free = shutil.disk_usage(cache.folder).free
    if rows or texts:
        about = f"{len(rows)} rows and {len(texts)} texts to encode, {need / 1e9:.2f} GB"
        sys.stderr.write(f"{cache.folder}: {about}\n")
    if need > free:
        remedy = "Name a cache_dir on a larger disk, or leave it out and encode in training."
        expected = f"at most the {free / 1e9:.2f} GB that are free"
        raise InputError(
            f"cache_dir {cache.folder}", found=f"{need / 1e9:.2f} GB to write", expected=expected, remedy=remedy
        )


def _add_rows(cache, dataset, missing, pipeline, dtype, device, batch_size) -> None:
    missing = sorted(missing, key=lambda i: dataset.buckets[i])
    progress = tqdm(total=len(missing), desc="encoding pictures", unit="row", disable=not missing)
    for rows in _chunks(missing, _ROWS):
        tensors: dict[str, torch.Tensor] = {}
        for part in _chunks(rows, batch_size):
            samples = []
            for i in part:
                try:
                    samples.append((i, dataset.read(i)))
                except BrokenRow as broken:
                    if broken.passing:  # it could be read when it was measured, and would be left out for ever
                        remedy = "Once it can be read, the same command goes on: what is encoded is kept."
                        raise InputError(f"cache_dir {cache.folder}", found=str(broken), remedy=remedy) from broken
                    dataset.note_broken(i, str(broken))
                    # Kept under the file's time and size: a mended one is read again.
                    reason = torch.frombuffer(bytearray(str(broken).encode()), dtype=torch.uint8)
                    tensors[f"{row_key(dataset, i)} broken"] = reason
            for name in ("", "ref_"):
                for same in _same_size(
                    [(i, s[f"{name}pixel_values"]) for i, s in samples if f"{name}pixel_values" in s]
                ):
                    pixels = torch.stack([p for _, p in same]).to(device)
                    latents = pipeline.encode_bytes(pixels).to(dtype)
                    tensors |= {
                        f"{row_key(dataset, i)} {name}latents": z for (i, _), z in zip(same, latents, strict=True)
                    }
            tensors |= {f"{row_key(dataset, i)} mask": s["loss_mask"] for i, s in samples if "loss_mask" in s}
            progress.update(len(part))
        if tensors:
            cache.add(tensors)
    progress.close()


def _add_texts(cache, missing, pipeline, dtype, device, batch_size) -> None:
    progress = tqdm(total=len(missing), desc="encoding texts", unit="text", disable=not missing)
    for texts in _chunks(missing, _TEXTS):
        tensors: dict[str, torch.Tensor] = {}
        for part in _chunks(texts, batch_size):
            states, _, pooled, _ = pipeline.encode_prompt(
                part, None, None, device=device, do_classifier_free_guidance=False
            )
            for prompt, one_states, one_pooled in zip(part, states.to(dtype), pooled.to(dtype), strict=True):
                tensors |= {f"{text_key(prompt)} states": one_states, f"{text_key(prompt)} pooled": one_pooled}
            progress.update(len(part))
        cache.add(tensors)
    progress.close()


def _chunks(items: list, size: int) -> Iterator[list]:
    return (items[i : i + size] for i in range(0, len(items), size))


def _same_size(items: list[tuple[int, torch.Tensor]]) -> list[list[tuple[int, torch.Tensor]]]:
    groups: dict[tuple, list] = {}
    for item in items:
        groups.setdefault(tuple(item[1].shape), []).append(item)
    return list(groups.values())


class CachedPairs(torch.utils.data.Dataset):
    """Samples of a `PairDataset` with `latents`, `ref_latents` and `text` (states, pooled) out of a cache.

    Rows that turned out broken while they were encoded are left out, and counted as broken.

    Args:
        dataset: the rows.
        cache: what `build_cache` made of them.
        with_sources: for MetaQuery, which reads texts itself: samples have no `text`, and those of edits have
            `source_pixels`, uint8 (3, H, W), out of the data; one that cannot be read any more is replaced as
            `PairDataset` does it.
    """

    def __init__(self, dataset: PairDataset, cache: Cache, with_sources: bool = False):
        self.pairs, self.cache, self.with_sources = dataset, cache, with_sources
        keys = [row_key(dataset, i) for i in range(len(dataset))]
        self.rows = [i for i, key in enumerate(keys) if f"{key} latents" in cache]
        for i, key in enumerate(keys):
            if f"{key} broken" in cache:
                dataset.note_broken(i, bytes(cache[f"{key} broken"].tolist()).decode())
        self.is_edit = [dataset.is_edit[i] for i in self.rows]
        self.buckets = [dataset.buckets[i] for i in self.rows]
        self._groups = defaultdict(list)
        for row, key in zip(self.rows, zip(self.is_edit, self.buckets, strict=True), strict=True):
            self._groups[key].append(row)

    @cached_property
    def empty_text(self) -> tuple[torch.Tensor, torch.Tensor]:
        """States (L, D) and pooled (P,) of the empty prompt, for caption dropout."""
        return self.text_of("")

    def text_of(self, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return states (L, D) and pooled (P,) of a prompt of the data, "" or the negative prompt of edits."""
        return tuple(self.cache[f"{text_key(prompt)} {part}"].float() for part in ("states", "pooled"))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        size = self.buckets[index]
        return whole_sample(self._groups[self.is_edit[index], size], self.rows[index], size, self._read)

    def note_broken(self, row: int, reason: str) -> None:
        """Count a row of the data as broken, see `PairDataset.note_broken`."""
        self.pairs.note_broken(row, reason)

    def _read(self, row: int) -> dict:
        """Return the sample of a row of the data. Raises BrokenRow where a source cannot be read any more."""
        key, prompt = row_key(self.pairs, row), self.pairs.prompts[row]
        sample = {"prompt": prompt, "source_id": self.pairs.source_ids[row]}
        if not self.with_sources:
            sample["text"] = self.text_of(prompt)
        sample["latents"] = self.cache[f"{key} latents"].float()
        if self.pairs.is_edit[row]:
            sample["ref_latents"] = self.cache[f"{key} ref_latents"].float()
            if self.with_sources:
                sample["source_pixels"] = self.pairs.read_source(row)
        if f"{key} mask" in self.cache:
            sample["loss_mask"] = self.cache[f"{key} mask"].float()
        return sample
