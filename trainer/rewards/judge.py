"""A model that looks at edits, behind an OpenAI-compatible endpoint, as a reward.

Scores are VIEScore's (arXiv 2312.14867): SC is the lesser of what was done and what was kept, PQ the lesser of natural
and free of faults, each 0 to 10 unless a judge was trained on another scale, and both together are the root of their
product. A sample that cannot be judged gets nan and is counted with its reason.
"""

import asyncio
import math
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from ...core.errors import InputError
from .endpoint import Ask, Endpoint, read_prompt, scores_reader

PROMPTS = Path(__file__).resolve().parent / "prompts"
HIGHEST = 10


class EditJudge:
    """Reward function for edits; samples without a source picture get None.

    Args:
        base_url, model, options: of `Endpoint`.
        success_prompt, quality_prompt: files with the questions; `{instruction}` stands for the edit's, `{highest}`
            for the best score.
        highest: the best score, such as 25 for EditScore; the worst is 0.

    Raises:
        InputError: see `Endpoint` and `read_prompt`; no best score.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        success_prompt: str | Path = PROMPTS / "edit_success.txt",
        quality_prompt: str | Path = PROMPTS / "edit_quality.txt",
        highest: int = HIGHEST,
        **options,
    ):
        if highest < 1:
            raise InputError("judge highest", found=highest, expected="at least 1")
        self.endpoint, self.highest = Endpoint(base_url, model, **options), highest
        self.success_prompt = read_prompt(success_prompt, "instruction", optional=("highest",))
        self.quality_prompt = read_prompt(quality_prompt, optional=("instruction", "highest"))
        self._read_scores = scores_reader(2, 0, highest)

    __name__ = "edit_judge"

    async def __call__(
        self, prompts: list[str], images: list[Image.Image], source_image: list[Image.Image | None], **columns
    ) -> list[float | None]:
        """Return the reward (0 to 1) of each edit, None where there is no source, nan where there is no answer."""

        async def reward(ask: Ask, prompt: str, image: Image.Image, source: Image.Image | None) -> float | None:
            if source is None:
                return None
            found = await self.grades(ask, prompt, lambda: (source, image))
            return math.nan if found is None else math.sqrt(math.prod(found)) / self.highest

        async with self.endpoint.session() as ask:
            samples = zip(prompts, images, source_image, strict=True)
            return await asyncio.gather(*(reward(ask, *sample) for sample in samples))

    async def grades(self, ask: Ask, prompt: str, pictures: Callable[[], tuple]) -> tuple[float, float] | None:
        """Return SC and PQ of an edit, 0 to `highest`, None without an answer; `pictures` are source and result."""
        said = {"instruction": prompt, "highest": self.highest}
        answers = await asyncio.gather(
            ask(self.success_prompt.format(**said), lambda: list(pictures()), self._read_scores),
            ask(self.quality_prompt.format(**said), lambda: [pictures()[1]], self._read_scores),
        )
        return None if None in answers else tuple(min(scores) for scores in answers)
