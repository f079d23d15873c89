"""Finding a ComfyUI and running its server; the one here is a small stand-in with the same command line."""

import json
import os
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from unipic2.cli import comfyui
from unipic2.cli.comfyui import ComfyUIInstall, Server, resolve, resolve_install
from unipic2.core.errors import InputError

# Answers /system_stats, notes what it was given, and starts a child that would outlive it.
STAND_IN = """
import argparse, http.server, json, os, subprocess, sys
args = argparse.ArgumentParser()
for name in ("listen", "extra-model-paths-config", "database-url"):
    args.add_argument("--" + name)
for name in ("output", "input", "temp", "user"):
    args.add_argument(f"--{name}-directory")
args.add_argument("--port", type=int)
for name in ("cpu", "disable-auto-launch", "disable-api-nodes"):
    args.add_argument("--" + name, action="store_true")
args = args.parse_args()
config = json.load(open(args.extra_model_paths_config))["unipic2"]
pack = os.path.join(config["custom_nodes"], "unipic2")
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
seen = {**vars(args), "config": config, "child": child.pid, "pack": os.listdir(pack) if os.path.isdir(pack) else None}
json.dump(seen, open("seen.json", "w"))
print("starting", flush=True)
DO
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *a):
        pass
http.server.HTTPServer((args.listen, args.port), Handler).serve_forever()
"""


@pytest.fixture
def install(tmp_path):
    root = tmp_path / "ComfyUI"
    (root / "comfy").mkdir(parents=True)
    (root / "comfy" / "cli_args.py").write_text('"--disable-api-nodes" "--database-url"')
    (root / "comfyui_version.py").write_text('__version__ = "0.30.0"')
    (root / "main.py").write_text(STAND_IN.replace("DO", ""))
    return ComfyUIInstall(root, Path(sys.executable))


@pytest.fixture
def pack(tmp_path):
    (tmp_path / "my pack").mkdir()
    (tmp_path / "my pack" / "__init__.py").write_text("")
    return tmp_path / "my pack"


def seen(install) -> dict:
    return json.loads((install.root / "seen.json").read_text())


def alive(pid: int) -> bool:
    try:
        # A dead child of a dead parent may wait for init to reap it.
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        if Path("/proc").is_dir():
            return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_server_runs_apart_and_leaves_nothing(install, pack, tmp_path, capsys):
    before = {p.name for p in install.root.iterdir()}
    models = tmp_path / "models"
    (models / "vae").mkdir(parents=True)
    with Server(install, cpu=True, pack=pack, models=[models]) as server:
        assert urllib.request.urlopen(server.url + "/system_stats").status == 200
        given = seen(install)
        folder = Path(given["output_directory"]).parent
        assert given["cpu"] and given["disable_api_nodes"] and given["disable_auto_launch"]
        assert given["listen"] == "127.0.0.1" and given["pack"] == ["__init__.py"]
        assert given["config"]["vae"] == str(models / "vae")
        assert given["database_url"].endswith("user/comfyui.db") and alive(given["child"])
    assert not folder.exists() and not server.log.exists()
    assert {p.name for p in install.root.iterdir()} == {*before, "seen.json"}
    assert server.process.poll() is not None
    deadline = time.monotonic() + 10
    while alive(given["child"]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(given["child"])
    assert "Started ComfyUI 0.30.0 on the CPU" in capsys.readouterr().err


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_server_ends_whatever_happens(install, error):
    with pytest.raises(error):
        with Server(install, cpu=True, pack=None) as server:
            raise error
    assert server.process.poll() is not None
    # The log stays for a bug, not for Ctrl-C.
    assert server.log.exists() == (error is RuntimeError)
    server.log.unlink(missing_ok=True)


def test_options_that_an_older_version_lacks_are_left_out(install):
    (install.root / "comfy" / "cli_args.py").write_text("")
    with Server(install, cpu=True, pack=None):
        given = seen(install)
    assert given["database_url"] is None and given["disable_api_nodes"] is False


def test_death_at_start_shows_the_last_lines_and_keeps_the_log(install, capsys):
    do = "[print('line', i, flush=True) for i in range(40)]; child.kill(); sys.exit(7)"
    (install.root / "main.py").write_text(STAND_IN.replace("DO", do))
    with pytest.raises(InputError) as error:
        Server(install, cpu=True, pack=None).__enter__()
    assert "exit code 7" in str(error.value) and "line 25\n" in str(error.value)
    assert "line 24\n" not in str(error.value)
    log = Path(capsys.readouterr().err.split("ComfyUI's log: ")[1].strip())
    assert "line 0" in log.read_text()
    log.unlink()


def test_no_answer_in_time(install):
    (install.root / "main.py").write_text(STAND_IN.replace("DO", "import time; time.sleep(60)"))
    server = Server(install, cpu=True, pack=None, start_seconds=1)
    with pytest.raises(InputError, match="no answer within 1 s"):
        server.__enter__()
    assert server.process.poll() is not None
    server.log.unlink()


def test_a_pack_that_does_not_import_is_an_error(install, pack):
    do = (
        "print('Error while calling comfy_entrypoint in', pack + ': No module named torchx')\n"
        "print('   0.0 seconds (IMPORT FAILED):', pack, flush=True)"
    )
    (install.root / "main.py").write_text(STAND_IN.replace("DO", do))
    server = Server(install, cpu=True, pack=pack)
    with pytest.raises(InputError, match="could not import it: No module named torchx"):
        server.__enter__()
    server.log.unlink()


def test_another_pack_that_fails_is_not_ours(install, pack):
    do = "print('   0.0 seconds (IMPORT FAILED): /elsewhere/custom_nodes/unipic2', flush=True)"
    (install.root / "main.py").write_text(STAND_IN.replace("DO", do))
    with Server(install, cpu=True, pack=pack):
        pass


def test_without_links_the_pack_is_copied(install, pack, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("A required privilege is not held by the client")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    (pack / "tests").mkdir()
    with Server(install, cpu=True, pack=pack):
        assert seen(install)["pack"] == ["__init__.py"]
    assert (pack / "__init__.py").is_file()


def test_a_python_without_torch_is_named(install, tmp_path):
    without = ComfyUIInstall(install.root, tmp_path / "python")
    without.python.write_text("#!/bin/sh\necho 'ModuleNotFoundError: No module named torch' >&2\nexit 1\n")
    without.python.chmod(0o755)
    server = Server(without, pack=None)
    with pytest.raises(InputError, match="No module named torch") as error:
        server.__enter__()
    assert "COMFYUI_PYTHON" in str(error.value)
    server.log.unlink()


# -- finding one ---------------------------------------------------------------------------------------------------


def test_resolve_finds_the_installs_python(install, monkeypatch):
    monkeypatch.delenv("COMFYUI_PYTHON", raising=False)
    assert resolve(install.root).python == Path(sys.executable)
    names = (".venv", "Scripts/python.exe") if sys.platform == "win32" else (".venv", "bin/python")
    python = install.root.joinpath(*names)
    python.parent.mkdir(parents=True)
    python.write_bytes(b"")
    assert resolve(install.root).python == python
    monkeypatch.setenv("COMFYUI_PYTHON", sys.executable)
    assert resolve(install.root).python == Path(sys.executable)
    monkeypatch.setenv("COMFYUI_PATH", str(install.root))
    assert resolve_install() == resolve(install.root)


def test_resolve_errors(install, tmp_path):
    with pytest.raises(InputError, match="no main.py.*Did you mean"):
        resolve(tmp_path)
    with pytest.raises(InputError, match="no such program"):
        resolve(install.root, python="/no/such/python")
    (install.root / "comfyui_version.py").write_text('__version__ = "0.3.63"')
    with pytest.raises(InputError, match="found version 0.3.63, expected 0.3.64 or newer"):
        resolve(install.root)


def test_models_folders(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        comfyui.extra_model_paths([tmp_path / "missing"])
    (tmp_path / "a").mkdir()
    with pytest.raises(InputError, match="no subfolder"):
        comfyui.extra_model_paths([tmp_path / "a"])
    for name in ("a/vae", "a/.git", "a/custom_nodes", "b/vae", "b/loras"):
        (tmp_path / name).mkdir(parents=True)
    found = comfyui.extra_model_paths([tmp_path / "a", tmp_path / "b"])
    assert found == {"vae": f"{tmp_path / 'a' / 'vae'}\n{tmp_path / 'b' / 'vae'}", "loras": str(tmp_path / "b/loras")}
    (tmp_path / "c" / "models").mkdir(parents=True)
    with pytest.raises(InputError, match="Use .*models"):
        comfyui.extra_model_paths([tmp_path / "c"])
