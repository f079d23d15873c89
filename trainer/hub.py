"""A trained model's card, and its way to the hub."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import yaml
from huggingface_hub import HfApi

from ..core.errors import InputError
from ..core.micro import BUNDLED_MODELS
from .flow_grpo_config import READ_BY

_SHOWN = (
    "trainable", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate",
    "muon_learning_rate",
    "lr_scheduler_type", "edit_ratio", "timestep_sampling", "shift", "dynamic_shift", "loss_weighting",
    "contrastive_weight", "caption_dropout", "edit_caption_dropout", "estimator", "num_generations", "dynamics", "eta",
    "old_policy", "nft_beta", "awm_power", "train_timesteps", "num_inference_steps", "guidance_scale", "beta",
    "distillation_weight", "positions", "vision_dropout", "vlm_lora_r", "vlm_lora_alpha", "ema_decay", "seed",
)  # fmt: skip
_OF_LORA = ("vlm_lora_r", "vlm_lora_alpha")
_USE_LORA = """`comfyui_lora.safetensors` goes into ComfyUI's `models/loras`, for the stock LoRA loaders.
`pytorch_lora_weights.safetensors` holds the same weights for diffusers' `load_lora_weights`."""
_USE_MODEL = """The folder is in the published layout:

```python
from unipic2.trainer import StableDiffusion3KontextPipeline

pipe = StableDiffusion3KontextPipeline.from_pretrained("FOLDER_OR_REPOSITORY")
drawn = pipe("a red car").images[0]
edited = pipe("make the car blue", image=drawn).images[0]
```

`unipic2 export --model FOLDER --out unipic2.safetensors` writes the transformer as one file for ComfyUI."""
_USE_METAQUERY = """The folder is in the published layout; where Qwen2.5-VL does not come along,
`vlm_name_or_path` names it:

```python
from unipic2.trainer import MetaQueryPipeline

pipe = MetaQueryPipeline.from_pretrained("FOLDER_OR_REPOSITORY")
drawn = pipe("a red car").images[0]
edited = pipe("make the car blue", image=drawn).images[0]
print(pipe.answer("What color is the car?", edited))
```

In ComfyUI the connector is the file in `conditioner/`, put into `models/model_patches`; `unipic2 export` writes the
transformer as one file. A LoRA of Qwen2.5-VL, if there is one, is in `text_encoder_lora/`: the stock Load
LoRA (Model and CLIP) puts `comfyui_clip_lora.safetensors` onto the CLIP."""


def model_card(
    name: str,
    base: str,
    datasets: list[str],
    args,
    steps: int | None,
    lora: bool,
    method: str = "flow matching",
    metaquery: bool = False,
    earlier: Sequence = (),
) -> str:
    """Return a model card as Markdown with the hub's YAML head.

    Args:
        name: the title.
        base: folder or hub repository that training started from.
        datasets: names of the training data.
        args: settings of the run, or of its last stage.
        earlier: those of the stages before; what differs is shown in turn.
        steps: optimizer steps taken; None where they are not known.
        lora: whether the export is a LoRA.
        method: what it was trained with.
        metaquery: whether it is a MetaQuery model.
    """
    head: dict = {"library_name": "diffusers", "pipeline_tag": "image-to-image"}
    if not Path(base).exists() and base not in BUNDLED_MODELS:  # a repository; where a folder lay is nobody's business
        head["base_model"] = base
    head["tags"] = ["text-to-image", "image-to-image", "unipic2", *(["lora"] if lora else [])]
    data = ", ".join(Path(name).name if Path(name).exists() else name for name in datasets)
    settings = {setting.name for setting in fields(args)}
    stages = (*earlier, args)
    estimators = {getattr(stage, "estimator", None) for stage in stages}
    use = _USE_LORA if lora else _USE_METAQUERY if metaquery else _USE_MODEL
    what = "A LoRA" if lora else "A MetaQuery model" if metaquery else "A transformer"
    shown = [name for name in _SHOWN if name in settings and not estimators.isdisjoint(READ_BY.get(name, estimators))]
    rows = []
    for setting in shown:
        if setting not in _OF_LORA or args.vlm_lora_r:
            values = [getattr(stage, setting) for stage in stages]
            values = [str(getattr(value, "value", value)) for value in values]  # names of transformers' choices
            rows.append(f"| {setting} | {values[0] if len(set(values)) == 1 else ', then '.join(values)} |")
    return "\n".join([
        "---", yaml.safe_dump(head, sort_keys=False).strip(), "---", "",
        f"# {name}", "",
        f"{what} for UniPic2-SD3.5M-Kontext: text-to-image and editing, trained with "
        f"{method}{'' if steps is None else f' for {steps} steps'} on {data}.", "",
        "## Use", "", use, "",
        "## Training", "", "| setting | value |", "|---|---|", *rows, "",
        "Weights derived from Stable Diffusion 3.5 Medium carry its licence.", "",
    ])  # fmt: skip


def repository_name(args, output_dir: Path) -> str:
    """Return `hub_model_id`, by default the name of the run's folder."""
    return args.hub_model_id or output_dir.resolve().name


def push(folder: Path, repository: str, args) -> str:
    """Upload an export, into a repository that is made if need be; returns its address.

    Raises:
        InputError: the hub does not take it; the export stays where it is.
    """
    try:
        hub = HfApi(token=args.hub_token)
        found = hub.create_repo(repository, private=args.hub_private_repo, exist_ok=True).repo_id
        return str(hub.upload_folder(repo_id=found, folder_path=folder))
    except Exception as error:  # whatever the hub's client and its own libraries raise
        remedy = f"The export is whole, in {folder}: `hf upload {repository} {folder}` sends it later."
        raise hub_error(repository, error, remedy) from error


def hub_error(repository: str, error: Exception, remedy: str) -> InputError:
    """Return the error that tells people why the hub could not be used."""
    found = " ".join(str(error).split())[:300] or type(error).__name__
    return InputError(f"push_to_hub to {repository}", found=found, expected="a hub that takes it", remedy=remedy)
