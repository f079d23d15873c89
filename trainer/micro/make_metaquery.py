"""`unipic2 micro metaquery`: the micro MetaQuery model from one seed: understands, draws and edits."""

import json
import shlex
import sys
from pathlib import Path

import torch

from ...core.errors import InputError
from ...core.files import check_replaceable, write_file
from ...core.micro import QWEN_TEXT_CONFIG, QWEN_VISION_CONFIG
from ..kontext_pipeline import StableDiffusion3KontextPipeline, check_pipeline_folder
from ..metaquery import metaquery, parse
from ..metaquery_config import MetaQueryConfig
from ..metaquery_pipeline import is_metaquery, load_vlm
from ..script import open_model
from ..sheets import save_sheet
from ..stages import parse_stages, run_stages
from . import HELD_OUT_COUNT, HELD_OUT_SEED, QUESTIONS_PER_KIND, VLM_STEPS
from .evaluate import evaluate
from .make import Stages, check_overrides, publish, recipe, results_table
from .questions import KINDS
from .sheet import result_sheet
from .vlm import QuestionDataset, build_vlm, build_vlm_tokenizer, question_accuracy, train_vlm

_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "metaquery_micro.yaml"


def make_metaquery(out: Path, work: Path, base: str, seed: int, vlm_steps: int, overrides: list[str]) -> dict:
    """Train Qwen2.5-VL on questions, then the connector, then all of it; evaluate and write the model to `out`.

    Args:
        out: folder of the finished model; replaced as a whole at the end.
        work: folder for stages, checkpoints, logs and previews; a second call goes on from there.
        base: micro model whose transformer and VAE are taken.
        seed: the one seed of everything.
        vlm_steps: optimizer steps of Qwen2.5-VL.
        overrides: further flags of `unipic2 train metaquery`.

    Returns:
        The results: questions, and held-out prompts and edits.

    Raises:
        InputError: `work` holds a run with other settings, `out` something that is no exported pipeline, or `base` is
            no model with a text encoder.
    """
    own = "Its Qwen2.5-VL is made here, and comes along."
    fixed = {"--model_name_or_path": "Take --base.", "--vlm_name_or_path": own, "--export_vlm": own}
    check_overrides("unipic2 micro metaquery", overrides, fixed)
    out, work = out.absolute(), work.absolute()
    check_replaceable(out)
    folder = StableDiffusion3KontextPipeline.find_folder(base)
    if is_metaquery(folder):
        raise InputError("--base", found=f"{base}, a MetaQuery model", expected="a micro model with a text encoder")
    check_pipeline_folder(folder)
    sample = QuestionDataset(4 * len(KINDS), seed)
    asked = [(question.text, question.answer) for question in (sample[i] for i in range(len(sample)))]
    made = recipe(_CONFIG, QWEN_TEXT_CONFIG, QWEN_VISION_CONFIG, KINDS, asked)
    settings = {"seed": seed, "base": base, "vlm_steps": vlm_steps, "overrides": overrides, "recipe": made}
    stages = Stages(work, settings)
    vlm_dir, run_dir = work / "vlm", work / "run"
    argv = ["--config", str(_CONFIG), "--model_name_or_path", base, "--teacher_name_or_path", base]
    argv += ["--vlm_name_or_path", str(vlm_dir)]
    argv += ["--output_dir", str(run_dir), "--seed", str(seed), "--resume"]
    argv += [*([] if torch.cuda.is_available() else ["--use_cpu"]), *overrides]
    runs = parse_stages(argv, parse)

    def understand() -> None:
        tokenizer = build_vlm_tokenizer(vlm_dir, seed)
        vlm = train_vlm(build_vlm(tokenizer, seed), tokenizer, work / "vlm-log", vlm_steps, seed)
        vlm.save_pretrained(vlm_dir)

    stages.run("vlm", understand)

    def questions() -> None:
        parts = load_vlm(vlm_dir)
        count = QUESTIONS_PER_KIND * len(KINDS)
        scores, given = question_accuracy(parts["text_encoder"], parts["tokenizer"], count, HELD_OUT_SEED)
        write_file(work / "questions.json", json.dumps(scores, indent=2) + "\n")
        lines = [f"{q.kind}\t{q.text}\t{q.answer}\t{text}" for q, text in given]
        write_file(work / "answers.tsv", "\n".join(["kind\tquestion\tanswer\tgiven", *lines]) + "\n")
        sys.stderr.write(f"questions: {scores['accuracy']:.3f} of {scores['n']} right\n")

    stages.run("questions", questions)
    stages.run("train", lambda: run_stages(runs, metaquery))

    def score() -> None:
        models = {base: folder, **{stage_of(args): Path(args.output_dir) / "export" for _, args in runs}}
        compared = {}
        for name, source in models.items():
            pipeline = open_model(source, torch_dtype=torch.float32)
            scores, drawn = evaluate(pipeline, HELD_OUT_COUNT, HELD_OUT_SEED)
            compared[name] = {task: scores[task] for task in ("t2i", "edit")}
        save_sheet(result_sheet(drawn), work / "results.png")
        write_file(work / "results.json", json.dumps({**scores, "compared": compared}, indent=2) + "\n")

    stages.run("evaluate", score)
    results = json.loads((work / "results.json").read_text(encoding="utf-8"))
    results["questions"] = json.loads((work / "questions.json").read_text(encoding="utf-8"))
    command = ["unipic2", "micro", "metaquery", "--seed", str(seed), "--base", base]
    command += ["--vlm-steps", str(vlm_steps)] if vlm_steps != VLM_STEPS else []
    publish(run_dir / "export", out, card(shlex.join([*command, *overrides]), stages.minutes, results, runs))
    return results


def stage_of(args: MetaQueryConfig) -> str:
    """Return what the model card calls a stage."""
    return f"{args.max_steps} steps, transformer {'frozen' if args.trainable == 'none' else 'trained'}"


def card(command: str, minutes: dict, results: dict, runs: list[tuple]) -> str:
    """Return the model card as Markdown."""
    asked = results["questions"]
    rows = [f"| {kind} | {accuracy:.3f} |" for kind, accuracy in asked["kinds"].items()]
    compared = [
        f"| {name} | {found['t2i']['strict']:.3f} | {found['edit']['strict']:.3f} |"
        for name, found in results["compared"].items()
    ]
    steps = ", ".join(f"{args.max_steps} ({args.trainable})" for _, args in runs)
    total = sum(minutes.values())
    spent = ", ".join(f"{name} {value}" for name, value in minutes.items())
    return f"""# Micro UniPic2-MetaQuery

The micro model with a small Qwen2.5-VL, learned queries and a connector in place of its text encoder: it answers
questions about its pictures, draws and edits, in the published layout.

Made by one command, {total:.0f} minutes on {torch.get_num_threads()} CPU threads (in minutes: {spent}):

```
{command}
```

Optimizer steps by stage, and what of the transformer was trained: {steps}.

Strict accuracy on held-out prompts and edits, of the model it was made from and after each stage:

| | t2i | edit |
|---|---|---|
{chr(10).join(compared)}

Held-out questions, right word for word: {asked["accuracy"]:.3f} of {asked["n"]}.

| questions | accuracy |
|---|---|
{chr(10).join(rows)}

{results_table(results)}
"""
