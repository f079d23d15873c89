"""Questions about pictures to a model behind an OpenAI-compatible endpoint (vLLM, SGLang, ...).

Requests and answers are JSON, pictures PNG. A question without a usable answer is counted with its reason; a server
that fails again and again is left alone for a while, so that a run goes on without it. Answers can be kept in a folder
by a hash of all that was asked, so that nothing is asked, or paid for, twice.
"""

import asyncio
import base64
import hashlib
import io
import json
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from weakref import WeakKeyDictionary

import httpx
from PIL import Image

from ...core.errors import InputError
from ...core.files import write_file

_MOST_DOUBLINGS = 4
_PATIENT_RETRIES = 20
_JSON = re.compile(r"\{.*\}", re.DOTALL)
_SCORES = re.compile(r'"scores?"\s*:\s*(\[[^\]]*\]|-?\d+(?:\.\d+)?)')
_LIST = re.compile(r"\s*(\[[^\]]*\])\s*")
_LINE = re.compile(r"^[^:\n]+:\s*(\d+)\s*$", re.MULTILINE)

Ask = Callable[..., Awaitable[object]]
"""`ask(text, pictures, read, **request)`: what `read` makes of the answer, a chat completion's choice; None where it
is of no use. `pictures` is a function that returns them, `request` are further fields of the request."""


class JudgeFailed(Exception):
    """A question without a usable answer; the message is the reason."""


class ServerFailed(JudgeFailed):
    """It is the server's doing, and may be another time: no connection, no answer in time, too busy, broken.

    `wait` is how many seconds the server asked to be left alone, by all questions.
    """

    def __init__(self, reason: str, wait: float = 0):
        super().__init__(reason)
        self.wait = wait


class Endpoint:
    """A model that looks at pictures and answers.

    Args:
        base_url: of the endpoint, such as `http://localhost:8000/v1`.
        model: name that the server knows the model by.
        api_key: sent as a bearer token.
        timeout: seconds that one request may take.
        max_retries: further tries of a question after the server failed; answers that cannot be used are not asked for
            again, as they would be the same.
        backoff: seconds before the first retry, doubled for each further one.
        concurrency: requests under way at a time.
        max_failures: failures of the server in a row after which it is left alone; requests that were under way when
            one was counted do not count, as one hiccup fails them all, unless they were not answered in time.
        cooldown: seconds that it is left alone; then one request tries it, and it is twice as long if that fails, too.
        cache_dir: folder of usable answers; None keeps none.
        patient: for work that is worth nothing without its answers: a question is tried 20 times more, a server that
            is left alone is waited for, `max_trips` times at most, and one that refuses (wrong key, no such model) is
            an error at once. Without, it is one if the server has not answered anything yet; but 403 may be about
            one picture.

    Raises:
        InputError: numbers out of range.
    """

    max_trips = 3

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str | None = None,
        timeout: float = 60.0,
        max_retries: int = 3,
        backoff: float = 0.5,
        concurrency: int = 16,
        max_failures: int = 8,
        cooldown: float = 60.0,
        cache_dir: Path | None = None,
        patient: bool = False,
    ):
        for name, value, least in (
            ("timeout", timeout, 0.001),
            ("max_retries", max_retries, 0),
            ("backoff", backoff, 0),
            ("concurrency", concurrency, 1),
            ("max_failures", max_failures, 1),
            ("cooldown", cooldown, 0),
        ):
            if not value >= least:
                raise InputError(f"judge {name}", found=value, expected=f"at least {least}")
        self.url, self.model, self.timeout = f"{base_url.rstrip('/')}/chat/completions", model, timeout
        self.headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.max_retries, self.backoff, self.concurrency = max_retries, backoff, concurrency
        self.max_failures, self.cooldown = max_failures, cooldown
        self.cache_dir, self.patient = cache_dir, patient
        self._slots: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()
        self.failures: Counter[str] = Counter()
        """Questions without an answer, by reason."""
        self.usage: Counter[str] = Counter()
        """`requests` that were answered, `kept` answers used again, and the tokens that the server counted."""
        self._in_a_row = self._trips = 0
        self._closed_until, self._probing, self._last_failure = 0.0, False, ""
        self._busy_until = self._last_counted = 0.0

    @asynccontextmanager
    async def session(self):
        """Yield an `Ask`; pictures are called for once it is the question's turn. Ends with a word on failures."""
        slots = self._slots.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(self.concurrency))
        limits = httpx.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
        failures: Counter[str] = Counter()
        under_way: dict[str, asyncio.Task] = {}

        async def ask(text: str, pictures: Callable, read: Callable, **request) -> object | None:
            question = _Question(self.model, text, pictures, request)
            async with slots:
                key = await asyncio.to_thread(question.key)
            if key not in under_way:  # of questions that are the same, such as on equal pictures, one is asked
                under_way[key] = asyncio.create_task(self._answer(client, slots, question, key, read))
                under_way[key].add_done_callback(partial(_ended, under_way, key))
            try:
                return await asyncio.shield(under_way[key])
            except JudgeFailed as failed:
                failures[str(failed)] += 1
                self.failures[str(failed)] += 1
                return None

        try:
            async with httpx.AsyncClient(timeout=self.timeout, headers=self.headers, limits=limits) as client:
                yield ask
        finally:
            for task in under_way.values():
                task.cancel()
        if failures:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in failures.most_common())
            sys.stderr.write(f"judge at {self.url}: {failures.total()} questions without an answer ({reasons})\n")

    async def _answer(self, client, slots, question: "_Question", key: str, read: Callable) -> object:
        """Return what `read` makes of an answer, a kept one if there is one. Raises JudgeFailed."""
        path = None if self.cache_dir is None else self.cache_dir / key[:2] / f"{key}.json"
        if path is not None:
            with suppress(JudgeFailed, OSError, ValueError, LookupError, TypeError):  # no longer whole: asked again
                found = read(dict(json.loads(await asyncio.to_thread(path.read_text, encoding="utf-8"))["answer"]))
                self.usage["kept"] += 1
                return found
        attempt, pause = 0, 0.0
        while True:
            if pause:  # outside the slot: others may ask meanwhile
                await asyncio.sleep(pause)
                pause = 0.0
            async with slots:
                started = time.monotonic()
                busy = 0.0 if started < self._closed_until else self._busy_until - started
                is_probe = None if busy > 0 else self._admit()
                if is_probe is not None:
                    try:
                        answer = await self._once(client, await asyncio.to_thread(question.body))
                        found = read(answer)
                    except ServerFailed as failed:
                        self._last_failure = str(failed)
                        self._busy_until = max(self._busy_until, time.monotonic() + failed.wait)
                        # A hiccup fails all that was under way; what waited in vain for an answer tells more.
                        self._note(False, is_probe, math.inf if str(failed) == "timeout" else started)
                        pause = self.backoff * 2 ** min(attempt, _MOST_DOUBLINGS)
                        attempt += 1
                        if attempt > (_PATIENT_RETRIES if self.patient else self.max_retries):
                            raise
                        continue
                    except JudgeFailed:
                        self._note(True, is_probe, started)
                        raise
                    except BaseException:
                        self._probing = self._probing and not is_probe
                        raise
                    self._note(True, is_probe, started)
                    if path is not None:
                        path.parent.mkdir(parents=True, exist_ok=True)
                        await asyncio.to_thread(write_file, path, json.dumps({"answer": answer}))
                    return found
            if busy > 0:
                await asyncio.sleep(busy)
                continue
            # One that was never there is not worth waiting for.
            was_there = self.usage["requests"] or not self._last_failure.startswith("connection")
            if not self.patient or self._trips > self.max_trips or not was_there:
                raise JudgeFailed(f"server left alone after {self._last_failure}")
            await asyncio.sleep(max(0.05, self._closed_until - time.monotonic()))

    def _admit(self) -> bool | None:
        """Return whether a request would be the one that tries a server after a pause; None where none may go out."""
        if time.monotonic() < self._closed_until or self._probing:
            return None
        self._probing = self._trips > 0
        return self._probing

    def _note(self, answered: bool, is_probe: bool, started: float) -> None:
        """Count what became of a request. Those that went out before a pause, or before the failure that was counted
        last, say nothing more about the server."""
        if is_probe:
            self._probing = False
        if answered:
            self._in_a_row = self._trips = 0
            return
        if not is_probe and (self._trips or started < self._last_counted):
            return
        self._last_counted = time.monotonic()
        self._in_a_row += 1
        if is_probe or self._in_a_row >= self.max_failures:
            self._closed_until = time.monotonic() + self.cooldown * 2 ** min(self._trips, _MOST_DOUBLINGS)
            self._in_a_row, self._trips = 0, self._trips + 1

    async def _once(self, client: httpx.AsyncClient, body: bytes) -> dict:
        try:
            # Beside httpx's own limit, which a server that sends byte after byte never meets.
            post = client.post(self.url, content=body, headers={"Content-Type": "application/json"})
            response = await asyncio.wait_for(post, self.timeout)
        except (httpx.TimeoutException, TimeoutError, asyncio.TimeoutError):
            raise ServerFailed("timeout") from None
        except httpx.HTTPError as error:
            raise ServerFailed(f"connection: {type(error).__name__}") from None
        # A wrong setting, by which nothing would be learned; of a server that has answered it may pass.
        is_wrong = response.status_code in (401, 404) and not self.usage["requests"]
        if is_wrong or (self.patient and response.status_code in (401, 403, 404)):
            found = f"status {response.status_code}: {' '.join(response.text.split())[:200]}"
            remedy = "Check the endpoint's address, the model's name there, and OPENAI_API_KEY."
            raise InputError(f"judge at {self.url}", found=found, expected="an answer", remedy=remedy)
        if response.status_code in (408, 429) or response.status_code >= 500:
            wait = min(_seconds(response.headers.get("Retry-After", "")), self.cooldown)
            raise ServerFailed(f"status {response.status_code}", wait)
        if response.status_code != 200:
            said = " ".join(response.text.split())[:80]
            raise JudgeFailed(f"status {response.status_code}: {said}" if said else f"status {response.status_code}")
        try:
            found = response.json()
            answer = dict(found["choices"][0])
        except (ValueError, LookupError, TypeError):
            raise JudgeFailed("no chat completion") from None
        self.usage["requests"] += 1
        counted = found.get("usage")
        for name in ("prompt_tokens", "completion_tokens"):
            if isinstance(counted, dict) and type(counted.get(name)) is int:
                self.usage[name] += counted[name]
        return answer


def _seconds(retry_after: str) -> float:
    """Return how long a `Retry-After` header says to wait: seconds, or until a date; 0 where it says nothing."""
    if retry_after.isdecimal():
        return float(retry_after)
    try:
        return max(0.0, (parsedate_to_datetime(retry_after) - datetime.now(timezone.utc)).total_seconds())
    except (TypeError, ValueError):  # no date, or one without its time zone
        return 0.0


def _ended(under_way: dict[str, asyncio.Task], key: str, task: asyncio.Task) -> None:
    """Forget a question; its error, if it has one, is known to whoever still waits for it."""
    under_way.pop(key)
    if not task.cancelled():
        task.exception()


class _Question:
    """One question about pictures, as a request and as the name under which its answer is kept."""

    def __init__(self, model: str, text: str, pictures: Callable[[], list[Image.Image]], request: dict):
        self.text, self.pictures = text, pictures
        self.settings = {"model": model, "temperature": 0, "max_tokens": 512, **request}

    def body(self) -> bytes:
        """Return the request, with the pictures as PNG."""
        content = [{"type": "image_url", "image_url": {"url": _data_url(picture)}} for picture in self.pictures()]
        message = {"role": "user", "content": [*content, {"type": "text", "text": self.text}]}
        return json.dumps({**self.settings, "messages": [message]}).encode()

    def key(self) -> str:
        """Return a hash of all that is asked: of pixels, not of PNG, which differs from library to library."""
        found = hashlib.sha256(json.dumps([self.settings, self.text], sort_keys=True).encode())
        for picture in self.pictures():
            found.update(f"{picture.mode} {picture.size}".encode())
            found.update(picture.tobytes())
        return found.hexdigest()


def text_of(answer: dict) -> str:
    """Return the words of an answer, "" where it has none. Raises JudgeFailed where it is no chat completion."""
    try:
        text = answer["message"]["content"]
    except (LookupError, TypeError):
        raise JudgeFailed("no chat completion") from None
    return text if isinstance(text, str) else ""


def _scores_in(text: str) -> object:
    """Return what JSON in a text, whole or broken, has as scores; None where there are none."""
    whole = _JSON.search(text)
    with suppress(ValueError, AttributeError):
        row = json.loads(whole[0], strict=False) if whole else {}  # lines may break within a reason
        scores = row.get("scores", row.get("score"))
        if scores is not None:
            return scores
    alone = _LIST.fullmatch(text)
    for part in [alone[1]] if alone else _SCORES.findall(text)[-1:]:
        with suppress(ValueError):
            return json.loads(part)
    return None


def scores_reader(count: int, least: int, most: int) -> Callable[[dict], list[float]]:
    """Return what reads `count` scores in `least`..`most` out of an answer.

    They stand in JSON, `{"scores": [...]}` or `{"score": [...]}`, which may have words around it or be broken by what
    is said beside them, such as a reason with a quote in it; or are a list alone, or one a line, `name: 4`, as
    ImgEdit's own prompts ask for. The reader raises JudgeFailed.
    """

    def read(answer: dict) -> list[float]:
        text = text_of(answer)
        scores = _scores_in(text)
        if type(scores) in (int, float):
            scores = [scores]
        if scores is None:
            scores = [int(number) for number in _LINE.findall(text)] or None
        if scores is None:
            raise JudgeFailed("no scores")
        if not isinstance(scores, list) or len(scores) != count:
            raise JudgeFailed(f"another number of scores than {count}")
        if not all(type(s) in (int, float) and least <= s <= most for s in scores):  # nan is in no range
            raise JudgeFailed(f"scores outside {least} to {most}")
        return scores

    return read


def read_prompt(path: str | Path, *names: str, optional: tuple[str, ...] = ()) -> str:
    """Return a file's text, to be formatted with `names`, which are in it, and `optional` ones.

    Raises:
        InputError: no such file, no text, a name that is missing, or others in braces.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        text.format(**dict.fromkeys((*names, *optional), ""))
    except (OSError, UnicodeDecodeError) as error:
        found = getattr(error, "strerror", None) or "no UTF-8 text"
        raise InputError(f"judge prompt {path}", found=found, expected="a text file") from None
    except (LookupError, ValueError):
        known = ", ".join(f"{{{name}}}" for name in (*names, *optional))
        expected = f"no names in braces but {known}, and {{{{ }}}} for braces themselves"
        raise InputError(f"judge prompt {path}", found="other braces", expected=expected) from None
    for name in names:
        if f"{{{name}}}" not in text:
            raise InputError(f"judge prompt {path}", found=f"no {{{name}}}", expected="it where the judge is told it")
    return text


def _data_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
