"""A model that looks at edits, behind an OpenAI-compatible endpoint (vLLM, SGLang, ...), as a reward.

Scores are VIEScore's (arXiv 2312.14867): SC is the lesser of what was done and what was kept, PQ the lesser of natural
and free of faults, and the reward is the root of their product, 0 to 1. Requests and answers are JSON, pictures PNG. A
sample that cannot be judged gets None and is counted with its reason; a server that fails again and again is left
alone for a while, so that a run goes on without it.
"""

import asyncio
import base64
import io
import json
import math
import re
import sys
import time
from collections import Counter
from pathlib import Path

import httpx
from PIL import Image

from ...core.errors import InputError

_PROMPTS = Path(__file__).resolve().parent / "prompts"
_HIGHEST = 10
_MOST_DOUBLINGS = 4
_JSON = re.compile(r"\{.*\}", re.DOTALL)


class JudgeFailed(Exception):
    """A question without a usable answer; the message is the reason."""


class ServerFailed(JudgeFailed):
    """It is the server's doing, and may be another time: no connection, no answer in time, too busy, broken."""


class EditJudge:
    """Reward function for edits; samples without a source picture get None.

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
        success_prompt, quality_prompt: files with the questions; `{instruction}` stands for the edit's.

    Raises:
        InputError: numbers out of range, or a file of a prompt that cannot be read.
    """

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
        success_prompt: str | Path = _PROMPTS / "edit_success.txt",
        quality_prompt: str | Path = _PROMPTS / "edit_quality.txt",
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
        self.success_prompt, self.quality_prompt = _read(success_prompt), _read(quality_prompt)
        self.failures: Counter[str] = Counter()
        """Questions without an answer, by reason."""
        self._in_a_row = self._trips = 0
        self._closed_until, self._probing = 0.0, False

    __name__ = "edit_judge"

    async def __call__(
        self, prompts: list[str], images: list[Image.Image], source_image: list[Image.Image | None], **columns
    ) -> list[float | None]:
        """Return the reward (0 to 1) of each edit, None where there is no source or no answer."""
        slots = asyncio.Semaphore(self.concurrency)
        limits = httpx.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
        async with httpx.AsyncClient(timeout=self.timeout, headers=self.headers, limits=limits) as client:
            samples = zip(prompts, images, source_image, strict=True)
            before = self.failures.copy()
            scores = await asyncio.gather(*(self._judge(client, slots, *sample) for sample in samples))
        new = self.failures - before
        if new:
            reasons = ", ".join(f"{reason} {count}" for reason, count in new.most_common())
            sys.stderr.write(f"edit_judge at {self.url}: {new.total()} questions without an answer ({reasons})\n")
        return scores

    async def _judge(self, client, slots, prompt: str, image: Image.Image, source: Image.Image | None) -> float | None:
        if source is None:
            return None
        success = self.success_prompt.format(instruction=prompt)
        questions = (success, [source, image]), (self.quality_prompt.format(instruction=prompt), [image])
        answers = await asyncio.gather(*(self._ask(client, slots, text, pictures) for text, pictures in questions))
        if None in answers:
            return None
        return math.sqrt(math.prod(min(scores) / _HIGHEST for scores in answers))

    async def _ask(self, client, slots, text: str, pictures: list[Image.Image]) -> list[float] | None:
        for attempt in range(self.max_retries + 1):
            if attempt:
                await asyncio.sleep(self.backoff * 2 ** (attempt - 1))  # outside the slot: others may ask meanwhile
            async with slots:
                if not self._is_asked():
                    reason = "server left alone"
                    break
                try:
                    body = await asyncio.to_thread(self._body, text, pictures)
                    scores = await self._once(client, body)
                except ServerFailed as failed:
                    reason = str(failed)
                    self._note(answered=False)
                    continue
                except JudgeFailed as failed:
                    reason = str(failed)
                    self._note(answered=True)
                    break
                except BaseException:
                    self._probing = False
                    raise
                self._note(answered=True)
                return scores
        self.failures[reason] += 1
        return None

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

    def _body(self, text: str, pictures: list[Image.Image]) -> dict:
        content = [{"type": "image_url", "image_url": {"url": _data_url(picture)}} for picture in pictures]
        message = {"role": "user", "content": [*content, {"type": "text", "text": text}]}
        return {"model": self.model, "messages": [message], "temperature": 0, "max_tokens": 256}

    async def _once(self, client: httpx.AsyncClient, body: dict) -> list[float]:
        try:
            # Beside httpx's own limit, which a server that sends byte after byte never meets.
            response = await asyncio.wait_for(client.post(self.url, json=body), self.timeout)
        except (httpx.TimeoutException, TimeoutError, asyncio.TimeoutError):
            raise ServerFailed("timeout") from None
        except httpx.HTTPError as error:
            raise ServerFailed(f"connection: {type(error).__name__}") from None
        if response.status_code != 200:
            passing = response.status_code in (408, 429) or response.status_code >= 500
            raise (ServerFailed if passing else JudgeFailed)(f"status {response.status_code}")
        try:
            answer = response.json()["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            raise JudgeFailed("no chat completion") from None
        return _scores(answer)


def _scores(answer: object) -> list[float]:
    """Return the two scores in an answer, which may have words around its JSON."""
    found = _JSON.search(answer) if isinstance(answer, str) else None
    try:
        scores = json.loads(found[0])["scores"] if found else None
    except (ValueError, LookupError, TypeError):
        scores = None
    if scores is None:
        raise JudgeFailed("no JSON with scores")
    if not isinstance(scores, list) or len(scores) != 2:
        raise JudgeFailed("another number of scores than 2")
    if not all(type(s) in (int, float) and 0 <= s <= _HIGHEST for s in scores):  # nan is in no range
        raise JudgeFailed(f"scores outside 0 to {_HIGHEST}")
    return scores


def _data_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _read(path: str | Path) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8")
        text.format(instruction="")
    except (OSError, UnicodeDecodeError) as error:
        found = getattr(error, "strerror", None) or "no UTF-8 text"
        raise InputError(f"judge prompt {path}", found=found, expected="a text file") from None
    except (LookupError, ValueError):
        expected = "{instruction} as the only name in braces, and {{ }} for braces themselves"
        raise InputError(f"judge prompt {path}", found="other braces", expected=expected) from None
    return text
