"""CLIP as a reward and as a judge of colours."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from ...core.errors import InputError

DEFAULT_CLIP = "openai/clip-vit-large-patch14"
PICK_SCORE, PICK_SCORE_PROCESSOR = "yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


@contextmanager
def loading(what: str, model: str, expected: str) -> Iterator[None]:
    """Turn what transformers raises of a model that it cannot load into an InputError."""
    try:
        yield
    except (OSError, ValueError) as error:
        found = " ".join(str(error).split())[:300]
        raise InputError(f"{what} {model}", found=found, expected=expected) from error


class Clip:
    """CLIP's picture and text directions.

    Args:
        model: hub repository or folder; its weights must be safetensors.
        device: where it runs, such as `cuda`.
        batch_size: pictures at a time.
        processor: hub repository or folder of what prepares pictures and texts; default the model's own.

    Raises:
        InputError: it cannot be loaded.
    """

    def __init__(
        self,
        model: str = DEFAULT_CLIP,
        device: str | torch.device = "cpu",
        batch_size: int = 16,
        processor: str | None = None,
    ):
        self.batch_size, self.device = batch_size, device
        with loading("CLIP", model, "a CLIP model"):
            loaded = CLIPModel.from_pretrained(model, use_safetensors=True)
            self.processor = CLIPImageProcessorPil.from_pretrained(processor or model)
            self.tokenizer = AutoTokenizer.from_pretrained(processor or model)
        self.model = loaded.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def texts(self, texts: list[str]) -> torch.Tensor:
        """Return the directions (N, D) of texts, of length 1."""
        tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(self.device)
        hidden = self.model.text_model(**tokens).pooler_output
        return torch.nn.functional.normalize(self.model.text_projection(hidden).float(), dim=-1)

    @torch.no_grad()
    def images(self, images: list[Image.Image]) -> torch.Tensor:
        """Return the directions (N, D) of pictures, of length 1."""
        parts = []
        for start in range(0, len(images), self.batch_size):
            part = [image.convert("RGB") for image in images[start : start + self.batch_size]]
            pixels = self.processor(part, return_tensors="pt").pixel_values.to(self.device)
            parts.append(self.model.visual_projection(self.model.vision_model(pixels).pooler_output).float())
        return torch.nn.functional.normalize(torch.cat(parts), dim=-1)


class ClipScore:
    """Reward function: the cosine of picture and prompt, -1 to 1 (CLIPScore, arXiv 2104.08718, without its factor).

    With the weights of PickScore (arXiv 2305.01569) or HPSv2 (arXiv 2306.09341), trained on people's choices, it is
    their score, over PickScore's own factor: about 0.2 and 0.3. Edits get None: their prompt is an instruction, not a
    description.

    Args:
        clip: the model.
        name: of the reward in logs.
    """

    def __init__(self, clip: Clip, name: str = "clip_score"):
        self.clip, self.__name__ = clip, name

    def __call__(self, prompts, images, source_image, **columns) -> list[float | None]:
        """Return the cosine for each sample without a source picture, else None."""
        chosen = [i for i, source in enumerate(source_image) if source is None]
        found: list[float | None] = [None] * len(prompts)
        if chosen:
            pictures = self.clip.images([images[i] for i in chosen])
            cosines = (pictures * self.clip.texts([prompts[i] for i in chosen])).sum(dim=1)
            for i, cosine in zip(chosen, cosines.tolist(), strict=True):
                found[i] = cosine
        return found
