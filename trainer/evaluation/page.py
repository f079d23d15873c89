"""A benchmark's results as one HTML page beside its pictures, filtered by task, kind and failure."""

import html
import json
from pathlib import Path

from ...core.files import write_file

PAGE_FILE = "index.html"
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1200px;margin:2em auto;padding:0 1em;color:#1f2328}"
    "table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #d1d9e0;padding:2px 10px;text-align:left}"
    "#items{display:flex;flex-wrap:wrap;gap:12px}figure{margin:0;width:272px;border:2px solid #1a7f37;padding:6px}"
    "figure.failed{border-color:#d1242f}figure[hidden]{display:none}"
    "img{width:128px;height:128px;object-fit:contain;margin-right:4px}.micro img{image-rendering:pixelated}"
    "figcaption{font-size:13px;overflow-wrap:anywhere}small{color:#59636e}"
)
_SCRIPT = """
const [task, kind, verdict] = ["task", "kind", "verdict"].map(id => document.getElementById(id));
function show() {
  let shown = 0;
  for (const figure of document.querySelectorAll("figure")) {
    const failed = figure.classList.contains("failed");
    const {task: ofTask, kind: ofKind} = figure.dataset;
    figure.hidden = (task.value && ofTask !== task.value) || (kind.value && ofKind !== kind.value)
      || (verdict.value && (verdict.value === "failed") !== failed);
    shown += !figure.hidden;
  }
  document.getElementById("shown").textContent = shown;
}
for (const filter of [task, kind, verdict]) filter.addEventListener("change", show);
show();
"""


def write_page(out: Path, results: dict, quoted: list[dict]) -> Path:
    """Write `index.html` into a benchmark's folder; returns its path. Pictures are referred to, not copied.

    Args:
        out: the folder, with `images/` and perhaps `sources/`.
        results: of `run.score`.
        quoted: published figures, of `published.quoted`.
    """
    items, tasks = results["items"], results["tasks"]
    first, *others = results["measures"]
    rows = []
    for name, found in tasks.items():
        for label, figures in [
            (f"<b>{html.escape(name)}</b>", found),
            *((html.escape(k), v) for k, v in found["kinds"].items()),
        ]:
            low, high = figures["interval"]
            cells = [f"{figures[first]:.3f} ({low:.3f} to {high:.3f})", *(f"{figures[name]:.3f}" for name in others)]
            rows.append(
                f"<tr><td>{label}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}<td>{figures['n']}</td></tr>"
            )
    coverage = results["coverage"]
    known = ("model", "lora", "metaquery", "weights", "prompts", "sampling", "versions", "judge", "coverage")
    about = {key: results[key] for key in known if key in results}
    about |= {key: results[key] for key in ("intersection", "categories") if key in results}
    heads = "".join(f"<th>{name}</th>" for name in ("", f"{first} (95 %)", *others, "n"))
    content = [
        f"<!doctype html><meta charset=utf-8><title>{results['benchmark']}</title><style>{_STYLE}</style>",
        f"<h1>{html.escape(results['benchmark'])}: {results['overall']:.3f}</h1>",
        f"<p>{coverage['judged']} of {coverage['expected']} pictures were judged; the highest {first} is "
        f"{results['highest']:g}.</p>",
        f"<table><tr>{heads}</tr>", *rows, "</table>", *_quotes(quoted),
        f"<details><summary>What was run</summary><pre>{html.escape(json.dumps(about, indent=2))}</pre></details>",
        f"<p>{_filter('task', tasks)} {_filter('kind', dict.fromkeys(item['kind'] for item in items))} "
        f"{_filter('verdict', ('passed', 'failed'))} <span id=shown></span> shown</p>"
        f"<div id=items class={html.escape(results['benchmark'])}>",
        *(_figure(out, item, item[first] >= results["passing"]) for item in items),
        f"</div><script>{_SCRIPT}</script>",
    ]  # fmt: skip
    path = out / PAGE_FILE
    write_file(path, "\n".join(content) + "\n")
    return path


def _quotes(quoted: list[dict]) -> list[str]:
    """Return published figures as a table that says they are no measurements of ours."""
    if not quoted:
        return []
    rows = [
        f"<tr><td>{html.escape(row['model'])}</td><td>{row['score']:g}</td>"
        f"<td><a href='{html.escape(row['source'])}'>{html.escape(row['source'])}</a></td></tr>"
        for row in quoted
    ]
    note = "<p>Quoted, not measured here; with the judges and settings of who published them:</p>"
    return [note, "<table><tr><th>model</th><th>overall</th><th>source</th></tr>", *rows, "</table>"]


def _filter(name: str, values) -> str:
    options = "".join(f"<option>{html.escape(value)}</option>" for value in values)
    return f"<label>{name} <select id={name}><option value=''>all</option>{options}</select></label>"


def _figure(out: Path, item: dict, passed: bool) -> str:
    name = html.escape(item["id"])
    has_source = (out / "sources" / f"{item['id']}.png").is_file()
    shown = [("sources", "source")] * has_source + [("images", name)]
    pictures = "".join(
        f"<a href='{folder}/{name}.png'><img src='{folder}/{name}.png' alt='{alt}' loading=lazy></a>"
        for folder, alt in shown
    )
    failed = "" if passed else " class=failed"
    notes = html.escape("; ".join(item["notes"]))
    return (
        f"<figure{failed} data-task='{html.escape(item['task'])}' data-kind='{html.escape(item['kind'])}'>{pictures}"
        f"<figcaption>{html.escape(item['prompt'])}<br>"
        f"<small>{html.escape(item['kind'])}{': not ' if notes else ''}{notes}</small></figcaption></figure>"
    )
