"""A server in this process that speaks ComfyUI's protocol and misbehaves on demand."""

import asyncio
import contextlib
import io
import json
import threading

import pytest
from aiohttp import web
from PIL import Image

IMAGE_SOCKET = ["IMAGE", {}]
OBJECT_INFO = {
    "LoadImage": {"input": {"required": {"image": [["example.png"], {"image_upload": True}]}}},
    "EmptyImage": {"input": {"required": {"width": ["INT", {"default": 64}], "height": ["INT", {"default": 64}]}}},
    "TextEncode": {"input": {"required": {"prompt": ["STRING", {"multiline": True}], "text": ["STRING", {}]}}},
    "KSampler": {
        "input": {
            "required": {
                "image": IMAGE_SOCKET,
                "seed": ["INT", {"default": 0, "control_after_generate": True}],
                "steps": ["INT", {"default": 20}],
                "cfg": ["FLOAT", {"default": 3.5}],
                "sampler_name": [["euler", "heun", "512"], {}],
            }
        }
    },
    "SaveImage": {"input": {"required": {"images": IMAGE_SOCKET, "filename_prefix": ["STRING", {"default": "x"}]}}},
}


def png(colour="red", size=(8, 6)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


class FakeComfyUI:
    """`fault` says what goes wrong; what the client sent is kept for the test to look at."""

    def __init__(self):
        self.fault: str | None = None
        self.version = "0.30.0"
        self.pictures = [png()]
        self.prompts: list[dict] = []
        self.uploads: dict[str, bytes] = {}
        self.calls: list[str] = []
        self.prompted = threading.Event()
        self.history: dict = {}
        self.running: list = []
        self.sockets: list = []
        self.url = ""

    # -- life ------------------------------------------------------------------------------------------------------

    def start(self):
        ready = threading.Event()
        self.thread = threading.Thread(target=self._serve, args=(ready,), daemon=True)
        self.thread.start()
        assert ready.wait(10)

    def stop(self):
        with contextlib.suppress(RuntimeError):  # it has ended by itself
            self.loop.call_soon_threadsafe(self.stopping.set)
        self.thread.join(10)

    def _serve(self, ready):
        async def main():
            self.loop, self.stopping = asyncio.get_running_loop(), asyncio.Event()
            app = web.Application(middlewares=[self._faulty])
            get, post = app.router.add_get, app.router.add_post
            get("/system_stats", self._says(lambda: {"system": {"comfyui_version": self.version}}))
            get("/object_info", self._says(lambda: OBJECT_INFO))
            get("/queue", self._says(lambda: {"queue_running": self.running, "queue_pending": []}))
            get("/history/{id}", self._history)
            get("/view", self._view)
            get("/ws", self._socket)
            post("/prompt", self._prompt)
            post("/upload/image", self._upload)
            post("/queue", self._says(dict))
            post("/interrupt", self._says(dict))
            self.runner = web.AppRunner(app, shutdown_timeout=0.1)
            await self.runner.setup()
            site = web.TCPSite(self.runner, "127.0.0.1", 0)
            await site.start()
            self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
            ready.set()
            await self.stopping.wait()
            await self.runner.cleanup()

        asyncio.run(main())

    # -- answers ---------------------------------------------------------------------------------------------------

    @web.middleware
    async def _faulty(self, request, handler):
        self.calls.append(f"{request.method} {request.path}")
        if self.fault == "another site":
            return web.Response(text="<html>It works!</html>", content_type="text/html")
        if self.fault == f"bad json {request.path}":
            return web.Response(text='{"broken": ', content_type="application/json")
        if self.fault == f"500 {request.path}":
            return web.Response(status=500, text="Internal Server Error")
        return await handler(request)

    def _says(self, body):
        async def handler(request):
            return await self._answer(body())

        return handler

    async def _answer(self, body, status=200):
        return web.json_response(body, status=status)

    async def _history(self, request):
        entry = self.history.get(request.match_info["id"])
        return await self._answer({request.match_info["id"]: entry} if entry else {})

    async def _view(self, request):
        assert request.query["type"] in ("output", "temp")
        return web.Response(body=self.pictures[int(request.query["filename"].split("_")[1])], content_type="image/png")

    async def _upload(self, request):
        form = await request.post()
        self.uploads[form["image"].filename] = form["image"].file.read()
        return await self._answer({"name": form["image"].filename, "subfolder": "", "type": "input"})

    async def _socket(self, request):
        if self.fault == "finishes unseen" and self.sockets:
            self._record()
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        self.sockets.append(socket)
        await self._send("status", {"status": {"exec_info": {"queue_remaining": 0}}, "sid": "x"})
        async for _ in socket:
            pass
        return socket

    async def _send(self, kind, data):
        await self.sockets[-1].send_str(json.dumps({"type": kind, "data": data}))

    async def _prompt(self, request):
        body = await request.json()
        self.prompts.append(body)
        if self.fault == "node_errors":
            detail = "sampler_name: 'foo' not in ['euler', 'heun']"
            error = {"type": "value_not_in_list", "message": "Value not in list", "details": detail}
            errors = [{**error, "extra_info": {"input_name": "sampler_name"}}]
            refusal = {"type": "prompt_outputs_failed_validation", "message": "Prompt outputs failed validation"}
            nodes = {"2": {"errors": errors, "dependent_outputs": ["3"], "class_type": "KSampler"}}
            return await self._answer({"error": refusal, "node_errors": nodes}, status=400)
        if self.fault == "no outputs":
            error = {"type": "prompt_no_outputs", "message": "Prompt has no outputs", "details": ""}
            return await self._answer({"error": error, "node_errors": {}}, status=400)
        self.running = [[0, "job-1", {}, {}, []]]
        self.tasks = asyncio.get_running_loop().create_task(self._run(body["prompt"]))
        return await self._answer({"prompt_id": "job-1", "number": 0, "node_errors": {}})

    # -- the run ---------------------------------------------------------------------------------------------------

    async def _run(self, prompt):
        job = {"prompt_id": "job-1"}
        await asyncio.sleep(0.05)
        await self._send("execution_start", job)
        await self._send("execution_cached", {"nodes": [], **job})
        await self.sockets[-1].send_bytes(b"\0\0\0\1 a preview")
        await self._send("progress", {"value": 9, "max": 9, "node": "2", "prompt_id": "someone else's"})
        for node_id in prompt:
            await self._send("executing", {"node": node_id, **job})
            if prompt[node_id]["class_type"] == "KSampler":
                self.prompted.set()
                for i in range(4):
                    await self._send("progress", {"value": i + 1, "max": 4, "node": node_id, **job})
                if await self._goes_wrong(node_id, job):
                    return
        await self._finish(job)

    async def _goes_wrong(self, node_id, job) -> bool:
        if self.fault == "execution_error":
            failure = {"exception_type": "torch.OutOfMemoryError", "exception_message": "Allocation\nfailed"}
            await self._send("execution_error", {"node_id": node_id, "node_type": "KSampler", **failure, **job})
        elif self.fault == "interrupted":
            await self._send("execution_interrupted", {"node_id": node_id, **job})
        elif self.fault == "bad json in events":
            await self.sockets[-1].send_str('{"type": "progress", ')
        elif self.fault == "dies":
            self.stopping.set()
        elif self.fault == "restarted":
            self.running = []
            await self.sockets[-1].close()
        elif self.fault == "finishes unseen":
            await self.sockets[-1].close()
        elif self.fault == "drops the socket":
            await self.sockets[-1].close()
            while len(self.sockets) < 2:
                await asyncio.sleep(0.02)
            return False
        elif self.fault != "hangs":
            return False
        return True

    async def _finish(self, job):
        await self._send("execution_success", job)
        # Like the real one: the history follows the event.
        await asyncio.sleep(0.05)
        self._record()
        await self._send("executing", {"node": None, **job})

    def _record(self):
        """Put the finished job into the history."""
        kind = "temp" if self.fault == "previews only" else "output"
        images = [{"filename": f"x_{i}_.png", "subfolder": "", "type": kind} for i in range(len(self.pictures))]
        outputs = {} if self.fault == "saves nothing" else {"3": {"images": images}}
        self.history["job-1"] = {"outputs": outputs, "status": {"status_str": "success", "messages": []}}
        self.running = []


@pytest.fixture
def server():
    fake = FakeComfyUI()
    fake.start()
    yield fake
    fake.stop()


@pytest.fixture
def workflow(tmp_path, monkeypatch):
    """A UI workflow file, LoadImage -> KSampler "Sampler" -> SaveImage, in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "draw.json"
    path.write_text(json.dumps(ui_workflow()))
    return path


def ui_workflow() -> dict:
    image_out = {"name": "IMAGE", "type": "IMAGE"}
    return {
        "version": 0.4,
        "nodes": [
            {
                "id": 1,
                "type": "LoadImage",
                "inputs": [],
                "outputs": [{**image_out, "links": [1]}],
                "widgets_values": ["example.png", "image"],
            },
            {
                "id": 2,
                "type": "KSampler",
                "title": "Sampler",
                "inputs": [{"name": "image", "type": "IMAGE", "link": 1}],
                "outputs": [{**image_out, "links": [2]}],
                "widgets_values": [42, "randomize", 20, 3.5, "euler"],
            },
            {
                "id": 3,
                "type": "SaveImage",
                "inputs": [{"name": "images", "type": "IMAGE", "link": 2}],
                "outputs": [],
                "widgets_values": ["ComfyUI"],
            },
        ],
        "links": [[1, 1, 0, 2, 0, "IMAGE"], [2, 2, 0, 3, 0, "IMAGE"]],
    }


@pytest.fixture
def ui():
    return ui_workflow()


@pytest.fixture
def object_info():
    return json.loads(json.dumps(OBJECT_INFO))


@pytest.fixture
def make_png():
    return png
