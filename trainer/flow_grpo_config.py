"""Settings of `FlowGRPOTrainer`, under TRL's names where its GRPO trainer has the same."""

import math
from dataclasses import dataclass, field, fields

from ..core.errors import InputError, check_one_of, check_share
from .advantages import AGGREGATIONS, SCALE_REWARDS
from .kontext_config import EXPORT_DTYPES, KontextConfig
from .rollouts import DYNAMICS, KL_SCALINGS, SDE_WINDOWS

POLICY_GRADIENTS = ("flow_grpo", "grpo_guard")
MATCHING = ("diffusion_nft", "awm")
ESTIMATORS = (*POLICY_GRADIENTS, *MATCHING)
OLD_POLICIES = ("current", "average")
EPSILONS = {"flow_grpo": 1e-4, "grpo_guard": 2e-6, "diffusion_nft": 0.0, "awm": 1.0}
"""Clip ranges as published, by estimator; diffusion_nft has none."""
READ_BY = {
    "dynamics": POLICY_GRADIENTS, "eta": POLICY_GRADIENTS, "kl_scaling": POLICY_GRADIENTS,
    "sde_window": POLICY_GRADIENTS, "sde_window_size": POLICY_GRADIENTS, "noise_weighting": POLICY_GRADIENTS,
    "sde_window_range": POLICY_GRADIENTS, "storage_dtype": POLICY_GRADIENTS,
    "epsilon": (*POLICY_GRADIENTS, "awm"), "old_policy": MATCHING, "train_timesteps": MATCHING,
    "nft_beta": ("diffusion_nft",), "awm_power": ("awm",),
}  # fmt: skip
"""Settings that these estimators alone read."""
_OLDEST = 20  # updates; pictures of older weights teach little about the present ones


@dataclass
class FlowGRPOConfig(KontextConfig):
    """`KontextConfig` plus groups, sampling and the loss of online reinforcement learning.

    A generation draws `per_device_train_batch_size * steps_per_generation` pictures in each process, whole groups of
    `num_generations`, which are then trained on in `steps_per_generation` batches, `num_iterations` times.
    """

    estimator: str = field(
        default="diffusion_nft",
        metadata={
            "help": "diffusion_nft or awm, which learn from finished pictures, without noisy steps; flow_grpo, or "
            "grpo_guard (for dynamics flow_sde)."
        },
    )
    num_generations: int = field(default=8, metadata={"help": "Pictures of a group: of one prompt and source."})
    num_iterations: int = field(default=1, metadata={"help": "Times that a generation is trained on."})
    steps_per_generation: int | None = field(
        default=None, metadata={"help": "Batches of a generation; default gradient_accumulation_steps."}
    )
    beta: float = field(
        default=0.0,
        metadata={"help": "Weight of the KL to the starting model, with LoRA to the model without any; 0 is none."},
    )
    log_kl: bool | None = field(
        default=None,
        metadata={
            "help": "Log how far the model has gone from its start (kl; with LoRA from the model without any) without "
            "a beta, too. That is one more pass without gradients in the step before each log. Default true with "
            "use_peft; full weights need a copy of the model for it."
        },
    )
    kl_scaling: str = field(
        default="coded",
        metadata={
            "help": "coded, for which published betas (0.04) are meant, or exact; they differ for flow_sde only."
        },
    )
    epsilon: float | None = field(
        default=None,
        metadata={
            "help": "Lower clip limit of the ratio: 1 - epsilon. Default 1e-4 (grpo_guard 2e-6, awm 1; nft has none)."
        },
    )
    epsilon_high: float | None = field(default=None, metadata={"help": "Upper clip limit: 1 + this; default epsilon."})
    scale_rewards: str = field(
        default="group", metadata={"help": "Divide by the deviation of the group, of the batch, or none."}
    )
    multi_objective_aggregation: str = field(
        default="sum_then_normalize", metadata={"help": "sum_then_normalize, or normalize_then_sum (GDPO)."}
    )
    reward_weights: list[float] | None = field(default=None, metadata={"help": "One for each reward; default 1."})
    advantage_clip: float | None = field(default=5.0, metadata={"help": "Advantages stay within plus and minus this."})
    dynamics: str = field(default="cps", metadata={"help": "How noisy steps draw: cps or flow_sde."})
    eta: float = field(default=0.8, metadata={"help": "How much noise; 0.8 for cps and 0.7 for flow_sde are usual."})
    num_inference_steps: int = field(default=10, metadata={"help": "Sampling steps of a rollout."})
    guidance_scale: float = field(
        default=1.0, metadata={"help": "Guidance in rollouts and in training; 1 is none and halves the cost."}
    )
    sde_window: str = field(
        default="random", metadata={"help": "Where the noisy steps are: fixed, random or progressive."}
    )
    sde_window_size: int = field(default=3, metadata={"help": "Noisy steps of a rollout; only they are trained."})
    sde_window_range: list[int] | None = field(
        default=None, metadata={"help": "Steps that the window lies in, first and after last; default the first half."}
    )
    train_timesteps: int = field(
        default=3,
        metadata={"help": "diffusion_nft, awm: noise levels of the schedule that each picture is learned at."},
    )
    old_policy: str | None = field(
        default=None,
        metadata={
            "help": "diffusion_nft, awm: what draws the pictures, and what losses compare with: the current weights, "
            "or their average, which is DiffusionNFT's slow copy and steadier; it wants an ema_decay of 0.5 to 0.9. "
            "Default average for diffusion_nft with use_ema, else current."
        },
    )
    nft_beta: float = field(
        default=0.1,
        metadata={"help": "diffusion_nft: how far good and bad lie from the old model; 1 moves more slowly."},
    )
    ema_decay: float = field(
        default=0.8,
        metadata={
            "help": "Highest decay at an update of the average, which is exported, and of which DiffusionNFT draws; "
            "update n has at most 1 - n ** -0.75."
        },
    )
    awm_power: float = field(default=0.25, metadata={"help": "awm: power of its generalised Huber function."})
    ema_beta: float = field(
        default=0.0,
        metadata={
            "help": "awm: weight of the squared distance of velocities to those of the averaged weights, which want a "
            "low ema_decay. Its authors have 1, and for this an average of its own with a decay of 0.3."
        },
    )
    noise_weighting: bool = field(
        default=False, metadata={"help": "Weigh steps by their noise (TempFlow-GRPO) instead of alike."}
    )
    storage_dtype: str = field(
        default="float32", metadata={"help": "Type of stored latents: float32, float16 or bfloat16."}
    )
    log_completions: bool = field(
        default=False,
        metadata={
            "help": "Every preview_steps keep a sheet of the best and worst pictures in output_dir/completions."
        },
    )
    edit_ratio: float = field(default=0.5, metadata={"help": "Share of the generations that are edits, 0 to 1."})

    def __post_init__(self):
        super().__post_init__()
        others = {name for name, estimators in READ_BY.items() if self.estimator not in estimators} - {"old_policy"}
        self._unread = [f.name for f in fields(self) if f.name in others and getattr(self, f.name) != f.default]
        if self.old_policy is None:
            self.old_policy = "average" if self.estimator == "diffusion_nft" and self.use_ema else "current"
        for name, known in (
            ("estimator", ESTIMATORS), ("kl_scaling", KL_SCALINGS), ("scale_rewards", SCALE_REWARDS),
            ("multi_objective_aggregation", AGGREGATIONS), ("dynamics", DYNAMICS), ("sde_window", SDE_WINDOWS),
            ("storage_dtype", EXPORT_DTYPES), ("old_policy", OLD_POLICIES),
        ):  # fmt: skip
            check_one_of(name, getattr(self, name), known)
        check_share("edit_ratio", self.edit_ratio)
        if self.train_text_encoder:
            raise InputError("train_text_encoder", found="true", expected="false: rewards train the transformer alone")
        if self.advantage_clip is not None and not self.advantage_clip > 0:
            raise InputError("advantage_clip", found=self.advantage_clip, expected="a number above 0, or null")
        if self.steps_per_generation is None:
            self.steps_per_generation = self.gradient_accumulation_steps
        if self.epsilon_high is not None and self.estimator != "flow_grpo":
            raise InputError("epsilon_high", found=f"{self.epsilon_high} for {self.estimator}", expected="flow_grpo")
        if self.epsilon is None:
            self.epsilon = EPSILONS[self.estimator]
        if self.sde_window_range is None:
            self.sde_window_range = [0, max(self.num_inference_steps // 2, self.sde_window_size)]
        if self.ema_beta and (self.estimator != "awm" or not self.use_ema):
            found = f"{self.ema_beta} with {f'estimator {self.estimator}' if self.use_ema else 'use_ema: false'}"
            raise InputError("ema_beta", found=found, expected="0, or awm with use_ema")
        least = {"num_generations": 2, "num_iterations": 1, "steps_per_generation": 1, "num_inference_steps": 2,
                 "sde_window_size": 1, "beta": 0, "epsilon": 0, "guidance_scale": 1,
                 "train_timesteps": 1, "ema_beta": 0}  # fmt: skip
        for name, value in least.items():
            if not getattr(self, name) >= value:
                raise InputError(name, found=getattr(self, name), expected=f"at least {value}")
        if self.estimator == "grpo_guard" and self.dynamics != "flow_sde":
            raise InputError(
                "estimator", found=f"grpo_guard with dynamics {self.dynamics}", expected="flow_sde for it"
            )
        pictures = self.per_device_train_batch_size * self.steps_per_generation
        if pictures % self.num_generations:
            raise InputError(
                "num_generations",
                found=f"{self.num_generations} for {pictures} pictures of a process's generation",
                expected="whole groups: per_device_train_batch_size * steps_per_generation a multiple of it",
            )
        if self.old_policy == "average" and (self.estimator not in MATCHING or not self.use_ema):
            found = f"average with {'use_ema: false' if not self.use_ema else f'estimator {self.estimator}'}"
            raise InputError("old_policy", found=found, expected="current, or diffusion_nft or awm with use_ema")
        for name in ("eta", "nft_beta", "awm_power"):
            if not getattr(self, name) > 0:
                raise InputError(name, found=getattr(self, name), expected="a number above 0")
        if self.estimator in POLICY_GRADIENTS:
            self._check_window()
        elif self.train_timesteps > self.num_inference_steps:
            expected = f"at most num_inference_steps, {self.num_inference_steps}"
            raise InputError("train_timesteps", found=self.train_timesteps, expected=expected)
        if self.dynamics == "cps" and self.eta > 1:
            raise InputError("eta", found=self.eta, expected="at most 1 for cps, where all of a step is noise")
        if self.auto_find_batch_size:
            remedy = "Lower per_device_train_batch_size, and num_generations with it."
            expected = "false: a generation is made of whole groups"
            raise InputError("auto_find_batch_size", found="true", expected=expected, remedy=remedy)
        whole = self.steps_per_generation * self.num_iterations
        saved = {"save_steps": self.save_steps} if self.save_strategy == "steps" else {}
        if self.save_strategy != "no" and self.max_steps > 0:
            saved["max_steps"] = self.max_steps  # the last step is always saved
        for name, steps in saved.items():
            if steps * self.gradient_accumulation_steps % whole:
                raise InputError(
                    name,
                    found=f"{steps} steps of {self.gradient_accumulation_steps} batches",
                    expected=f"whole generations, of {whole} batches, so that a run can go on exactly",
                )

    def warnings(self) -> list[str]:
        """Return what of the settings is probably not meant, in sentences."""
        found = []
        if self._unread:
            found.append(f"{', '.join(self._unread)}: no effect with estimator {self.estimator}")
        age = self.ema_update_steps / (1 - self.ema_decay) if self.ema_decay < 1 else math.inf
        if self.old_policy == "average" and age > _OLDEST:
            found.append(
                f"ema_decay {self.ema_decay}, ema_update_steps {self.ema_update_steps}: pictures are drawn by an "
                f"average of about {age:.0f} updates; DiffusionNFT is usual with an ema_decay of 0.5 to 0.9"
            )
        if self.log_kl and not self.beta and self.logging_strategy != "steps":
            found.append(f"log_kl: no effect with logging_strategy {self.logging_strategy.value}")
        if self.log_completions and not self.preview_steps:
            found.append("log_completions: no sheets, as preview_steps is 0")
        return found

    def _check_window(self) -> None:
        first, last = (*self.sde_window_range, 0, 0)[:2]
        fits = len(self.sde_window_range) == 2 and 0 <= first and first + self.sde_window_size <= last
        if not fits or last >= self.num_inference_steps:
            raise InputError(
                "sde_window_range",
                found=f"{self.sde_window_range} for a window of {self.sde_window_size}",
                expected=f"two numbers from 0 to {self.num_inference_steps - 1} with room for it",
            )
