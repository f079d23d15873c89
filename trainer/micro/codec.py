"""Training of the micro VAE: diffusers' `AutoencoderTiny` (TAESD architecture), factor 8, 16 channels.

Two terms make its latents fit for diffusion: each channel is held near zero mean and unit deviation, so no scaling
factor is needed, and the decoder sees latents with noise of many sizes: clean ones come out sharp, bad ones as the
nearest picture, so small errors of the transformer do not show.

It learns on whole pictures. Trained on 32-pixel crops it drew crops well and 64-pixel pictures badly: its view is
wider than a crop, so it had learned to orient itself by the borders.
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from diffusers.models.autoencoders.vae import AutoencoderTinyBlock
from PIL import Image
from torch import nn
from transformers import Trainer, TrainingArguments

from ...core.micro import VAE_CONFIG
from .tasks import EDIT_KINDS, T2I_KINDS, sample_edit, sample_t2i
from .verifier import read_scene
from .world import Scene, render

_MOST_NOISE = 0.5  # largest standard deviation of the noise added to latents before decoding
_STATISTICS_WEIGHT = 0.1
_NUM_SCENES = 4096
_BATCH_SIZE = 4  # pictures; each has 64 latents, so small batches and many steps learn fastest
_BRANCH_GAIN = 0.1  # size of each residual branch at the start


def to_pixels(images: list[Image.Image]) -> torch.Tensor:
    """Return pictures as a float tensor (N, 3, H, W) in -1..1."""
    pixels = torch.from_numpy(np.stack([np.asarray(i.convert("RGB")) for i in images]))
    return pixels.permute(0, 3, 1, 2).float().div(127.5).sub(1)


def to_images(pixels: torch.Tensor) -> list[Image.Image]:
    """Return a tensor (N, 3, H, W) in -1..1 as 8-bit RGB pictures; values outside are clamped."""
    array = pixels.float().clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(a) for a in array]


def sample_scenes(count: int, seed: int) -> list[Scene]:
    """Return `count` scenes in turn from all kinds of prompts and edits."""
    rng = np.random.default_rng([seed, 1])
    scenes: list[Scene] = []
    while len(scenes) < count:
        scenes += [sample_t2i(rng, kind)[1] for kind in T2I_KINDS]
        scenes += [sample_edit(rng, kind).target for kind in EDIT_KINDS]
    return scenes[:count]


class PictureDataset(torch.utils.data.Dataset):
    """Rendered scenes, some mirrored, as float tensors (3, 64, 64) in -1..1; the same for the same seed."""

    def __init__(self, num_scenes: int, length: int, seed: int):
        self.pixels = to_pixels([render(s) for s in sample_scenes(num_scenes, seed)])
        self.length, self.seed = length, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng([self.seed, 2, index])
        picture = self.pixels[rng.integers(len(self.pixels))]
        return {"pixel_values": picture.flip(-1) if rng.random() < 0.5 else picture}


class CodecLoss(nn.Module):
    """Reconstruction plus latent statistics of an `AutoencoderTiny`."""

    def __init__(self, vae: AutoencoderTiny):
        super().__init__()
        self.vae = vae

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the loss for `pixel_values` (N, 3, H, W) in -1..1."""
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        latents = self.vae.encode(pixel_values).latents.float()
        std, mean = torch.std_mean(latents, dim=(0, 2, 3))
        statistics = mean.square().mean() + (std - 1).square().mean()
        noise = _MOST_NOISE * torch.rand(len(latents), 1, 1, 1, device=latents.device) * torch.randn_like(latents)
        decoded = self.vae.decode(latents + noise).sample.float()
        reconstruction = F.mse_loss(decoded, pixel_values) + 0.2 * F.l1_loss(decoded, pixel_values)
        return {"loss": reconstruction + _STATISTICS_WEIGHT * statistics}


@torch.no_grad()
def initialize(vae: AutoencoderTiny, pixel_values: torch.Tensor) -> None:
    """He initialisation with each residual branch almost off, and latents scaled to unit deviation on a batch.

    The network has no normalisation; with torch's default gain its signal fades over 30 convolutions, and latents far
    from unit size saturate the decoder's clamp. Either way training ends at the mean picture.

    Args:
        vae: changed in place.
        pixel_values: pictures (N, 3, H, W) in -1..1.
    """
    for module in vae.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in vae.modules():
        if isinstance(module, AutoencoderTinyBlock):
            module.conv[-1].weight.mul_(_BRANCH_GAIN)
    vae.encoder.layers[-1].weight.div_(vae.encode(pixel_values).latents.std())
    vae.decoder.layers[-1].weight.div_(vae.decode(vae.encode(pixel_values).latents).sample.std())


def train_codec(output_dir: Path, steps: int, seed: int) -> AutoencoderTiny:
    """Train the micro VAE and return it in evaluation mode. Logs go to `output_dir`."""
    torch.manual_seed(seed)
    pictures = PictureDataset(_NUM_SCENES, steps * _BATCH_SIZE, seed)
    vae = AutoencoderTiny(**VAE_CONFIG)
    initialize(vae, torch.stack([pictures[i]["pixel_values"] for i in range(64)]))
    return _fit(vae, pictures, output_dir, steps, seed, learning_rate=6e-4)


def refine_decoder(vae: AutoencoderTiny, output_dir: Path, steps: int, seed: int) -> AutoencoderTiny:
    """Go on training the decoder alone and return the VAE.

    The encoder, and with it every latent that a transformer was trained on, stays as it is.
    """
    vae.encoder.requires_grad_(False)
    pictures = PictureDataset(_NUM_SCENES, steps * _BATCH_SIZE, seed + 1)
    return _fit(vae, pictures, output_dir, steps, seed, learning_rate=4e-4)


def _fit(vae, pictures, output_dir: Path, steps: int, seed: int, learning_rate: float) -> AutoencoderTiny:
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=steps,
        per_device_train_batch_size=_BATCH_SIZE,
        learning_rate=learning_rate,
        adam_beta2=0.99,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(0.05 * steps),
        max_grad_norm=1.0,
        weight_decay=0.0,
        bf16=True,
        logging_steps=100,
        save_strategy="no",
        report_to=["tensorboard"],
        remove_unused_columns=False,
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
    )
    model = CodecLoss(vae.to(memory_format=torch.channels_last))
    Trainer(model=model, args=arguments, train_dataset=pictures).train()
    return vae.eval()


@torch.no_grad()
def encode(vae: AutoencoderTiny, images: list[Image.Image], batch_size: int = 64) -> torch.Tensor:
    """Return latents (N, 16, H/8, W/8), float32, ready for the transformer."""
    chunks = [images[i : i + batch_size] for i in range(0, len(images), batch_size)]
    return torch.cat([vae.encode(to_pixels(c).to(vae.dtype)).latents.float() for c in chunks])


@torch.no_grad()
def round_trip_accuracy(vae: AutoencoderTiny, num_scenes: int, seed: int) -> float:
    """Share of held-out scenes that read the same after encoding and decoding, within the verifier's tolerances."""
    scenes = sample_scenes(num_scenes, seed)
    latents = encode(vae, [render(s) for s in scenes])
    decoded = to_images(torch.cat([vae.decode(chunk).sample for chunk in latents.to(vae.dtype).split(64)]))
    return sum(_same(read_scene(image), scene) for image, scene in zip(decoded, scenes, strict=True)) / len(scenes)


def _same(read: Scene, real: Scene) -> bool:
    left = list(read.things)
    for thing in real.things:
        near = [t for t in left if t.name == thing.name and abs(t.x - thing.x) <= 2 and abs(t.y - thing.y) <= 2]
        if not near:
            return False
        left.remove(near[0])
    return not left and read.ground == real.ground
