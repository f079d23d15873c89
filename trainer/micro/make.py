"""`unipic2 micro make`: the whole micro model from one seed, with a card of how it was made and how it scores."""

import hashlib
import json
import platform
import shlex
import shutil
import sys
import time
from pathlib import Path

import torch
import yaml
from diffusers import AutoencoderTiny

from ...core.checkpoint import cast_file
from ...core.errors import InputError
from ...core.files import check_replaceable, replaced_folder, write_file
from ...core.micro import (
    GUIDANCE_SCALE,
    NUM_INFERENCE_STEPS,
    TEXT_ENCODER_CONFIG,
    TRANSFORMER_CONFIG,
    VAE_CONFIG,
)
from ..kontext_pipeline import StableDiffusion3KontextPipeline, forget_paths
from ..kontext_trainer import last_checkpoint
from ..pretrain import parse, pretrain
from ..sheets import save_sheet
from . import CODEC_STEPS, DECODER_STEPS, HELD_OUT_COUNT, HELD_OUT_SEED
from .build import build_pipeline, build_tokenizer
from .codec import refine_decoder, round_trip_accuracy, train_codec
from .evaluate import evaluate
from .sheet import result_sheet

_STAGES_FILE = "stages.json"
_FIXED = {
    "--output_dir": "Take --out and --work for folders.",
    "--model_name_or_path": "It starts from a model of its own.",
    "--resume": "The same command goes on by itself.",
    "--seed": "Name it once.",
}
"""Flags of training that this command itself decides, with what to do instead."""


def check_overrides(command: str, overrides: list[str], fixed: dict[str, str] | None = None) -> None:
    """Raise InputError where flags are among those that a command decides itself.

    Args:
        command: its name.
        overrides: flags for training.
        fixed: further ones that are refused, each with a remedy.
    """
    remedies = _FIXED | (fixed or {})
    found = [flag for flag in (o.partition("=")[0] for o in overrides) if flag in remedies]
    if found:
        remedy = " ".join(dict.fromkeys(remedies[flag] for flag in found))
        raise InputError(command, found=", ".join(found), expected="other flags", remedy=remedy)


class Stages:
    """Which stages are done, with the minutes of all their attempts, so that a stopped run goes on where it was."""

    def __init__(self, work: Path, settings: dict):
        self.path = work / _STAGES_FILE
        self.state = {"settings": settings, "minutes": {}, "done": []}
        if self.path.is_file():
            self.state = json.loads(self.path.read_text(encoding="utf-8"))
            if self.state["settings"] != settings:
                raise InputError(
                    f"folder {work}",
                    found=f"a run with other settings: {self.state['settings']}",
                    expected=f"{settings}",
                    remedy="Name another folder with --work, or delete this one.",
                )
        work.mkdir(parents=True, exist_ok=True)

    @property
    def minutes(self) -> dict[str, float]:
        """Minutes by stage."""
        return {name: round(minutes, 1) for name, minutes in self.state["minutes"].items()}

    def run(self, name: str, action) -> None:
        """Run `action` unless it is done, and note how long it took, also when it is stopped."""
        if name in self.state["done"]:
            sys.stderr.write(f"[{name}] done before\n")
            return
        sys.stderr.write(f"[{name}] starts\n")
        start = time.monotonic()
        try:
            action()
            self.state["done"].append(name)
        finally:
            spent = (time.monotonic() - start) / 60
            self.state["minutes"][name] = self.state["minutes"].get(name, 0) + spent
            write_file(self.path, json.dumps(self.state, indent=2))


def recipe(config: Path, *parts) -> str:
    """Return a hash of a training config and of what else of the program decides what is made."""
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    return hashlib.sha256(json.dumps([settings, *parts], sort_keys=True).encode()).hexdigest()[:12]


def make(out: Path, work: Path, seed: int, codec_steps: int, decoder_steps: int, overrides: list[str]) -> dict:
    """Train codec, text encoder and transformer, evaluate, and write the model to `out` (published layout, fp16).

    Args:
        out: folder of the finished model; replaced as a whole at the end.
        work: folder for stages, checkpoints, logs and previews; a second call goes on from there.
        seed: the one seed of everything.
        codec_steps: optimizer steps of the VAE.
        decoder_steps: further steps of its decoder, after the transformer, which never sees the decoder.
        overrides: further flags of `unipic2 train pretrain`, such as `["--max_steps", "100"]`.

    Returns:
        The results on held-out prompts and edits.

    Raises:
        InputError: `work` holds a run with other settings, or `out` something that is no exported pipeline.
    """
    check_overrides("unipic2 micro make", overrides)
    out, work = out.absolute(), work.absolute()
    check_replaceable(out)
    config = Path(__file__).resolve().parent.parent / "configs" / "pretrain_micro.yaml"
    settings = {"seed": seed, "codec_steps": codec_steps, "decoder_steps": decoder_steps, "overrides": overrides}
    made = recipe(config, TEXT_ENCODER_CONFIG, TRANSFORMER_CONFIG, VAE_CONFIG)
    stages = Stages(work, {**settings, "recipe": made})
    vae_dir, init_dir, run_dir, decoder_dir, model_dir = (
        work / name for name in ("vae", "init", "run", "decoder", "model")
    )
    argv = ["--config", str(config), "--model_name_or_path", str(init_dir), "--output_dir", str(run_dir)]
    argv += ["--seed", str(seed), *([] if torch.cuda.is_available() else ["--use_cpu"]), *overrides]
    script_args, args = parse(argv)

    stages.run("codec", lambda: train_codec(work / "codec", codec_steps, seed).save_pretrained(vae_dir))

    def build() -> None:
        vae = AutoencoderTiny.from_pretrained(vae_dir).eval()
        build_pipeline(vae, build_tokenizer(work / "tokenizer", seed), seed).save_pretrained(init_dir)

    stages.run("build", build)
    script_args.resume = last_checkpoint(run_dir, args.use_ema) is not None
    stages.run("pretrain", lambda: pretrain(script_args, args))

    def refine() -> None:
        vae = AutoencoderTiny.from_pretrained(vae_dir)
        refine_decoder(vae, work / "codec", decoder_steps, seed).save_pretrained(decoder_dir)

    stages.run("decoder", refine)

    def score() -> None:
        _assemble(run_dir / "export", decoder_dir, model_dir, getattr(torch, args.export_dtype))
        # Scores are of the finished weights, as people will load them.
        pipeline = StableDiffusion3KontextPipeline.from_pretrained(model_dir, torch_dtype=torch.float32)
        scores, drawn = evaluate(pipeline, HELD_OUT_COUNT, HELD_OUT_SEED)
        scores["codec_round_trip"] = round(round_trip_accuracy(pipeline.vae, 512, HELD_OUT_SEED), 4)
        save_sheet(result_sheet(drawn), work / "results.png")
        write_file(work / "results.json", json.dumps(scores, indent=2) + "\n")

    stages.run("evaluate", score)
    results = json.loads((work / "results.json").read_text(encoding="utf-8"))
    steps = {"codec": codec_steps, "pretrain": args.max_steps, "decoder": decoder_steps}
    command = ["unipic2", "micro", "make", "--seed", str(seed)]
    command += ["--codec-steps", str(codec_steps)] if codec_steps != CODEC_STEPS else []
    command += ["--decoder-steps", str(decoder_steps)] if decoder_steps != DECODER_STEPS else []
    publish(model_dir, out, card(shlex.join([*command, *overrides]), stages.minutes, steps, results))
    return results


def _assemble(export: Path, decoder: Path, model: Path, dtype: torch.dtype) -> None:
    """Put the exported pipeline and the refined VAE together in one folder."""
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(export, model, ignore=shutil.ignore_patterns("vae"))
    shutil.copytree(decoder, model / "vae")
    for file in (model / "vae").glob("*.safetensors"):
        cast_file(file, dtype)
    forget_paths(model)


def publish(export: Path, out: Path, text: str) -> None:
    """Put a finished model with its card in the place of `out`, as a whole."""
    with replaced_folder(out) as unfinished:
        shutil.copytree(export, unfinished)
        write_file(unfinished / "README.md", text)


def card(command: str, minutes: dict, steps: dict, results: dict) -> str:
    """Return the model card as Markdown."""
    total = sum(minutes.values())
    spent = ", ".join(f"{name} {value}" for name, value in minutes.items())
    taken = ", ".join(f"{name} {count}" for name, count in steps.items())
    return f"""# Micro UniPic2 (pretrained)

A complete UniPic2 for 64x64 pictures of coloured shapes: transformer, VAE (TAESD architecture) and CLIP text encoder
in the published layout. It exists so that training, loading and sampling can be tried and tested in seconds.

Made by one command, {total:.0f} minutes on {torch.get_num_threads()} CPU threads (in minutes: {spent}):

```
{command}
```

Optimizer steps: {taken}; torch {torch.__version__.partition("+")[0]}, {platform.machine()}. No reinforcement
learning. Sampling: FlowMatchEuler, {NUM_INFERENCE_STEPS} steps, guidance {GUIDANCE_SCALE} (ComfyUI: euler, normal).

Codec round trip, strict: {results["codec_round_trip"]:.3f} on 512 held-out scenes.

{results_table(results)}
"""


def results_table(results: dict) -> str:
    """Return the scores on held-out prompts and edits as Markdown, with what they mean."""
    rows = []
    for task in ("t2i", "edit"):
        scores = {f"**{task}, all**": results[task], **results[task]["kinds"]}
        rows += [f"| {kind} | {s['strict']:.3f} | {s['soft']:.3f} | {s['n']} |" for kind, s in scores.items()]
    return f"""Held-out prompts and edits (seed {results["seed"]}), judged by the verifier; strict means that
everything asked is there and nothing else, and for edits that nothing else changed:

| kind | strict | soft | n |
|---|---|---|---|
{chr(10).join(rows)}"""
