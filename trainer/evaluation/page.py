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
    "img{width:128px;height:128px;object-fit:contain;image-rendering:pixelated}"
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


def write_page(out: Path, results: dict) -> Path:
    """Write `index.html` into a benchmark's folder; returns its path. Pictures are referred to, not copied.

    Args:
        out: the folder, with `images/` and perhaps `sources/`.
        results: of `run.score`.
    """
    items = results["items"]
    tasks = list(dict.fromkeys(item["task"] for item in items))
    rows = []
    for name in tasks:
        for label, figures in {name: results[name], **results[name]["kinds"]}.items():
            low, high = figures["interval"]
            text = f"<b>{html.escape(label)}</b>" if label == name else html.escape(label)
            rows.append(
                f"<tr><td>{text}</td><td>{figures['strict']:.3f} ({low:.3f} to {high:.3f})</td>"
                f"<td>{figures['soft']:.3f}</td><td>{figures['n']}</td></tr>"
            )
    coverage = results["coverage"]
    about = {key: results[key] for key in ("model", "weights", "prompts", "sampling", "versions") if key in results}
    content = [
        f"<!doctype html><meta charset=utf-8><title>{results['benchmark']}</title><style>{_STYLE}</style>",
        f"<h1>{html.escape(results['benchmark'])}: {results['overall']:.3f}</h1>",
        f"<p>{coverage['judged']} of {coverage['expected']} pictures were judged.</p>",
        "<table><tr><th></th><th>strict (95 %)</th><th>soft</th><th>n</th></tr>", *rows, "</table>",
        f"<details><summary>What was run</summary><pre>{html.escape(json.dumps(about, indent=2))}</pre></details>",
        f"<p>{_filter('task', tasks)} {_filter('kind', dict.fromkeys(item['kind'] for item in items))} "
        f"{_filter('verdict', ('passed', 'failed'))} <span id=shown></span> shown</p><div id=items>",
        *(_figure(out, item) for item in items),
        f"</div><script>{_SCRIPT}</script>",
    ]  # fmt: skip
    path = out / PAGE_FILE
    write_file(path, "\n".join(content) + "\n")
    return path


def _filter(name: str, values) -> str:
    options = "".join(f"<option>{html.escape(value)}</option>" for value in values)
    return f"<label>{name} <select id={name}><option value=''>all</option>{options}</select></label>"


def _figure(out: Path, item: dict) -> str:
    name = html.escape(item["id"])
    has_source = (out / "sources" / f"{item['id']}.png").is_file()
    source = f"<img src='sources/{name}.png' alt='source' loading=lazy>" if has_source else ""
    failed = " class=failed" if item["strict"] < 1 else ""
    notes = html.escape("; ".join(item["notes"]))
    return (
        f"<figure{failed} data-task='{html.escape(item['task'])}' data-kind='{html.escape(item['kind'])}'>{source}"
        f"<img src='images/{name}.png' alt='{name}' loading=lazy><figcaption>{html.escape(item['prompt'])}<br>"
        f"<small>{html.escape(item['kind'])}{': not ' if notes else ''}{notes}</small></figcaption></figure>"
    )
