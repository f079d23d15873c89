"""Reward functions: what is made of their answers, the micro verifier, a judge behind a server that misbehaves."""

import asyncio
import json
import math
import threading
import time
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file
from unipic2.core.errors import InputError
from unipic2.trainer.micro.tasks import sample_edit, sample_t2i
from unipic2.trainer.micro.world import render
from unipic2.trainer.rewards import beside, columns_of, looked_through
from unipic2.trainer.rewards.aesthetic import AestheticScore
from unipic2.trainer.rewards.digit_judge import EditDigitJudge
from unipic2.trainer.rewards.endpoint import JudgeFailed, scores_reader
from unipic2.trainer.rewards.judge import EditJudge
from unipic2.trainer.rewards.micro import micro_soft, micro_strict
from unipic2.trainer.rewards.ocr import OcrReward, text_asked
from unipic2.trainer.rewards.preservation import preservation
from unipic2.trainer.rewards.registry import RewardArguments

from .judge_server import completion, good

PICTURE = Image.new("RGB", (8, 8), "red")


def ask(functions, count=2, **columns):
    return looked_through(functions, *beside.ask(functions, ["p"] * count, [PICTURE] * count, columns))


def unknown(values):
    return all(value is not None and math.isnan(value) for value in values)


# Any function


def test_plain_functions_and_coroutines_side_by_side():
    async def slow(prompts, images, size, **columns):
        await asyncio.sleep(0.01)
        return [None, size[1] / 2]

    found = ask([lambda prompts, images, **columns: [1, 2.5], slow], size=[1, 3])
    torch.testing.assert_close(found.rewards, torch.tensor([[1, float("nan")], [2.5, 1.5]]).double(), equal_nan=True)
    assert found.warnings == ()


def test_a_plain_function_may_run_a_loop_of_its_own():
    async def answer():
        return 0.5

    found = ask([lambda prompts, images, **columns: [asyncio.run(answer()), 1.0]])
    assert found.rewards.tolist() == [[0.5], [1.0]]


def test_a_plain_function_may_return_what_is_awaited():
    async def slow(prompts, images, **columns):
        return [1.0, 0.0]

    assert ask([lambda *args, **columns: slow(*args, **columns)]).rewards.tolist() == [[1.0], [0.0]]


def test_what_a_coroutine_keeps_can_be_used_again():
    """Such as a client with open connections, which belong to the loop that they were made on."""
    kept = []

    async def client(queue):
        while True:
            future, value = await queue.get()
            future.set_result(value)

    async def reward(prompts, images, **columns):
        loop = asyncio.get_running_loop()
        if not kept:
            kept.append(asyncio.Queue())
            kept.append(loop.create_task(client(kept[0])))
        future = loop.create_future()
        await kept[0].put((future, 0.25))
        return [await asyncio.wait_for(future, 5)] * len(prompts)

    for _ in range(3):
        assert ask([reward]).rewards.tolist() == [[0.25], [0.25]]


def test_what_is_under_way_ends_with_the_generation():
    ended = []

    begun = threading.Semaphore(0)

    async def endless(prompts, images, **columns):
        begun.release()
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(len(prompts))

    with pytest.raises(KeyboardInterrupt), beside.Beside([endless], ["p"] * 4, {}, 2) as rewards:
        rewards.drawn([PICTURE] * 2)
        rewards.drawn([PICTURE] * 2)
        assert begun.acquire(timeout=5) and begun.acquire(timeout=5)
        raise KeyboardInterrupt
    assert ended == [2, 2]


def test_where_one_fails_the_others_go_no_further():
    ended, begun = [], asyncio.Event()

    async def endless(prompts, images, **columns):
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(len(prompts))

    async def failing(prompts, images, **columns):
        await begun.wait()
        raise KeyError("label")

    with pytest.raises(InputError, match="reward failing: found KeyError"):
        ask([endless, failing])
    assert ended == [2]


def test_a_reward_that_never_changes_is_told():
    def same(prompts, images, **columns):
        return [0.25] * len(prompts)

    assert ask([same], 3).warnings == ("reward same is 0.25 for all of 3 samples",)


def test_no_reward_at_all_is_told_and_ends_nothing():
    def absent(prompts, images, **columns):
        return [None, float("nan")]

    found = ask([absent])
    assert found.rewards.isnan().all() and found.warnings == (
        "reward absent could not be found out for 1 of 2 samples, which teach nothing",
        "no reward for any of 2 samples, from absent",
    )


def test_what_is_unknown_is_not_what_does_not_apply():
    def reward(prompts, images, **columns):
        return [1.0, None, math.nan]

    rewards, missing = beside.ask([reward], ["p"] * 3, [PICTURE] * 3, {})
    assert rewards[0] == 1 and rewards[1:].isnan().all() and missing.tolist() == [[False], [False], [True]]


def test_columns_that_are_called_like_arguments():
    rows = [{"prompt": "p", "images": ["a.png"], "prompts": "q", "tag": "t"}]
    columns = columns_of(rows)
    assert columns == {"tag": ["t"], "source_image": [None]}
    assert ask([lambda prompts, images, **found: [len(found)]], 1, **columns).rewards.tolist() == [[2]]


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


def judged(server, count=1, source=PICTURE, **options):
    judge = EditJudge(server.url, "qwen", **{"backoff": 0.01, "timeout": 2.0, **options})
    prompts = [f"make it {i}" for i in range(count)]
    images = [Image.new("RGB", (8, 8), (255, i, 0)) for i in range(count)]
    return asyncio.run(judge(prompts, images, source_image=[source] * count)), judge


def test_what_is_asked_and_what_is_made_of_the_answers(server):
    server.behave = lambda number, request: good(4, 9) if len(request["messages"][0]["content"]) == 3 else good(10, 9)
    values, judge = judged(server, api_key="secret")
    assert values == [pytest.approx((0.4 * 0.9) ** 0.5)] and not judge.endpoint.failures
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
        (("drip", 3.0), "timeout"),
    ],
)
def test_every_failure_of_the_server_is_tried_again_then_counted(server, answer, reason):
    server.behave = lambda number, request: answer
    values, judge = judged(server, max_retries=1, timeout=0.3 if reason == "timeout" else 10.0)
    assert unknown(values) and len(server.requests) == 4, "two questions, each asked twice"
    ((found, count),) = judge.endpoint.failures.items()
    assert found.startswith(reason) and count == 2


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((400, b"too long"), "status 400: too long"),
        ((403, b"flagged"), "status 403: flagged"),
        ((200, b"<html>"), "no chat completion"),
        ((200, b"{}"), "no chat completion"),
        (completion("nine of ten"), "no scores"),
        (completion('{"scores": [1, 2'), "no scores"),
        (completion('{"scores": [NaN, 5]}'), "scores outside 0 to 10"),
        (completion('{"scores": [11, 5]}'), "scores outside 0 to 10"),
        (completion('{"scores": [true, "5"]}'), "scores outside 0 to 10"),
        (completion('{"scores": [5]}'), "another number of scores than 2"),
        (completion(None), "no scores"),
    ],
)
def test_every_answer_that_cannot_be_used_is_counted(server, answer, reason):
    """It is not asked for again, and does not count against the server."""
    server.behave = lambda number, request: answer
    values, judge = judged(server, 3, max_retries=2, max_failures=1)
    assert unknown(values) and len(server.requests) == 6 and judge.endpoint.failures == {reason: 6}


@pytest.mark.parametrize(
    "text",
    [
        '{"reasoning": "It is\nred.", "score": [8, 9]}',
        '{"reasoning": "It says "red".", "score": [8, 9]}',
        '{"scores": [1, 1]} would be too low. {"reasoning": "fine", "scores": [8, 9]}',
        " [8, 9]\n",
        "[8.0, 9]",
    ],
)
def test_scores_of_judges_that_write_no_clean_json(server, text):
    """EditScore's own reader mends such answers, too."""
    server.behave = lambda number, request: completion(text)
    values, judge = judged(server)
    assert values == [pytest.approx(0.8)] and not judge.endpoint.failures


def test_one_score_may_be_a_number():
    read = scores_reader(1, 0, 5)
    assert [read({"message": {"content": text}}) for text in ('{"score": 4}', '"no" {"score": 3.5, "')] == [[4], [3.5]]
    with pytest.raises(JudgeFailed, match="no scores"):
        read({"message": {"content": "it scored [4] of [5]"}})


@pytest.mark.parametrize("status", [401, 404])
def test_a_wrong_address_name_or_key_is_an_error_at_once(server, status):
    """A run would go on to its end and learn nothing. Once the server has answered, it is counted like the others."""
    server.behave = lambda number, request: (status, b"no such model")
    with pytest.raises(InputError, match=f"found status {status}: no such model.*the model's name there"):
        judged(server, 3)
    server.requests.clear()
    server.behave = lambda number, request: good(10, 10) if number < 2 else (status, b"gone")
    values, judge = judged(server, 3, concurrency=1)
    assert values[0] == 1.0 and unknown(values[1:]) and judge.endpoint.failures == {f"status {status}: gone": 4}


def test_one_bad_answer_is_mended_by_asking_again(server):
    server.behave = lambda number, request: (503, b"") if number < 2 else good(10, 10)
    values, judge = judged(server)
    assert values == [1.0] and not judge.endpoint.failures and len(server.requests) == 4


def test_one_failure_does_not_touch_the_others(server):
    def behave(number, request):
        return (500, b"") if "make it 1" in request["messages"][0]["content"][-1]["text"] else good(10, 10)

    server.behave = behave
    values, judge = judged(server, 3, max_retries=0)
    assert values[::2] == [1.0, 1.0] and unknown(values[1:2]) and judge.endpoint.failures.total() == 1


def test_the_same_question_is_asked_once(server, tmp_path):
    """Two samples with the same words and pictures, at the same time, and later from what was kept."""
    judge = EditJudge(server.url, "qwen", cache_dir=tmp_path)
    server.behave = lambda number, request: 0.1
    for _ in range(2):
        values = asyncio.run(judge(["make it red"] * 3, [PICTURE] * 3, source_image=[PICTURE] * 3))
        assert values == [pytest.approx(0.8)] * 3
    assert len(server.requests) == 2 and judge.endpoint.usage["kept"] == 2


def test_failures_of_one_outage_are_one_pause(server):
    """What was under way when the pause began does not make it longer."""
    server.behave = lambda number, request: (time.sleep(0.1), (500, b""))[1]
    _, judge = judged(server, 8, max_retries=0, concurrency=4, max_failures=3, cooldown=5.0)
    assert judge.endpoint._trips == 1 and judge.endpoint._closed_until - time.monotonic() < 5.0


@pytest.mark.parametrize("status", [429, 500])
def test_one_hiccup_of_many_requests_is_one_failure(server, status):
    asked = set()

    def behave(number, request):
        time.sleep(0.1)
        first = (key := json.dumps(request)) not in asked
        asked.add(key)
        return (status, b"") if first else good(10, 10)

    server.behave = behave
    values, judge = judged(server, 6, max_retries=1, concurrency=12, max_failures=8, cooldown=60.0)
    assert values == [1.0] * 6 and not judge.endpoint.failures and len(server.requests) == 24


@pytest.mark.parametrize("date", [False, True])
def test_a_server_says_how_long_to_wait(server, date):
    """All questions wait, those too that it did not turn away."""
    begun = []

    def behave(number, request):
        begun.append(time.monotonic())
        return (429, b"") if number < 1 else good(10, 10)

    later = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=3), usegmt=True)  # whole seconds
    server.behave, server.retry_after = behave, later if date else "1"
    values, _ = judged(server, 2, max_retries=1, concurrency=1)
    assert values == [1.0] * 2 and min(begun[1:]) - begun[0] >= 0.8


def test_requests_at_a_time_are_limited(server):
    server.behave = lambda number, request: 0.05
    judged(server, 6, concurrency=3)
    assert server.most_at_a_time == 3 and len(server.requests) == 12


def test_a_server_that_keeps_failing_is_left_alone_for_a_while(server, capsys):
    server.behave = lambda number, request: (500, b"")
    values, judge = judged(server, 10, max_retries=0, concurrency=1, max_failures=3, cooldown=0.4)
    assert unknown(values) and len(server.requests) == 3
    assert judge.endpoint.failures == {"status 500": 3, "server left alone after status 500": 17}
    told = "20 questions without an answer (server left alone after status 500: 17, status 500: 3)"
    assert told in capsys.readouterr().err

    def again():
        images = [Image.new("RGB", (8, 8), (0, i, 0)) for i in range(3)]
        return asyncio.run(judge(["x"] * 3, images, source_image=[PICTURE] * 3))

    time.sleep(0.4)
    assert unknown(again()) and len(server.requests) == 4, "one request tries it, and fails"
    time.sleep(0.4)
    assert unknown(again()) and len(server.requests) == 4, "twice as long"
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
    assert unknown(asyncio.run(judge(["x"], [PICTURE], source_image=[PICTURE])))
    assert list(judge.endpoint.failures) == ["connection: ConnectError"]


def test_prompts_in_files_and_settings_that_cannot_be(tmp_path):
    (tmp_path / "p.txt").write_text("Do {this}")
    with pytest.raises(InputError, match="judge prompt .*p.txt: found other braces"):
        EditJudge("http://x", "m", success_prompt=tmp_path / "p.txt")
    (tmp_path / "p.txt").write_text("Is it good?")
    with pytest.raises(InputError, match="judge prompt .*p.txt: found no {instruction}"):
        EditJudge("http://x", "m", success_prompt=tmp_path / "p.txt")
    with pytest.raises(InputError, match="judge prompt .*none.txt: found No such file"):
        EditJudge("http://x", "m", success_prompt=tmp_path / "none.txt")
    with pytest.raises(InputError, match="judge concurrency: found 0"):
        EditJudge("http://x", "m", concurrency=0)


def test_a_judge_as_settings_describe_it(server, tmp_path):
    """One on a scale of its own, such as EditScore's, with questions of one's own."""
    (tmp_path / "done.txt").write_text("Was it done, 0 to {highest}? {instruction}")
    server.behave = lambda number, request: good(16, 25)
    arguments = RewardArguments(
        reward_funcs=["edit_judge"], judge_base_url=server.url, judge_model="EditScore", judge_highest=25,
        judge_success_prompt=str(tmp_path / "done.txt"), judge_concurrency=1, judge_timeout=2.0, judge_max_retries=0,
    )  # fmt: skip
    (judge,) = arguments.load_rewards(torch.device("cpu"))
    values, _ = beside.ask([judge], ["make it red"] * 2, [PICTURE] * 2, {"source_image": [PICTURE] * 2})
    assert values.flatten().tolist() == [pytest.approx(16 / 25)] * 2 and server.most_at_a_time == 1
    texts = {request["messages"][0]["content"][-1]["text"] for request in server.requests}
    assert "Was it done, 0 to 25? make it red" in texts
    assert any("25 if there are none" in text and "{" not in text.split("such as")[0] for text in texts)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"judge_highest": 0}, "judge highest: found 0"),
        ({"judge_timeout": 0.0}, "judge timeout: found 0"),
        ({"judge_concurrency": 0}, "judge concurrency: found 0"),
        ({"judge_quality_prompt": "none.txt"}, "judge prompt none.txt: found No such file"),
    ],
)
def test_a_judge_that_cannot_be_is_said_before_anything_is_loaded(settings, said):
    arguments = RewardArguments(reward_funcs=["edit_judge"], judge_base_url="http://x", judge_model="m", **settings)
    with pytest.raises(InputError, match=said):
        arguments.check_rewards()


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


# The judge that answers with one digit


def likely(**logprobs):
    """Return an answer whose first token had these logprobs; names are the tokens, with `t` before digits."""
    tokens = [{"token": name.lstrip("t"), "logprob": value} for name, value in logprobs.items()]
    choice = {"message": {"content": "4"}, "logprobs": {"content": [{"token": "4", "top_logprobs": tokens}]}}
    return 200, json.dumps({"choices": [choice]}).encode()


def graded(server, count=1, **columns):
    judge = EditDigitJudge(server.url, "qwen", backoff=0.01, timeout=2.0)
    prompts = [f"make it red {i}" for i in range(count)]
    call = judge(prompts, [PICTURE] * count, source_image=[PICTURE] * count, **columns)
    return asyncio.run(call), judge


def test_the_mean_of_the_digits_by_their_probabilities(server):
    half, quarter = math.log(0.5), math.log(0.25)
    server.behave = lambda number, request: likely(t4=half, t2=quarter, t9=quarter, The=quarter)
    values, judge = graded(server, requirement=["The hat stays."])
    assert values == [pytest.approx((4 * 0.5 + 2 * 0.25) / 0.75 / 5)] and not judge.endpoint.failures
    (request,) = server.requests
    assert (request["max_tokens"], request["logprobs"], request["top_logprobs"]) == (1, True, 20)
    *pictures, text = request["messages"][0]["content"]
    assert len(pictures) == 2 and "make it red" in text["text"] and "The hat stays." in text["text"]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (completion("4"), "no logprobs"),
        (likely(The=-0.1, t6=-2.0), "no digit from 0 to 5"),
        (likely(The=-0.001, t5=-9.0), "no digit from 0 to 5"),
        ((200, b'{"choices": [{"logprobs": {"content": []}}]}'), "no logprobs"),
        ((200, b'{"choices": [3]}'), "no chat completion"),
    ],
)
def test_answers_without_a_digit_are_counted(server, answer, reason):
    server.behave = lambda number, request: answer
    values, judge = graded(server, 2)
    assert unknown(values) and judge.endpoint.failures == {reason: 2}


# Text in pictures


def lettering(text):
    picture = Image.new("RGB", (320, 96), "white")
    ImageDraw.Draw(picture).text((16, 24), text, fill="black", font=ImageFont.load_default(size=36))
    return picture


def test_text_that_is_there_and_text_that_is_not():
    prompts = ['a sign that says "HELLO"', 'a sign that says "HELLO"', "a sign “HELLO”", "a sign", "a shop"]
    images = [lettering(text) for text in ("hello you", "HELP", "", "HELLO", "open")]
    reward = OcrReward()
    found = reward(prompts, images, source_image=[None] * 5, ocr_text=[None] * 4 + ["OPEN"])
    assert found[0] == 1.0 and found[1] == pytest.approx(1 - 2 / 5) and found[2:] == [0.0, None, 1.0]
    # An edit may quote what is to go.
    edits = ['replace "SALE" with "OPEN"'] * 2
    assert reward(edits, [images[4]] * 2, source_image=[PICTURE] * 2, ocr_text=[None, "open"]) == [None, 1.0]


def test_text_asked_for():
    assert text_asked('A "Big Sale" and “50 %”', None) == "bigsale50%"
    assert text_asked("a cat", None) is None and text_asked('a "cat"', "Dog") == "dog"


# LAION's head


class Direction:
    """A CLIP whose picture direction is its size."""

    model = SimpleNamespace(config=SimpleNamespace(projection_dim=2))

    def images(self, images):
        return torch.tensor([image.size for image in images]).float()


def test_the_head_is_its_layers_one_after_the_other(tmp_path):
    layers = {
        "layers.0.weight": [[1.0, 2.0], [0.0, 1.0], [1.0, 0.0]], "layers.0.bias": [0.0, 1.0, 0.0],
        "layers.10.weight": [[2.0, -1.0]], "layers.10.bias": [3.0],
        "layers.2.weight": [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]], "layers.2.bias": [0.0, -1.0],
    }  # fmt: skip
    save_file({name: torch.tensor(value) for name, value in layers.items()}, tmp_path / "head.safetensors")
    score = AestheticScore(Direction(), tmp_path / "head.safetensors")
    width, height = 3, 4
    expected = 2 * ((width + 2 * height) + width) - (height + 1 - 1) + 3
    assert score(["p"], [Image.new("RGB", (width, height))]) == [pytest.approx(expected / 10)]


@pytest.mark.parametrize(
    ("tensors", "found"),
    [({"x": (1, 2)}, "no layers.N.weight"), ({"layers.0.weight": (1, 3), "layers.0.bias": (1,)}, r"\(1, 3\)"),
     ({"layers.0.weight": (4, 2), "layers.0.bias": (4,)}, r"\(4, 2\)")],
)  # fmt: skip
def test_heads_that_do_not_fit(tmp_path, tensors, found):
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "head.safetensors")
    with pytest.raises(InputError, match=f"aesthetic_head .*{found}.*from CLIP's 2 to 1"):
        AestheticScore(Direction(), tmp_path / "head.safetensors")
    with pytest.raises(InputError, match="aesthetic_head .*a safetensors file"):
        AestheticScore(Direction(), tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("name", "missing"), [("edit_digit_judge", "judge_base_url"), ("aesthetic", "aesthetic_head")]
)
def test_what_a_reward_needs_is_asked_for(name, missing):
    with pytest.raises(InputError, match=f"{missing}: found nothing"):
        RewardArguments(reward_funcs=[name]).check_rewards()
