"""The published size of MetaQuery's connector (0.9 billion weights) in ComfyUI: time and memory to load and to encode.

    python benchmarks/connector.py

Random weights, written as one float16 file into a temporary folder, are loaded by the pack's own code in the pinned
ComfyUI on the CPU; the ratio is against the same connector in the trainer's class (torch.nn, float32) in the same run.
What Qwen2.5-VL itself takes is not in it.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PACK = Path(__file__).resolve().parents[1]
QUERIES, WIDTH = 256, 3584
SIZES = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 24, "num_attention_heads": 24}
ROUNDS = 3


def fastest(action) -> float:
    """Return the least seconds of some calls."""
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def resident() -> float:
    """Return this process's memory in GB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9


def inside(root: str, path: str) -> None:
    """In ComfyUI's process: load the file as the node does and encode once for each of a prompt and its negative."""
    sys.path.insert(0, root)
    sys.argv = ["main.py", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.model_management
    import nodes  # noqa: F401, as ComfyUI itself starts
    import torch

    sys.path.insert(0, str(PACK.parent))
    metaquery = __import__(f"{PACK.name}.comfy_nodes.metaquery", fromlist=["load_connector"])
    before, start = resident(), time.perf_counter()
    with torch.inference_mode():
        connector = metaquery.load_connector(Path(path))
        comfy.model_management.load_models_gpu([connector])
        for weight in connector.model.parameters():  # safetensors maps the file: touch each page of it
            float(weight.view(-1)[::1024].float().sum())
        loaded, memory = time.perf_counter() - start, resident() - before
        states = torch.randn(1, QUERIES, WIDTH)
        encode = fastest(lambda: connector.model.conditioner(states))
    print(json.dumps({"load": loaded, "memory": memory, "encode": encode, "torch": torch.__version__}))


def main() -> None:
    import torch
    from unipic2.cli.comfyui import resolve_install
    from unipic2.core.connector import StableDiffusion3Conditioner

    def write(folder: str) -> tuple[int, float]:
        model = StableDiffusion3Conditioner(SIZES, QUERIES, WIDTH).initialize(0)
        states = torch.randn(1, QUERIES, WIDTH)
        with torch.inference_mode():
            plain = fastest(lambda: model(states))
        model.half().save_pretrained(folder)
        return sum(p.numel() for p in model.parameters()), plain

    install = resolve_install()
    with tempfile.TemporaryDirectory() as folder:
        count, plain = write(folder)
        path = next(Path(folder).glob("*.safetensors"))
        command = [str(install.python), __file__, "--inside", str(install.root), str(path)]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    if done.returncode:
        sys.exit(done.stderr[-4000:])
    found = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{count / 1e9:.3f} billion weights, float16 file, {torch.get_num_threads()} threads")
    print(f"loaded by the pack in {found['load']:.1f} s, {found['memory']:.2f} GB")
    print(f"encoding one prompt: ComfyUI {found['encode']:.2f} s (torch {found['torch']}), ", end="")
    print(f"trainer's class in float32 {plain:.2f} s (torch {torch.__version__}), ratio {found['encode'] / plain:.2f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        inside(*sys.argv[2:4])
    else:
        main()
