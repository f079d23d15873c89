"""Client of ComfyUI's HTTP and WebSocket interface: queue a prompt, follow it, fetch what it saved.

Every failure is one `InputError`: nothing there, something else there, a refused prompt, a node that failed, a
server that went away.
"""

import asyncio
import contextlib
import json
import uuid
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from ..core.errors import InputError
from .workflow import label

CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 120.0
"""Silence allowed within one HTTP answer; a busy server on a slow CPU can take a while."""
RECONNECTS = 3

OnEvent = Callable[[str, dict], None]


def normalize_url(url: str) -> str:
    """Return `url` with a scheme and without a final slash: `localhost:8188` becomes `http://localhost:8188`.

    Raises:
        InputError: not an http(s) address.
    """
    full = (url if "://" in url else f"http://{url}").rstrip("/")
    try:
        parts = urlsplit(full)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        valid = False
    if not valid:
        raise InputError(f"server {url}", found="not an address", expected="such as http://127.0.0.1:8188")
    return full


class ServerLost(InputError):
    """The server does not answer, or went away during the run."""


class ComfyUIClient:
    """One session with a ComfyUI server: `async with ComfyUIClient(url) as client`.

    Args:
        url: address of the server, with or without `http://`.
    """

    def __init__(self, url: str):
        self.url = normalize_url(url)
        self.client_id = uuid.uuid4().hex
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> "ComfyUIClient":
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=ANSWER_SECONDS)
        self._session = aiohttp.ClientSession(timeout=timeout)
        return self

    async def __aexit__(self, *_) -> None:
        await self._session.close()

    # -- requests --------------------------------------------------------------------------------------------------

    async def _request(self, method: str, path: str, **options) -> tuple[int, bytes]:
        try:
            async with self._session.request(method, self.url + path, **options) as response:
                return response.status, await response.read()
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> InputError:
        return ServerLost(
            f"ComfyUI server {self.url}",
            found=f"no answer ({str(error) or type(error).__name__})",
            expected="a running ComfyUI",
            remedy="Start it, check the address, or leave --server out to let this command start one.",
        )

    def _foreign(self, path: str, status: int, body: bytes) -> InputError:
        text = " ".join(body[:200].decode("utf-8", errors="replace").split())
        return InputError(
            f"ComfyUI server {self.url}",
            found=f"HTTP {status} from {path}: {text or '(empty)'}",
            expected="ComfyUI's JSON",
            remedy="Is this the address of a ComfyUI?",
        )

    async def _json(self, method: str, path: str, **options) -> Any:
        status, body = await self._request(method, path, **options)
        try:
            answer = json.loads(body) if status == 200 else None
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise self._foreign(path, status, body)
        return answer

    async def version(self) -> str | None:
        """Return the server's ComfyUI version, None where it does not tell."""
        stats = await self._json("GET", "/system_stats")
        system = stats.get("system")
        if not isinstance(system, dict):
            raise self._foreign("/system_stats", 200, json.dumps(stats).encode())
        return system.get("comfyui_version")

    async def object_info(self) -> dict:
        """Return the server's node classes: `{class name: {"input": {"required": {name: [type, options]}}, ...}}`."""
        return await self._json("GET", "/object_info")

    async def upload_image(self, name: str, png: bytes) -> str:
        """Store a picture in the server's input folder; return the name a LoadImage node wants."""
        form = aiohttp.FormData()
        form.add_field("image", png, filename=name, content_type="image/png")
        form.add_field("overwrite", "true")
        answer = await self._json("POST", "/upload/image", data=form)
        if not isinstance(answer.get("name"), str):
            raise self._foreign("/upload/image", 200, json.dumps(answer).encode())
        folder = answer.get("subfolder")
        return f"{folder}/{answer['name']}" if folder else answer["name"]

    async def fetch(self, file: dict) -> bytes:
        """Return the bytes of a saved file (`{"filename", "subfolder", "type"}`) exactly as the server has them."""
        query = {key: str(file.get(key, "")) for key in ("filename", "subfolder", "type")}
        status, body = await self._request("GET", "/view", params=query)
        if status != 200:
            raise self._foreign(f"/view of {query['filename']}", status, body)
        return body

    # -- running ---------------------------------------------------------------------------------------------------

    async def run(
        self,
        prompt: dict,
        *,
        extra_data: dict | None = None,
        hints: dict[str, str] | None = None,
        on_event: OnEvent | None = None,
    ) -> dict[str, dict]:
        """Queue `prompt` (API format), follow it to its end, return its outputs `{node id: {"images": [file, ...]}}`.

        When the waiting task is cancelled (Ctrl-C, a timeout) the job is taken off the server, too.

        Args:
            extra_data: what the frontend sends beside the prompt (`{"extra_pnginfo": {"workflow": ...}}`).
            hints: for a refused value, the sentence that tells what to do (see `workflow.model_sources`).
            on_event: called with the type and data of each of the server's events for this job.
        """
        socket = await self._connect()
        try:
            prompt_id = await self._queue(prompt, extra_data, hints or {})
            try:
                return await self._follow(socket, prompt, prompt_id, on_event or (lambda kind, data: None))
            except asyncio.CancelledError:
                await self._cancel(prompt_id)
                raise
        finally:
            with contextlib.suppress(Exception):
                await socket.close()

    async def _connect(self) -> aiohttp.ClientWebSocketResponse:
        url = "ws" + self.url.removeprefix("http") + f"/ws?clientId={self.client_id}"
        try:
            # A dead peer is noticed by the heartbeat; previews and states may be large.
            connecting = self._session.ws_connect(url, heartbeat=60, max_msg_size=0)
            return await asyncio.wait_for(connecting, CONNECT_SECONDS + ANSWER_SECONDS)
        except aiohttp.WSServerHandshakeError as error:
            raise self._foreign("/ws", error.status, error.message.encode()) from error
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            raise self._unreachable(error) from error

    async def _queue(self, prompt: dict, extra_data: dict | None, hints: dict[str, str]) -> str:
        body = {"prompt": prompt, "client_id": self.client_id, "extra_data": extra_data or {}}
        status, answer = await self._request("POST", "/prompt", json=body)
        try:
            parsed = json.loads(answer)
        except ValueError:
            parsed = None
        if not isinstance(parsed, dict):
            raise self._foreign("/prompt", status, answer)
        # Status 200 with node_errors: some outputs would silently be missing, so that is refused, too.
        if status == 200 and isinstance(parsed.get("prompt_id"), str) and not parsed.get("node_errors"):
            return parsed["prompt_id"]
        if isinstance(parsed.get("prompt_id"), str):
            await self._cancel(parsed["prompt_id"])
        if "error" in parsed or parsed.get("node_errors"):
            raise describe_refusal(parsed, prompt, hints)
        raise self._foreign("/prompt", status, answer)

    async def _follow(self, socket, prompt: dict, prompt_id: str, on_event: OnEvent) -> dict[str, dict]:
        for _ in range(RECONNECTS + 1):
            ended = await self._listen(socket, prompt, prompt_id, on_event)
            # The history is written just after the last event; after a broken connection it is the truth.
            for _ in range(100):
                entry = await self._history(prompt_id)
                if entry is not None:
                    return self._outputs(entry, prompt)
                if not ended:
                    break
                await asyncio.sleep(0.1)
            if ended:
                break
            # In this order nothing falls between two questions: events come from here on, then the queue tells
            # whether there is anything to wait for, and what ended before that is in the history.
            socket = await self._connect()
            if not await self._knows(prompt_id):
                if (entry := await self._history(prompt_id)) is not None:
                    return self._outputs(entry, prompt)
                raise InputError(f"ComfyUI server {self.url}", found="the job is gone: it was restarted or cleared")
        raise ServerLost(
            f"ComfyUI server {self.url}", found="the connection was lost during the run", remedy="Run it again."
        )

    async def _listen(self, socket, prompt: dict, prompt_id: str, on_event: OnEvent) -> bool:
        """Pass events on until the job ends (True) or the socket does (False)."""
        async for message in socket:
            if message.type is not aiohttp.WSMsgType.TEXT:
                continue
            try:
                event = json.loads(message.data)
                kind, data = event["type"], event["data"]
            except (ValueError, KeyError, TypeError) as error:
                raise self._foreign("/ws", 200, message.data.encode()) from error
            if not isinstance(data, dict) or data.get("prompt_id", prompt_id) != prompt_id:
                continue
            if kind == "execution_error":
                raise describe_failure(data, prompt)
            if kind == "execution_interrupted":
                raise InputError("run", found=f"interrupted on the server at {label(prompt, data.get('node_id'))}")
            on_event(kind, data)
            # `executing` without a node is how older versions say that all is done.
            if kind == "execution_success" or (kind == "executing" and "prompt_id" in data and data["node"] is None):
                return True
        return False

    async def _history(self, prompt_id: str) -> dict | None:
        entry = (await self._json("GET", f"/history/{prompt_id}")).get(prompt_id)
        return entry if isinstance(entry, dict) else None

    async def _knows(self, prompt_id: str) -> bool:
        queue = await self._json("GET", "/queue")
        jobs = [*(queue.get("queue_running") or []), *(queue.get("queue_pending") or [])]
        return any(prompt_id in job for job in jobs if isinstance(job, list))

    def _outputs(self, entry: dict, prompt: dict) -> dict[str, dict]:
        for kind, data in (entry.get("status") or {}).get("messages") or []:
            if kind == "execution_error":
                raise describe_failure(data, prompt)
            if kind == "execution_interrupted":
                raise InputError("run", found="interrupted on the server")
        return entry.get("outputs") or {}

    async def _cancel(self, prompt_id: str) -> None:
        """Take the job off the queue and, if it is the one that runs, stop it; best effort within seconds."""
        with contextlib.suppress(InputError, asyncio.TimeoutError):
            async with _limit(5):
                await self._request("POST", "/queue", json={"delete": [prompt_id]})
                running = (await self._json("GET", "/queue")).get("queue_running") or []
                # Older versions ignore the id and stop whatever runs: ask first, it may be someone else's.
                if any(prompt_id in job for job in running if isinstance(job, list)):
                    await self._request("POST", "/interrupt", json={"prompt_id": prompt_id})


@contextlib.asynccontextmanager
async def _limit(seconds: float):
    """`asyncio.timeout` for Python 3.10: raise TimeoutError when the block takes longer."""
    task, expired = asyncio.current_task(), False

    def expire():
        nonlocal expired
        expired = True
        task.cancel()

    handle = asyncio.get_running_loop().call_later(seconds, expire)
    try:
        yield
    except asyncio.CancelledError:
        if expired:
            if hasattr(task, "uncancel"):  # Python 3.11: else the task counts as cancelled for ever
                task.uncancel()
            raise asyncio.TimeoutError from None
        raise
    finally:
        handle.cancel()


def describe_refusal(answer: dict, prompt: dict, hints: dict[str, str]) -> InputError:
    """Turn /prompt's `{"error": {...}, "node_errors": {id: {"errors": [...]}}}` into one error."""
    found, remedies = [], []
    node_errors = answer.get("node_errors")
    for node_id, node in node_errors.items() if isinstance(node_errors, dict) else ():
        for error in node.get("errors") or []:
            name = (error.get("extra_info") or {}).get("input_name")
            place = f"{label(prompt, node_id)}{f', input {name}' if name else ''}"
            found.append(f"{place}: {error.get('message')} ({str(error.get('details'))[:300]})")
            value = (prompt.get(node_id) or {}).get("inputs", {}).get(name)
            if isinstance(value, str) and value in hints:
                remedies.append(hints[value])
    if not found:
        error = answer.get("error")
        error = error if isinstance(error, dict) else {"message": error}
        found = [" ".join(str(error[key])[:500] for key in ("message", "details") if error.get(key))]
    return InputError(
        "ComfyUI refused the workflow", found="; ".join(found), remedy=" ".join(dict.fromkeys(remedies)) or None
    )


def describe_failure(data: dict, prompt: dict) -> InputError:
    """Turn an `execution_error` event into one error."""
    message = " ".join(str(data.get("exception_message") or "no message").split())[:600].rstrip(".")
    kind = str(data.get("exception_type") or "error").rsplit(".", 1)[-1]
    found = message if kind == "InputError" else f"{kind}: {message}"
    return InputError(f"{label(prompt, data.get('node_id'))} failed in ComfyUI", found=found)
