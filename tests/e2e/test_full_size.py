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
    plain = found[benchmark.WAYS[0]]["memory"]
    for way in benchmark.WAYS[1:]:
        assert found[way]["memory"] < 2 * plain, f"{way} holds the weights more than once"
