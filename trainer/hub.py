"""A trained model's card, and its way to the hub."""

from pathlib import Path

import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from ..core.errors import InputError

HUB_ERRORS = (OSError, HfHubHTTPError, HFValidationError, LocalTokenNotFoundError)
"""What the hub's client raises: no network, no token, no such user, a name it does not take."""
_SHOWN = (
    "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "muon_learning_rate",
    "lr_scheduler_type", "edit_ratio", "timestep_sampling", "shift", "dynamic_shift", "loss_weighting",
    "contrastive_weight", "caption_dropout", "edit_caption_dropout", "ema_decay", "seed",
)  # fmt: skip
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


def model_card(base: str, datasets: list[str], args, steps: int, lora: bool) -> str:
    """Return a model card as Markdown with the hub's YAML head.

    Args:
        base: folder or hub repository that training started from.
        datasets: names of the training data.
        args: `FlowMatchingConfig` of the run.
        steps: optimizer steps taken.
        lora: whether the export is a LoRA.
    """
    head: dict = {"library_name": "diffusers", "pipeline_tag": "image-to-image"}
    if not Path(base).exists():  # a repository; where a folder lay is nobody's business
        head["base_model"] = base
    head["tags"] = ["text-to-image", "image-to-image", "unipic2", *(["lora"] if lora else [])]
    data = ", ".join(Path(name).name if Path(name).exists() else name for name in datasets)
    rows = [f"| {name} | {getattr(args, name)} |" for name in _SHOWN]
    return "\n".join([
        "---", yaml.safe_dump(head, sort_keys=False).strip(), "---", "",
        f"# {Path(args.hub_model_id or Path(args.output_dir).resolve().name).name}", "",
        f"A {'LoRA' if lora else 'transformer'} for UniPic2-SD3.5M-Kontext: text-to-image and editing, trained with "
        f"flow matching for {steps} steps on {data}.", "",
        "## Use", "", _USE_LORA if lora else _USE_MODEL, "",
        "## Training", "", "| setting | value |", "|---|---|", *rows, "",
        "Weights derived from Stable Diffusion 3.5 Medium carry its licence.", "",
    ])  # fmt: skip


def push(folder: Path, repository: str, token: str | None) -> str:
    """Upload an export to a repository that exists; returns its address.

    Raises:
        InputError: the hub does not take it; the export stays where it is.
    """
    try:
        return str(HfApi(token=token).upload_folder(repo_id=repository, folder_path=folder))
    except HUB_ERRORS as error:
        raise hub_error(repository, error, f"The export is whole, in {folder}.") from error


def hub_error(repository: str, error: Exception, remedy: str) -> InputError:
    """Return the error that tells people why the hub could not be used."""
    found = " ".join(str(error).split())[:300] or type(error).__name__
    return InputError(f"push_to_hub to {repository}", found=found, expected="a hub that takes it", remedy=remedy)
