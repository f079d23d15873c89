"""Benchmarks whose pictures a model behind an OpenAI-compatible endpoint looks at."""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from ..rewards.endpoint import Ask, Endpoint
from .items import Item, Score

PROMPTS = Path(__file__).resolve().parent / "prompts"


def ask_about_all(
    endpoint: Endpoint,
    items: Sequence[Item],
    images: Sequence[Image.Image],
    grade: Callable[[Ask, Item, Image.Image], Awaitable[Score | None]],
) -> list[Score | None]:
    """Return what `grade` says of each picture, many at a time; None where it got no answer."""

    async def ask_all() -> list[Score | None]:
        progress = tqdm(total=len(items), desc=f"asking {endpoint.model}")

        async def one(item: Item, image: Image.Image) -> Score | None:
            found = await grade(ask, item, image)
            progress.update()
            return found

        async with endpoint.session() as ask:
            found = await asyncio.gather(*(one(*pair) for pair in zip(items, images, strict=True)))
        progress.close()
        return found

    return asyncio.run(ask_all())


def about(endpoint: Endpoint, *prompts: str) -> dict:
    """Return what results note of a judge: its name, a hash of its prompts, what it cost, and what failed."""
    return {
        "model": endpoint.model,
        "prompts": hashlib.sha256("\0".join(prompts).encode()).hexdigest(),
        **dict(sorted(endpoint.usage.items())),
        "failures": dict(endpoint.failures.most_common()),
    }
