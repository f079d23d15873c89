"""Make `unipic2` mean this checkout, whatever the folder is called and whatever wheel is installed."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

spec = importlib.util.spec_from_file_location("unipic2", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
module = importlib.util.module_from_spec(spec)
sys.modules["unipic2"] = module
spec.loader.exec_module(module)


# Faults that these tests have found and that are not mended yet.
KNOWN_FAULTS = (
    "test_a_broken_shard_index",
    "test_a_config_that_disagrees_names_the_field",
    "test_a_full_disk_during_import_leaves_no_folder",
    "test_weights_with_a_missing_tensor",
    "test_a_failed_export_keeps_the_old_one",
    "test_gradient_checkpointing_trains_the_same",
    "test_kill_and_resume_equals_an_uninterrupted_run",
    "test_the_sheet_command_with_a_bad_file_name",
    "test_a_ground_that_changed_in_part_is_wrong",
    "test_many_specks_are_something_else",
    "test_no_picture_in_the_list",
    "test_one_given_edge_is_not_dropped",
    "test_pictures_of_every_kind_are_seen_as_they_look",
)


def pytest_collection_modifyitems(items):
    for item in items:
        if getattr(item, "originalname", item.name) in KNOWN_FAULTS:
            item.add_marker(pytest.mark.xfail(strict=False, reason="a known fault, listed in tests/conftest.py"))
