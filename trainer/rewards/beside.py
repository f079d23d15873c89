"""Rewards that wait for something else, such as a judge on a server, are found out while pictures are drawn.

These are coroutines; they run on an event loop in a thread of its own. Plain functions compute, on the device or the
cores that draw, and are asked once all is drawn.
"""

import asyncio
import inspect
import threading
from collections.abc import Sequence

import torch
from PIL import Image

from . import RewardFunction, ask_all


def is_coroutine(function: RewardFunction) -> bool:
    """Whether a reward is a coroutine, or an object whose call is one."""
    return inspect.iscoroutinefunction(function if inspect.isroutine(function) else type(function).__call__)


async def _end_others() -> None:
    """End what is still under way on this loop, so that connections are closed."""
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


class Beside:
    """Asks all reward functions about N samples that come group by group.

    Example:
        ```python
        with Beside(functions, prompts, columns) as rewards:
            for images in parts:
                rewards.drawn(images)
            found = rewards.all()
        ```

    Args:
        functions: R reward functions.
        prompts: N texts.
        columns: N values each.
        group: samples of a group; coroutines are asked about whole groups, so that they may compare them.
        device: what the thread's own device becomes, as CUDA has one for each thread.
    """

    def __init__(
        self, functions: Sequence[RewardFunction], prompts: list[str], columns: dict[str, list], group: int,
        device: torch.device,
    ):  # fmt: skip
        self.functions, self.prompts, self.columns, self.group, self.device = (
            functions,
            prompts,
            columns,
            group,
            device,
        )
        self.waiting = [function for function in functions if is_coroutine(function)]
        self.images: list[Image.Image] = []
        self._asked, self._parts = 0, []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="rewards", daemon=True)

    def _run(self) -> None:
        torch.set_grad_enabled(False)  # both are a thread's own
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self._loop.run_forever()

    def __enter__(self):
        if self.waiting:
            self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        if self.waiting:
            asyncio.run_coroutine_threadsafe(_end_others(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._loop.close()

    def drawn(self, images: list[Image.Image]) -> None:
        """Take the next samples' pictures; coroutines are asked about the groups that are whole."""
        self.images += images
        whole = len(self.images) // self.group * self.group
        if self.waiting and whole > self._asked:
            coroutine = self._ask(self.waiting, slice(self._asked, whole))
            self._parts.append(asyncio.run_coroutine_threadsafe(coroutine, self._loop))
            self._asked = whole

    def all(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all rewards (N, R), once they are there, and which could not be found out.

        Raises:
            InputError: see `ask_all`.
        """
        plain = [function for function in self.functions if function not in self.waiting]
        asked = asyncio.run(self._ask(plain, slice(None)))
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

    async def _ask(self, functions: Sequence[RewardFunction], part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        columns = {name: values[part] for name, values in self.columns.items()}
        return await ask_all(functions, self.prompts[part], self.images[part], columns)
