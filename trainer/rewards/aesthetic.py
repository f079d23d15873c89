"""LAION's aesthetic predictor: a head on CLIP's picture direction that says how much people like a picture.

Its weights are published as a pickle, which is not read here; as safetensors they are converted once:

    save_file(torch.load("sac+logos+ava1-l14-linearMSE.pth", weights_only=True), "aesthetic.safetensors")
"""

import re
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from ...core.errors import InputError
from .clip import Clip

_LAYER = re.compile(r"(?:layers|mlp)\.(\d+)\.weight")
_HIGHEST = 10  # of the grades that it was trained on


class AestheticScore:
    """Reward function: the predicted grade, over 10.

    Args:
        clip: the CLIP that the head was trained on, ViT-L/14 for LAION's.
        head: safetensors file of linear layers, `layers.0.weight`, `layers.0.bias`, ..., applied one after the other.

    Raises:
        InputError: the file cannot be read, has no such layers, or they do not fit CLIP or each other.
    """

    __name__ = "aesthetic"

    def __init__(self, clip: Clip, head: str | Path):
        self.clip = clip
        try:
            tensors = load_file(head)
        except (OSError, SafetensorError) as error:
            found = " ".join(str(error).split())[:200]
            raise InputError(f"aesthetic_head {head}", found=found, expected="a safetensors file") from None
        numbered = {int(found[1]): name for name in tensors if (found := _LAYER.fullmatch(name))}
        names = [numbered[number] for number in sorted(numbered)]
        biases = [tensors.get(name.replace("weight", "bias"), tensors[name].new_zeros(())) for name in names]
        self.layers = [(tensors[name].float(), bias.float()) for name, bias in zip(names, biases, strict=True)]
        widths = [clip.model.config.projection_dim, *(weight.shape[0] for weight, _ in self.layers)]
        fits = all(weight.shape[1:] == (width,) for (weight, _), width in zip(self.layers, widths, strict=False))
        if not self.layers or not fits or widths[-1] != 1:
            found = ", ".join(f"{name} {tuple(tensors[name].shape)}" for name in names) or "no layers.N.weight"
            expected = f"linear layers from CLIP's {widths[0]} to 1"
            raise InputError(f"aesthetic_head {head}", found=found, expected=expected)

    @torch.no_grad()
    def __call__(self, prompts: list[str], images: list[Image.Image], **columns) -> list[float]:
        """Return the grade of each picture, about 0 to 1."""
        found = self.clip.images(images).cpu()
        for weight, bias in self.layers:
            found = torch.nn.functional.linear(found, weight, bias)
        return (found[:, 0] / _HIGHEST).tolist()
