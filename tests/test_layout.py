"""Holds the boundaries: who may import whom, packages listed = folders on disk, and a light root `__init__`."""

import ast
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = {name.partition(".")[2].replace(".", "/") for name in PROJECT["tool"]["setuptools"]["packages"]}
PACKAGE_DATA = PROJECT["tool"]["setuptools"]["package-data"]
OUTSIDE = {"tests", "benchmarks", "docs", "build", "dist", "runs", "out"}

OURS = ("cli", "comfy_nodes", "core", "trainer")
STDLIB = set(sys.stdlib_module_names)
COMFYUI = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "folder_paths", "node_helpers", "nodes"}
TRAINING = {"accelerate", "datasets", "diffusers", "peft", "transformers", "trl"}
# area: (third-party modules that may be imported, or None for any; modules that may not; our areas that may be used)
RULES = {
    "__init__": (set(), set(), {"comfy_nodes"}),
    "core": ({"safetensors", "torch"}, set(), {"core"}),
    "comfy_nodes": ({"PIL", "numpy", "safetensors", "torch"} | COMFYUI, TRAINING, {"comfy_nodes", "core"}),
    "trainer": (None, COMFYUI, {"trainer", "core"}),
    "cli": (None, COMFYUI, {"cli", "core", "trainer"}),
}
# What these areas may import inside functions only, because it is heavy or may not be installed.
LAZY = {"__init__": set(OURS), "cli": {"torch", "trainer", *TRAINING}}


ALSO = {"comfy_nodes/micro_qwen.py": {"transformers"}}
"""Files that may import more: ComfyUI requires transformers, but has no tokenizer class of its own for this folder."""


def imports_of(source: str, path: str) -> list[tuple[str, bool, bool]]:
    """Return `(module, relative, lazy)` for each import; relative ones are resolved from the repository root.

    `importlib.import_module("name")` and `__import__("name")` count too.
    """
    found = []

    def visit(node: ast.AST, lazy: bool) -> None:
        lazy = lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if isinstance(node, ast.Import):
            found.extend((alias.name, False, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if not node.level:
                found.append((node.module, False, lazy))
            else:
                package = list(Path(path).parent.parts)
                base = package[: len(package) - node.level + 1] if node.level - 1 <= len(package) else [".."]
                base += (node.module or "").split(".") if node.module else []
                found.extend((".".join(base) or alias.name, True, lazy) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("import_module", "__import__"):
                found.append((str(node.args[0].value), str(node.args[0].value).startswith("."), lazy))
        for child in ast.iter_child_nodes(node):
            visit(child, lazy)

    visit(ast.parse(source), False)
    return found


def broken_rules(source: str, path: str) -> list[str]:
    """Return a sentence for each import of this file that the table forbids."""
    area = path.partition("/")[0].removesuffix(".py")
    allowed, denied, ours = RULES[area]
    problems = []
    for module, relative, lazy in imports_of(source, path):
        top = module.partition(".")[0]
        if relative:
            wrong = top not in ours
        else:
            named_ours = top in OURS or top == "unipic2"
            outside = top not in STDLIB and allowed is not None and top not in allowed
            wrong = named_ours or (top in denied or outside) and top not in ALSO.get(path, ())
        if wrong or (not lazy and top in LAZY.get(area, ())):
            problems.append(f"{path} imports {'.' if relative else ''}{module}{' in a function' if lazy else ''}")
    return problems


def python_files() -> list[str]:
    files = [p.relative_to(ROOT).as_posix() for area in OURS for p in sorted((ROOT / area).rglob("*.py"))]
    return ["__init__.py", *files]


@pytest.mark.parametrize("path", python_files())
def test_imports_keep_the_boundaries(path):
    assert not broken_rules((ROOT / path).read_text(encoding="utf-8"), path)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("comfy_nodes/a.py", "from ..trainer import kontext_pipeline"),
        ("comfy_nodes/a.py", "def f():\n    from ..trainer.micro import world"),
        ("comfy_nodes/a.py", "from .. import cli"),
        ("comfy_nodes/a.py", "import diffusers"),
        ("comfy_nodes/a.py", "class A:\n    def f(self):\n        from transformers import CLIPTokenizer"),
        ("comfy_nodes/a.py", "import aiohttp"),
        ("comfy_nodes/a.py", "import importlib\nimportlib.import_module('peft')"),
        ("comfy_nodes/a.py", "from unipic2.core import sizes"),
        ("core/a.py", "def f():\n    import comfy.utils"),
        ("core/a.py", "import numpy as np"),
        ("core/a.py", "from ..comfy_nodes import nodes"),
        ("core/a.py", "async def f():\n    import diffusers"),
        ("trainer/a.py", "import folder_paths"),
        ("trainer/micro/a.py", "from ...comfy_nodes import kontext"),
        ("trainer/micro/a.py", "from ...cli.client import label"),
        ("trainer/a.py", "import core.sizes"),
        ("trainer/a.py", "f = lambda: __import__('comfy')"),
        ("cli/a.py", "from ..trainer.cli import main"),
        ("cli/a.py", "import torch"),
        ("cli/a.py", "try:\n    import diffusers\nexcept ImportError:\n    pass"),
        ("cli/a.py", "def f():\n    from ..comfy_nodes import nodes"),
        ("cli/a.py", "from ....elsewhere import x"),
        ("__init__.py", "from .core import sizes"),
        ("__init__.py", "from . import comfy_nodes"),
        ("__init__.py", "import torch"),
        ("__init__.py", "def f():\n    from .trainer import x"),
    ],
)
def test_the_walker_sees_forbidden_imports(path, source):
    assert len(broken_rules(source, path)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "comfy_nodes/a.py",
            "import json\nimport torch\nimport comfy.sd\nfrom . import text\nfrom ..core import sizes",
        ),
        ("core/a.py", "from .errors import InputError\nfrom safetensors.torch import load_file"),
        ("trainer/micro/a.py", "import diffusers\nfrom ...core.micro import SHIFT\nfrom ..pretrain import parse"),
        ("cli/a.py", "import aiohttp\ndef f():\n    import torch\n    from ..trainer.cli import main"),
        ("__init__.py", "async def f():\n    from .comfy_nodes import UniPic2Extension"),
    ],
)
def test_the_walker_lets_allowed_imports_pass(path, source):
    assert not broken_rules(source, path)


def folders_with_code() -> set[str]:
    files = [p.relative_to(ROOT) for p in ROOT.rglob("*.py")]
    kept = {p.parent.as_posix() for p in files if p.parts[0] not in OUTSIDE and not p.parts[0].startswith(".")}
    return {"" if folder == "." else folder for folder in kept}


def test_every_folder_with_code_is_a_listed_package():
    with_code = folders_with_code()
    data_only = {name for name in PACKAGES if name not in with_code}
    assert with_code <= PACKAGES
    assert data_only == {"locales", "trainer/configs", "web", "weights", "workflows"}


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_every_listed_package_holds_files(package):
    assert any(p.is_file() for p in (ROOT / package).rglob("*")), (
        f"{package}/ is listed in pyproject.toml but is empty"
    )


def test_every_data_file_goes_into_the_wheel():
    patterns = {name.partition(".")[2].replace(".", "/"): globs for name, globs in PACKAGE_DATA.items()}
    packed = {p for folder, globs in patterns.items() for g in globs for p in (ROOT / folder).glob(g)}
    data = set()
    for top in {name.partition("/")[0] for name in PACKAGES if name}:
        files = (p for p in (ROOT / top).rglob("*") if p.is_file() and "__pycache__" not in p.parts)
        data |= {p for p in files if p.suffix not in (".py", ".pyc")}
    left_out = sorted(p.relative_to(ROOT).as_posix() for p in data - packed)
    assert not left_out


def test_the_pack_has_no_dependency_and_only_init_lies_in_the_root():
    assert PROJECT["project"]["dependencies"] == []
    assert [p.name for p in ROOT.glob("*.py")] == ["__init__.py"]


def run_python(code: str, *flags: str) -> str:
    done = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, cwd="/", timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


# The loader of ComfyUI's custom nodes: the module's name is the folder's path with its dots replaced.
LOAD_BY_PATH = """
import asyncio, importlib, importlib.util, inspect, sys
folder = {folder!r}
name = folder.replace(".", "_x_")
spec = importlib.util.spec_from_file_location(name, folder + "/__init__.py")
module = importlib.util.module_from_spec(spec)
sys.modules[name] = module
spec.loader.exec_module(module)
assert [m for m in sys.modules if m.startswith(name)] == [name], "the root must import nothing of ours"
assert not {{"torch", "numpy", "safetensors", "unipic2"}} & set(sys.modules)
assert inspect.iscoroutinefunction(module.comfy_entrypoint)
assert not hasattr(module, "NODE_CLASS_MAPPINGS")
sizes = importlib.import_module(name + ".core.sizes")
assert sizes.fit_size(640, 480) == (512, 384)
try:
    asyncio.run(module.comfy_entrypoint())
except ModuleNotFoundError as error:
    print(error.name)
"""


@pytest.mark.parametrize("folder_name", ["ComfyUI-UniPic2", "ComfyUI-UniPic2.v1.5", "uni pic 2"])
def test_the_folder_loads_by_path_in_a_bare_process(tmp_path, folder_name):
    os.symlink(ROOT, tmp_path / folder_name, target_is_directory=True)
    # Without site-packages only the standard library is there, so the entry point gets as far as ComfyUI's modules.
    missing = run_python(LOAD_BY_PATH.format(folder=str(tmp_path / folder_name)), "-I", "-S")
    assert missing.strip().partition(".")[0] in {*COMFYUI, "torch"}


IMPORT_TRAINER = """
import importlib.util, sys
root = {root!r}
spec = importlib.util.spec_from_file_location("unipic2", root + "/__init__.py", submodule_search_locations=[root])
module = importlib.util.module_from_spec(spec)
sys.modules["unipic2"] = module
spec.loader.exec_module(module)
import unipic2.trainer
heavy = {{"torch", "diffusers", "transformers", "trl", "peft", "accelerate"}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
import unipic2.cli
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert set(unipic2.trainer.__all__) == {{
    "FlowGRPOConfig", "FlowGRPOTrainer", "FlowMatchingConfig", "FlowMatchingTrainer", "MetaQueryConfig",
    "MetaQueryPipeline", "MetaQueryTrainer", "SD3Transformer2DKontextModel", "StableDiffusion3KontextPipeline",
}}
from unipic2.trainer import SD3Transformer2DKontextModel
assert "diffusers" in sys.modules and "trl" not in sys.modules
print(SD3Transformer2DKontextModel.__name__)
"""


def test_importing_the_trainer_is_light_until_a_name_is_used():
    assert run_python(IMPORT_TRAINER.format(root=str(ROOT))).strip() == "SD3Transformer2DKontextModel"


def test_every_exported_name_of_the_trainer_exists_and_others_do_not():
    from unipic2 import trainer

    assert all(getattr(trainer, name).__name__ == name for name in trainer.__all__)
    with pytest.raises(AttributeError, match="NoSuchTrainer"):
        trainer.NoSuchTrainer  # noqa: B018


def test_importing_the_root_twice_gives_one_module():
    assert importlib.util.find_spec("unipic2").origin == str(ROOT / "__init__.py")


def test_bundled_models_share_the_parts_that_they_were_trained_with():
    """`weights/shared.json` is written when a model is bundled: one that is remade would leave the others behind."""
    weights = ROOT / "weights"
    models = {path.name for path in weights.iterdir() if path.is_dir()} - {"micro-pretrained", "loras"}
    recorded = json.loads((weights / "shared.json").read_text(encoding="utf-8"))
    assert set(recorded) == models
    for model, parts in recorded.items():
        with_weights = {path.parent.name for path in (weights / "micro-pretrained").glob("*/*.safetensors")}
        needed = json.loads((weights / model / "model_index.json").read_text(encoding="utf-8"))
        missing = {n for n in with_weights if n in needed and not (weights / model / n).is_dir()}
        assert set(parts) == missing, model
        for part, digest in parts.items():
            (file,) = (weights / "micro-pretrained" / part).glob("*.safetensors")
            assert hashlib.sha256(file.read_bytes()).hexdigest() == digest, f"{model} was trained with another {part}"
