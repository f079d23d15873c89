"""Which members the samples of webdataset tars have, and whether the tars are whole, by their heads and ends.

`datasets` takes the first samples of the first tar for those of all: what only others have would be left out.
"""

import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
from datasets.packaged_modules.webdataset.webdataset import WebDataset

from ...core.errors import InputError

_SAMPLES = 2000  # looked at in all, and at least some of each tar
_LEAST = 5
_BLOCK = 512  # bytes; a tar ends with zeros
_TEXTS, _NUMBERS, _JSON = ("txt", "text", "transcript"), ("cls", "cls2", "index", "inx", "id"), ("json", "jsn")


def features_of_tars(files: Sequence[Path]) -> datasets.Features:
    """Return the columns of all tars together: pictures, texts, numbers, and JSON with its values.

    Raises:
        InputError: a tar is cut off, empty, or none at all, or has JSON that is no object.
    """
    found: dict = {}
    for file in files:
        try:
            with tarfile.open(file) as tar:
                for name, member in _first_members(tar, max(_LEAST, _SAMPLES // len(files))):
                    kind = name.rpartition(".")[2].lower()
                    if kind in WebDataset.IMAGE_EXTENSIONS:
                        found[name] = datasets.Image()
                    elif kind in _TEXTS:
                        found[name] = datasets.Value("string")
                    elif kind in _NUMBERS:
                        found[name] = datasets.Value("int64")
                    elif kind in _JSON:
                        content = tar.extractfile(member).read()
                        _add_values(found.setdefault(name, {}), content, f"{name} in {file}")
                if not _ends_with_zeros(file):
                    tar.getmembers()  # walks to the end
                    if tar.offset < file.stat().st_size:
                        raise tarfile.ReadError("unexpected end of data")
        except (tarfile.TarError, EOFError) as error:
            remedy = "Copy it again, or take it away."
            raise InputError(f"file {file}", found=f"no whole tar ({error})", remedy=remedy) from error
    if not found:
        raise InputError(f"tar {files[0]}", found="no pictures and no texts", expected="0001.jpg, 0001.txt, ...")
    for name, feature in list(found.items()):
        if isinstance(feature, dict):
            found[name] = {key: value for key, value in feature.items() if value is not None}
    return datasets.Features({name: feature for name, feature in found.items() if feature != {}})


def _first_members(tar: tarfile.TarFile, count: int) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """Yield the members of the first `count` samples, each with its name: all after the first dot."""
    samples: dict[str, None] = {}
    for member in tar:
        folder, _, base = member.name.rpartition("/")
        sample, dot, name = base.partition(".")
        if not (member.isfile() and dot and sample) or base.startswith("__"):
            continue
        samples[f"{folder}/{sample}"] = None
        if len(samples) > count:
            return
        yield name, member


def _add_values(features: dict, content: bytes, where: str) -> None:
    """Add what a JSON object has: texts, numbers, truth values, and lists of texts; None for values of several kinds.

    Raises:
        InputError: it is no object.
    """
    try:
        values = json.loads(content)
    except ValueError as error:
        raise InputError(where, found=f"broken JSON ({error})") from error
    if not isinstance(values, dict):
        raise InputError(where, found=f"{type(values).__name__} in JSON", expected="an object")
    for key, value in values.items():
        feature = _feature_of(value)
        if feature is not None:
            features[key] = feature if features.get(key, feature) == feature else None


def _feature_of(value):
    """Return the feature of a JSON value; None for what has no use here, or says nothing (null, an empty list)."""
    for kind, name in ((str, "string"), (bool, "bool"), ((int, float), "float64")):
        if isinstance(value, kind):
            return datasets.Value(name)
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return datasets.List(datasets.Value("string"))
    return None


def _ends_with_zeros(file: Path) -> bool:
    with file.open("rb") as stream:
        stream.seek(-min(_BLOCK, file.stat().st_size), 2)
        return not any(stream.read())
