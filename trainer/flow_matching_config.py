"""Settings of `FlowMatchingTrainer`."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from ..core.errors import InputError, check_one_of, check_share
from ..core.micro import SHIFT
from .adapters import TRAINABLE
from .objective import LOSS_WEIGHTINGS, TIMESTEP_SAMPLINGS

ATTENTION_BACKENDS = {
    "auto": None,
    "flash": "FLASH_ATTENTION",
    "efficient": "EFFICIENT_ATTENTION",
    "cudnn": "CUDNN_ATTENTION",
    "math": "MATH",
}
"""Names of torch's kernels for attention, as in `torch.nn.attention.SDPBackend`; `auto` lets torch choose."""
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
        metadata={"help": "How sigma is drawn before the shift: logit_normal, uniform or mode (SD3, section 3.1)."},
    )
    logit_mean: float = field(
        default=0.0, metadata={"help": "Mean of the normal under logit_normal; above 0 trains noisier sigmas more."}
    )
    logit_std: float = field(default=1.0, metadata={"help": "Deviation of the normal under logit_normal."})
    mode_scale: float = field(
        default=1.29, metadata={"help": "Scale of `mode`, -1 to 1.75; above 0 the middle sigmas are drawn more often."}
    )
    dynamic_shift: bool = field(
        default=False,
        metadata={"help": "Shift by picture size instead of `shift`, in training, previews and exported scheduler."},
    )
    base_shift: float = field(
        default=0.5, metadata={"help": "dynamic_shift: logarithm of the shift at 256x256 pixels (0.5 is shift 1.65)."}
    )
    max_shift: float = field(
        default=1.16, metadata={"help": "dynamic_shift: logarithm of the shift at 1024x1024 pixels (1.16 is 3.19)."}
    )
    loss_weighting: str = field(
        default="none",
        metadata={"help": "How sigmas count in the loss: none, sigma_sqrt (sigma^-2) or cosmap (SD3, section 3.1)."},
    )
    contrastive_weight: float = field(
        default=0.0,
        metadata={
            "help": "Contrastive flow matching (arXiv 2506.05350): this times the squared distance to the velocity of "
            "another sample of the batch is subtracted from the loss. 0 is off; the paper uses 0.05."
        },
    )
    caption_dropout: float = field(
        default=0.1, metadata={"help": "Share of text-to-image samples trained without text, 0 to 1."}
    )
    edit_caption_dropout: float = field(
        default=0.1, metadata={"help": "Share of edits trained without text (the reference stays), 0 to 1."}
    )
    reference_dropout: float = field(
        default=0.0, metadata={"help": "Share of the batches of edits trained without their references, 0 to 1."}
    )
    unmasked_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of the loss outside an edit's mask, 0 to 1, against 1 inside; 1 ignores masks."},
    )
    edit_ratio: float = field(
        default=0.5, metadata={"help": "Share of the batches that are edits, 0 to 1. A batch holds one task only."}
    )
    trainable: str = field(
        default="full",
        metadata={"help": "Weights of the transformer that are trained without LoRA: full or attention."},
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
    attention_backend: str = field(
        default="auto",
        metadata={"help": "torch's kernel for attention in training: auto, flash, efficient, cudnn or math."},
    )
    use_ema: bool = field(default=True, metadata={"help": "Keep an average of the weights; it is what is exported."})
    ema_decay: float = field(default=0.999, metadata={"help": "Decay of that average for each optimizer step."})
    ema_update_steps: int = field(default=1, metadata={"help": "Optimizer steps between updates of the average."})
    ema_on_cpu: bool = field(
        default=False, metadata={"help": "Keep the average in main memory: frees 4 bytes a weight, costs a copy."}
    )
    preview_steps: int = field(
        default=500, metadata={"help": "Optimizer steps between fixed-seed preview grids; 0 is none."}
    )
    preview_inference_steps: int = field(default=20, metadata={"help": "Denoising steps of a preview."})
    preview_guidance_scale: float = field(default=3.5, metadata={"help": "Guidance of a preview."})
    report_to: None | str | list[str] = field(
        default="tensorboard",
        metadata={"help": "Loggers: tensorboard, wandb, trackio, ... (installed ones), several, or none."},
    )
    export_dtype: str = field(
        default="float16", metadata={"help": "Type of exported trained weights: float32, float16 or bfloat16."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Kept False: the collator reads columns that no forward signature names."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.ddp_find_unused_parameters is None:  # each step reaches all that is trained
            self.ddp_find_unused_parameters = False
        check_one_of("timestep_sampling", self.timestep_sampling, TIMESTEP_SAMPLINGS)
        check_one_of("export_dtype", self.export_dtype, EXPORT_DTYPES)
        check_one_of("attention_backend", self.attention_backend, tuple(ATTENTION_BACKENDS))
        check_one_of("trainable", self.trainable, TRAINABLE)
        check_one_of("loss_weighting", self.loss_weighting, LOSS_WEIGHTINGS)
        shares = ("caption_dropout", "edit_caption_dropout", "reference_dropout", "unmasked_weight", "edit_ratio")
        for name in (*shares, "ema_decay"):
            check_share(name, getattr(self, name))
        if not self.shift > 0:  # also true for nan
            raise InputError("shift", found=self.shift, expected="a number above 0 (1 is no shift)")
        if self.use_ema and "schedule_free" in self.optim.value:
            expected = "use_ema: false, as this optimizer averages the weights by itself"
            raise InputError("use_ema", found=f"true with optim {self.optim.value}", expected=expected)
        if self.muon_learning_rate is not None and not self.muon_learning_rate > 0:
            expected = "a number above 0, or null for `optim` alone"
            raise InputError("muon_learning_rate", found=self.muon_learning_rate, expected=expected)
        if not -1 <= self.mode_scale <= 1.75:
            raise InputError("mode_scale", found=self.mode_scale, expected="-1 to 1.75; beyond, sigmas leave 0 to 1")
        if not 0 <= self.contrastive_weight < 1:
            expected = "0 (off) to below 1; at 1 the loss has no minimum"
            raise InputError("contrastive_weight", found=self.contrastive_weight, expected=expected)
        if self.ema_update_steps < 1:
            raise InputError("ema_update_steps", found=self.ema_update_steps, expected="at least 1")
        if not self.logit_std >= 0:
            raise InputError("logit_std", found=self.logit_std, expected="a number from 0 on")
