"""How sure a model is of each grade of an edit, as a reward: Edit-R1's (arXiv 2510.16888), by an endpoint's logprobs.

The model is to answer with one digit, 0 to 5; the reward is the mean of the digits by their probabilities, over 5. It
needs no words and one token, and it changes smoothly where a written grade jumps.
"""

import asyncio
import math
from pathlib import Path

from PIL import Image

from .endpoint import Ask, Endpoint, JudgeFailed, read_prompt
from .judge import PROMPTS

_HIGHEST = 5
_LEAST = 0.1  # probability of all digits together: below it the model was about to say something else
_REQUEST = {"max_tokens": 1, "logprobs": True, "top_logprobs": 20}


def expected_digit(answer: dict) -> float:
    """Return the mean of the digits 0 to 5 by the probabilities of an answer's first token, others left out.

    Raises:
        JudgeFailed: no logprobs, or digits are too unlikely to mean anything.
    """
    try:
        likeliest = answer["logprobs"]["content"][0]["top_logprobs"]
        found = [(str(token["token"]).strip(), float(token["logprob"])) for token in likeliest]
    except (LookupError, TypeError, ValueError):
        raise JudgeFailed("no logprobs") from None
    weights = [0.0] * (_HIGHEST + 1)
    for token, logprob in found:
        if token in map(str, range(_HIGHEST + 1)) and not math.isnan(logprob):
            weights[int(token)] += math.exp(min(logprob, 0.0))
    if sum(weights) < _LEAST:
        raise JudgeFailed(f"no digit from 0 to {_HIGHEST}")
    return sum(digit * weight for digit, weight in enumerate(weights)) / sum(weights)


class EditDigitJudge:
    """Reward function for edits; samples without a source picture get None.

    Args:
        base_url, model, options: of `Endpoint`. The server must return logprobs, as vLLM and SGLang do.
        prompt: file with the question; `{instruction}` stands for the edit's, `{requirement}` for what a row's
            `requirement` column says of a good result.

    Raises:
        InputError: see `Endpoint` and `read_prompt`.
    """

    __name__ = "edit_digit_judge"

    def __init__(self, base_url: str, model: str, prompt: str | Path = PROMPTS / "edit_digit.txt", **options):
        self.endpoint = Endpoint(base_url, model, **options)
        self.prompt = read_prompt(prompt, "instruction", optional=("requirement",))

    async def __call__(
        self, prompts: list[str], images: list[Image.Image], source_image: list[Image.Image | None],
        requirement: list[str | None] | None = None, **columns,
    ) -> list[float | None]:  # fmt: skip
        """Return the reward (0 to 1) of each edit, None where there is no source, nan where there is no answer."""

        async def reward(ask: Ask, prompt: str, image, source, required: str | None) -> float | None:
            if source is None:
                return None
            question = self.prompt.format(instruction=prompt, requirement=required or "")
            digit = await ask(question, lambda: [source, image], expected_digit, **_REQUEST)
            return math.nan if digit is None else digit / _HIGHEST

        requirements = requirement or [None] * len(prompts)
        async with self.endpoint.session() as ask:
            samples = zip(prompts, images, source_image, requirements, strict=True)
            return await asyncio.gather(*(reward(ask, *sample) for sample in samples))
