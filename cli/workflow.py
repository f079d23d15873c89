"""Workflow files: read, convert to what the server runs, find nodes, set their inputs.

`prompt` below is ComfyUI's API format: `{node id: {"class_type": str, "inputs": {...}, "_meta": {"title": str}}}`;
an input is a value, or a link `[node id, output index]`. `object_info` is the server's own list of node classes.
"""

import difflib
import json
import logging
from pathlib import Path
from typing import Any

from ..core.errors import InputError

BUNDLED = Path(__file__).resolve().parent.parent / "workflows"
_MASK_OUTPUT = 1  # of LoadImage
_SWITCH = {"true": True, "1": True, "false": False, "0": False}
VALUE_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


def find_workflow(name: str) -> Path:
    """Return the file for a path or the name of a bundled workflow (`micro_edit`, with or without `.json`).

    Raises:
        InputError: neither; the message lists the bundled names.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    bundled = {file.stem: file for file in sorted(BUNDLED.glob("*.json"))}
    stem = name.removesuffix(".json")
    if stem in bundled:
        return bundled[stem]
    near = difflib.get_close_matches(stem, bundled, n=1)
    hint = f"Did you mean {near[0]}?" if near else None
    found = "a folder" if path.is_dir() else "no such file"
    expected = f"a workflow file, or one of the bundled: {', '.join(bundled) or '(none)'}"
    raise InputError(f"workflow {name}", found=found, expected=expected, remedy=hint)


def read_workflow(path: Path) -> dict:
    """Return the JSON object in `path`.

    Raises:
        InputError: it cannot be read, or is not a JSON object.
    """
    expected = "a workflow saved by ComfyUI (Save, or Export (API))"
    try:
        workflow = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "bytes that are not text"
        raise InputError(f"workflow {path}", found=reason, expected=expected) from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"workflow {path}", found=f"broken JSON ({error})", expected=expected) from error
    if not isinstance(workflow, dict):
        raise InputError(f"workflow {path}", found=f"a JSON {type(workflow).__name__}", expected=expected)
    return workflow


def to_prompt(workflow: dict, object_info: dict, name: str) -> tuple[dict, list[str]]:
    """Return the workflow in API format and the converter's remarks.

    UI format (0.4 and 1.0, subgraphs, reroutes, muted and bypassed nodes) is converted by comfy-cli.

    Raises:
        InputError: neither format, no node left to run, a node that cannot be converted, or one that this
            ComfyUI does not have (with the pack or version that brings it).
    """
    from comfy_cli.workflow_to_api import WorkflowConversionError, convert_ui_to_api, is_api_format

    remarks: list[str] = []
    if is_api_format(workflow):
        prompt = {key: node for key, node in workflow.items() if isinstance(node, dict) and "class_type" in node}
    else:
        with _Remarks("comfy_cli.workflow_to_api") as heard:
            try:
                prompt = convert_ui_to_api(workflow, object_info)
            except Exception as error:  # its own error, or whatever a malformed node makes it trip over
                own = isinstance(error, WorkflowConversionError)
                found = error if own else f"a node that cannot be read ({type(error).__name__}: {error})"
                expected = "a workflow in ComfyUI's UI or API format"
                raise InputError(f"workflow {name}", found=found, expected=expected) from error
        # A node that the converter gave up on would be missing from the picture's history: refuse.
        if failed := [record.getMessage() for record in heard.records if record.levelno >= logging.ERROR]:
            raise InputError(f"workflow {name}", found="; ".join(failed), expected="nodes that can be converted")
        remarks = [record.getMessage() for record in heard.records]
    _check_nodes(prompt, workflow, object_info, name)
    return prompt, remarks


class _Remarks(logging.Handler):
    """Collects what a logger says within a `with` block instead of printing it."""

    def __init__(self, logger: str):
        super().__init__(logging.WARNING)
        self.logger = logging.getLogger(logger)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def __enter__(self) -> "_Remarks":
        self.propagate, self.logger.propagate = self.logger.propagate, False
        self.logger.addHandler(self)
        return self

    def __exit__(self, *_) -> None:
        self.logger.removeHandler(self)
        self.logger.propagate = self.propagate


def _check_nodes(prompt: dict, workflow: dict, object_info: dict, name: str) -> None:
    if not prompt:
        raise InputError(f"workflow {name}", found="no node to run", expected="at least one that is not muted")
    for node_id, node in prompt.items():
        if not isinstance(node.get("inputs", {}), dict):
            raise InputError(f"workflow {name}", found=f"node {node_id} without a dict of inputs")
        node.setdefault("inputs", {})
    unknown = [
        (node_id, node["class_type"]) for node_id, node in prompt.items() if node["class_type"] not in object_info
    ]
    if unknown:
        listed = ", ".join(f"{kind} (node {node_id})" for node_id, kind in unknown)
        remedies = dict.fromkeys(_remedy(kind, workflow, object_info) for _, kind in unknown)
        raise InputError(
            f"workflow {name}",
            found=f"nodes that this ComfyUI does not have: {listed}",
            remedy=" ".join(remedies),
        )


def _remedy(kind: str, workflow: dict, object_info: dict) -> str:
    """Say what brings the node class `kind`; UI workflows record the pack in a node's properties."""
    if kind.startswith("UniPic2"):
        return "UniPic2 nodes come with this package: install it in that ComfyUI's custom_nodes (same version)."
    own = [node.get("properties") or {} for node in ui_nodes(workflow) if node.get("type") == kind]
    pack = next((p.get("cnr_id") or p.get("aux_id") for p in own if p.get("cnr_id") or p.get("aux_id")), None)
    version = next((p["ver"] for p in own if p.get("ver")), None)
    saved = f" (saved with {version})" if version else ""
    if pack == "comfy-core":
        return f"{kind} belongs to ComfyUI itself{saved}: update ComfyUI."
    if pack:
        return f"{kind} comes with the node pack {pack}{saved}: install it in ComfyUI and use --comfyui or --server."
    near = difflib.get_close_matches(str(kind), object_info, n=1, cutoff=0.8)
    return f"Did you mean {near[0]}?" if near else f"Install the node pack that has {kind}, or update ComfyUI."


def ui_nodes(workflow: dict) -> list[dict]:
    """Return every node of a UI workflow, those inside subgraphs included (API format: none)."""
    graphs = [workflow, *((workflow.get("definitions") or {}).get("subgraphs") or [])]
    nodes = [graph.get("nodes") or [] for graph in graphs if isinstance(graph, dict)]
    return [node for group in nodes if isinstance(group, list) for node in group if isinstance(node, dict)]


def model_sources(workflow: dict) -> dict[str, str]:
    """Map model file names to a sentence on where to get them, from the `properties.models` of a UI workflow."""
    listed = [m for node in ui_nodes(workflow) for m in (node.get("properties") or {}).get("models") or []]
    return {
        m["name"]: f"Download {m['url']} into models/{m.get('directory', '')} (another folder: --models DIR)."
        for m in listed
        if isinstance(m, dict) and m.get("name") and m.get("url")
    }


# -- nodes and their inputs ----------------------------------------------------------------------------------------


def label(prompt: dict, node_id: str) -> str:
    """Return how people know a node: `node 3 "Sampler" (KSampler)`."""
    node = prompt.get(str(node_id)) or {}
    kind = node.get("class_type", "?")
    title = (node.get("_meta") or {}).get("title") or kind
    return f"node {node_id} ({kind})" if title == kind else f'node {node_id} "{title}" ({kind})'


def find_node(prompt: dict, name: str) -> str:
    """Return the id of the node with that id, title or class name (in this order).

    Raises:
        InputError: none or several; the message lists them.
    """
    if name in prompt:
        return name
    for key in (lambda node: (node.get("_meta") or {}).get("title"), lambda node: node["class_type"]):
        matches = [node_id for node_id, node in prompt.items() if key(node) == name]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise InputError(
                f"node {name!r}",
                found=f"{len(matches)} of them: {', '.join(label(prompt, m) for m in matches)}",
                expected="exactly one",
                remedy="Use the id.",
            )
    everything = ", ".join(label(prompt, node_id) for node_id in prompt)
    raise InputError(f"node {name!r}", found="no such node", expected=f"an id, title or class of: {everything}")


def input_specs(node: dict, object_info: dict) -> dict[str, Any]:
    """Return the node's inputs `{name: [type, options]}`; what the workflow sets beyond the schema has spec None."""
    declared = (object_info.get(node["class_type"]) or {}).get("input") or {}
    specs = {**(declared.get("required") or {}), **(declared.get("optional") or {})}
    return {**specs, **{name: None for name in node["inputs"] if name not in specs}}


def is_link(value: Any) -> bool:
    """Tell whether an input's value is a link to another node's output."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)


def reads_transparency(prompt: dict, node_id: str) -> bool:
    """Whether a workflow takes the mask of a node that loads pictures, which is what is transparent of its file."""
    node = prompt[node_id]
    if node["class_type"] == "LoadImageMask":
        return node["inputs"].get("channel", "alpha") == "alpha"
    return is_read(prompt, node_id, _MASK_OUTPUT)


def is_read(prompt: dict, node_id: str, output: int) -> bool:
    """Whether any node reads an output of another one."""
    return any(value == [node_id, output] for node in prompt.values() for value in node["inputs"].values())


def is_value_input(spec: Any, current: Any) -> bool:
    """Tell whether an input takes a value (a widget), as opposed to a connection such as MODEL or IMAGE."""
    if not isinstance(spec, (list, tuple)) or not spec:
        return not is_link(current)
    return isinstance(spec[0], (list, tuple)) or spec[0] in VALUE_TYPES or not (current is None or is_link(current))


def set_input(prompt: dict, node_id: str, name: str, value: Any, object_info: dict) -> str | None:
    """Set an input of a node; return a remark when that replaces a link.

    Raises:
        InputError: the node has no such input (with its inputs and the nearest), or it takes a connection.
    """
    node = prompt[node_id]
    specs = input_specs(node, object_info)
    current = node["inputs"].get(name)
    values = [key for key, spec in specs.items() if is_value_input(spec, node["inputs"].get(key))]
    if name not in specs:
        near = difflib.get_close_matches(name, values, n=1)
        raise InputError(
            f"input {name!r} of {label(prompt, node_id)}",
            found="no such input",
            expected=f"one of {', '.join(values) or '(none)'}",
            remedy=f"Did you mean {near[0]}?" if near else None,
        )
    if name not in values:
        kind = specs[name][0] if specs[name] else "link"
        raise InputError(
            f"input {name!r} of {label(prompt, node_id)}",
            found=f"a connection of type {kind}",
            expected=f"a value input: {', '.join(values) or '(none)'}",
        )
    # ComfyUI reads a bare list as a link.
    node["inputs"][name] = {"__value__": value} if isinstance(value, list) else value
    if is_link(current):
        return (
            f"{label(prompt, node_id)}: {name} was connected to {label(prompt, current[0])}; the given value is used."
        )
    return None


def parse_value(text: str, spec: Any) -> Any:
    """Return the value of `--set NODE.INPUT=text`: JSON where it is JSON, else the text.

    Inputs that hold text (STRING, or a list of options that has the text itself) keep it unless it is a quoted
    JSON string: a prompt may well be the digit 7.

    Raises:
        InputError: another value than true or false for a BOOLEAN.
    """
    kind, options = (list(spec) + [None, None])[:2] if isinstance(spec, (list, tuple)) else (None, None)
    listed = kind if isinstance(kind, (list, tuple)) else (options or {}).get("options") or ()
    if text in listed:
        return text
    if kind == "BOOLEAN":  # ComfyUI takes any text for true
        if text.lower() not in _SWITCH:
            raise InputError("--set", found=f"{text!r} for a switch", expected="true or false")
        return _SWITCH[text.lower()]
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    return text if kind == "STRING" and not isinstance(value, str) else value


def split_assignment(prompt: dict, text: str) -> tuple[str, str, str]:
    """Split `NODE.INPUT=VALUE` into node id, input name and text; titles and input names may hold dots.

    Raises:
        InputError: another form, or a node that is not there.
    """
    target, value = _target_and_value(text)
    dots = [i for i, letter in enumerate(target) if letter == "."]
    for dot in dots:
        names = {(node.get("_meta") or {}).get("title") for node in prompt.values()}
        names |= {node["class_type"] for node in prompt.values()} | set(prompt)
        if target[:dot] in names:
            return find_node(prompt, target[:dot]), target[dot + 1 :], value
    return find_node(prompt, target[: dots[0]]), target[dots[0] + 1 :], value


def _target_and_value(text: str) -> tuple[str, str]:
    """Split `NODE.INPUT=VALUE` at the first `=`; whether there is such a node only the workflow can tell."""
    target, equals, value = text.partition("=")
    if not equals or "." not in target:
        raise InputError(f"--set {text}", expected="NODE.INPUT=VALUE, such as --set KSampler.steps=30")
    return target, value


MAX_PROMPT_LENGTH = 4000
"""Characters for UniPic2 Text Encode; the longest of its encoders reads 256 tokens, about 1,300 characters."""


def check_options(prompt: str | None, assignments: list[str], images: list[str]) -> None:
    """Check what of `--prompt`, `--set` and `--image` can be checked without a server.

    Raises:
        InputError: an empty prompt, or an assignment that is none.
    """
    if prompt is not None and not prompt.strip():
        raise InputError("--prompt", found="an empty text", expected="what to draw, or what to change")
    for text in assignments:
        _target_and_value(text)
    if len(images) > 1 and (bare := [text for text in images if "=" not in text]):
        raise InputError(f"--image {bare[0]}", found="no NODE=", expected="NODE=FILE where there are several")


def set_prompt(prompt: dict, text: str, object_info: dict) -> str | None:
    """Set the `prompt` input of the only node that has one; return a remark as `set_input` does.

    Raises:
        InputError: no such node, or several; or an absurdly long prompt.
    """
    nodes = [i for i, n in prompt.items() if is_value_input_named(n, "prompt", object_info)]
    if len(nodes) != 1:
        raise InputError(
            "--prompt",
            found="no node with an input named prompt"
            if not nodes
            else f"{len(nodes)} nodes with one: {', '.join(label(prompt, i) for i in nodes)}",
            expected="exactly one",
            remedy="Use --set NODE.INPUT=TEXT.",
        )
    if len(text) > MAX_PROMPT_LENGTH and prompt[nodes[0]]["class_type"] == "UniPic2TextEncode":
        raise InputError(
            "--prompt",
            found=f"{len(text):,} characters",
            expected=f"at most {MAX_PROMPT_LENGTH:,}",
            remedy="The text encoders read 77 tokens (CLIP) and 256 (T5), so most of it would be lost: shorten it.",
        )
    return set_input(prompt, nodes[0], "prompt", text, object_info)


def set_seed(prompt: dict, seed: int, object_info: dict) -> list[str]:
    """Set every input named seed or noise_seed; return remarks.

    Raises:
        InputError: the workflow has none.
    """
    found = [(i, key) for i, n in prompt.items() for key in SEEDS if is_value_input_named(n, key, object_info)]
    if not found:
        raise InputError("--seed", found="no input named seed or noise_seed in the workflow")
    remarks = [set_input(prompt, node_id, key, seed, object_info) for node_id, key in found]
    return [remark for remark in remarks if remark]


SEEDS = ("seed", "noise_seed")


def is_value_input_named(node: dict, name: str, object_info: dict) -> bool:
    """Tell whether the node has a value input of that name."""
    specs = input_specs(node, object_info)
    return name in specs and is_value_input(specs[name], node["inputs"].get(name))


def first_seed(prompt: dict) -> int | None:
    """Return the first seed of the workflow, for file names."""
    seeds = (node["inputs"].get(name) for node in prompt.values() for name in SEEDS)
    return next((seed for seed in seeds if isinstance(seed, int)), None)


def picture_inputs(prompt: dict, object_info: dict) -> dict[str, str]:
    """Map the nodes that load an uploaded picture (LoadImage and its like) to the input that names the file."""
    found = {}
    for node_id, node in prompt.items():
        for name, spec in input_specs(node, object_info).items():
            options = spec[1] if isinstance(spec, (list, tuple)) and len(spec) > 1 else None
            if isinstance(options, dict) and options.get("image_upload"):
                found[node_id] = name
    return found
