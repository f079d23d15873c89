"""Reward functions: what is made of their answers, the micro verifier, a judge behind a server that misbehaves."""

import asyncio
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image
from unipic2.core.errors import InputError
from unipic2.trainer.micro.tasks import sample_edit, sample_t2i
from unipic2.trainer.micro.world import render
from unipic2.trainer.rewards import score
from unipic2.trainer.rewards.judge import EditJudge
from unipic2.trainer.rewards.micro import micro_soft, micro_strict
from unipic2.trainer.rewards.preservation import preservation

PICTURE = Image.new("RGB", (8, 8), "red")


def ask(functions, count=2, **columns):
    return asyncio.run(score(functions, ["p"] * count, [PICTURE] * count, columns))


# Any function


def test_plain_functions_and_coroutines_side_by_side():
    async def slow(prompts, images, size, **columns):
        await asyncio.sleep(0.01)
        return [None, size[1] / 2]

    found = ask([lambda prompts, images, **columns: [1, 2.5], slow], size=[1, 3])
    torch.testing.assert_close(found.rewards, torch.tensor([[1, float("nan")], [2.5, 1.5]]).double(), equal_nan=True)
    assert found.warnings == ()


def test_a_reward_that_never_changes_is_told():
    def same(prompts, images, **columns):
        return [0.25] * len(prompts)

    assert ask([same], 3).warnings == ("reward same is 0.25 for all of 3 samples",)


def test_no_reward_at_all_is_told_and_ends_nothing():
    def absent(prompts, images, **columns):
        return [None, float("nan")]

    found = ask([absent])
    assert found.rewards.isnan().all() and found.warnings == ("no reward for any of 2 samples, from absent",)


def boom(prompts, images, **columns):
    raise KeyError("mask")


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda prompts, images, **columns: [1.0], "found 1 values, expected 2"),
        (lambda prompts, images, **columns: [1.0, float("inf")], "found inf, expected a number"),
        (lambda prompts, images, **columns: ["good", "bad"], "found 'good', expected a number or None"),
        (boom, "reward boom: found KeyError: 'mask'"),
    ],
)
def test_rewards_that_are_none(function, found):
    with pytest.raises(InputError, match=found):
        ask([function])


def test_the_micro_rewards():
    rng = np.random.default_rng(0)
    drawn, scene = sample_t2i(rng, "colors")
    edit = sample_edit(rng, "recolor")
    tasks = [drawn, edit, edit]
    images = [render(scene), render(edit.target), render(edit.source)]
    assert micro_strict([""] * 3, images, task=tasks, kind=["x"] * 3) == [1, 1, 0]
    soft = micro_soft([""] * 3, images, task=tasks)
    assert soft[:2] == [1, 1] and 0 < soft[2] < 1


# The judge


class Server:
    """A chat endpoint that answers as `behave(number of the request, request)` says: (status, body) or seconds."""

    def __init__(self):
        self.requests, self.paths, self.headers, self.behave = [], [], [], lambda number, request: good(8, 9)
        self.at_a_time = self.most_at_a_time = 0
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(outer.requests)
                    outer.requests.append(request)
                    outer.paths.append(self.path)
                    outer.headers.append(dict(self.headers))
                    outer.at_a_time += 1
                    outer.most_at_a_time = max(outer.most_at_a_time, outer.at_a_time)
                try:
                    self.answer(outer.behave(number, request))
                except OSError:
                    pass  # who asked has gone
                finally:
                    with lock:
                        outer.at_a_time -= 1

            def answer(self, what):
                if what == "closed":
                    self.connection.close()
                    return
                if isinstance(what, float):
                    time.sleep(what)
                    what = good(8, 9)
                status, body = what
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"


def completion(text):
    return 200, json.dumps({"choices": [{"message": {"content": text}}]}).encode()


def good(*scores):
    return completion(f'Here it is: {{"scores": {list(scores)}, "reason": "so"}}')


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def judged(server, count=1, source=PICTURE, **options):
    judge = EditJudge(server.url, "qwen", **{"backoff": 0.01, "timeout": 2.0, **options})
    prompts, images = [f"make it {i}" for i in range(count)], [PICTURE] * count
    return asyncio.run(judge(prompts, images, source_image=[source] * count)), judge


def test_what_is_asked_and_what_is_made_of_the_answers(server):
    server.behave = lambda number, request: good(4, 9) if len(request["messages"][0]["content"]) == 3 else good(10, 9)
    values, judge = judged(server, api_key="secret")
    assert values == [pytest.approx((0.4 * 0.9) ** 0.5)] and not judge.failures
    assert set(server.paths) == {"/v1/chat/completions"} and len(server.requests) == 2
    assert all(h["Authorization"] == "Bearer secret" for h in server.headers)
    success = next(r for r in server.requests if len(r["messages"][0]["content"]) == 3)
    assert success["model"] == "qwen" and success["temperature"] == 0
    *pictures, text = success["messages"][0]["content"]
    assert all(p["image_url"]["url"].startswith("data:image/png;base64,") for p in pictures)
    assert "make it 0" in text["text"] and '{"scores": [7, 9]' in text["text"]


def test_text_to_image_is_not_asked_about(server):
    assert judged(server, 2, source=None)[0] == [None, None] and not server.requests


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((500, b"out of memory"), "status 500"),
        ((429, b""), "status 429"),
        ("closed", "connection: "),
        (1.0, "timeout"),
    ],
)
def test_every_failure_of_the_server_is_tried_again_then_counted(server, answer, reason):
    server.behave = lambda number, request: answer
    values, judge = judged(server, max_retries=1, timeout=0.3)
    assert values == [None] and len(server.requests) == 4, "two questions, each asked twice"
    ((found, count),) = judge.failures.items()
    assert found.startswith(reason) and count == 2


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((404, b"no such model"), "status 404"),
        ((200, b"<html>"), "no chat completion"),
        ((200, b"{}"), "no chat completion"),
        (completion("nine of ten"), "no JSON with scores"),
        (completion('{"scores": [1, 2'), "no JSON with scores"),
        (completion('{"score": [1, 2]}'), "no JSON with scores"),
        (completion('{"scores": [NaN, 5]}'), "scores outside 0 to 10"),
        (completion('{"scores": [11, 5]}'), "scores outside 0 to 10"),
        (completion('{"scores": [true, "5"]}'), "scores outside 0 to 10"),
        (completion('{"scores": [5]}'), "another number of scores than 2"),
        (completion(None), "no JSON with scores"),
    ],
)
def test_every_answer_that_cannot_be_used_is_counted(server, answer, reason):
    """It is not asked for again, and does not count against the server."""
    server.behave = lambda number, request: answer
    values, judge = judged(server, 3, max_retries=2, max_failures=1)
    assert values == [None] * 3 and len(server.requests) == 6 and judge.failures == {reason: 6}


def test_one_bad_answer_is_mended_by_asking_again(server):
    server.behave = lambda number, request: (503, b"") if number < 2 else good(10, 10)
    values, judge = judged(server)
    assert values == [1.0] and not judge.failures and len(server.requests) == 4


def test_one_failure_does_not_touch_the_others(server):
    def behave(number, request):
        return (500, b"") if "make it 1" in request["messages"][0]["content"][-1]["text"] else good(10, 10)

    server.behave = behave
    values, judge = judged(server, 3, max_retries=0)
    assert values == [1.0, None, 1.0] and sum(judge.failures.values()) == 1


def test_requests_at_a_time_are_limited(server):
    server.behave = lambda number, request: 0.05
    judged(server, 6, concurrency=3)
    assert server.most_at_a_time == 3 and len(server.requests) == 12


def test_a_server_that_keeps_failing_is_left_alone_for_a_while(server, capsys):
    server.behave = lambda number, request: (500, b"")
    values, judge = judged(server, 10, max_retries=0, concurrency=1, max_failures=3, cooldown=0.4)
    assert values == [None] * 10 and len(server.requests) == 3
    assert judge.failures == {"status 500": 3, "server left alone": 17}
    told = "20 questions without an answer (server left alone 17, status 500 3)"
    assert told in capsys.readouterr().err

    def again():
        return asyncio.run(judge(["x"] * 3, [PICTURE] * 3, source_image=[PICTURE] * 3))

    time.sleep(0.4)
    assert again() == [None] * 3 and len(server.requests) == 4, "one request tries it, and fails"
    time.sleep(0.4)
    assert again() == [None] * 3 and len(server.requests) == 4, "twice as long"
    time.sleep(0.4)
    server.behave = lambda number, request: good(10, 10)
    assert again() == [1.0] * 3


def test_waiting_for_a_retry_holds_nobody_up(server):
    def behave(number, request):
        return (500, b"") if "make it 0" in request["messages"][0]["content"][-1]["text"] else good(10, 10)

    server.behave = behave
    judged(server, 4, concurrency=1, max_retries=1, backoff=0.3)
    texts = [request["messages"][0]["content"][-1]["text"] for request in server.requests]
    assert "make it 0" in texts[0] and "make it 0" in texts[-1] and "make it 3" not in texts[-1]


def test_no_server_at_all():
    judge = EditJudge("http://127.0.0.1:9/v1", "m", max_retries=0)
    assert asyncio.run(judge(["x"], [PICTURE], source_image=[PICTURE])) == [None]
    assert list(judge.failures) == ["connection: ConnectError"]


def test_prompts_in_files_and_settings_that_cannot_be(tmp_path):
    (tmp_path / "p.txt").write_text("Do {this}")
    with pytest.raises(InputError, match="judge prompt .*p.txt: found other braces"):
        EditJudge("http://x", "m", success_prompt=tmp_path / "p.txt")
    with pytest.raises(InputError, match="judge prompt .*none.txt: found No such file"):
        EditJudge("http://x", "m", success_prompt=tmp_path / "none.txt")
    with pytest.raises(InputError, match="judge concurrency: found 0"):
        EditJudge("http://x", "m", concurrency=0)


# Preservation


def test_preservation_is_the_share_of_pixels_that_were_left():
    source = Image.new("RGB", (40, 40), "white")
    half = source.copy()
    half.paste((255, 0, 0), (0, 0, 20, 40))
    faint = Image.new("RGB", (40, 40), (227, 255, 255))
    images = [source, half, faint, Image.new("RGB", (40, 40), (250, 250, 250)), half]
    found = preservation(["p"] * 5, images, source_image=[source] * 4 + [None])
    assert found[:2] == [1.0, 0.5] and found[2] == pytest.approx(0.5) and found[3:] == [1.0, None]
    assert preservation(["p"], [source.resize((20, 20))], source_image=[source]) == [1.0]
