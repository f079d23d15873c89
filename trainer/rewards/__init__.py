"""Reward functions of reinforcement learning, in TRL's shape: `f(prompts, images, **columns) -> list[float | None]`.

`prompts` are texts and `images` 8-bit RGB pictures, one for each sample; `columns` are the dataset's others, as lists.
None says that a reward does not apply to a sample, nan that it could not be found out, such as by a judge that does
not answer. A function may be a coroutine; several are awaited together.
"""

import asyncio
import inspect
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from ...core.errors import InputError
from ..batches import DRAW_SEED

RewardFunction = Callable[..., Sequence[float | None]]


@dataclass(frozen=True, slots=True)
class Scores:
    """What reward functions said. Example: `looked_through([f], rewards)`."""

    rewards: torch.Tensor
    """(B, R), float64; nan where a reward does not apply."""
    warnings: tuple[str, ...]
    """What a person should know: no reward at all, or one that says the same of everything, teaches nothing."""


NOT_COLUMNS = ("prompt", "size", "source_image", "broken", DRAW_SEED, "prompts", "images")
"""What rows say to the trainer, not to rewards, and names of their own arguments; `source_image` is always there for
these."""


def columns_of(rows: list[dict]) -> dict[str, list]:
    """Return what rewards are told of B samples beside prompts and pictures: lists of B values, None where absent."""
    names = dict.fromkeys(name for row in rows for name in row if name not in NOT_COLUMNS)
    return {name: [row.get(name) for row in rows] for name in (*names, "source_image")}


def name_of(function: RewardFunction) -> str:
    """Return the name that a reward has in logs."""
    return getattr(function, "__name__", None) or type(function).__name__


def names_of(functions: Sequence[RewardFunction]) -> list[str]:
    """Return the names that rewards have in logs; of the same ones the later have a number, such as `score_2`."""
    names = [name_of(function) for function in functions]
    numbers = [names[: place + 1].count(name) for place, name in enumerate(names)]
    return [name if number == 1 else f"{name}_{number}" for name, number in zip(names, numbers, strict=True)]


Asked = tuple[torch.Tensor, torch.Tensor]
"""Rewards (B, R), float64, nan where there is none; and where one could not be found out (B, R), bool."""


def begin(
    function: RewardFunction, prompts: list[str], images: list[Image.Image], columns: dict[str, list]
) -> list[float | None] | Awaitable[Sequence[float | None]]:
    """Call a reward function on B samples; returns its values, or what they are awaited by.

    Plain functions are called where no event loop runs, as they may run one of their own.

    Raises:
        InputError: it fails.
    """
    try:
        found = function(prompts, images, **columns)
        return found if inspect.isawaitable(found) else list(found)
    except InputError:
        raise
    except Exception as error:  # it is the user's code
        raise _failed(function, error) from error


async def finish(functions: Sequence[RewardFunction], begun: list, count: int) -> Asked:
    """Return what `begin` returned of R functions, once it is there, for `count` samples.

    Raises:
        InputError: a function that fails, or returns another number of values, infinity or no numbers.
    """
    tasks = [asyncio.ensure_future(_values(*each, count)) for each in zip(functions, begun, strict=True)]
    try:
        found = await asyncio.gather(*tasks)
    finally:  # where one fails, the others go no further
        for task in tasks:
            task.cancel()
    values = [[math.nan if value is None else value for value in one] for one in found]
    missing = [[value is not None and math.isnan(value) for value in one] for one in found]
    shape = len(functions), count
    return (
        torch.tensor(values, dtype=torch.float64).reshape(shape).T,
        torch.tensor(missing, dtype=torch.bool).reshape(shape).T,
    )


def looked_through(functions: Sequence[RewardFunction], rewards: torch.Tensor, missing: torch.Tensor) -> Scores:
    """Return rewards (B, R) with what a person should know of them; `missing` (B, R) could not be found out."""
    names = names_of(functions)
    warnings = [
        f"reward {name} could not be found out for {count} of {len(rewards)} samples, which teach nothing"
        for name, count in zip(names, missing.sum(dim=0).tolist(), strict=True)
        if count
    ]
    if rewards.isnan().all():  # a server that is down for a while must not end a run
        warnings.append(f"no reward for any of {len(rewards)} samples, from {', '.join(names)}")
    for name, column in zip(names, rewards.T, strict=True):
        values = column[~column.isnan()]
        if len(values) > 1 and values.max() == values.min():
            warnings.append(f"reward {name} is {values[0].item():g} for all of {len(values)} samples")
    return Scores(rewards, tuple(warnings))


def _failed(function: RewardFunction, error: Exception) -> InputError:
    found = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return InputError(f"reward {name_of(function)}", found=found, expected="a number or None for each sample")


async def _values(function: RewardFunction, begun, count: int) -> list[float | None]:
    name = f"reward {name_of(function)}"
    try:
        values = list(await begun) if inspect.isawaitable(begun) else begun
    except InputError:
        raise
    except Exception as error:  # it is the user's code, or a server's answer
        raise _failed(function, error) from error
    if len(values) != count:
        raise InputError(name, found=f"{len(values)} values", expected=f"{count}, one for each sample")
    numbers = []
    for value in values:
        try:
            number = None if value is None else float(value)
        except (TypeError, ValueError):
            number = math.inf
        if number is not None and math.isinf(number):
            raise InputError(name, found=repr(value)[:80], expected="a number or None for each sample")
        numbers.append(number)
    return numbers
