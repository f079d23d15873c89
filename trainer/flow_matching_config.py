"""Settings of `FlowMatchingTrainer`."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from ..core.errors import InputError
from ..core.micro import SHIFT

TIMESTEP_SAMPLINGS = ("logit_normal", "uniform")
EXPORT_DTYPES = ("float32", "float16", "bfloat16")


@dataclass
class FlowMatchingConfig(TrainingArguments):
    """`transformers.TrainingArguments` plus what flow-matching training of a Kontext model needs."""

    shift: float = field(
        default=SHIFT,
        metadata={"help": "Timestep shift of training and of the exported scheduler; 1 is none, SD3 uses 3."},
    )
    timestep_sampling: str = field(
        default="logit_normal",
        metadata={"help": "How sigma is drawn before the shift: logit_normal or uniform."},
    )
    logit_mean: float = field(
        default=0.0, metadata={"help": "Mean of the normal under logit_normal; above 0 trains noisier sigmas more."}
    )
    logit_std: float = field(default=1.0, metadata={"help": "Deviation of the normal under logit_normal."})
    caption_dropout: float = field(
        default=0.1, metadata={"help": "Share of text-to-image samples trained without text, 0 to 1."}
    )
    edit_caption_dropout: float = field(
        default=0.1, metadata={"help": "Share of edits trained without text (the reference stays), 0 to 1."}
    )
    edit_ratio: float = field(
        default=0.5, metadata={"help": "Share of the batches that are edits, 0 to 1. A batch holds one task only."}
    )
    train_text_encoder: bool = field(
        default=False, metadata={"help": "Also train the text encoder (the micro model does; published ones do not)."}
    )
    muon_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Train the matrices inside the blocks with Muon at this rate, the rest with AdamW at "
            "learning_rate; both have AdamW's scale. None trains everything with `optim`."
        },
    )
    use_ema: bool = field(default=True, metadata={"help": "Keep an average of the weights; it is what is exported."})
    ema_decay: float = field(default=0.999, metadata={"help": "Decay of that average for each optimizer step."})
    preview_steps: int = field(
        default=500, metadata={"help": "Optimizer steps between fixed-seed preview grids; 0 is none."}
    )
    preview_inference_steps: int = field(default=20, metadata={"help": "Denoising steps of a preview."})
    preview_guidance_scale: float = field(default=3.5, metadata={"help": "Guidance of a preview."})
    export_dtype: str = field(
        default="float16", metadata={"help": "Type of the exported weights: float32, float16 or bfloat16."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Kept False: the collator reads columns that no forward signature names."}
    )

    def __post_init__(self):
        super().__post_init__()
        _one_of("timestep_sampling", self.timestep_sampling, TIMESTEP_SAMPLINGS)
        _one_of("export_dtype", self.export_dtype, EXPORT_DTYPES)
        for name in ("caption_dropout", "edit_caption_dropout", "edit_ratio", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(name, found=getattr(self, name), expected="a share from 0 to 1")
        if not self.shift > 0:  # also true for nan
            raise InputError("shift", found=self.shift, expected="a number above 0 (1 is no shift)")
        if self.muon_learning_rate is not None and not self.muon_learning_rate > 0:
            expected = "a number above 0, or null for `optim` alone"
            raise InputError("muon_learning_rate", found=self.muon_learning_rate, expected=expected)
        if not self.logit_std >= 0:
            raise InputError("logit_std", found=self.logit_std, expected="a number from 0 on")


def _one_of(name: str, value: str, options: tuple[str, ...]) -> None:
    if value not in options:
        raise InputError(name, found=repr(value), expected=f"one of {', '.join(options)}")
