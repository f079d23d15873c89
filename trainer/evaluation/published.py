"""Figures that others published, quoted beside ours: `published.json`, benchmark -> model, score, source."""

import json
from pathlib import Path

_FILE = Path(__file__).resolve().parent / "published.json"


def quoted(benchmark: str) -> list[dict]:
    """Return what was published for a benchmark: rows of `model`, `score` (its overall figure), `source` (a URL)."""
    return json.loads(_FILE.read_text(encoding="utf-8")).get(benchmark, [])
