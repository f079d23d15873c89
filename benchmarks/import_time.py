"""How long ComfyUI takes to load this pack, against an empty V3 pack.

    python benchmarks/import_time.py [--repeats 5]

Each figure comes from a process of its own: ComfyUI's modules are imported first (not timed), then ComfyUI's own
`load_custom_node` runs once on the pack. The two packs take turns. Prints medians, their difference and ratio.
"""

import argparse
import statistics
import subprocess
import tempfile
from pathlib import Path

from unipic2.cli.comfyui import resolve_install

PACK = Path(__file__).resolve().parents[1]

CHILD = """
import asyncio, sys, time
root, pack = sys.argv[1:3]
sys.path.insert(0, root)
sys.argv = ["main.py", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import nodes
try:  # what `load_custom_node` imports for its first pack: one of ComfyUI's own, in a real start
    from comfy_config import config_parser
except ImportError:
    pass
start = time.perf_counter()
loaded = asyncio.run(nodes.load_custom_node(pack))
print("SECONDS" if loaded else "FAILED", time.perf_counter() - start)
"""

EMPTY_INIT = """
from comfy_api.latest import ComfyExtension, io


class Empty(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="UniPic2BenchmarkEmpty", outputs=[io.Int.Output()])

    @classmethod
    def execute(cls):
        return io.NodeOutput(0)


class EmptyExtension(ComfyExtension):
    async def get_node_list(self):
        return [Empty]


async def comfy_entrypoint():
    return EmptyExtension()
"""
# ComfyUI reads a pack's pyproject.toml while loading it, so the empty pack has one too.
EMPTY_PYPROJECT = '[project]\nname = "empty"\nversion = "0.1.0"\n[tool.comfy]\nDisplayName = "Empty"\n'


def measure(install, pack: Path) -> float:
    """Return the milliseconds that ComfyUI needs for `pack`, in a fresh process."""
    command = [install.python, "-c", CHILD, install.root, pack]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, check=False)
    last = done.stdout.split()[-2:]
    if done.returncode or last[:1] != ["SECONDS"]:
        raise SystemExit(f"{pack} did not load:\n{done.stdout}{done.stderr}")
    return 1000 * float(last[1])


def main() -> None:
    """Measure both packs in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="processes per pack (default 5)")
    repeats = parser.parse_args().repeats
    install = resolve_install()
    with tempfile.TemporaryDirectory() as folder:
        empty, ours = Path(folder) / "empty-pack", Path(folder) / "ComfyUI-UniPic2"
        empty.mkdir()
        (empty / "__init__.py").write_text(EMPTY_INIT)
        (empty / "pyproject.toml").write_text(EMPTY_PYPROJECT)
        ours.symlink_to(PACK, target_is_directory=True)
        times = {empty: [], ours: []}
        for run in range(repeats + 1):
            for pack, values in times.items():
                value = measure(install, pack)
                if run:  # the first round writes the bytecode
                    values.append(value)
    median = {pack: statistics.median(values) for pack, values in times.items()}
    for pack, values in times.items():
        print(f"{pack.name:16s} {median[pack]:7.1f} ms   ({', '.join(f'{value:.1f}' for value in values)})")
    print(f"difference       {median[ours] - median[empty]:7.1f} ms   ratio {median[ours] / median[empty]:.2f}")


if __name__ == "__main__":
    main()
