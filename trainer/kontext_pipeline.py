"""Text-to-image and editing with one diffusers pipeline (UniPic2-SD3.5M-Kontext).

Differences from diffusers' `StableDiffusion3Pipeline`, whose denoising loop runs unchanged: `image=` makes it an
edit; the reference goes into both guidance branches, only the text is dropped; the second and third text encoder
may be absent (the micro model has one).
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline
from huggingface_hub import snapshot_download
from PIL import Image
from transformers import CLIPTokenizer

from ..core.checkpoint import cast_file, check_transformer_config, component_files, config_disagrees, read_header
from ..core.errors import InputError, check_one_of
from ..core.files import PIPELINE_INDEX, read_json, write_file
from ..core.micro import BUNDLED_MODELS, component_dir, weights_dir
from ..core.pictures import to_rgb
from ..core.prompts import DEFAULT_EDIT_NEGATIVE_PROMPT
from ..core.sizes import fit_size, nearest_valid_size
from .kontext_transformer import SD3Transformer2DKontextModel

SAMPLE_MODES = ("argmax", "sample")
_REFERENCE_KEY = "ref_hidden_states"
_VARIANTS = "*.fp16*"  # the same weights again
NOT_COPIED = shutil.ignore_patterns(".*", "*.bin", "*.pt", "*.ckpt", "*.msgpack", _VARIANTS)
"""Pickles, leftovers of downloads, variants."""
_TOKEN_EMBEDDINGS = {
    "text_model.embeddings.token_embedding.weight": ("vocab_size", "hidden_size"),
    "shared.weight": ("vocab_size", "d_model"),
}


def check_pipeline_folder(folder: Path, given: set[str] = frozenset()) -> None:
    """Check a folder in the published layout before anything is loaded from it.

    Args:
        folder: the pipeline's folder.
        given: components that are not read from it.

    Raises:
        InputError: `model_index.json` is missing or broken, a component's folder or weight file is missing, a pickle
            or cut off, or the `config.json` of the transformer or a text encoder disagrees with its weights.
    """
    index = read_json(folder / PIPELINE_INDEX, "a pipeline in the published layout")
    # An entry is [library, class]; [null, null] says that the pipeline has no such component.
    present = {name for name, entry in index.items() if isinstance(entry, list) and any(entry)} | {"transformer"}
    for name in sorted(present - given):
        if not component_dir(folder, name).is_dir():
            raise InputError(
                f"model {folder}", found=f"no {name} folder", expected=f"{name}/, as model_index.json says"
            )
    for name in sorted(present - given):
        if not name.startswith(("tokenizer", "scheduler")):
            check_component(folder, name)


def check_component(folder: Path, name: str) -> None:
    """Check the weights of one component, and its `config.json`. Raises InputError, see `check_pipeline_folder`."""
    folder = component_dir(folder, name)
    headers = [read_header(file) for file in component_files(folder)]
    shapes = {key: shape for header in headers for key, shape in header.shapes.items()}
    path = folder / "config.json"
    config = read_json(path, f"the settings of the {name}")
    if name == "transformer":
        check_transformer_config(config, shapes, path)
        _check_tensors(config, shapes, folder)
    elif name.startswith("text_encoder"):
        _check_text_encoder(config, shapes, path)


def _check_text_encoder(config: dict, shapes: dict[str, tuple[int, ...]], path: Path) -> None:
    """Compare the sizes of a CLIP or T5 text encoder with its token embedding; transformers names neither."""
    for key, fields in _TOKEN_EMBEDDINGS.items():
        for field, size in zip(fields, shapes.get(key, ()), strict=False):
            if config.get(field) != size:
                raise config_disagrees(field, config.get(field), size, path)


def _check_tensors(config: dict, shapes: dict[str, tuple[int, ...]], folder: Path) -> None:
    """Compare all shapes with those of the architecture; diffusers would fill a gap with random numbers."""
    with torch.device("meta"):
        wanted = SD3Transformer2DKontextModel.from_config(config).state_dict()
    for key, tensor in wanted.items():
        if shapes.get(key) != tuple(tensor.shape):
            raise InputError(
                f"{key} in {folder}",
                found=f"shape {shapes[key]}" if key in shapes else "no such tensor",
                expected=f"shape {tuple(tensor.shape)}",
                remedy="The weights are incomplete or of another model: fetch or export them again.",
            )


def forget_paths(folder: Path) -> None:
    """Take out of a saved pipeline's configs where it was loaded from; that is of no use to whoever gets it."""
    for path in folder.glob("**/*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
            write_file(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _write_vocabulary(folder: Path) -> None:
    if (folder / "vocab.json").is_file():
        return
    model = read_json(folder / "tokenizer.json", "a CLIP tokenizer")["model"]
    merges = "".join(f"{' '.join(pair) if isinstance(pair, list) else pair}\n" for pair in model["merges"])
    vocabulary = json.dumps(model["vocab"], ensure_ascii=False)
    for name, text in (("vocab.json", vocabulary), ("merges.txt", f"#version: 0.2\n{merges}")):
        write_file(folder / name, text)


def resized(image: Image.Image | torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return a picture as (3, height, width) in 0..1: bicubic with antialiasing, as the node pack does it."""
    if isinstance(image, Image.Image):
        image = torch.from_numpy(np.array(to_rgb(image, "image")[0])).permute(2, 0, 1) / 255
    if image.shape[-2:] == (height, width):
        return image.float()
    return F.interpolate(image[None].float(), (height, width), mode="bicubic", antialias=True)[0].clamp(0, 1)


def negatives_of(negative_prompt: str | list[str] | None, count: int) -> list[str]:
    """Return a negative prompt for each of `count` prompts. Raises InputError where there are others."""
    negative = negative_prompt or ""
    negative = [negative] * count if isinstance(negative, str) else negative
    if len(negative) != count:
        expected = f"one text, or {count}, one for each prompt"
        raise InputError("negative_prompt", found=f"{len(negative)} texts", expected=expected)
    return negative


class StableDiffusion3KontextPipeline(StableDiffusion3Pipeline):
    """Draw from text, or edit a picture.

    Example:
        ```python
        pipe = StableDiffusion3KontextPipeline.from_pretrained("Skywork/UniPic2-SD3.5M-Kontext-2B")
        edited = pipe("make the car red", image=photo, generator=torch.Generator().manual_seed(0)).images[0]
        ```
    """

    _optional_components = [
        *StableDiffusion3Pipeline._optional_components,
        "text_encoder_2",
        "tokenizer_2",
        "text_encoder_3",
        "tokenizer_3",
    ]

    sees_pictures = False
    """Whether prompts of edits are encoded together with their pictures."""
    loaded_from: Path | None = None
    """The folder this pipeline was loaded from; what is not trained is exported from there."""
    given: frozenset[str] = frozenset()
    """Components that did not come from that folder."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Load a folder in the published layout, or a hub repository. Weights are safetensors only.

        Raises:
            InputError: the folder is not a pipeline, its weights are missing, cut off, or not of this architecture, or
                the hub does not have them.
        """
        name = pretrained_model_name_or_path
        folder, given = (
            cls.find_folder(name, kwargs),
            frozenset(k for k, v in kwargs.items() if hasattr(v, "state_dict")),
        )
        if (folder / "conditioner").is_dir():
            remedy = "Load it with MetaQueryPipeline."
            raise InputError(f"model {name}", found="a MetaQuery model", expected="text encoders", remedy=remedy)
        check_pipeline_folder(folder, set(kwargs))
        kwargs["use_safetensors"] = True
        try:
            if "transformer" not in kwargs:
                types = {key: kwargs[key] for key in ("torch_dtype", "dtype") if key in kwargs}
                for key, value in types.items():  # one type, or one for each component
                    types[key] = value.get("transformer", value.get("default")) if isinstance(value, dict) else value
                kwargs["transformer"] = SD3Transformer2DKontextModel.from_pretrained(
                    folder, subfolder="transformer", use_safetensors=True, **types
                )
            # The transformer is there, so the folder that has the VAE has all else too.
            pipeline = super().from_pretrained(component_dir(folder, "vae").parent, **kwargs)
            pipeline.loaded_from, pipeline.given = folder, given
            return pipeline
        except InputError:
            raise
        except (OSError, ValueError, RuntimeError) as error:  # a component whose config disagrees with its weights
            found = " ".join(str(error).split())[:600]
            raise InputError(f"model {name}", found=found, expected="components that fit their configs") from error

    @classmethod
    def find_folder(cls, name: str | Path, kwargs: dict | None = None) -> Path:
        """Return the folder of a pipeline: bundled weights by name, a folder, or a hub repository.

        The latter is downloaded, but for the components in `kwargs`. A folder of a bundled model's name is `./micro`.

        Raises:
            InputError: neither is there.
        """
        if name in BUNDLED_MODELS:
            return weights_dir(name)
        folder = Path(name)
        if folder.is_dir():
            return folder
        if folder.is_absolute() or len(folder.parts) != 2:
            raise InputError(f"model {folder}", found="no such folder", expected="a folder with model_index.json")
        return cls._download(str(name), {} if kwargs is None else kwargs)

    @staticmethod
    def _download(name: str, kwargs: dict) -> Path:
        """Fetch what a pipeline needs of a hub repository: no pickles, no code, no component that was given."""
        keys = ("cache_dir", "revision", "token", "local_files_only", "force_download")
        options = {key: kwargs.pop(key) for key in keys if key in kwargs}
        patterns = ["*.json", "*.txt", "*.model", "*.safetensors"]
        # Stability's repositories hold all weights once more for ComfyUI: one file at the root, and a folder.
        ignored = [_VARIANTS, "sd3*.safetensors", "text_encoders/*", *(f"{component}/*" for component in kwargs)]
        try:
            return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=ignored, **options))
        except (OSError, ValueError) as error:  # what the hub's client raises: no network, no such repository, ...
            raise InputError(
                f"model {name}",
                found=str(error).strip().splitlines()[0],
                expected="a folder with model_index.json, or a repository of the hub that can be reached",
            ) from error

    @classmethod
    def load_config(cls, *args, **kwargs):
        """Read `model_index.json`. Folders name various modules for the Kontext class; diffusers knows its parent."""
        loaded = super().load_config(*args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        if "transformer" in config:
            config["transformer"] = ["diffusers", "SD3Transformer2DModel"]
        return loaded

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Write the pipeline as diffusers does, CLIP vocabularies also as `vocab.json` and `merges.txt`.

        transformers 5 writes `tokenizer.json` alone; transformers 4, and ComfyUI with it, reads the other two.
        """
        super().save_pretrained(save_directory, *args, **kwargs)
        forget_paths(Path(save_directory))
        for name in ("tokenizer", "tokenizer_2"):
            if isinstance(getattr(self, name, None), CLIPTokenizer):
                _write_vocabulary(Path(save_directory) / name)

    def save_trained(
        self, folder: Path, trained: set[str], dtype: torch.dtype, metadata: dict[str, str] | None = None
    ) -> None:
        """Write the pipeline with `trained` components in `dtype`; the others are copied from `loaded_from` unchanged.

        What was not loaded from a folder is written as a trained component is. Components that were left out when the
        pipeline was loaded, such as text encoders whose states are cached, come back this way.

        Args:
            folder: new; not cleaned up on errors.
            trained: names of components whose weights changed; the scheduler is always written.
            dtype: floating type of what is written.
            metadata: put into the files of what is written.
        """
        base = self.loaded_from
        if base is None:
            self.save_pretrained(folder, safe_serialization=True)
            index, copied = {}, []
        else:
            index = read_json(base / PIPELINE_INDEX, "a pipeline in the published layout")
            present = [name for name, entry in index.items() if isinstance(entry, list) and any(entry)]
            written = [name for name in present if name in {*trained, *self.given, "scheduler"}]
            copied = [name for name in present if name not in written]
            for name in written:
                getattr(self, name).save_pretrained(folder / name)
        for file in folder.rglob("*.safetensors"):
            cast_file(file, dtype, metadata)
        for name in copied:
            shutil.copytree(component_dir(base, name), folder / name, ignore=NOT_COPIED)
            if name in ("tokenizer", "tokenizer_2") and (folder / name / "tokenizer.json").is_file():
                _write_vocabulary(folder / name)
        if base is not None:
            write_file(folder / PIPELINE_INDEX, json.dumps(index, indent=2) + "\n")
        forget_paths(folder)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Image.Image | list[Image.Image] | torch.Tensor | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        longer_edge: int = 512,
        num_inference_steps: int = 50,
        guidance_scale: float = 3.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        sample_mode: str = "argmax",
        generator: torch.Generator | list[torch.Generator] | None = None,
        joint_attention_kwargs: dict | None = None,
        **kwargs,
    ):
        """Generate pictures. Arguments that are not named here are diffusers' (`latents`, `output_type`, ...).

        Args:
            prompt: text or a list of texts; an instruction when `image` is given.
            image: reference picture(s) for an edit: PIL, or a tensor (B, 3, H, W) in 0..1; one for all prompts or one
                for each. Resized (bicubic) to the target size. None draws from text alone.
            height, width: target size in pixels, multiples of 16. Default: the reference's shape with its longer edge
                at `longer_edge` (multiples of 32); without a reference, the model's own size.
            longer_edge: pixels of the longer edge of an edit; the published default is 512, 1024 works too.
            num_inference_steps: denoising steps; the published default is 50.
            guidance_scale: classifier-free guidance; 1 turns it off.
            negative_prompt: None uses the default for edits ("" for text-to-image, and for models with one encoder).
            num_images_per_prompt: pictures for each prompt.
            sample_mode: "argmax" encodes the reference by the VAE posterior's mode (ComfyUI's way, deterministic),
                "sample" draws from it (the published script's way).
            generator: source of the noise; same generator state, same pictures.

        Returns:
            diffusers' `StableDiffusion3PipelineOutput`.

        Raises:
            InputError: sizes that the model cannot draw, pictures without pixels or of a kind that has no RGB, a
                number of pictures that fits no prompt list, or an unknown `sample_mode`.
        """
        if image is not None:
            images = list(image) if isinstance(image, (list, tuple, torch.Tensor)) else [image]
            if not images:
                raise InputError("image", found="an empty list", expected="at least one picture, or None to draw")
            if (height is None) != (width is None):
                found = f"only {'width' if height is None else 'height'}"
                raise InputError("height and width of an edit", found=found, expected="both, or neither")
            if height is None:
                first = images[0]
                size = first.size if isinstance(first, Image.Image) else (first.shape[-1], first.shape[-2])
                width, height = fit_size(*size, longer_edge=longer_edge)
        self._check_size(height, width)
        if negative_prompt is None and kwargs.get("negative_prompt_embeds") is None:
            negative_prompt = self.default_negative_prompt(is_edit=image is not None) or None
        if image is not None:
            prompts = len(prompt) if isinstance(prompt, list) else 1
            if prompt is None and kwargs.get("prompt_embeds") is not None:
                prompts = kwargs["prompt_embeds"].shape[0]
            reference = self.encode_reference(images, height, width, generator, sample_mode)
            reference = self._repeat_reference(reference, prompts, num_images_per_prompt)
            joint_attention_kwargs = {**(joint_attention_kwargs or {}), _REFERENCE_KEY: reference}
        conditions = {"prompt": prompt, "negative_prompt": negative_prompt}
        if prompt is not None:
            pictures = None
            if image is not None and self.sees_pictures:
                pictures = torch.stack([resized(i, height, width) for i in images])
            conditions = self.conditions(prompt, negative_prompt, pictures, num_images_per_prompt, guidance_scale > 1)
            twice = sorted(conditions.keys() & kwargs.keys())
            if twice:
                expected = "words, or states of prompt and negative prompt"
                raise InputError("prompt", found=f"words and {', '.join(twice)}", expected=expected)
        return super().__call__(
            **{"num_images_per_prompt": num_images_per_prompt, **conditions},
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=generator,
            joint_attention_kwargs=joint_attention_kwargs,
            **kwargs,
        )

    def conditions(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None,
        pictures: torch.Tensor | None,
        num_images_per_prompt: int,
        guided: bool,
    ) -> dict:
        """Return what tells diffusers' loop the prompt: here its words, which it encodes itself.

        Args:
            prompt, negative_prompt: as for a call.
            pictures: (B, 3, height, width) in 0..1 at the size that is drawn, for models whose prompts see them.
            num_images_per_prompt: pictures for each prompt.
            guided: the negative prompt is needed.
        """
        return {"prompt": prompt, "negative_prompt": negative_prompt}

    def encode_conditions(
        self, prompts: list[str], pictures: torch.Tensor | None = None, device: torch.device | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return states (B, L, D) and pooled text (B, P) of prompts, for models that look at them with their pictures.

        Args:
            prompts: B texts.
            pictures: (B, 3, H, W) in 0..1 at the size that is drawn; these text encoders do not see them.
            device: where the encoders are; None asks the pipeline.
        """
        states, _, pooled, _ = self.encode_prompt(
            prompts, None, None, device=device, do_classifier_free_guidance=False
        )
        return states, pooled

    def default_negative_prompt(self, is_edit: bool) -> str:
        """Return what stands against the prompt where nothing is given: a text for edits of published models."""
        return DEFAULT_EDIT_NEGATIVE_PROMPT if is_edit and self.tokenizer_2 is not None else ""

    def encode_reference(
        self,
        images: list[Image.Image] | list[torch.Tensor],
        height: int,
        width: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
        sample_mode: str = "argmax",
    ) -> torch.Tensor:
        """Return the scaled latents (B, C, height/8, width/8) of reference pictures resized to the target size.

        Pictures of any mode are read as 8-bit RGB, alpha over white. Tensors are (3, H, W) in 0..1.

        Raises:
            InputError: a picture without pixels or without an RGB meaning, or an unknown `sample_mode`.
        """
        check_one_of("sample_mode", sample_mode, SAMPLE_MODES)
        pixels = torch.stack([resized(image, height, width) for image in images]) * 2 - 1
        if isinstance(generator, list) and len(generator) != len(images):
            generator = generator[0]  # one picture for several prompts
        pixels = pixels.to(self._execution_device, self.vae.dtype)
        return self.encode_pixels(pixels, sample=sample_mode == "sample", generator=generator)

    @property
    def text_encoders(self) -> list[torch.nn.Module]:
        """The text encoders that there are, one to three."""
        encoders = (self.text_encoder, self.text_encoder_2, self.text_encoder_3)
        return [encoder for encoder in encoders if encoder is not None]

    def encode_bytes(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return `encode_pixels` of uint8 pixels (B, 3, H, W), 0 to 255."""
        return self.encode_pixels(pixels.float().div(127.5).sub(1).to(self.vae.dtype))

    def encode_pixels(
        self,
        pixels: torch.Tensor,
        sample: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> torch.Tensor:
        """Return scaled latents (B, C, H/8, W/8) of `pixels` (B, 3, H, W) in -1..1, in the VAE's type.

        Args:
            sample: draw from the VAE's posterior instead of taking its mode.
            generator: source of that draw.
        """
        encoded = self.vae.encode(pixels)
        if not hasattr(encoded, "latent_dist"):
            latents = encoded.latents  # a VAE without a posterior (TAESD architecture)
        else:
            latents = encoded.latent_dist.sample(generator) if sample else encoded.latent_dist.mode()
        return (latents - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    @staticmethod
    def _repeat_reference(reference: torch.Tensor, prompts: int, per_prompt: int) -> torch.Tensor:
        if reference.shape[0] not in (1, prompts):
            raise InputError(
                "image",
                found=f"{reference.shape[0]} pictures for {prompts} prompts",
                expected="one picture, or one for each prompt",
            )
        return reference.expand(prompts, -1, -1, -1).repeat_interleave(per_prompt, dim=0)

    def _check_size(self, height: int | None, width: int | None) -> None:
        step = self.vae_scale_factor * self.patch_size
        most = self.transformer.config.pos_embed_max_size * step
        for name, edge in (("height", height), ("width", width)):
            if edge is None:
                continue
            if edge < step or edge % step or edge > most:
                nearest = nearest_valid_size(min(edge, most), min(edge, most), step)[0]
                expected = f"a multiple of {step} from {step} to {most} pixels"
                raise InputError(name, found=edge, expected=expected, remedy=f"The nearest valid {name} is {nearest}.")

    def encode_prompt(
        self, prompt, prompt_2=None, prompt_3=None, device=None, num_images_per_prompt=1,
        do_classifier_free_guidance=True, negative_prompt=None, **kwargs,
    ):  # fmt: skip
        """Return text conditioning as diffusers does; a model with only the first encoder uses its states as they are.

        Returns:
            `(prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds, negative_pooled_prompt_embeds)` with states
            (B, L, joint_attention_dim) and pooled (B, pooled_projection_dim); the negatives are None without guidance.
        """
        ready = kwargs.get("prompt_embeds") is not None
        if self.text_encoder is None or self.text_encoder_2 is not None or self.text_encoder_3 is not None or ready:
            return super().encode_prompt(
                prompt, prompt_2, prompt_3, device, num_images_per_prompt, do_classifier_free_guidance,
                negative_prompt, **kwargs,
            )  # fmt: skip
        prompt = [prompt] if isinstance(prompt, str) else prompt
        embeds, pooled = self._get_clip_prompt_embeds(prompt, num_images_per_prompt, device)
        if not do_classifier_free_guidance:
            return embeds, None, pooled, None
        negative = negatives_of(negative_prompt, len(prompt))
        negative_embeds, negative_pooled = self._get_clip_prompt_embeds(negative, num_images_per_prompt, device)
        return embeds, negative_embeds, pooled, negative_pooled
