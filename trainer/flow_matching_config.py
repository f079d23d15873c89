"""Settings of `FlowMatchingTrainer`."""

from dataclasses import dataclass, field

from ..core.errors import InputError, check_one_of, check_share
from .kontext_config import KontextConfig
from .objective import LOSS_WEIGHTINGS, TIMESTEP_SAMPLINGS


@dataclass
class FlowMatchingConfig(KontextConfig):
    """`KontextConfig` plus the objective of flow-matching training."""

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

    def __post_init__(self):
        super().__post_init__()
        check_one_of("timestep_sampling", self.timestep_sampling, TIMESTEP_SAMPLINGS)
        check_one_of("loss_weighting", self.loss_weighting, LOSS_WEIGHTINGS)
        for name in ("caption_dropout", "edit_caption_dropout", "reference_dropout", "unmasked_weight", "edit_ratio"):
            check_share(name, getattr(self, name))
        if not -1 <= self.mode_scale <= 1.75:
            raise InputError("mode_scale", found=self.mode_scale, expected="-1 to 1.75; beyond, sigmas leave 0 to 1")
        if not 0 <= self.contrastive_weight < 1:
            expected = "0 (off) to below 1; at 1 the loss has no minimum"
            raise InputError("contrastive_weight", found=self.contrastive_weight, expected=expected)
        if not self.logit_std >= 0:
            raise InputError("logit_std", found=self.logit_std, expected="a number from 0 on")
