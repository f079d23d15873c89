"""Rewards by name, as settings give them: shipped ones, and functions of one's own."""

import importlib
import os
import sys
from dataclasses import dataclass, field

import torch

from ...core.errors import InputError
from . import RewardFunction
from .aesthetic import AestheticScore
from .clip import DEFAULT_CLIP, PICK_SCORE, PICK_SCORE_PROCESSOR, Clip, ClipScore
from .digit_judge import EditDigitJudge
from .geneval import DEFAULT_DETECTOR, GenEval, Mask2Former
from .judge import HIGHEST, EditJudge
from .micro import micro_soft, micro_strict
from .ocr import OcrReward
from .preservation import preservation

_PLAIN = {"micro_soft": micro_soft, "micro_strict": micro_strict, "preservation": preservation}
JUDGES = {"edit_judge": EditJudge, "edit_digit_judge": EditDigitJudge}
SHIPPED = (*_PLAIN, *JUDGES, "geneval", "geneval_strict", "clip_score", "pick_score", "hps_v2", "aesthetic", "ocr")


@dataclass
class RewardArguments:
    """What is rewarded, and the models that some rewards need."""

    reward_funcs: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"Rewards, one or more: {', '.join(SHIPPED)}, or module.function of your own. reward_weights has "
            "one number for each."
        },
    )
    judge_base_url: str | None = field(
        default=None, metadata={"help": "judges: OpenAI-compatible endpoint, such as http://localhost:8000/v1."}
    )
    judge_model: str | None = field(
        default=None,
        metadata={"help": "judges: the model's name there; OPENAI_API_KEY in the environment is its key."},
    )
    judge_timeout: float = field(default=60.0, metadata={"help": "judges: seconds that one request may take."})
    judge_max_retries: int = field(
        default=3, metadata={"help": "judges: further tries of a question after the server failed."}
    )
    judge_concurrency: int = field(
        default=16, metadata={"help": "judges: requests under way at a time, of each process."}
    )
    judge_highest: int = field(
        default=HIGHEST,
        metadata={"help": "edit_judge: the best of its scores, the worst is 0; EditScore was trained on 25."},
    )
    judge_success_prompt: str | None = field(
        default=None,
        metadata={
            "help": "edit_judge: text file with your question about what was done and what was kept, {instruction} in "
            "it and, where it says so, {highest}; its answer has two scores."
        },
    )
    judge_quality_prompt: str | None = field(
        default=None, metadata={"help": "edit_judge: likewise, about how natural and free of faults the result is."}
    )
    judge_digit_prompt: str | None = field(
        default=None, metadata={"help": "edit_digit_judge: text file with your question, {instruction} in it."}
    )
    detector_name_or_path: str = field(
        default=DEFAULT_DETECTOR, metadata={"help": "geneval: Mask2Former model, a hub repository or a folder."}
    )
    clip_name_or_path: str = field(
        default=DEFAULT_CLIP,
        metadata={"help": "geneval, clip_score, aesthetic: CLIP model, a hub repository or a folder."},
    )
    pick_score_name_or_path: str = field(
        default=PICK_SCORE, metadata={"help": "pick_score: its CLIP model, a hub repository or a folder."}
    )
    hps_v2_name_or_path: str | None = field(
        default=None,
        metadata={"help": "hps_v2: HPSv2 as a CLIP model with processor, a folder; see the documentation."},
    )
    aesthetic_head: str | None = field(
        default=None, metadata={"help": "aesthetic: safetensors file of LAION's head on CLIP, see the documentation."}
    )

    def check_rewards(self) -> None:
        """Raise InputError for no or unknown rewards, or a judge without an address or a question; loads no model."""
        if not self.reward_funcs:
            expected = f"one or more of {', '.join(SHIPPED)}, or module.function"
            raise InputError("reward_funcs", found="none", expected=expected)
        for name in self.reward_funcs:
            if name not in SHIPPED:
                _imported(name)
        if "aesthetic" in self.reward_funcs and not self.aesthetic_head:
            raise InputError("aesthetic_head", found="nothing", expected="a safetensors file of the predictor's head")
        if "hps_v2" in self.reward_funcs and not self.hps_v2_name_or_path:
            raise InputError("hps_v2_name_or_path", found="nothing", expected="a folder with HPSv2 as a CLIP model")
        if JUDGES.keys() & set(self.reward_funcs):
            for name in ("judge_base_url", "judge_model"):
                if not getattr(self, name):
                    expected = "where the judge answers, and its name there (judge_base_url, judge_model)"
                    raise InputError(name, found="nothing", expected=expected)
        for name in JUDGES.keys() & set(self.reward_funcs):
            self._judge(name, patient=False)  # asks nobody yet

    def load_rewards(self, device: torch.device, patient: bool = False) -> list[RewardFunction]:
        """Return the reward functions, their models on `device`; judges that are `patient` or not, see `Endpoint`.

        Raises:
            InputError: see `check_rewards`, or a model that cannot be loaded.
        """
        self.check_rewards()
        return [self._load(name, device, patient) for name in self.reward_funcs]

    def _load(self, name: str, device: torch.device, patient: bool) -> RewardFunction:
        if name in _PLAIN:
            return _PLAIN[name]
        if name in JUDGES:
            return self._judge(name, patient)
        if name == "clip_score":
            return ClipScore(Clip(self.clip_name_or_path, device))
        if name == "pick_score":
            processor = PICK_SCORE_PROCESSOR if self.pick_score_name_or_path == PICK_SCORE else None
            return ClipScore(Clip(self.pick_score_name_or_path, device, processor=processor), name)
        if name == "hps_v2":
            return ClipScore(Clip(self.hps_v2_name_or_path, device), name)
        if name == "aesthetic":
            return AestheticScore(Clip(self.clip_name_or_path, device), self.aesthetic_head)
        if name == "ocr":
            return OcrReward()
        if name in ("geneval", "geneval_strict"):
            detector = Mask2Former(self.detector_name_or_path, device)
            return GenEval(detector, Clip(self.clip_name_or_path, device), strict=name == "geneval_strict")
        return _imported(name)

    def _judge(self, name: str, patient: bool) -> RewardFunction:
        options = {
            "api_key": os.environ.get("OPENAI_API_KEY"), "patient": patient, "timeout": self.judge_timeout,
            "max_retries": self.judge_max_retries, "concurrency": self.judge_concurrency,
        }  # fmt: skip
        if name == "edit_judge":
            options["highest"] = self.judge_highest
            prompts = {"success_prompt": self.judge_success_prompt, "quality_prompt": self.judge_quality_prompt}
        else:
            prompts = {"prompt": self.judge_digit_prompt}
        options |= {key: path for key, path in prompts.items() if path is not None}
        return JUDGES[name](self.judge_base_url, self.judge_model, **options)


def _imported(name: str) -> RewardFunction:
    """Return a function of the user's own, from an installed module or one in the folder where training is started."""
    module, _, function = name.rpartition(".")
    if not module:
        expected = f"one of {', '.join(SHIPPED)}, or module.function of your own"
        raise InputError("reward_funcs", found=repr(name), expected=expected)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        found, expected = f"{name}: {error}", "a function that can be imported"
        raise InputError("reward_funcs", found=found, expected=expected) from None
    if not callable(found):
        raise InputError("reward_funcs", found=f"{name}, a {type(found).__name__}", expected="a function")
    return found
