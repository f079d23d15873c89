"""Settings of `MetaQueryTrainer`."""

from dataclasses import dataclass, field
from typing import ClassVar

from ..core.errors import InputError, check_one_of, check_share
from ..core.prompts import POSITIONS
from .adapters import TRAINABLE
from .flow_matching_config import FlowMatchingConfig


@dataclass
class MetaQueryConfig(FlowMatchingConfig):
    """`FlowMatchingConfig` plus what MetaQuery adds. Queries and connector are always trained."""

    TRAINABLE: ClassVar[tuple[str, ...]] = ("none", *TRAINABLE)

    trainable: str = field(
        default="none",
        metadata={
            "help": "Weights of the transformer that are trained beside the queries and the connector: none (the "
            "first stage, alignment), attention, or full (the second, joint one)."
        },
    )
    transformer_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Rate of the transformer's weights, usually a tenth of the others'; None is learning_rate."},
    )
    positions: str | None = field(
        default=None,
        metadata={
            "help": "How the picture's tokens are numbered in Qwen2.5-VL: 1d, as the published model is run, or "
            "mrope, by rows and columns. Exported with the model; the nodes have the same choice. None is the "
            "model's own, 1d for a new connector."
        },
    )
    distillation_weight: float = field(
        default=0.0,
        metadata={
            "help": "How far, 0 to 1, the target goes from the data's velocity to what teacher_name_or_path says, "
            "behind its own text encoders: there the connector is to lead, and what was learned there is to stay. "
            "That target has no noise of samples, so it is learned sooner."
        },
    )
    vision_dropout: float = field(
        default=0.1,
        metadata={
            "help": "Share of edits, 0 to 1, for which Qwen2.5-VL sees a black picture (the transformer still has its "
            "reference); drawn apart from edit_caption_dropout, so some lose both."
        },
    )
    prefix_cache_gib: float = field(
        default=0.0,
        metadata={
            "help": "Main memory of each process, in GiB, for keys and values of prompts and pictures that come "
            "again: Qwen2.5-VL is not run over them a second time. 0 keeps none; the least recently used go."
        },
    )

    vlm_lora_r: int = field(
        default=0,
        metadata={
            "help": "Rank of LoRAs on the attention of Qwen2.5-VL's language model, trained with the queries and "
            "exported beside it; 0 trains none. Questions are answered without them. gradient_checkpointing does not "
            "reach the language model, whose activations of whole prompts are then kept."
        },
    )
    vlm_lora_alpha: int | None = field(
        default=None, metadata={"help": "Their scale: updates count alpha / r; None is twice the rank."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.vlm_lora_r < 0:
            raise InputError("vlm_lora_r", found=self.vlm_lora_r, expected="at least 1, or 0 for none")
        if self.vlm_lora_alpha is None:
            self.vlm_lora_alpha = 2 * self.vlm_lora_r
        elif self.vlm_lora_r and self.vlm_lora_alpha <= 0:
            raise InputError(
                "vlm_lora_alpha", found=self.vlm_lora_alpha, expected="above 0, or null for twice the rank"
            )
        elif self.vlm_lora_alpha and not self.vlm_lora_r:
            raise InputError("vlm_lora_alpha", found="no vlm_lora_r", expected="their rank too")
        if self.vlm_lora_r and self.prefix_cache_gib:
            found, expected = "vlm_lora_r too", "one of them: with LoRAs, what stands before the queries changes too"
            raise InputError("prefix_cache_gib", found=found, expected=expected)
        if self.positions is not None:
            check_one_of("positions", self.positions, POSITIONS)
        check_share("vision_dropout", self.vision_dropout)
        check_share("distillation_weight", self.distillation_weight)
        if not self.prefix_cache_gib >= 0:
            raise InputError("prefix_cache_gib", found=self.prefix_cache_gib, expected="a number from 0 on")
        if self.attention_backend == "flash":
            found, expected = (
                "flash",
                "another one: queries behind a prompt need a mask, which that kernel does not take",
            )
            raise InputError("attention_backend", found=found, expected=expected)
        if self.train_text_encoder:
            raise InputError("train_text_encoder", found="true", expected="false: Qwen2.5-VL stays as it is")
        rate = self.transformer_learning_rate
        if rate is not None and not rate > 0:
            raise InputError("transformer_learning_rate", found=rate, expected="a number above 0, or null")
        if rate is not None and self.muon_learning_rate is not None:
            found, expected = "muon_learning_rate too", "one of them: under Muon all matrices have one rate"
            raise InputError("transformer_learning_rate", found=found, expected=expected)
        if rate is not None and self.trainable == "none":
            raise InputError("transformer_learning_rate", found="trainable: none", expected="full or attention")
