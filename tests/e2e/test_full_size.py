"""The transformer's published size, random weights, in the real ComfyUI on the CPU (`pytest -m slow`)."""

import pytest

from ..benchmark_file import benchmark


@pytest.mark.slow
@pytest.mark.comfyui
@pytest.mark.timeout(1800)
def test_every_way_to_load_it_edits(tmp_path):
    full_size = benchmark("full_size")
    elements, found = full_size.measure(str(tmp_path))
    print(full_size.table(elements, found))
    assert elements == 2_469_663_936
    assert set(found) == set(full_size.WAYS) and all(figures["finite"] for figures in found.values())
    # On a CPU ComfyUI itself computes in float32, so its own loader is the measure, not the file's size.
    stock = found["UNETLoader + Enable Editing"]["memory"]
    for way in full_size.WAYS[2:]:
        assert found[way]["memory"] < 1.2 * stock, f"{way} holds the weights more often than the stock loader"
