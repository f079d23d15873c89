"""Whether a picture shows the text that it should, read by RapidOCR's packaged models (Flow-GRPO's OCR reward).

The text is a row's `ocr_text`, or else what stands in quotation marks in its prompt. Needs the extra `ocr`.
"""

import re

import numpy as np
from PIL import Image

from ...core.errors import InputError

_QUOTED = re.compile(r"\"([^\"]+)\"|“([^”]+)”|「([^」]+)」")


def text_asked(prompt: str, ocr_text: str | None) -> str | None:
    """Return the text that a picture should show, without spaces and in lower case; None where there is none."""
    words = ocr_text or " ".join("".join(found) for found in _QUOTED.findall(prompt))
    return "".join(words.split()).lower() or None


class OcrReward:
    """Reward function: 1 where the text is found among what is read, else less by the share of letters to change.

    That is `max(0, 1 - distance / length)` with the edit distance of all that was read to what was asked. Samples that
    ask for no text get None, and so do edits without `ocr_text`.

    Raises:
        InputError: RapidOCR is not installed.
    """

    __name__ = "ocr"

    def __init__(self):
        try:
            from rapidfuzz.distance import Levenshtein
            from rapidocr import RapidOCR
        except ImportError as error:
            found, remedy = f"no module {error.name}", "Install the extra: pip install 'unipic2[ocr]'."
            raise InputError("reward ocr", found=found, expected="rapidocr and rapidfuzz", remedy=remedy) from None
        self.reader = RapidOCR(params={"Global.log_level": "error"})
        self.distance = Levenshtein.distance

    def __call__(
        self, prompts: list[str], images: list[Image.Image], source_image: list[Image.Image | None],
        ocr_text: list[str | None] | None = None, **columns,
    ) -> list[float | None]:  # fmt: skip
        """Return the reward of each picture (0 to 1), None where no text is asked for."""
        given = ocr_text or [None] * len(prompts)
        # What an instruction has in quotation marks may be what is to go.
        texts = [
            text_asked(prompt if source is None else "", text)
            for prompt, source, text in zip(prompts, source_image, given, strict=True)
        ]
        return [None if text is None else self._score(image, text) for image, text in zip(images, texts, strict=True)]

    def _score(self, image: Image.Image, asked: str) -> float:
        lines = self.reader(np.asarray(image.convert("RGB"))[..., ::-1]).txts or ()  # RapidOCR takes BGR
        read = "".join("".join(lines).split()).lower()
        return 1.0 if asked in read else max(0.0, 1 - self.distance(read, asked) / len(asked))
