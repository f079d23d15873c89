"""Hundreds of bad values for the pack's nodes over a live server's `/prompt`: refused by name, or harmless."""

import asyncio
import copy
import io

import pytest
from unipic2.cli import workflow as wf
from unipic2.cli.client import ComfyUIClient, ServerLost
from unipic2.cli.comfyui import Server, resolve_install
from unipic2.core.errors import InputError
from unipic2.trainer.micro.evaluate import eval_edit_tasks
from unipic2.trainer.micro.world import render

pytestmark = pytest.mark.comfyui

WORKFLOWS = ("micro_edit_local", "micro_metaquery_understand_edit")
WRONG_TYPES = (None, [], {}, [[]], {"a": 1})
TEXTS = ("", "absent", "../../etc/passwd", "/etc/passwd", "micro (bundled)/../..", "\x00", "é😀" * 40, "a" * 5000, 5)
NUMBERS = (-(2**63), 2**64, -1, 0, 10**9, 0.5, -0.0, 1e308, "abc", "", "12.5", "nan", "inf", True)
PROMPTS = ("", "(a:1e999)", "(((((", "))", "embedding:../../x", "<|im_end|>", "\x00\x01", "word " * 9000, 5, 1.5)
# Links to a node or an output that is not there, or "0" for 0, fail in ComfyUI's own validation, which names the node
# behind.
LINKS = ("text", 5, True, ["1"], [["1", 0]])


def bad_values(kind) -> tuple:
    """Return values to try for an input of a kind; some of them it may take."""
    if isinstance(kind, list) or kind == "COMBO":
        return (*WRONG_TYPES, *TEXTS)
    by_kind = {"INT": NUMBERS, "FLOAT": NUMBERS, "STRING": PROMPTS}
    return (*WRONG_TYPES, *by_kind.get(kind, LINKS))


def attempts(prompt: dict, object_info: dict):
    """Yield `(node id, input, value)` for every input of the pack's nodes; a value of `...` leaves the input out."""
    for node_id, node in prompt.items():
        if node["class_type"].startswith("UniPic2"):
            for name, (kind, _) in wf.input_specs(node, object_info).items():
                for value in (*bad_values(kind), ...):
                    yield node_id, name, value


async def outcome(client: ComfyUIClient, prompt: dict, node_id: str, name: str, value) -> str | None:
    """Return what the server says to a prompt with one value changed; None where it draws."""
    changed = copy.deepcopy(prompt)
    changed[node_id]["inputs"][name] = value
    if value is ...:
        del changed[node_id]["inputs"][name]
    try:
        await client.run(changed)
    except ServerLost as error:
        raise AssertionError(f"{changed[node_id]['class_type']}, {name} = {str(value)[:80]!r} ended it") from error
    except InputError as error:
        return str(error)
    return None


async def try_all(url: str) -> list[tuple[str, str, object, str | None]]:
    """Return every attempt's node class, input, value and what the server said."""
    picture, drawn = io.BytesIO(), render(eval_edit_tasks(1, 0)[0].source).convert("RGBA")
    drawn.paste((0, 0, 0, 0), (16, 16, 48, 48))  # what is transparent is the mask of a local edit
    drawn.save(picture, "png")
    found = []
    async with ComfyUIClient(url) as client:
        object_info = await client.object_info()
        image = await client.upload_image("source.png", picture.getvalue())
        for name in WORKFLOWS:
            prompt, _ = wf.to_prompt(wf.read_workflow(wf.find_workflow(name)), object_info, name)
            for node in prompt.values():
                if node["class_type"] == "LoadImage":
                    node["inputs"]["image"] = image
                if node["class_type"] == "KSampler":
                    node["inputs"]["steps"] = 1
            if name == WORKFLOWS[0]:  # the other loader, on the same picture
                model = next(i for i, node in prompt.items() if node["class_type"] == "UniPic2EnableEditing")
                inputs = {"model": "micro (bundled)", "weight_dtype": "default"}
                prompt["99"] = {"class_type": "UniPic2Loader", "inputs": inputs}
                prompt[model]["inputs"]["model"] = ["99", 0]
            await client.run(prompt)
            for node_id, socket, value in attempts(prompt, object_info):
                said = await outcome(client, prompt, node_id, socket, value)
                found.append((prompt[node_id]["class_type"], socket, value, said))
            await client.run(prompt)  # the server survived all of it
    return found


@pytest.fixture(scope="module")
def answers():
    with Server(resolve_install(), cpu=True) as server:
        return asyncio.run(try_all(server.url))


def test_the_server_survives_hundreds_of_bad_inputs(answers):
    refused = [said for *_, said in answers if said is not None]
    print(f"{len(answers)} inputs, {len(refused)} refused")
    assert len(refused) >= 200


def test_every_refusal_names_the_node_and_the_input(answers):
    for kind, name, value, said in answers:
        if said is not None:
            assert kind in said or kind.replace("UniPic2", "UniPic2 ") in said, (kind, name, value, said)
            assert name in said, (kind, name, value, said)
            assert "Traceback" not in said


def test_what_cannot_be_meant_is_refused(answers):
    """No value of another type, no name that is not offered, no number out of range gets through."""
    choices = ("model", "connector", "weight_dtype", "fit", "task", "positions", "lm_head", "clip", "vae", "image")
    numbers = ("longer_edge", "multiple", "feather", "max_length", "temperature")
    for kind, name, value, said in answers:
        if name in choices:
            may_be_left_out = value in (..., None) and name in ("fit", "task", "image")
            assert said is not None or may_be_left_out, (kind, name, value)
        if name in numbers and value in (-(2**63), 2**64, "abc"):
            assert said is not None, (kind, name, value)
