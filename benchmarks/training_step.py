"""Training steps on random weights of the published size: samples/s, peak memory and MFU, on a GPU.

    python benchmarks/training_step.py [--train lora|full] [--resolution 512] [--batch-size 4] [--peak-tflops 989]
    python benchmarks/training_step.py --shape micro          # a try on a CPU

Latents and texts are ready, as from a cache; half of the steps are edits. MFU is the floating-point operations of the
forward and backward pass, as torch counts them without gradient checkpointing, by time and by the GPU's dense peak in
bfloat16; what checkpointing computes again is not counted as use.
"""

import argparse
import platform
import tempfile
import time

import full_size
import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback
from unipic2.core.micro import MAX_TOKENS, TRANSFORMER_CONFIG, weights_dir
from unipic2.trainer import (
    FlowMatchingConfig,
    FlowMatchingTrainer,
    SD3Transformer2DKontextModel,
    StableDiffusion3KontextPipeline,
)
from unipic2.trainer.adapters import lora_config

SHAPES = {"sd35m": (full_size.CONFIG, 77 + 256), "micro": (TRANSFORMER_CONFIG, MAX_TOKENS)}
PEAKS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "4090": 165}  # TFLOP/s, dense, bfloat16
WARM_UP = 4


class Samples(torch.utils.data.Dataset):
    """Random samples, every second one an edit."""

    def __init__(self, config: dict, tokens: int, edge: int, count: int):
        self.is_edit = [bool(i % 2) for i in range(count)]
        generator = torch.Generator().manual_seed(0)
        self.latents = torch.randn(config["in_channels"], edge, edge, generator=generator)
        states = torch.randn(tokens, config["joint_attention_dim"], generator=generator)
        self.empty_text = states, torch.randn(config["pooled_projection_dim"], generator=generator)

    def __len__(self) -> int:
        return len(self.is_edit)

    def __getitem__(self, index: int) -> dict:
        sample = {"prompt": "", "latents": self.latents, "text": self.empty_text}
        return sample | ({"ref_latents": self.latents} if self.is_edit[index] else {})


class Clock(TrainerCallback):
    """Notes when each step was done."""

    def __init__(self):
        self.times: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())


def flops_of(config: dict, tokens: int, edge: int, batch_size: int) -> float:
    """Return the operations of a forward and backward pass, the mean of both tasks, without computing anything."""
    found = []
    with torch.device("meta"):
        model = SD3Transformer2DKontextModel(**config)
        latents = torch.empty(batch_size, config["in_channels"], edge, edge)
        states = torch.empty(batch_size, tokens, config["joint_attention_dim"])
        pooled, sigmas = torch.empty(batch_size, config["pooled_projection_dim"]), torch.empty(batch_size)
        for reference in (None, latents):
            with FlopCounterMode(display=False) as counter:
                model(latents, states, pooled, sigmas, ref_hidden_states=reference, return_dict=False)[
                    0
                ].sum().backward()
            found.append(counter.get_total_flops())
    return sum(found) / len(found)


def peak_memory() -> float:
    """Return the most memory in use, in GB: the GPU's where there is one, else the process's."""
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else full_size.peak()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="sd35m", help="size of the transformer (default sd35m)")
    parser.add_argument("--train", choices=("lora", "full"), default="lora", help="what is trained (default lora)")
    parser.add_argument("--resolution", type=int, default=512, help="pixels of an edge (default 512; micro: 64)")
    parser.add_argument("--batch-size", type=int, default=4, help="samples of a batch (default 4)")
    parser.add_argument(
        "--steps", type=int, default=20, help="optimizer steps that count, an even number (default 20)"
    )
    parser.add_argument("--peak-tflops", type=float, help="of the device, dense bfloat16; known: " + ", ".join(PEAKS))
    arguments = parser.parse_args()
    config, tokens = SHAPES[arguments.shape]
    on_gpu, full = torch.cuda.is_available(), arguments.train == "full"
    edge = (64 if arguments.shape == "micro" else arguments.resolution) // 8
    with torch.device("cuda" if on_gpu else "cpu"):
        transformer = SD3Transformer2DKontextModel(**config).to(
            torch.float32 if full or not on_gpu else torch.bfloat16
        )
    vae = AutoencoderTiny.from_pretrained(weights_dir("micro-pretrained") / "vae")
    empty = dict.fromkeys(f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3"))
    pipe = StableDiffusion3KontextPipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae, **empty
    )
    samples, clock = Samples(config, tokens, edge, 8 * arguments.batch_size), Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = FlowMatchingConfig(
            output_dir=folder, max_steps=WARM_UP + arguments.steps, per_device_train_batch_size=arguments.batch_size,
            learning_rate=1e-5, bf16=True, use_cpu=not on_gpu, use_ema=False, preview_steps=0, save_strategy="no",
            report_to="none", logging_steps=1000, disable_tqdm=True, gradient_checkpointing=arguments.shape == "sd35m",
        )  # fmt: skip
        lora = None if full else lora_config(16, 32, 0.0, ["attention"])
        FlowMatchingTrainer(pipe, args, samples, callbacks=[clock], peft_config=lora).train()
    seconds = (clock.times[-1] - clock.times[WARM_UP - 1]) / arguments.steps
    device = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()}, {torch.get_num_threads()} threads"
    flops = flops_of(config, tokens, edge, arguments.batch_size) * (1 if full else 2 / 3)  # no gradients of weights
    print(f"{device}, torch {torch.__version__}, {arguments.shape}, {arguments.train}, {8 * edge}x{8 * edge} pixels")
    print(f"{seconds:.3f} s/step, {arguments.batch_size / seconds:.1f} samples/s, peak memory {peak_memory():.1f} GB")
    peak = arguments.peak_tflops or next((value for name, value in PEAKS.items() if name in device), None)
    share = f"MFU {flops / seconds / peak / 1e12:.3g} of {peak:g}" if peak else "no MFU without --peak-tflops"
    print(f"{flops / 1e12:.3g} TFLOP/step, {flops / seconds / 1e12:.3g} TFLOP/s, {share}")


if __name__ == "__main__":
    main()
