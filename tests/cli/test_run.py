"""`unipic2 run` against a server that speaks ComfyUI's protocol: what it sends, saves, prints, and how it fails."""

import asyncio
import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
from unipic2.cli import main

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments) -> int:
    return main(["run", *map(str, arguments)])


def only_error(capsys) -> str:
    """Return the one error; there is no traceback and nothing on stdout."""
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert out == "" and "Traceback" not in err and len(errors) == 1, err
    return errors[0]


# -- what works ----------------------------------------------------------------------------------------------------


def test_saves_the_servers_bytes_and_prints_the_path(server, workflow, tmp_path, capsys):
    assert run(workflow, "--server", server.url, "-o", tmp_path / "out.png") == 0
    assert (tmp_path / "out.png").read_bytes() == server.pictures[0]
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'out.png'}\n"
    assert "[2/3] Sampler" in err and "4/4" in err
    sent = server.prompts[0]
    assert sent["prompt"]["2"]["inputs"] == {
        "image": ["1", 0],
        "seed": 42,
        "steps": 20,
        "cfg": 3.5,
        "sampler_name": "euler",
    }
    assert sent["extra_data"]["extra_pnginfo"]["workflow"] == json.loads(workflow.read_text())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["draw.json", "out.png"]


def test_default_name_has_workflow_and_seed(server, workflow, tmp_path):
    assert run(workflow, "--server", server.url, "--seed", "7") == 0
    assert (tmp_path / "draw_7.png").is_file()
    assert server.prompts[0]["prompt"]["2"]["inputs"]["seed"] == 7
    # The picture must not carry a workflow whose seed is another one.
    assert server.prompts[0]["extra_data"] == {}


def test_several_pictures_are_numbered(server, workflow, tmp_path, make_png, capsys):
    server.pictures = [make_png("red"), make_png("blue")]
    assert run(workflow, "--server", server.url, "-o", "out.png") == 0
    assert capsys.readouterr().out == "out_00001.png\nout_00002.png\n"
    assert (tmp_path / "out_00002.png").read_bytes() == server.pictures[1]


def test_picture_is_uploaded_and_named_by_content(server, workflow, tmp_path, make_png):
    (tmp_path / "in.png").write_bytes(make_png("green"))
    assert run(workflow, "--server", server.url, "--image", "in.png", "-o", ".") == 0
    assert run(workflow, "--server", server.url, "--image", "LoadImage=in.png", "-o", ".") == 0
    names = [prompt["prompt"]["1"]["inputs"]["image"] for prompt in server.prompts]
    assert names[0] == names[1] and list(server.uploads) == [names[0]]
    assert re.fullmatch(r"unipic2_[0-9a-f]{20}\.png", names[0])


def test_set_by_id_title_and_class(server, workflow):
    options = ["--set", "2.steps=30", "--set", "Sampler.cfg=1.5", "--set", "KSampler.sampler_name=512"]
    assert run(workflow, "--server", server.url, *options) == 0
    inputs = server.prompts[0]["prompt"]["2"]["inputs"]
    assert (inputs["steps"], inputs["cfg"], inputs["sampler_name"]) == (30, 1.5, "512")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prompt", " "], "an empty text"),
        (["--set", "steps=3"], "NODE.INPUT=VALUE"),
        (["--image", "in.png", "--image", "in.png"], "no NODE="),
        (["--python", "python3"], "--comfyui PATH"),
    ],
)
def test_wrong_options_are_found_before_comfyui_is_installed(
    workflow, tmp_path, make_png, monkeypatch, capsys, options, words
):
    monkeypatch.setattr("unipic2.cli.comfyui.resolve_install", lambda *args: pytest.fail("an install was looked for"))
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    (tmp_path / "in.png").write_bytes(make_png())
    assert run(workflow, *options) == 2
    assert words in only_error(capsys)


def test_a_name_that_is_too_long_is_one_error(workflow, capsys):
    assert run("x" * 300) == 2
    assert "xxx" in only_error(capsys)


def test_api_format_is_taken_as_it_is(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    api = {
        "7": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8}},
        "2": {"class_type": "KSampler", "inputs": {"image": ["7", 0], "seed": 1, "steps": 2, "cfg": 1.0}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "x"}},
    }
    Path("api.json").write_text(json.dumps(api))
    assert run("api.json", "--server", server.url.removeprefix("http://")) == 0
    assert server.prompts[0]["prompt"] == api


def test_previews_are_saved_when_nothing_else_is(server, workflow, tmp_path):
    server.fault = "previews only"
    assert run(workflow, "--server", server.url) == 0
    assert (tmp_path / "draw_42.png").read_bytes() == server.pictures[0]


def test_a_dropped_socket_is_connected_again(server, workflow, tmp_path):
    server.fault = "drops the socket"
    assert run(workflow, "--server", server.url) == 0
    assert (tmp_path / "draw_42.png").is_file() and len(server.sockets) == 2


def test_a_job_that_ends_between_two_connections_is_found(server, workflow, tmp_path):
    server.fault = "finishes unseen"
    assert run(workflow, "--server", server.url, "--timeout", "20") == 0
    assert (tmp_path / "draw_42.png").is_file() and len(server.sockets) == 2


def test_a_limit_that_ran_out_leaves_no_cancellation_behind():
    from unipic2.cli.client import _limit

    async def main():
        with pytest.raises(asyncio.TimeoutError):
            async with _limit(0.01):
                await asyncio.sleep(5)
        await asyncio.sleep(0)
        return getattr(asyncio.current_task(), "cancelling", lambda: 0)()

    assert asyncio.run(main()) == 0


# -- servers that fail ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("another site", ["is this the address of a comfyui", "it works!"]),
        ("bad json /object_info", ["/object_info", '{"broken":']),
        ("bad json /prompt", ["/prompt"]),
        ("bad json in events", ["/ws"]),
        ("500 /prompt", ["http 500 from /prompt: internal server error"]),
        ("500 /ws", ["http 500 from /ws"]),
        ("500 /view", ["http 500 from /view of x_0_.png"]),
        ("node_errors", ['node 2 "sampler" (ksampler), input sampler_name: value not in list', "'foo' not in"]),
        ("no outputs", ["prompt has no outputs"]),
        ("execution_error", ['node 2 "sampler" (ksampler) failed', "outofmemoryerror: allocation failed"]),
        ("interrupted", ["interrupted on the server"]),
        ("dies", ["no answer"]),
        ("restarted", ["the job is gone"]),
        ("saves nothing", ["saved no picture", "saveimage"]),
    ],
)
def test_server_faults_are_one_error(server, workflow, tmp_path, capsys, fault, words):
    server.fault = fault
    assert run(workflow, "--server", server.url, "-o", "out.png") == 2
    error = only_error(capsys).lower()
    assert all(word in error for word in words), error
    assert [p.name for p in tmp_path.iterdir()] == ["draw.json"]


def test_no_server(server, workflow, capsys):
    server.stop()
    assert run(workflow, "--server", server.url) == 2
    assert f"ComfyUI server {server.url}: found no answer" in only_error(capsys)


def test_old_server(server, workflow, capsys):
    server.version = "0.3.40"
    assert run(workflow, "--server", server.url) == 2
    assert "found version 0.3.40, expected 0.3.64 or newer" in only_error(capsys)


@pytest.mark.parametrize("url", ["ftp://host", "http://", "http://host:99999", "http://host:abc"])
def test_not_an_address(workflow, capsys, url):
    assert run(workflow, "--server", url) == 2
    assert "found not an address" in only_error(capsys)


def test_timeout_stops_the_job(server, workflow, capsys):
    server.fault = "hangs"
    assert run(workflow, "--server", server.url, "--timeout", "0.5") == 2
    assert "still running after 0.5 s" in only_error(capsys)
    assert "POST /interrupt" in server.calls


def test_ctrl_c_stops_the_job(server, workflow, capsys):
    server.fault = "hangs"

    def interrupt():
        assert server.prompted.wait(20)
        os.kill(os.getpid(), signal.SIGINT)

    # A shell that starts the tests in the background lets them ignore Ctrl-C.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=interrupt).start()
        assert run(workflow, "--server", server.url) == 130
    finally:
        signal.signal(signal.SIGINT, previous)
    assert "POST /interrupt" in server.calls
    assert "Traceback" not in capsys.readouterr().err


# -- inputs that are wrong -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--set", "2.step=3"], ["'step' of node 2 \"Sampler\"", "seed, steps, cfg", "Did you mean steps?"]),
        (["--set", "2.image=3"], ["a connection of type IMAGE"]),
        (["--set", "Nobody.steps=3"], ["'Nobody'", "no such node", 'node 2 "Sampler" (KSampler)']),
        (["--set", "steps=3"], ["NODE.INPUT=VALUE"]),
        (["--prompt", "a cat"], ["no node with an input named prompt"]),
        (["--prompt", " "], ["an empty text"]),
        (["--image", "2=in.png"], ['node 2 "Sampler" (KSampler), which loads no picture', "node 1 (LoadImage)"]),
        (["--image", "in.png", "--image", "in.png"], ["no NODE="]),
        (["--image", "missing.png"], ["No such file"]),
        (["--cpu"], ["--server"]),
    ],
)
def test_wrong_options(server, workflow, tmp_path, make_png, capsys, options, words):
    (tmp_path / "in.png").write_bytes(make_png())
    assert run(workflow, "--server", server.url, *options) == 2
    error = only_error(capsys)
    assert all(word in error for word in words), error
    assert server.prompts == []


def test_unknown_node_names_class_id_and_pack(server, workflow, ui, capsys):
    ui["nodes"][1].update(type="FancySampler", properties={"cnr_id": "comfyui-fancy", "ver": "1.2.3"})
    workflow.write_text(json.dumps(ui))
    assert run(workflow, "--server", server.url) == 2
    error = only_error(capsys)
    assert "FancySampler (node 2)" in error and "node pack comfyui-fancy (saved with 1.2.3)" in error


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "broken JSON"),
        ("[1]", "a JSON list"),
        ("{}", "UI or API format"),
        ('{"nodes": [], "links": []}', "no node to run"),
        ('{"1": {"class_type": "EmptyImage", "inputs": 3}}', "without a dict of inputs"),
    ],
)
def test_broken_workflow_files(server, workflow, capsys, text, words):
    workflow.write_text(text)
    assert run(workflow, "--server", server.url) == 2
    assert words in only_error(capsys)


def test_binary_workflow_file(workflow, make_png, capsys):
    workflow.write_bytes(make_png())
    assert run(workflow, "--server", "http://127.0.0.1:1") == 2
    assert "bytes that are not text" in only_error(capsys)


def test_output_folder_is_checked_before_anything_is_queued(server, workflow, tmp_path, capsys):
    for target in ("missing/out.png", "missing/", "missing", "draw.json/out.png"):
        assert run(workflow, "--server", server.url, "-o", target) == 2
        assert "output folder" in only_error(capsys)
    assert server.calls == []


def test_full_disk_leaves_the_old_file_and_nothing_else(server, workflow, tmp_path, monkeypatch, capsys):
    (tmp_path / "out.png").write_bytes(b"old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert run(workflow, "--server", server.url, "-o", "out.png") == 2
    assert "found a full disk" in only_error(capsys)
    assert (tmp_path / "out.png").read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["draw.json", "out.png"]


# -- the command itself --------------------------------------------------------------------------------------------


def test_missing_extra_is_one_line(workflow, monkeypatch, capsys):
    monkeypatch.setattr("unipic2.cli.run.REQUIRES", {"no_such_module": "no-such-package"})
    assert run(workflow) == 2
    assert (
        only_error(capsys)
        == 'error: unipic2 run needs no-such-package. In the folder of unipic2: pip install ".[run]"'
    )


def test_help_and_version(capsys):
    assert main(["--help"]) == 0
    assert "unipic2 run micro_edit --image photo.png" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert re.fullmatch(r"unipic2 \d+\.\d+\.\d+\n", capsys.readouterr().out)
    assert main([]) == 2


def test_bad_seed(workflow, capsys):
    for seed in ("-1", "x", str(2**64)):
        assert run(workflow, "--seed", seed) == 2
        assert "--seed" in capsys.readouterr().err


def test_a_process_of_its_own_shows_no_traceback_and_imports_no_torch(tmp_path):
    code = f"""
import importlib.util, sys
where = {{"submodule_search_locations": [{str(ROOT)!r}]}}
spec = importlib.util.spec_from_file_location("unipic2", {str(ROOT / "__init__.py")!r}, **where)
sys.modules["unipic2"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["unipic2"])
from unipic2.cli import main
heavy = {{"torch", "aiohttp", "PIL", "comfy_cli"}} & set(sys.modules)
assert not heavy, heavy
sys.exit(main(["run", "no_such_workflow"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: workflow no_such_workflow: found no such file")
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture
def trainer(monkeypatch):
    """Stand in for the trainer's command line with a function of the test's own."""

    def put(trainer_main):
        fake = types.ModuleType("unipic2.trainer.cli")
        fake.main = trainer_main
        monkeypatch.setitem(sys.modules, "unipic2.trainer", types.ModuleType("unipic2.trainer"))
        monkeypatch.setitem(sys.modules, "unipic2.trainer.cli", fake)

    return put


def test_train_eval_and_micro_go_to_the_trainer(trainer):
    given = []
    trainer(lambda argv: given.append(argv) or 5)
    for command in (["train", "pretrain", "--help"], ["eval", "micro", "--out", "x"], ["micro"]):
        assert main(command) == 5 and given[-1] == command


def test_missing_training_package_is_one_line(trainer, capsys):
    def needs(argv):
        raise ModuleNotFoundError("No module named 'diffusers.models'", name="diffusers.models")

    trainer(needs)
    assert main(["train", "pretrain"]) == 2
    expected = (
        'error: unipic2 train needs the package diffusers.models. In the folder of unipic2: pip install ".[train]"'
    )
    assert only_error(capsys) == expected


def test_a_bug_of_ours_is_not_called_a_missing_package(trainer):
    def broken(argv):
        raise ModuleNotFoundError("No module named 'unipic2.trainer.x'", name="unipic2.trainer.x")

    trainer(broken)
    with pytest.raises(ModuleNotFoundError):
        main(["train", "pretrain"])
