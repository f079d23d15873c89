"""Rewards that wait for something else, such as a judge on a server, are found out while pictures are drawn.

These are coroutines. They run on one event loop in a thread of its own for as long as the process lives, as clients
that a function keeps belong to the loop that they were first used on. Plain functions compute, on the device or the
cores that draw, and are asked once all is drawn.
"""

import asyncio
import atexit
import inspect
import os
import threading
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from functools import cache

import torch
from PIL import Image

from . import Asked, RewardFunction, begin, finish


def is_coroutine(function: RewardFunction) -> bool:
    """Whether a reward is a coroutine, or an object whose call is one."""
    return inspect.iscoroutinefunction(function if inspect.isroutine(function) else type(function).__call__)


class _Loop:
    """An event loop in a thread."""

    def __init__(self):
        self.loop, self._process = asyncio.new_event_loop(), os.getpid()
        self._thread = threading.Thread(target=self._run, name="rewards", daemon=True)
        self._thread.start()
        atexit.register(self._end)

    def _run(self) -> None:
        torch.set_grad_enabled(False)  # a thread's own
        self.loop.run_forever()

    def _end(self) -> None:
        if os.getpid() != self._process:
            return
        with suppress(TimeoutError, FutureTimeoutError):  # they are two before Python 3.11
            asyncio.run_coroutine_threadsafe(_end_others(), self.loop).result(timeout=5)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(timeout=5)
        if not self._thread.is_alive():
            self.loop.close()

    def submit(self, coroutine: Coroutine) -> Future:
        """Run a coroutine; the caller's CUDA device becomes the thread's, as each has its own."""
        if torch.cuda.is_initialized():
            self.loop.call_soon_threadsafe(torch.cuda.set_device, torch.cuda.current_device())
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)


@cache
def _loop_of(process: int) -> _Loop:  # a process that was forked has no threads
    return _Loop()


async def _end_others() -> None:
    """End all that is left on this loop, such as what a client keeps."""
    await _end([task for task in asyncio.all_tasks() if task is not asyncio.current_task()])


async def _end(tasks: list[asyncio.Task]) -> None:
    """End what is still under way, so that connections are closed."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class Beside:
    """Asks all reward functions about N samples that come group by group.

    Example:
        ```python
        with Beside(functions, prompts, columns, group=12) as rewards:
            for images in parts:
                rewards.drawn(images)
            found = rewards.all()
        ```

    Args:
        functions: R reward functions.
        prompts: N texts.
        columns: N values each.
        group: samples of a group; coroutines are asked about whole groups, so that they may compare them.
    """

    def __init__(self, functions: Sequence[RewardFunction], prompts: list[str], columns: dict[str, list], group: int):
        self.functions, self.prompts, self.columns, self.group = functions, prompts, columns, group
        self.waiting = [function for function in functions if is_coroutine(function)]
        self.images: list[Image.Image] = []
        self._asked, self._parts, self._tasks = 0, [], []
        self._loop = _loop_of(os.getpid())

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self._loop.submit(_end(self._tasks)).result()

    def drawn(self, images: list[Image.Image]) -> None:
        """Take the next samples' pictures; coroutines are asked about the groups that are whole."""
        self.images += images
        whole = len(self.images) // self.group * self.group
        if self.waiting and whole > self._asked:
            self._parts.append(self._loop.submit(self._ask(slice(self._asked, whole))))
            self._asked = whole

    def all(self) -> Asked:
        """Return all rewards (N, R), once they are there, and which could not be found out.

        Raises:
            InputError: see `begin` and `finish`.
        """
        plain = [function for function in self.functions if function not in self.waiting]
        begun = [begin(function, self.prompts, self.images, self.columns) for function in plain]
        asked = self._loop.submit(finish(plain, begun, len(self.prompts))).result()
        waited = torch.tensor([function in self.waiting for function in self.functions])
        parts = [part.result() for part in self._parts]
        both = []
        for number, of_plain in enumerate(asked):
            found = of_plain.new_empty(len(self.prompts), len(self.functions))
            found[:, ~waited] = of_plain
            if parts:
                found[:, waited] = torch.cat([part[number] for part in parts])
            both.append(found)
        return tuple(both)

    async def _ask(self, part: slice) -> Asked:
        self._tasks.append(asyncio.current_task())
        prompts, images = self.prompts[part], self.images[part]
        columns = {name: values[part] for name, values in self.columns.items()}
        begun = [begin(function, prompts, images, columns) for function in self.waiting]
        return await finish(self.waiting, begun, len(prompts))


def ask(
    functions: Sequence[RewardFunction], prompts: list[str], images: list[Image.Image], columns: dict[str, list]
) -> Asked:
    """Return what all reward functions say of B samples. Raises InputError, see `begin` and `finish`."""
    with Beside(functions, prompts, columns, max(1, len(prompts))) as beside:
        beside.drawn(images)
        return beside.all()
