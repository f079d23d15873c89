"""UniPic2-MetaQuery: one pipeline that understands, draws and edits through Qwen2.5-VL.

The prompt goes through a frozen Qwen2.5-VL, which for an edit also sees the picture; learned queries behind it and a
connector (`core.connector`) turn what it understood into the transformer's text states. Everything after that is
`StableDiffusion3KontextPipeline`.

Folder: `transformer/`, `vae/`, `scheduler/`, `conditioner/`, and, where the language model comes along (the micro
model), `text_encoder/` and `tokenizer/`. Published models leave these two out: they are Qwen2.5-VL-7B-Instruct's own.
LoRAs that were trained in the language model are in `text_encoder_lora/` (`vlm_lora`).
"""

import json
import shutil
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, FlowMatchEulerDiscreteScheduler
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from ..core.checkpoint import cast_file, component_files, read_header
from ..core.connector import StableDiffusion3Conditioner
from ..core.errors import InputError, check_one_of
from ..core.files import PIPELINE_INDEX, VLM_LORA_FOLDER, read_json, write_file
from ..core.micro import BUNDLED_MODELS, component_dir, weights_dir
from ..core.pictures import to_rgb
from ..core.prompts import DEFAULT_EDIT_NEGATIVE_PROMPT, POSITIONS, question_segments
from ..core.vision import understanding_pixels
from . import vlm_lora
from .kontext_pipeline import (
    NOT_COPIED,
    StableDiffusion3KontextPipeline,
    check_component,
    forget_paths,
    negatives_of,
    resized,
)
from .kontext_transformer import SD3Transformer2DKontextModel
from .query_states import (
    Prefix,
    PrefixCache,
    build_prefix,
    picture_inputs,
    text_states,
    token_ids,
    widened,
)

PUBLISHED_VLM = "Qwen/Qwen2.5-VL-7B-Instruct"
_POSITIONS_KEY, _VLM_KEY = "positions", "vlm"
"""Entries of `model_index.json` that say how, and on which Qwen2.5-VL, the model was trained; published folders lack
them."""
_LIBRARIES = {
    "transformer": ("diffusers", "SD3Transformer2DModel"),
    "vae": ("diffusers", None),
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "conditioner": ("unipic2", "StableDiffusion3Conditioner"),
    "text_encoder": ("transformers", "Qwen2_5_VLForConditionalGeneration"),
    "tokenizer": ("transformers", "Qwen2Tokenizer"),
}
VLM_PARTS = ("text_encoder", "tokenizer")
"""What a folder holds of Qwen2.5-VL, if it holds it."""


class MetaQueryPipeline(StableDiffusion3KontextPipeline):
    """Draw, edit and answer questions.

    Args:
        transformer, scheduler, vae: as for `StableDiffusion3KontextPipeline`.
        text_encoder: Qwen2.5-VL of any size.
        tokenizer: its tokenizer.
        conditioner: queries and connector, for that size and that transformer.
        positions: one of `query_states.POSITIONS`; None takes the connector's own, 1d where it says none.

    Raises:
        InputError: the parts' widths do not fit together, or unknown positions.

    Example:
        ```python
        pipe = MetaQueryPipeline.from_pretrained("Skywork/UniPic2-Metaquery-9B")
        picture = pipe("two red squares").images[0]
        print(pipe.answer("What color are the squares?", picture))
        ```
    """

    sees_pictures = True
    vlm_name: str | None = None
    """Name of a Qwen2.5-VL that came from elsewhere, as it was given."""
    writes_vlm = False
    """Whether `save_trained` also writes a Qwen2.5-VL that came from elsewhere."""

    def __init__(
        self,
        transformer: SD3Transformer2DKontextModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL | AutoencoderTiny,
        text_encoder: Qwen2_5_VLForConditionalGeneration,
        tokenizer: Qwen2Tokenizer,
        conditioner: StableDiffusion3Conditioner,
        positions: str | None = None,
    ):
        super().__init__(
            transformer=transformer,
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=None,
            tokenizer_2=None,
            text_encoder_3=None,
            tokenizer_3=None,
        )
        self.register_modules(conditioner=conditioner)
        self.positions = positions or conditioner.positions
        for field, part, expected in (
            ("llm_hidden_size", "Qwen2.5-VL", text_encoder.config.text_config.hidden_size),
            ("joint_attention_dim", "the transformer", transformer.config.joint_attention_dim),
            ("pooled_projection_dim", "the transformer", transformer.config.pooled_projection_dim),
        ):
            found = conditioner.config[field]
            if found != expected:
                raise InputError(f"connector, {field}", found=found, expected=f"{expected} (width of {part})")

    @property
    def positions(self) -> str:
        """How a picture's tokens are numbered; kept with the connector, whose file may go elsewhere alone."""
        return self.conditioner.positions

    @positions.setter
    def positions(self, value: str) -> None:
        check_one_of("positions", value, POSITIONS)
        self.conditioner.config[_POSITIONS_KEY] = value

    @property
    def components(self) -> dict:
        """The parts by name; those of the parent that this model lacks are not among them."""
        return {name: getattr(self, name) for name in _LIBRARIES}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, vlm_name_or_path: str | Path | None = None, **kwargs):
        """Load a folder in the published layout (module docstring), a bundled model, or a hub repository.

        Args:
            pretrained_model_name_or_path: the model.
            vlm_name_or_path: Qwen2.5-VL, a folder or hub repository; None takes the model's own, the one that
                `model_index.json` names, or the published 7B.
            kwargs: `torch_dtype` (one, or one for each component), `positions` instead of those that the model was
                trained with, and parts that are ready; such a `text_encoder` is taken as it is, without the model's
                LoRA.

        Raises:
            InputError: a part is missing, broken, or does not fit the others.
        """
        types = kwargs.pop("torch_dtype", kwargs.pop("dtype", None))
        folder = cls.find_folder(pretrained_model_name_or_path, kwargs)
        index = read_json(folder / PIPELINE_INDEX, "a pipeline") if (folder / PIPELINE_INDEX).is_file() else {}
        positions = kwargs.pop("positions", None) or index.get(_POSITIONS_KEY)
        given = frozenset(name for name in kwargs if name in _LIBRARIES)
        unknown = kwargs.keys() - given
        if unknown:
            raise InputError(
                "MetaQueryPipeline", found=", ".join(sorted(unknown)), expected=f"{', '.join(_LIBRARIES)}"
            )
        for name in ("transformer", "vae", "scheduler", "conditioner"):
            if name not in given and not component_dir(folder, name).is_dir():
                raise InputError(
                    f"model {folder}", found=f"no {name} folder", expected=f"{name}/, a UniPic2-MetaQuery model"
                )
        for name in ("transformer", "vae"):  # before the language model, which may be large, is loaded
            if name not in given:
                check_component(folder, name)

        def type_of(name: str) -> torch.dtype | None:
            return types.get(name, types.get("default")) if isinstance(types, dict) else types

        parts, vlm_name = {name: kwargs[name] for name in given}, None
        if not given.issuperset(VLM_PARTS):
            own = vlm_name_or_path is None and (folder / "text_encoder").is_dir()
            vlm_name = None if own else str(vlm_name_or_path or index.get(_VLM_KEY, PUBLISHED_VLM))
            source = vlm_folder(folder, vlm_name)
            if source.resolve().parent != folder.resolve():
                given |= set(VLM_PARTS)
            parts |= load_vlm(source, type_of("text_encoder"), tuple(n for n in VLM_PARTS if n not in parts))
        parts |= _drawing_parts(folder, type_of, parts)
        if "conditioner" not in parts:
            parts["conditioner"] = StableDiffusion3Conditioner.from_pretrained(
                folder / "conditioner", **({} if type_of("conditioner") is None else {"dtype": type_of("conditioner")})
            )
        lora = folder / VLM_LORA_FOLDER
        if lora.is_dir() and "text_encoder" not in kwargs:
            vlm_lora.load_lora(parts["text_encoder"], lora)
        pipeline = cls(**parts, positions=positions)
        pipeline.loaded_from, pipeline.given, pipeline.vlm_name = folder, given, vlm_name
        return pipeline

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """Write all parts in the published layout, with a `model_index.json`. Arguments of diffusers are not taken."""
        self._write(Path(save_directory), copied=())

    def save_trained(
        self, folder: Path, trained: set[str], dtype: torch.dtype, metadata: dict[str, str] | None = None
    ) -> None:
        """Write `trained` parts in `dtype`; the others are copied unchanged, or left out if they are Qwen2.5-VL's own.

        See `StableDiffusion3KontextPipeline.save_trained`.
        """
        base = self.loaded_from
        copied = () if base is None else [n for n in _LIBRARIES if n not in {*trained, *self.given, "scheduler"}]
        left_out = set() if self.writes_vlm else set(VLM_PARTS) & self.given
        self._write(folder, copied, left_out, dtype, metadata)

    def _write(self, folder: Path, copied, left_out=frozenset(), dtype: torch.dtype | None = None, metadata=None):
        folder.mkdir(parents=True, exist_ok=True)
        index = {"_class_name": type(self).__name__, _POSITIONS_KEY: self.positions}
        for name, (library, class_name) in _LIBRARIES.items():
            if name in left_out:
                continue
            index[name] = [library, class_name or type(getattr(self, name)).__name__]
            if name not in copied:
                part = getattr(self, name)
                own = {"state_dict": vlm_lora.own_weights(part)} if name == "text_encoder" else {}
                part.save_pretrained(folder / name, **own)
        if vlm_lora.lora_of(self.text_encoder) is not None:
            vlm_lora.save_lora(self.text_encoder, folder / VLM_LORA_FOLDER)
        if "text_encoder" in left_out and self.vlm_name is not None and not Path(self.vlm_name).exists():
            index[_VLM_KEY] = self.vlm_name  # a repository; where a folder lay is nobody's business
        for file in folder.rglob("*.safetensors") if dtype is not None else ():
            if file.parent.name != "text_encoder" or dtype != torch.float32:  # never widened, between stages
                cast_file(file, dtype, metadata)
        for name in copied:
            shutil.copytree(component_dir(self.loaded_from, name), folder / name, ignore=NOT_COPIED)
        write_file(folder / PIPELINE_INDEX, json.dumps(index, indent=2) + "\n")
        forget_paths(folder)

    def default_negative_prompt(self, is_edit: bool) -> str:
        """Return what stands against the prompt where nothing is given: a text for edits of published models."""
        return DEFAULT_EDIT_NEGATIVE_PROMPT if is_edit and not isinstance(self.vae, AutoencoderTiny) else ""

    def enable_model_cpu_offload(self, *args, **kwargs) -> None:
        """Refuse: what moves whole parts to the GPU does so at their own forward, which is not what is called here.

        Raises:
            InputError: always.
        """
        raise self._no_offload("enable_model_cpu_offload")

    def enable_sequential_cpu_offload(self, *args, **kwargs) -> None:
        """Refuse, as `enable_model_cpu_offload` and for its reason.

        Raises:
            InputError: always.
        """
        raise self._no_offload("enable_sequential_cpu_offload")

    @staticmethod
    def _no_offload(name: str) -> InputError:
        remedy = "Call `encode_conditions` with Qwen2.5-VL on the GPU, move it away, and draw with its states."
        return InputError(name, found="a MetaQuery pipeline", remedy=remedy)

    def prefix(self, prompts: list[str], pictures: torch.Tensor | None = None) -> Prefix:
        """Return what stands before the queries, see `query_states.build_prefix`."""
        return build_prefix(self.text_encoder, self.tokenizer, prompts, pictures, self.positions)

    def states_of(self, prefix: Prefix | PrefixCache) -> tuple[torch.Tensor, torch.Tensor]:
        """Return text states (B, Q, D) and pooled text (B, P) of prefixes; gradients flow to queries and connector."""
        self.conditioner.to(self.text_encoder.device)  # a trainer moves only what it has wrapped
        return text_states(self.text_encoder, self.conditioner, prefix)

    def encode_conditions(
        self, prompts: list[str], pictures: torch.Tensor | None = None, device: torch.device | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return text states (B, Q, D) and pooled text (B, P) of prompts, or of instructions with their pictures.

        Args:
            prompts: B texts.
            pictures: (B, 3, H, W) in 0..1 at the size that is drawn, for edits.
            device: not needed; the language model's.
        """
        return self.states_of(self.prefix(prompts, pictures))

    def conditions(self, prompt, negative_prompt, pictures, num_images_per_prompt, guided) -> dict:
        """Return the prompt and, under guidance, the negative prompt as states; both see the picture."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if pictures is not None:
            pictures = pictures.expand(len(prompts), -1, -1, -1)
        states, pooled = self.encode_conditions(prompts, pictures)
        found = {"prompt_embeds": states, "pooled_prompt_embeds": pooled}
        if guided:
            states, pooled = self.encode_conditions(negatives_of(negative_prompt, len(prompts)), pictures)
            found |= {"negative_prompt_embeds": states, "negative_pooled_prompt_embeds": pooled}
        like = next(self.transformer.parameters())
        found = {name: part.to(like).repeat_interleave(num_images_per_prompt, 0) for name, part in found.items()}
        return {**found, "num_images_per_prompt": 1}  # diffusers does not repeat ready states

    @torch.no_grad()
    def answer(self, question: str, image: Image.Image | None = None, max_new_tokens: int = 256, **generation) -> str:
        """Answer a question about a picture, or without one, by Qwen2.5-VL alone: nothing of it was changed, and a
        LoRA for drawing is off.

        Args:
            question: plain text; markup of chats in it is read as text.
            image: any Pillow picture; the model sees it at its own size (`core.sizes.understanding_size`).
            max_new_tokens: length of the answer at most, in tokens.
            generation: further arguments of transformers' `generate` (`do_sample`, `temperature`, ...).

        Raises:
            InputError: a picture without pixels or without an RGB meaning, or far longer than wide.
        """
        vlm, config = self.text_encoder, self.text_encoder.config
        ids = token_ids(self.tokenizer, question_segments(question, image is not None))
        inputs = {}
        if image is not None:
            picture = to_rgb(image, "image")[0]
            pixels = understanding_pixels(resized(picture, picture.height, picture.width)[None])
            inputs = dict(picture_inputs(config.vision_config, pixels).to(vlm.device))
            count = int(inputs["image_grid_thw"][0].prod()) // config.vision_config.spatial_merge_size**2
            ids = widened(ids, config.image_token_id, count)
        ids = torch.tensor([ids], device=vlm.device)
        if image is not None:
            inputs["mm_token_type_ids"] = (ids == config.image_token_id).int()
        vlm.model.rope_deltas = None  # of an earlier picture
        with vlm_lora.without_lora(vlm):
            out = vlm.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                **inputs,
                **{"max_new_tokens": max_new_tokens, "do_sample": False, **generation},
            )
        vlm.model.rope_deltas = None
        return self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


def is_metaquery(folder: Path) -> bool:
    """Whether a pipeline's folder is one of MetaQuery."""
    return (folder / "conditioner").is_dir()


@contextmanager
def _fitting(folder: Path) -> Iterator[None]:
    """Turn what diffusers raises of a component whose config disagrees with its weights into an InputError."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        found = " ".join(str(error).split())[:600]
        raise InputError(f"model {folder}", found=found, expected="parts that fit their configs") from error


def _drawing_parts(folder: Path, type_of: Callable[[str], torch.dtype | None], ready: Container[str] = ()) -> dict:
    """Load transformer, VAE and scheduler, but for those that are ready."""
    parts = {}
    with _fitting(folder):
        if "transformer" not in ready:
            parts["transformer"] = _load_transformer(folder, type_of("transformer"))
        if "vae" not in ready:
            vae = component_dir(folder, "vae")
            tiny = read_json(vae / "config.json", "the VAE's settings").get("_class_name")
            kind = AutoencoderTiny if tiny == "AutoencoderTiny" else AutoencoderKL
            parts["vae"] = kind.from_pretrained(vae, use_safetensors=True, torch_dtype=type_of("vae"))
        if "scheduler" not in ready:
            parts["scheduler"] = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    return parts


def load_unconditioned(folder: Path, dtype: torch.dtype) -> StableDiffusion3KontextPipeline:
    """Load a model of either kind without what reads texts: what encodes pictures for a MetaQuery model.

    Raises:
        InputError: transformer or VAE is missing or broken.
    """
    for name in ("transformer", "vae"):
        check_component(folder, name)
    texts = {f"{kind}{number}": None for kind in VLM_PARTS for number in ("", "_2", "_3")}
    pipeline = StableDiffusion3KontextPipeline(**_drawing_parts(folder, lambda _: dtype), **texts)
    pipeline.loaded_from, pipeline.sees_pictures = folder, True
    return pipeline


def _load_transformer(folder: Path, dtype: torch.dtype | None) -> SD3Transformer2DKontextModel:
    return SD3Transformer2DKontextModel.from_pretrained(
        folder, subfolder="transformer", use_safetensors=True, torch_dtype=dtype
    )


def load_transformer(folder: Path, dtype: torch.dtype | None) -> SD3Transformer2DKontextModel:
    """Load the transformer of a pipeline's folder. Raises InputError where it is missing or broken."""
    check_component(folder, "transformer")
    with _fitting(folder):
        return _load_transformer(folder, dtype)


def vlm_folder(folder: Path | None, name: str | Path | None) -> Path:
    """Return the folder of a model's Qwen2.5-VL: the named one, the model's own, or the published 7B's.

    Args:
        folder: the model's, None where it has no Qwen2.5-VL of its own.
        name: Qwen2.5-VL's folder, a model that has one, or a hub repository.

    Raises:
        InputError: it is neither a folder nor can it be downloaded.
    """
    if name is None and folder is not None and (folder / "text_encoder").is_dir():
        return folder / "text_encoder"
    name = PUBLISHED_VLM if name is None else str(name)
    path = weights_dir(name) if name in BUNDLED_MODELS else Path(name)
    if not path.is_dir():
        try:
            path = StableDiffusion3KontextPipeline.find_folder(name)
        except InputError as error:
            remedy = "Fetch Qwen2.5-VL and name its folder with vlm_name_or_path."
            raise InputError("Qwen2.5-VL of the model", found=str(error), remedy=remedy) from error
    return path / "text_encoder" if (path / "text_encoder").is_dir() else path


def load_vlm(folder: Path, dtype: torch.dtype | None = None, parts: tuple[str, ...] = VLM_PARTS) -> dict:
    """Return `text_encoder`, frozen, and `tokenizer` of a Qwen2.5-VL in one folder, or in two beside each other.

    `parts` are those that are wanted.

    Raises:
        InputError: the folder holds something else, pickles, or broken weights.
    """
    config = read_json(folder / "config.json", "Qwen2.5-VL's settings")
    if config.get("model_type") != "qwen2_5_vl":
        raise InputError(f"model {folder}", found=config.get("model_type"), expected="qwen2_5_vl")
    found, info = {}, {"missing_keys": ()}
    try:
        if "text_encoder" in parts:
            for file in component_files(folder):
                read_header(file)
            vlm, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
                folder, use_safetensors=True, output_loading_info=True, **({} if dtype is None else {"dtype": dtype})
            )
            found["text_encoder"] = vlm.eval().requires_grad_(False)
        if "tokenizer" in parts:
            words = folder if (folder / "tokenizer_config.json").is_file() else folder.parent / "tokenizer"
            found["tokenizer"] = Qwen2Tokenizer.from_pretrained(words)
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"Qwen2.5-VL in {folder}", found=" ".join(str(error).split())[:600]) from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        words = f"{len(missing)} missing tensors, for example {missing[0]!r}"
        raise InputError(f"Qwen2.5-VL in {folder}", found=words, remedy="Fetch the folder again.")
    return found
