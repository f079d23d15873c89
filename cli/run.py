"""`unipic2 run`: queue a workflow on a real ComfyUI and save the pictures."""

import argparse
import asyncio
import contextlib
import hashlib
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import InputError
from .console import Console

EXAMPLES = """\
examples:
  unipic2 run micro_edit --image photo.png --prompt "make the red circle blue" -o edited.png
  unipic2 run micro_text_to_image --prompt "two squares" --seed 7
  unipic2 run my_workflow.json --set KSampler.steps=30 --set 6.text="a lighthouse" --image 12=photo.jpg -o results/
  unipic2 run my_workflow.json --server http://192.168.0.5:8188
  unipic2 run my_workflow.json --comfyui ~/ComfyUI --models /data/models

NODE is a node's id, its title, or its class name where only one node has it.
Without --server, --comfyui or COMFYUI_PATH, ComfyUI is installed once into the cache folder (about 6 GB) and started.
Saved paths go to stdout, one per line; everything else to stderr. Exit status: 0 saved, 2 bad input, 130 Ctrl-C.
"""

REMEDY = 'In the folder of unipic2: pip install ".[{}]"'
REQUIRES = {"aiohttp": "aiohttp", "comfy_cli": "comfy-cli", "PIL": "pillow", "tqdm": "tqdm"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `unipic2 run`."""
    parser.add_argument("workflow", help="workflow file (UI or API format), or the name of a bundled one")
    parser.add_argument("--prompt", metavar="TEXT", help="text for the only node with a prompt input")
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="[NODE=]FILE",
        help="picture for a LoadImage node (repeatable; NODE= may be left out where there is one)",
    )
    parser.add_argument("--seed", type=_seed, help="value of every seed (0 to 2^64 - 1)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NODE.INPUT=VALUE", help="any other input; JSON or text"
    )
    parser.add_argument(
        "-o", "--output", metavar="OUT", help="file or folder (default: WORKFLOW_SEED.png in this folder)"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--server", metavar="URL", help="a ComfyUI that is running")
    where.add_argument("--comfyui", metavar="PATH", help="an install of yours to start (or COMFYUI_PATH)")
    parser.add_argument("--python", metavar="EXE", help="the Python of that install (or COMFYUI_PYTHON)")
    parser.add_argument(
        "--models", action="append", default=[], metavar="DIR", help="one more models folder (repeatable)"
    )
    parser.add_argument("--cpu", action="store_true", help="do not use the GPU")
    parser.add_argument("--timeout", type=_seconds, metavar="S", help="give up when the run takes longer (seconds)")


def _seed(text: str) -> int:
    seed = int(text)
    if not 0 <= seed < 2**64:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 2^64 - 1")
    return seed


def _seconds(text: str) -> float:
    seconds = float(text)
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return seconds


def run(args: argparse.Namespace) -> int:
    """Run one workflow as the parsed options say; print the saved paths; return the exit status.

    Raises:
        InputError: anything the user can mend.
    """
    missing = [package for module, package in REQUIRES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise InputError(f"unipic2 run needs {', '.join(missing)}", remedy=REMEDY.format("run"))
    from . import workflow as wf
    from .client import ServerLost
    from .comfyui import Server, resolve_install
    from .pictures import Output

    if args.server and (args.cpu or args.models or args.python):
        raise InputError(
            "--server", found="--cpu, --models or --python", expected="those only where this starts ComfyUI"
        )
    console = Console()
    path = wf.find_workflow(args.workflow)
    workflow = wf.read_workflow(path)
    # All that can be checked without a server is checked before one is installed or started.
    Output(args.output, path.stem)
    wf.check_options(args.prompt, args.set, args.image)
    if args.python and not (args.comfyui or os.environ.get("COMFYUI_PATH")):
        raise InputError("--python", found="no ComfyUI that it belongs to", expected="--comfyui PATH beside it")
    pictures = _read_pictures(args.image)
    job = _Job(args, path, workflow, pictures, console)
    if args.server:
        saved = asyncio.run(job.run(args.server))
    else:
        install = resolve_install(args.comfyui, args.python, console)
        with Server(install, cpu=args.cpu or None, models=args.models, progress=console) as server:
            try:
                saved = asyncio.run(job.run(server.url))
            except ServerLost as lost:
                # When it died, its own last words say more than the lost connection.
                if died := server.stopped(wait_seconds=5):
                    raise died from lost
                raise
    for file in saved:
        print(file)
    return 0


@dataclass(frozen=True, slots=True)
class _Picture:
    """A picture of `--image`."""

    node: str | None
    """The node that loads it, if it was named."""
    path: Path
    png: bytes
    """As RGB."""
    notes: list[str]
    """What was converted for that, in words."""


def _read_pictures(images: list[str]) -> list[_Picture]:
    """Read what each `--image` names."""
    from .pictures import read_rgb

    pictures = []
    for given in images:
        node, equals, name = given.partition("=")
        if not equals or Path(given).is_file():
            node, name = None, given
        path = Path(name).expanduser()
        pictures.append(_Picture(node, path, *read_rgb(path)))
    return pictures


class _Job:
    """One workflow on its way through a server."""

    def __init__(self, args, path: Path, workflow: dict, pictures: list, console: Console):
        self.args = args
        self.path = path
        self.workflow = workflow
        self.pictures = pictures
        self.console = console

    async def run(self, url: str) -> list[Path]:
        """Fill in, queue, follow, save; return the saved paths."""
        from ..core.files import write_file
        from . import workflow as wf
        from .client import ComfyUIClient
        from .comfyui import check_version
        from .pictures import Output

        async with ComfyUIClient(url) as client:
            check_version(await client.version(), f"ComfyUI server {client.url}")
            object_info = await client.object_info()
            prompt, remarks = wf.to_prompt(self.workflow, object_info, self.path.name)
            original = {i: dict(node["inputs"]) for i, node in prompt.items()}
            for remark in remarks + self._fill_in(prompt, object_info):
                self.console.note(remark)
            await self._upload(client, prompt, object_info)
            seed = wf.first_seed(prompt)
            output = Output(self.args.output, self.path.stem if seed is None else f"{self.path.stem}_{seed}")
            changed = any(node["inputs"] != original[i] for i, node in prompt.items())
            hints = {**wf.model_sources(self.workflow), **self._picture_hints(prompt, object_info)}
            with _Progress(prompt, self.console) as progress:
                running = client.run(prompt, extra_data=self._extra(changed), hints=hints, on_event=progress)
                outputs = await self._within_time(running)
            files = saved_files(outputs)
            paths = output.paths([file["filename"] for file in files])
            contents = [await client.fetch(file) for file in files]  # all of them, before the first is written
            for path, content in zip(paths, contents, strict=True):
                write_file(path, content)
            if output.suffix and paths[0].suffix != output.suffix:
                self.console.note(f"The server saved {paths[0].suffix or 'a file'}, so that is the name's ending.")
            return paths

    def _extra(self, changed: bool) -> dict:
        """Return what SaveImage embeds beside the prompt: the UI workflow, unless the options made it untrue."""
        return {} if changed or "nodes" not in self.workflow else {"extra_pnginfo": {"workflow": self.workflow}}

    def _fill_in(self, prompt: dict, object_info: dict) -> list[str]:
        from . import workflow as wf

        remarks: list[str | None] = []
        if self.args.prompt is not None:
            remarks.append(wf.set_prompt(prompt, self.args.prompt, object_info))
        if self.args.seed is not None:
            remarks += wf.set_seed(prompt, self.args.seed, object_info)
        for assignment in self.args.set:
            node_id, name, text = wf.split_assignment(prompt, assignment)
            spec = wf.input_specs(prompt[node_id], object_info).get(name)
            remarks.append(wf.set_input(prompt, node_id, name, wf.parse_value(text, spec), object_info))
        return [remark for remark in remarks if remark]

    async def _upload(self, client, prompt: dict, object_info: dict) -> None:
        from . import workflow as wf
        from .pictures import read_masked

        loaders = wf.picture_inputs(prompt, object_info)
        targets = [wf.find_node(prompt, picture.node) if picture.node else None for picture in self.pictures]
        for target, picture in zip(targets, self.pictures, strict=True):
            if target is None and len(loaders) == 1 and len(targets) == 1:
                target = next(iter(loaders))
            if target not in loaders:
                known = ", ".join(wf.label(prompt, i) for i in loaders) or "none"
                raise InputError(
                    "--image",
                    found=f"{wf.label(prompt, target)}, which loads no picture" if target else "no NODE=",
                    expected=f"--image NODE=FILE with a node that loads pictures; this workflow has: {known}",
                )
            png = picture.png
            if wf.reads_transparency(prompt, target):
                png = read_masked(picture.path)
            elif picture.notes:
                self.console.note(f"{picture.path}: {', '.join(picture.notes)}")
            # Named by content: the same picture again is the same file, and the server's cache holds.
            name = f"unipic2_{hashlib.sha256(png).hexdigest()[:20]}.png"
            prompt[target]["inputs"][loaders[target]] = await client.upload_image(name, png)

    def _picture_hints(self, prompt: dict, object_info: dict) -> dict[str, str]:
        from . import workflow as wf

        inputs = wf.picture_inputs(prompt, object_info).items()
        named = [(prompt[node_id]["inputs"].get(name), node_id) for node_id, name in inputs]
        return {k: f"Give the picture with --image {v}=FILE." for k, v in named if isinstance(k, str)}

    async def _within_time(self, running) -> dict:
        try:
            return await asyncio.wait_for(running, self.args.timeout)
        except asyncio.TimeoutError as error:
            raise InputError(
                f"workflow {self.path.name}",
                found=f"still running after {self.args.timeout:g} s; it was stopped",
                remedy="Give --timeout more seconds.",
            ) from error


def saved_files(outputs: dict[str, dict]) -> list[dict]:
    """Return the files that a run saved, or its previews where it saved none.

    Args:
        outputs: `{node id: {"images": [{"filename", "subfolder", "type"}, ...], ...}}` from the history.

    Raises:
        InputError: it made neither.
    """
    lists = [files for node in outputs.values() if isinstance(node, dict) for files in node.values()]
    files = [file for listed in lists if isinstance(listed, list) for file in listed]
    files = [file for file in files if isinstance(file, dict) and file.get("filename")]
    for kind in ("output", "temp"):
        if wanted := [file for file in files if file.get("type") == kind]:
            return wanted
    raise InputError("workflow", found="it ran but saved no picture", expected="a SaveImage or PreviewImage node")


class _Progress(contextlib.AbstractContextManager):
    """A tqdm bar for each node that reports steps, fed with the server's events."""

    def __init__(self, prompt: dict, console: Console):
        self.prompt = prompt
        self.console = console
        self.bar = None
        self.node: str | None = None
        self.started: set[str] = set()

    def __exit__(self, *_) -> None:
        self._close()
        self.console.clear()

    def __call__(self, kind: str, data: dict) -> None:
        if kind == "status":
            waiting = ((data.get("status") or {}).get("exec_info") or {}).get("queue_remaining", 0)
            if not self.started and waiting > 1:
                self.console.status(f"Waiting: {waiting} jobs in the server's queue")
        elif kind == "execution_cached":
            self.started.update(map(str, data.get("nodes") or ()))
        elif kind == "executing" and data.get("node") is not None:
            self._enter(str(data["node"]))
        elif kind == "progress":
            self._step(str(data.get("node")), data.get("value") or 0, data.get("max") or 0)
        elif kind == "progress_state":
            for node in (data.get("nodes") or {}).values():
                if node.get("state") == "running":
                    self._step(str(node.get("node_id")), node.get("value") or 0, node.get("max") or 0)

    def _title(self, node_id: str) -> str:
        node = self.prompt.get(node_id) or {}
        title = (node.get("_meta") or {}).get("title") or node.get("class_type") or node_id
        return f"[{len(self.started)}/{len(self.prompt)}] {title}"

    def _enter(self, node_id: str) -> None:
        if node_id != self.node:
            self._close()
            self.node = node_id
            self.started.add(node_id)
            self.console.status(self._title(node_id))

    def _step(self, node_id: str, value: float, total: float) -> None:
        from tqdm import tqdm

        if total <= 1:
            return
        self._enter(node_id)
        if self.bar is None:
            self.console.clear()
            stream = self.console.stream
            # A log file gets a line now and then, a terminal a lively bar.
            seconds = 0.1 if stream.isatty() else self.console.QUIET_SECONDS
            often = {"mininterval": seconds, "maxinterval": max(seconds, 10)}
            self.bar = tqdm(total=int(total), desc=self._title(node_id), file=stream, dynamic_ncols=True, **often)
        self.bar.total = int(total)
        self.bar.update(max(0, int(value) - self.bar.n))

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
