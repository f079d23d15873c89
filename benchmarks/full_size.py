"""The published size of the transformer (2.47 billion elements) in ComfyUI on the CPU: load time, memory, two steps.

    python benchmarks/full_size.py [--folder DIR]

Random bfloat16 weights (4.9 GB) are written into a temporary folder. Each way to load them runs in a process of its
own in the pinned ComfyUI, then edits a 256x256 latent in two steps; the ratios are against reading the tensors with
safetensors alone, in the same run. The file lies in the system's cache for all of them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PACK = Path(__file__).resolve().parents[1]
CONFIG = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
    "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048, "pos_embed_max_size": 384, "dual_attention_layers": list(range(13)),
    "qk_norm": "rms_norm",
}  # fmt: skip
WAYS = ("safetensors", "UNETLoader + Enable Editing", "UniPic2 Loader, file", "UniPic2 Loader, folder")
STEPS, LATENT = 2, (1, 16, 32, 32)


def write_model(folder: Path) -> int:
    """Write `transformer/` with random weights; returns how many elements it has."""
    import torch
    from safetensors.torch import save_file
    from unipic2.trainer import SD3Transformer2DKontextModel

    with torch.device("meta"):
        shapes = {k: tuple(t.shape) for k, t in SD3Transformer2DKontextModel(**CONFIG).state_dict().items()}
    torch.manual_seed(0)
    weights = {key: torch.randn(shape, dtype=torch.bfloat16).mul_(0.02) for key, shape in shapes.items()}
    (folder / "transformer").mkdir(parents=True)
    save_file(weights, folder / "transformer/diffusion_pytorch_model.safetensors")
    config = {"_class_name": "SD3Transformer2DKontextModel", **CONFIG}
    (folder / "transformer/config.json").write_text(json.dumps(config))
    return sum(t.numel() for t in weights.values())


def peak() -> float:
    """Return the most memory this process has had, in GB; getrusage would count what its parent had before exec."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / 1e9


def read_alone(path: Path) -> dict:
    """Read all tensors, and touch each page of them: safetensors maps the file."""
    import torch  # noqa: F401, not part of what is measured
    from safetensors.torch import load_file

    start = time.perf_counter()
    total = sum(float(tensor.view(-1)[::1024].float().sum()) for tensor in load_file(path).values())
    return {"load": time.perf_counter() - start, "memory": peak(), "finite": total == total}


def inside(way: str, root: str, folder: str) -> dict:
    """In a process of its own: load one way and, in ComfyUI, edit."""
    path = Path(folder) / "transformer/diffusion_pytorch_model.safetensors"
    if way == WAYS[0]:
        return read_alone(path)
    sys.path.insert(0, root)
    sys.argv = ["main.py", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import asyncio

    import comfy.model_management
    import folder_paths
    import nodes
    import torch

    pack = Path(folder) / "ComfyUI-UniPic2"
    if not pack.exists():
        pack.symlink_to(PACK, target_is_directory=True)
    folder_paths.add_model_folder_path("diffusion_models", str(path.parent))
    folder_paths.add_model_folder_path("unipic2", str(Path(folder).parent))
    asyncio.run(nodes.load_custom_node(str(pack)))

    def node(name, **inputs):
        return nodes.NODE_CLASS_MAPPINGS[name].execute(**inputs).args[0]

    with torch.inference_mode():
        start = time.perf_counter()
        if way == WAYS[1]:
            (stock,) = nodes.UNETLoader().load_unet(path.name, "default")
            model = node("UniPic2EnableEditing", model=stock)
        else:
            chosen = path.name if way == WAYS[2] else Path(folder).name
            model = node("UniPic2Loader", model=chosen, weight_dtype="default")
        comfy.model_management.load_models_gpu([model])
        seconds, memory = time.perf_counter() - start, peak()
        values = {"pooled_output": torch.randn(1, 2048), "reference_latents": [torch.randn(LATENT)]}
        cond = [[torch.randn(1, 333, 4096), values]]
        start = time.perf_counter()
        latent = {"samples": torch.zeros(LATENT)}
        (out,) = nodes.KSampler().sample(model, 0, STEPS, 3.5, "euler", "normal", cond, cond, latent)
    sampling = time.perf_counter() - start
    finite = bool(torch.isfinite(out["samples"]).all())
    return {"load": seconds, "memory": memory, "sampling": sampling, "finite": finite, "peak": peak()}


def measure(parent: str | None) -> tuple[int, dict[str, dict]]:
    """Write the model into a temporary folder in `parent`; returns its number of elements, and way -> figures.

    Raises:
        RuntimeError: a way failed; the message is the end of what it said.
    """
    from unipic2.cli.comfyui import resolve_install

    install = resolve_install()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    with tempfile.TemporaryDirectory(dir=parent) as temporary:
        folder = Path(temporary) / "models" / "full"
        elements, found = write_model(folder), {}
        for way in WAYS:
            command = [str(install.python), __file__, "--inside", way, str(install.root), str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=temporary)
            if done.returncode:
                raise RuntimeError(done.stderr[-4000:])
            found[way] = json.loads(done.stdout.strip().splitlines()[-1])
    return elements, found


def table(elements: int, found: dict[str, dict]) -> str:
    """Return what was measured as Markdown, with ratios to reading the tensors alone."""
    plain = found[WAYS[0]]
    lines = [f"{elements / 1e9:.2f} billion elements, bfloat16", ""]
    lines += [
        "| way | load, s | ratio | memory, GB | ratio | two steps, s | finite |",
        "|---|---|---|---|---|---|---|",
    ]
    for way, r in found.items():
        steps = f"{r['sampling']:.0f}" if "sampling" in r else ""
        lines.append(
            f"| {way} | {r['load']:.1f} | {r['load'] / plain['load']:.2f} | {r['memory']:.1f} | "
            f"{r['memory'] / plain['memory']:.2f} | {steps} | {r['finite']} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run every way, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="where the temporary folder goes; it needs 5 GB")
    print(table(*measure(parser.parse_args().folder)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        print(json.dumps(inside(*sys.argv[2:5])))
    else:
        main()
