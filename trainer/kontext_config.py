"""Settings that all trainers of a Kontext model share."""

from dataclasses import dataclass, field
from typing import ClassVar

from transformers import TrainingArguments

from ..core.errors import InputError, check_one_of, check_share
from ..core.micro import SHIFT
from .adapters import TRAINABLE

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
class KontextConfig(TrainingArguments):
    """`transformers.TrainingArguments` plus what is trained, how it is averaged, shown and exported."""

    TRAINABLE: ClassVar[tuple[str, ...]] = TRAINABLE
    """What `trainable` may be."""

    shift: float = field(
        default=SHIFT,
        metadata={"help": "Timestep shift of training and of the exported scheduler; 1 is none, SD3 uses 3."},
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
    ema_decay: float = field(
        default=0.999,
        metadata={"help": "Highest decay of that average at an update; update n has at most 1 - n ** -0.75."},
    )
    ema_update_steps: int = field(
        default=1,
        metadata={"help": "Optimizer steps between updates: 10 with a decay of 0.999 is as long a memory as 0.9999."},
    )
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

    @property
    def n_gpu(self) -> int:
        """One GPU for each process: `nn.DataParallel`, transformers' way to use several, knows no bf16 and would take
        the GPUs of judges; `--accelerate_config` trains on several."""
        return min(super().n_gpu, 1)

    @property
    def draw_seed(self) -> int:
        """Seed of the order of samples and their random choices: `data_seed`, or `seed` where there is none."""
        return self.seed if self.data_seed is None else self.data_seed

    def __post_init__(self):
        super().__post_init__()
        if self.eval_strategy != "no":
            remedy = "`unipic2 eval` measures models, `unipic2 train pdtr` around its stages, previews show them."
            found = getattr(self.eval_strategy, "value", self.eval_strategy)
            raise InputError("eval_strategy", found=found, expected="no", remedy=remedy)
        if self.save_strategy == "best":
            raise InputError("save_strategy", found="best", expected="steps, epoch or no")
        if self.save_only_model:
            remedy = "`output_dir/export` is the model alone; save_strategy no keeps no checkpoints."
            raise InputError("save_only_model", found="true", expected="false, or no run can go on", remedy=remedy)
        if self.resume_from_checkpoint is not None:
            remedy = "Take `resume: true`: it goes on at the last whole checkpoint of output_dir."
            raise InputError("resume_from_checkpoint", found=self.resume_from_checkpoint, remedy=remedy)
        if self.ddp_find_unused_parameters is None:  # each step reaches all that is trained
            self.ddp_find_unused_parameters = False
        if self.ddp_broadcast_buffers is None:  # positions alone, which never change: 0.9 GB a step
            self.ddp_broadcast_buffers = False
        check_one_of("export_dtype", self.export_dtype, EXPORT_DTYPES)
        check_one_of("attention_backend", self.attention_backend, tuple(ATTENTION_BACKENDS))
        check_one_of("trainable", self.trainable, self.TRAINABLE)
        check_share("ema_decay", self.ema_decay)
        if not self.shift > 0:  # also true for nan
            raise InputError("shift", found=self.shift, expected="a number above 0 (1 is no shift)")
        if self.use_ema and "schedule_free" in self.optim.value:
            expected = "use_ema: false, as this optimizer averages the weights by itself"
            raise InputError("use_ema", found=f"true with optim {self.optim.value}", expected=expected)
        if self.muon_learning_rate is not None and not self.muon_learning_rate > 0:
            expected = "a number above 0, or null for `optim` alone"
            raise InputError("muon_learning_rate", found=self.muon_learning_rate, expected=expected)
        if self.ema_update_steps < 1:
            raise InputError("ema_update_steps", found=self.ema_update_steps, expected="at least 1")
