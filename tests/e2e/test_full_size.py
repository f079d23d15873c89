"""The transformer's published size, random weights, in the real ComfyUI on the CPU (`pytest -m slow`)."""

import importlib.util
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "full_size.py"


@pytest.mark.slow
@pytest.mark.comfyui
@pytest.mark.timeout(1800)
def test_every_way_to_load_it_edits(tmp_path):
    spec = importlib.util.spec_from_file_location("full_size", BENCHMARK)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    elements, found = benchmark.measure(str(tmp_path))
    print(benchmark.table(elements, found))
    assert elements == 2_469_663_936
    assert set(found) == set(benchmark.WAYS) and all(figures["finite"] for figures in found.values())
    # On a CPU ComfyUI itself computes in float32, so its own loader is the measure, not the file's size.
    stock = found["UNETLoader + Enable Editing"]["memory"]
    for way in benchmark.WAYS[2:]:
        assert found[way]["memory"] < 1.2 * stock, f"{way} holds the weights more often than the stock loader"
