"""A real ComfyUI to run workflows on: find or install one, start its server, end it.

with Server(resolve_install()) as server:
    print(server.url)          # http://127.0.0.1:PORT
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from ..core.errors import InputError
from .console import Console
from .install import ComfyUIInstall, ensure_installed, last_lines

__all__ = ["ComfyUIInstall", "Server", "check_version", "ensure_installed", "resolve", "resolve_install"]

PACKAGE_ROOT = Path(__file__).resolve().parent.parent
MIN_VERSION = (0, 3, 64)
"""Oldest ComfyUI with the V3 node schema that the pack uses."""

# Asked of the ComfyUI's own Python, because only its torch knows.
GPU_PROBE = """
import torch
xpu = getattr(torch, "xpu", None)
found = torch.cuda.is_available() or torch.backends.mps.is_available() or (xpu is not None and xpu.is_available())
print("gpu" if found else "cpu")
"""


def resolve_install(
    comfyui: str | os.PathLike | None = None,
    python: str | os.PathLike | None = None,
    progress: Console | None = None,
) -> ComfyUIInstall:
    """Return the ComfyUI to use: `comfyui`, else `COMFYUI_PATH`, else the pinned one (installed when missing).

    Raises:
        InputError: as `resolve` and `ensure_installed`.
    """
    path = comfyui or os.environ.get("COMFYUI_PATH")
    return resolve(path, python) if path else ensure_installed(progress)


def resolve(comfyui: str | os.PathLike, python: str | os.PathLike | None = None) -> ComfyUIInstall:
    """Return the user's own install at `comfyui`.

    Its Python is `python`, else `COMFYUI_PYTHON`, else `.venv` or `venv` inside it, else the `python_embeded` beside
    it (Windows portable), else the one that runs this.

    Raises:
        InputError: no `main.py` there, no such Python, or a version below 0.3.64.
    """
    root = Path(comfyui).expanduser().absolute()
    if not (root / "main.py").is_file():
        inner = root / "ComfyUI"
        hint = f"Did you mean {inner}?" if (inner / "main.py").is_file() else "Name the folder that holds main.py."
        raise InputError(f"ComfyUI at {root}", found="no main.py", expected="a ComfyUI folder", remedy=hint)
    install = ComfyUIInstall(root, _find_python(root, python or os.environ.get("COMFYUI_PYTHON")))
    check_version(install.version, f"ComfyUI at {root}")
    return install


def _find_python(root: Path, given: str | os.PathLike | None) -> Path:
    if given:
        found = shutil.which(os.path.expanduser(given))
        if found is None:
            raise InputError(f"Python {given}", found="no such program", expected="the Python that runs ComfyUI")
        return Path(found).absolute()
    if sys.platform == "win32":
        names = (".venv/Scripts/python.exe", "venv/Scripts/python.exe", "../python_embeded/python.exe")
    else:
        names = (".venv/bin/python", "venv/bin/python")
    return next((root / name for name in names if (root / name).is_file()), Path(sys.executable))


def check_version(version: str | None, what: str) -> None:
    """Raise `InputError` when `version` ("0.30.0"; None = unknown, passes) is below the oldest supported ComfyUI."""
    numbers = tuple(int(part) for part in (version or "").split(".")[:3] if part.isdigit())
    if len(numbers) == 3 and numbers < MIN_VERSION:
        raise InputError(
            what, found=f"version {version}", expected="0.3.64 or newer", remedy="Update ComfyUI (git pull)."
        )


class Server:
    """A ComfyUI server with this pack, for the length of a `with` block.

    It writes into a temporary folder of its own (output, input, temp, user, log) and never into the install: the
    pack is linked into that folder, which ComfyUI gets as one more custom_nodes path. The process and its children
    end with the block. The log goes when all went well and is kept, and named, when the block raised an error.

    Args:
        install: which ComfyUI, from `resolve_install()`.
        cpu: True forces `--cpu`; None asks that Python's torch whether there is a GPU.
        models: folders laid out like ComfyUI's `models` (their subfolders `vae`, `loras`, ... are searched too).
        pack: the node pack to load, or None for stock nodes only.
        options: further options of ComfyUI's, such as `["--lowvram"]`.
        start_seconds: how long it may take to answer.

    Attributes:
        url: `http://127.0.0.1:PORT`, set on entry.

    Raises (on entry):
        InputError: it died or did not answer in time, the pack failed to import, a models folder is not one.
    """

    def __init__(
        self,
        install: ComfyUIInstall,
        *,
        cpu: bool | None = None,
        models: Sequence[str | os.PathLike] = (),
        pack: Path | None = PACKAGE_ROOT,
        options: Sequence[str] = (),
        progress: Console | None = None,
        start_seconds: float = 600.0,
    ):
        self.install = install
        self.cpu = cpu
        self.models = [Path(folder).expanduser().absolute() for folder in models]
        self.pack = pack
        self.options = list(options)
        self.console = progress or Console()
        self.start_seconds = start_seconds
        self.url = ""
        self.log = Path()
        self.process: subprocess.Popen | None = None
        self._folder = Path()

    def __enter__(self) -> "Server":
        folders = extra_model_paths(self.models)
        descriptor, log = tempfile.mkstemp(prefix="unipic2-comfyui-", suffix=".log")
        self.log = Path(log)
        self._folder = Path(tempfile.mkdtemp(prefix="unipic2-comfyui-"))
        try:
            with open(descriptor, "wb") as output:
                self._start(folders, output)
            self._wait_until_ready()
            self._check_pack()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self.process is not None:
            _end_tree(self.process)
        shutil.rmtree(self._folder, ignore_errors=True)
        if kind is not None and issubclass(kind, Exception):
            self.console.note(f"ComfyUI's log: {self.log}")
        else:
            self.log.unlink(missing_ok=True)

    def stopped(self, wait_seconds: float = 0.0) -> InputError | None:
        """Return the error to show when the process has ended by itself (now or so soon), or None while it lives."""
        try:
            code = self.process.wait(timeout=wait_seconds)
        except subprocess.TimeoutExpired:
            return None
        killed = " (killed, perhaps for want of memory)" if code == -9 else ""
        return self._failure(f"it ended with exit code {code}{killed}")

    def _failure(self, found: str) -> InputError:
        lines = "\n".join("  " + line for line in last_lines(self.log, 15))
        return InputError(f"ComfyUI at {self.install.root}", found=f"{found}. Its last words:\n{lines}")

    def _start(self, folders: dict[str, str], output) -> None:
        for name in ("output", "input", "temp", "user", "custom_nodes"):
            (self._folder / name).mkdir()
        if self.pack is not None:
            _link(self.pack, self._folder / "custom_nodes" / "unipic2")
        folders = {**folders, "custom_nodes": str(self._folder / "custom_nodes")}
        config = self._folder / "extra_model_paths.yaml"
        # JSON is YAML; absolute paths without base_path are taken as they are, with no ~ or $ expansion.
        config.write_text(json.dumps({"unipic2": folders}, ensure_ascii=False), encoding="utf-8")
        if self.cpu is None:
            self.cpu = not self._has_gpu()
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [str(self.install.python), "main.py", *self._arguments(port, config)]
        session = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if sys.platform == "win32" else {}
        if sys.platform != "win32":
            # Its own session: Ctrl-C reaches us alone and we end the whole tree in order.
            session["start_new_session"] = True
        self.process = subprocess.Popen(
            command,
            cwd=self.install.root,
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            **session,
        )

    def _arguments(self, port: int, config: Path) -> list[str]:
        arguments = ["--listen", "127.0.0.1", "--port", str(port), "--disable-auto-launch"]
        for name in ("output", "input", "temp", "user"):
            arguments += [f"--{name}-directory", str(self._folder / name)]
        arguments += ["--extra-model-paths-config", str(config)]
        if self.cpu:
            arguments.append("--cpu")
        arguments += self.options
        # Options that older versions lack are looked up in the file that declares them.
        known = (self.install.root / "comfy" / "cli_args.py").read_text(encoding="utf-8", errors="replace")
        if '"--disable-api-nodes"' in known:
            arguments.append("--disable-api-nodes")
        if '"--database-url"' in known:
            arguments += ["--database-url", f"sqlite:///{(self._folder / 'user' / 'comfyui.db').as_posix()}"]
        return arguments

    def _environment(self) -> dict[str, str]:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
        if self.install.python != Path(sys.executable):
            # They belong to the Python that runs this.
            environment.pop("PYTHONPATH", None)
            environment.pop("PYTHONHOME", None)
        return environment

    def _has_gpu(self) -> bool:
        self.console.status("Looking for a GPU ...")
        command = [str(self.install.python), "-c", GPU_PROBE]
        options = {"capture_output": True, "text": True, "env": self._environment()}
        try:
            probe = subprocess.run(command, timeout=self.start_seconds, **options)
        except subprocess.TimeoutExpired as error:
            found = f"no answer about its GPU within {self.start_seconds:.0f} s"
            remedy = "Use --cpu, or try again when the machine is less busy."
            raise InputError(f"Python {self.install.python}", found=found, remedy=remedy) from error
        except OSError as error:
            raise InputError(f"Python {self.install.python}", found=error, expected="ComfyUI's Python") from error
        if probe.returncode:
            raise InputError(
                f"Python {self.install.python}",
                found=(probe.stderr.strip().splitlines() or ["no message"])[-1],
                expected="the Python that runs ComfyUI, with torch",
                remedy="Name it with --python or COMFYUI_PYTHON.",
            )
        return probe.stdout.strip().endswith("gpu")

    def _wait_until_ready(self) -> None:
        started = time.monotonic()
        name = f"ComfyUI {self.install.version or 'server'} on the {'CPU' if self.cpu else 'GPU'}"
        # No proxy stands between this process and its own child.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while True:
            waited = time.monotonic() - started
            if error := self.stopped():
                raise error
            if waited > self.start_seconds:
                raise self._failure(f"no answer within {self.start_seconds:.0f} s")
            self.console.status(f"Starting {name}: {waited:.0f} s")
            try:
                with opener.open(f"{self.url}/system_stats", timeout=5):
                    break
            except (urllib.error.URLError, OSError):
                time.sleep(0.3)
        self.console.note(f"Started {name} in {time.monotonic() - started:.0f} s.")

    def _check_pack(self) -> None:
        if self.pack is None:
            return
        path = str(self._folder / "custom_nodes" / "unipic2")
        lines = [line for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines() if path in line]
        if any("IMPORT FAILED" in line for line in lines):
            reasons = [line.split(path, 1)[1].strip(" :") for line in lines if "IMPORT FAILED" not in line]
            raise InputError(
                f"node pack {self.pack}",
                found=f"ComfyUI could not import it: {'; '.join(reasons) or 'no reason given'}",
                expected=f"a pack that loads in ComfyUI {self.install.version}",
            )


def extra_model_paths(folders: Sequence[Path]) -> dict[str, str]:
    """Map ComfyUI's model kinds to the subfolders of `folders`, one path per line as its YAML wants them.

    Raises:
        InputError: a folder that does not exist or has no subfolder.
    """
    paths: dict[str, list[str]] = {}
    for folder in folders:
        if not folder.is_dir():
            raise InputError(
                f"models folder {folder}", found="no such folder", expected="a folder like ComfyUI/models"
            )
        kinds = [kind for kind in sorted(folder.iterdir()) if kind.is_dir() and not kind.name.startswith(".")]
        if not kinds:
            raise InputError(
                f"models folder {folder}",
                found="no subfolder",
                expected="subfolders such as diffusion_models, text_encoders, vae",
            )
        if (folder / "models").is_dir():
            raise InputError(
                f"models folder {folder}", found="a folder that holds models/", remedy=f"Use {folder / 'models'}."
            )
        for kind in kinds:
            if kind.name != "custom_nodes":
                paths.setdefault(kind.name, []).append(str(kind))
    return {kind: "\n".join(found) for kind, found in paths.items()}


def _link(pack: Path, link: Path) -> None:
    try:
        link.symlink_to(pack, target_is_directory=True)
    except (OSError, NotImplementedError):
        # Windows without developer mode.
        ignore = shutil.ignore_patterns(".*", "__pycache__", "tests", "benchmarks", "docs", "build", "runs", "out")
        shutil.copytree(pack, link, ignore=ignore)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _end_tree(process: subprocess.Popen) -> None:
    """End the process and all its children: politely first, by force after 10 seconds."""
    if sys.platform == "win32":
        subprocess.run(["taskkill", "/T", "/F", "/PID", str(process.pid)], capture_output=True)
        process.wait(timeout=30)
        return
    for sign, seconds in ((signal.SIGTERM, 10), (signal.SIGKILL, 30)):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            break
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            continue
    process.wait(timeout=30)
