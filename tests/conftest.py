"""Make `unipic2` mean this checkout, whatever the folder is called and whatever wheel is installed."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

spec = importlib.util.spec_from_file_location("unipic2", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
module = importlib.util.module_from_spec(spec)
sys.modules["unipic2"] = module
spec.loader.exec_module(module)


def pytest_collection_modifyitems(config, items) -> None:
    """Leave out what is marked slow unless `-m` asks for it."""
    if "slow" in (config.option.markexpr or ""):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
