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
import re
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from weakref import WeakKeyDictionary

import httpx
from PIL import Image

from ...core.errors import InputError
from ...core.files import write_file

_MOST_DOUBLINGS = 4
_JSON = re.compile(r"\{.*\}", re.DOTALL)
_LINE = re.compile(r"^[^:\n]+:\s*(\d+)\s*$", re.MULTILINE)

Ask = Callable[..., Awaitable[object]]
"""`ask(text, pictures, read, **request)`: what `read` makes of the answer, a chat completion's choice; None where it
is of no use. `pictures` is a function that returns them, `request` are further fields of the request."""


class JudgeFailed(Exception):
    """A question without a usable answer; the message is the reason."""


class ServerFailed(JudgeFailed):
    """It is the server's doing, and may be another time: no connection, no answer in time, too busy, broken."""


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
        max_failures: failures of the server in a row after which it is left alone.
        cooldown: seconds that it is left alone; then one request tries it, and it is twice as long if that fails, too.
        cache_dir: folder of usable answers; None keeps none.
        patient: for work that is worth nothing without its answers: a server that is left alone is waited for,
            `max_trips` times at most, and one that refuses (wrong key, no such model) is an error at once.

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

    @asynccontextmanager
    async def session(self):
        """Yield an `Ask`; pictures are called for once it is the question's turn. Ends with a word on failures."""
        slots = self._slots.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(self.concurrency))
        before = self.failures.copy()
        limits = httpx.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
        async with httpx.AsyncClient(timeout=self.timeout, headers=self.headers, limits=limits) as client:
            yield partial(self._ask, client, slots)
        new = self.failures - before
        if new:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in new.most_common())
            sys.stderr.write(f"judge at {self.url}: {new.total()} questions without an answer ({reasons})\n")

    async def _ask(self, client, slots, text: str, pictures: Callable, read: Callable, **request) -> object | None:
        attempt = 0
        while attempt <= self.max_retries:
            if attempt:
                await asyncio.sleep(self.backoff * 2 ** (attempt - 1))  # outside the slot: others may ask meanwhile
            async with slots:
                asked = _Question(self.model, text, await asyncio.to_thread(pictures), request)
                with suppress(JudgeFailed):
                    kept = None if self.cache_dir is None else await asyncio.to_thread(asked.kept_in, self.cache_dir)
                    if kept is not None:
                        found = read(kept)
                        self.usage["kept"] += 1
                        return found
                is_asked = self._is_asked()
                if is_asked:
                    try:
                        answer = await self._once(client, await asyncio.to_thread(asked.body))
                        found = read(answer)
                    except ServerFailed as failed:
                        reason = self._last_failure = str(failed)
                        self._note(answered=False)
                        attempt += 1
                        continue
                    except JudgeFailed as failed:
                        reason = str(failed)
                        self._note(answered=True)
                        break
                    except BaseException:
                        self._probing = False
                        raise
                    self._note(answered=True)
                    if self.cache_dir is not None:
                        await asyncio.to_thread(asked.keep_in, self.cache_dir, answer)
                    return found
            if not self._is_waited_for():
                reason = f"server left alone after {self._last_failure}"
                break
            await asyncio.sleep(max(0.05, self._closed_until - time.monotonic()))
        self.failures[reason] += 1
        return None

    def _is_waited_for(self) -> bool:
        """Whether a server that is left alone is worth waiting for; one that was never there is not."""
        was_there = self.usage["requests"] or not self._last_failure.startswith("connection")
        return self.patient and self._trips <= self.max_trips and was_there

    def _is_asked(self) -> bool:
        """Whether the server may be asked now; after a pause one request tries it first."""
        if time.monotonic() < self._closed_until or self._probing:
            return False
        self._probing = self._trips > 0
        return True

    def _note(self, answered: bool) -> None:
        self._probing = False
        if answered:
            self._in_a_row = self._trips = 0
            return
        self._in_a_row += 1
        if self._trips or self._in_a_row >= self.max_failures:
            pause = self.cooldown * 2 ** min(self._trips, _MOST_DOUBLINGS)
            self._closed_until = time.monotonic() + pause
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
        if self.patient and response.status_code in (401, 403, 404):
            found = f"status {response.status_code}: {' '.join(response.text.split())[:200]}"
            remedy = "Check the endpoint's address, the model's name there, and OPENAI_API_KEY."
            raise InputError(f"judge at {self.url}", found=found, expected="an answer", remedy=remedy)
        if response.status_code != 200:
            passing = response.status_code in (408, 429) or response.status_code >= 500
            raise (ServerFailed if passing else JudgeFailed)(f"status {response.status_code}")
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


class _Question:
    """One question about pictures, as a request and as the name under which its answer is kept."""

    def __init__(self, model: str, text: str, pictures: list[Image.Image], request: dict):
        self.text, self.pictures = text, pictures
        self.settings = {"model": model, "temperature": 0, "max_tokens": 512, **request}

    def body(self) -> bytes:
        """Return the request, with the pictures as PNG."""
        content = [{"type": "image_url", "image_url": {"url": _data_url(picture)}} for picture in self.pictures]
        message = {"role": "user", "content": [*content, {"type": "text", "text": self.text}]}
        return json.dumps({**self.settings, "messages": [message]}).encode()

    def kept_in(self, folder: Path) -> dict | None:
        """Return the answer that was kept; None where there is none, or it is no longer whole."""
        try:
            return dict(json.loads(self._path(folder).read_text(encoding="utf-8"))["answer"])
        except (OSError, ValueError, LookupError, TypeError):
            return None

    def keep_in(self, folder: Path, answer: dict) -> None:
        """Write an answer down."""
        path = self._path(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps({"answer": answer}))

    def _path(self, folder: Path) -> Path:
        """Return where an answer is kept: by pixels, not by PNG, which differs from library to library."""
        found = hashlib.sha256(json.dumps([self.settings, self.text], sort_keys=True).encode())
        for picture in self.pictures:
            found.update(f"{picture.mode} {picture.size}".encode())
            found.update(picture.tobytes())
        name = found.hexdigest()
        return folder / name[:2] / f"{name}.json"


def text_of(answer: dict) -> str:
    """Return the words of an answer, "" where it has none. Raises JudgeFailed where it is no chat completion."""
    try:
        text = answer["message"]["content"]
    except (LookupError, TypeError):
        raise JudgeFailed("no chat completion") from None
    return text if isinstance(text, str) else ""


def scores_reader(count: int, least: int, most: int) -> Callable[[dict], list[float]]:
    """Return what reads `count` scores in `least`..`most` out of an answer.

    They stand in JSON, `{"scores": [...]}` or `{"score": [...]}`, which may have words around it, or else one a line,
    `name: 4`, as ImgEdit's own prompts ask for. The reader raises JudgeFailed.
    """

    def read(answer: dict) -> list[float]:
        text = text_of(answer)
        found = _JSON.search(text)
        try:
            row = json.loads(found[0]) if found else {}
            scores = row.get("scores", row.get("score"))
        except (ValueError, AttributeError):
            scores = None
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


def read_prompt(path: str | Path, *names: str) -> str:
    """Return a file's text, to be formatted with these names.

    Raises:
        InputError: no such file, no text, or other names in braces.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        text.format(**dict.fromkeys(names, ""))
    except (OSError, UnicodeDecodeError) as error:
        found = getattr(error, "strerror", None) or "no UTF-8 text"
        raise InputError(f"judge prompt {path}", found=found, expected="a text file") from None
    except (LookupError, ValueError):
        known = ", ".join(f"{{{name}}}" for name in names)
        expected = f"no names in braces but {known}, and {{{{ }}}} for braces themselves"
        raise InputError(f"judge prompt {path}", found="other braces", expected=expected) from None
    return text


def _data_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
