"""A training run as one HTML file that stands alone: curves, preview grids, settings, environment."""

import base64
import html
import json
import math
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from transformers import TrainerCallback

from ..core.files import write_file

REPORT_FILE = "report.html"
HISTORY_FILE = "log_history.json"
_CURVES = {
    "Loss": ("loss", "loss/t2i", "loss/edit"),
    "Loss by band of sigma": None,  # all that is logged
    "Reward": ("reward",),
    "Rewards": None,
    "Deviation of rewards in a group": ("reward_std",),
    "Share of groups that teach nothing": ("frac_reward_zero_std",),
    "KL": ("kl",),
    "Ratio of new to old probability": ("ratio",),
    "Clipped": ("clip_ratio/low_mean", "clip_ratio/high_mean"),
    "Gradient norm": ("grad_norm",),
    "Learning rate": ("learning_rate",),
    "Samples per second": ("samples_per_second",),
    "Picture tokens per second": ("tokens_per_second",),
    "Peak GPU memory, GiB": ("peak_memory_gib",),
}
_PREFIXES = {"Loss by band of sigma": "loss/sigma_", "Rewards": "rewards/"}
_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "datasets", "safetensors")
_COLORS = ("#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df")
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 640, 240, 64, 24  # pixels of a chart and of its axes
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#1f2328}"
    "img{max-width:100%;border:1px solid #d1d9e0}table{border-collapse:collapse}"
    "td{border:1px solid #d1d9e0;padding:2px 8px;font-size:13px;vertical-align:top;word-break:break-word}"
    "svg{display:block;margin:0 0 1em}figure{margin:0 0 1.5em}"
)


class ReportCallback(TrainerCallback):
    """Writes `report.html` to `output_dir` when training ends, with what `settings()` then returns."""

    def __init__(self, settings: Callable[[], dict]):
        self.settings = settings

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            write_report(Path(args.output_dir), state.log_history, self.settings())


def write_report(output_dir: Path, history: list[dict], settings: dict) -> Path:
    """Write the report of a run, and `log_history.json` beside it; returns the report's path.

    Args:
        output_dir: the run's folder; grids are read from `previews/` in it.
        history: what transformers keeps as `log_history`.
        settings: names and values of all settings.

    Raises:
        InputError: the file cannot be written.
    """
    grids = pictures(output_dir / "previews") or ["<p>No previews were drawn.</p>"]
    parts = ["<h2>Curves</h2>", *charts(history), "<h2>Previews</h2>", *grids]
    samples = pictures(output_dir / "completions")
    parts += ["<h2>Samples</h2>", *samples] if samples else []
    parts += ["<h2>Settings</h2>", table({k: settings[k] for k in sorted(settings)})]
    path = output_dir / REPORT_FILE
    write_page(path, output_dir.resolve().name, parts)
    write_file(output_dir / HISTORY_FILE, json.dumps(history) + "\n")
    return path


def write_page(path: Path, title: str, parts: list[str]) -> None:
    """Write an HTML page of a title, parts and the environment, as a whole or not at all."""
    title = html.escape(title)
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>"
    parts = [f"<h1>{title}</h1>", *parts, "<h2>Environment</h2>", table(environment())]
    write_file(path, f"{head}<body>{''.join(parts)}</body></html>\n")


def environment() -> dict[str, str]:
    """Return versions and the machine that training runs on."""
    found = {"python": platform.python_version(), "machine": platform.platform()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {**found, "devices": ", ".join(gpus) or f"CPU, {torch.get_num_threads()} threads"}


def charts(history: list[dict]) -> list[str]:
    """Return a figure for each kind of value that a history has."""
    figures = []
    for title, names in _CURVES.items():
        if names is None:
            prefix = _PREFIXES[title]
            names = sorted({name for entry in history for name in entry if name.startswith(prefix)})
        curves = {}
        for name in names:
            points = [(e["step"], float(e[name])) for e in history if name in e and "step" in e]
            points = [(step, value) for step, value in points if math.isfinite(value)]
            if points:
                curves[name] = points
        if curves:
            figures.append(f"<figure><figcaption>{title}</figcaption>{_chart(curves)}</figure>")
    return figures or ["<p>Nothing was logged.</p>"]


def _chart(curves: dict[str, list[tuple[int, float]]]) -> str:
    """Return an SVG with one line for each name."""
    steps = [step for points in curves.values() for step, _ in points]
    values = [value for points in curves.values() for _, value in points]
    low_x, high_x, low, high = min(steps), max(steps), min(values), max(values)

    def place(step: float, value: float) -> str:
        x = _LEFT + (_WIDTH - _LEFT - 8) * (step - low_x) / ((high_x - low_x) or 1)
        y = 8 + (_HEIGHT - _BOTTOM - 8) * (1 - (value - low) / ((high - low) or 1))
        return f"{x:.1f},{y:.1f}"

    bottom = _HEIGHT - _BOTTOM
    lines = [
        f'<svg width="{_WIDTH}" height="{_HEIGHT + 18}" font-size="11" font-family="sans-serif">',
        f'<path d="M{_LEFT} 8V{bottom}H{_WIDTH - 8}" fill="none" stroke="#818b98"/>',
        f'<text x="{_LEFT - 6}" y="16" text-anchor="end">{high:.4g}</text>',
        f'<text x="{_LEFT - 6}" y="{bottom}" text-anchor="end">{low:.4g}</text>',
        f'<text x="{_LEFT}" y="{bottom + 14}">step {low_x}</text>',
        f'<text x="{_WIDTH - 8}" y="{bottom + 14}" text-anchor="end">{high_x}</text>',
    ]
    for i, (name, points) in enumerate(curves.items()):
        color = _COLORS[i % len(_COLORS)]
        if len(points) == 1:
            x, y = place(*points[0]).split(",")
            lines.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{color}"/>')
        else:
            lines.append(f'<polyline points="{" ".join(place(*p) for p in points)}" fill="none" stroke="{color}"/>')
        lines.append(f'<text x="{_LEFT + 120 * i}" y="{_HEIGHT + 12}" fill="{color}">{html.escape(name)}</text>')
    return "".join([*lines, "</svg>"])


def pictures(folder: Path, pattern: str = "*.png") -> list[str]:
    """Return a figure, with the picture inside, for each PNG of a folder."""
    figures = []
    for path in sorted(folder.glob(pattern)):
        data = base64.b64encode(path.read_bytes()).decode()
        name = html.escape(path.stem.replace("_", " "))
        figures.append(f'<figure><figcaption>{name}</figcaption><img src="data:image/png;base64,{data}"></figure>')
    return figures


def table(values: dict) -> str:
    """Return a table of names and values."""
    rows = (f"<tr><td>{html.escape(str(k))}<td>{html.escape(str(v))}" for k, v in values.items())
    return f"<table>{''.join(rows)}</table>"
