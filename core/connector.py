"""MetaQuery's connector: turns the states of the learned queries into what the transformer reads as text.

The file of a published `conditioner/` folder holds it together with the queries. One implementation serves both
wings: ComfyUI passes its `operations`, which cast and offload weights; the trainer passes `torch.nn`.

Shapes: B batch, Q queries, L width of the language model, W width of the connector, D width of text states
(`joint_attention_dim`), P width of pooled text (`pooled_projection_dim`).

Source: UniPic 2.0 (arXiv 2509.04548), section 3.3; class name and keys of the published checkpoint.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from .checkpoint import TRANSFORMER_FILE, component_files, config_disagrees, read_files, read_header, save_tensors
from .errors import InputError
from .files import read_json, write_file
from .prompts import POSITIONS

METADATA_KEY = "unipic2.conditioner_config"
"""Entry of a safetensors file's metadata that holds the config as JSON, for files without a `config.json` beside."""
_HEAD_DIM = 64  # of all published connectors; the number of heads is not in the weights
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_FIXED = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "attention_dropout": 0.0}
_LAYER = re.compile(r"connector\.layers\.(\d+)\.")


class _Attention(nn.Module):
    """Attention of all queries over all queries."""

    def __init__(self, width: int, num_heads: int, operations, **where):
        super().__init__()
        self.num_heads = num_heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, operations.Linear(width, width, **where))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    def __init__(self, width: int, hidden: int, operations, **where):
        super().__init__()
        self.fc1 = operations.Linear(width, hidden, **where)
        self.fc2 = operations.Linear(hidden, width, **where)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class _Layer(nn.Module):
    """Pre-norm encoder layer."""

    def __init__(self, config: Mapping, operations, **where):
        super().__init__()
        width, eps = config["hidden_size"], _FIXED["layer_norm_eps"]
        self.layer_norm1 = operations.LayerNorm(width, eps=eps, **where)
        self.self_attn = _Attention(width, config["num_attention_heads"], operations, **where)
        self.layer_norm2 = operations.LayerNorm(width, eps=eps, **where)
        self.mlp = _MLP(width, config["intermediate_size"], operations, **where)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class _Encoder(nn.Module):
    """A stack of layers: bidirectional, no mask, no positions (the queries differ by themselves), no final norm."""

    def __init__(self, config: Mapping, operations, **where):
        super().__init__()
        self.layers = nn.ModuleList(_Layer(config, operations, **where) for _ in range(config["num_hidden_layers"]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class StableDiffusion3Conditioner(nn.Module):
    """The queries and the connector of UniPic2-MetaQuery.

    Args:
        connector_config: `hidden_size`, `intermediate_size`, `num_hidden_layers`, `num_attention_heads`; other entries
            of a published config must say what is built here (`gelu_pytorch_tanh`, eps 1e-6, no dropout).
        num_queries: Q; 256 in the published model.
        llm_hidden_size: L; 3584 for Qwen2.5-VL-7B, 2048 for 3B.
        pooled_projection_dim: P; 2048 for SD3.5.
        joint_attention_dim: D; 4096 for SD3.5.
        positions: how a picture's tokens were numbered in training, one of `core.prompts.POSITIONS`; None: not known,
            as in the published model, which is run with 1d.
        operations: where `Linear` and `LayerNorm` come from: `torch.nn`, or one of ComfyUI's `comfy.ops` classes.
        device, dtype: of the weights.

    Raises:
        InputError: a size is missing or not a number above 0, heads do not divide the width, or an unknown activation
            or numbering.
    """

    def __init__(
        self,
        connector_config: Mapping,
        num_queries: int = 256,
        llm_hidden_size: int = 3584,
        pooled_projection_dim: int = 2048,
        joint_attention_dim: int = 4096,
        positions: str | None = None,
        *,
        operations=nn,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.config = {
            "connector_config": {name: connector_config.get(name) for name in _SIZES},
            "num_queries": num_queries,
            "llm_hidden_size": llm_hidden_size,
            "pooled_projection_dim": pooled_projection_dim,
            "joint_attention_dim": joint_attention_dim,
        }
        if positions is not None:
            self.config["positions"] = positions
        _check_config({**self.config, "connector_config": connector_config}, "connector")
        where = {"device": device, "dtype": dtype}
        width = connector_config["hidden_size"]
        self.connector = _Encoder(connector_config, operations, **where)
        self.projector_1 = operations.Linear(llm_hidden_size, width, **where)
        self.projector_2 = operations.Linear(width, pooled_projection_dim, **where)
        self.projector_3 = operations.Linear(width, joint_attention_dim, **where)
        self.meta_queries = nn.Parameter(torch.empty(num_queries, llm_hidden_size, **where))

    @property
    def num_queries(self) -> int:
        """Q."""
        return self.config["num_queries"]

    @property
    def positions(self) -> str:
        """How a picture's tokens are numbered: as it was trained, or as the published model is run."""
        return self.config.get("positions", POSITIONS[0])

    @property
    def dtype(self) -> torch.dtype:
        """Type of the queries."""
        return self.meta_queries.dtype

    @property
    def device(self) -> torch.device:
        """Where the queries are."""
        return self.meta_queries.device

    @torch.no_grad()
    def initialize(self, seed: int) -> "StableDiffusion3Conditioner":
        """Draw new weights and return self: queries N(0, 1/sqrt(L)), connector xavier, what leads out zero.

        With the last two projections at zero the transformer starts from an empty prompt, and nothing that it has
        learned is upset by noise.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name == "meta_queries":
                values = torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5
            elif parameter.ndim == 2 and not name.startswith(("projector_2", "projector_3")):
                bound = (6 / sum(parameter.shape)) ** 0.5
                values = (torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound
            else:
                values = torch.full(parameter.shape, float("layer_norm" in name and name.endswith("weight")))
            parameter.copy_(values)
        return self

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return text states (B, Q, D) and pooled text (B, P) for states (B, Q, L) of the queries.

        They are those after the language model's last norm (`last_hidden_state` of transformers).
        """
        x = self.connector(self.projector_1(states))
        return self.projector_3(x), self.projector_2(x.mean(1))

    def save_pretrained(self, folder: str | Path, **_) -> None:
        """Write `config.json` and the weights in the published layout.

        Raises:
            InputError: the folder cannot be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"_class_name": type(self).__name__, **self.config}, indent=2)
        write_file(folder / "config.json", text + "\n")
        tensors = {name: p.detach().contiguous() for name, p in self.state_dict().items()}
        save_tensors(tensors, folder / TRANSFORMER_FILE, {METADATA_KEY: json.dumps(self.config)})

    @classmethod
    def from_pretrained(cls, path: str | Path, **kwargs) -> "StableDiffusion3Conditioner":
        """Load a `conditioner/` folder in the published layout, or one safetensors file of it.

        Args:
            path: folder, or file. A file tells its sizes by its shapes; its heads by its metadata, or 64 wide.
            kwargs: `operations`, `device`, `dtype` of the constructor; without a dtype the file's own is kept.

        Raises:
            InputError: a file is missing or broken, its tensors are not those of a connector, or its config disagrees.
        """
        path = Path(path)
        files = component_files(path) if path.is_dir() else [path]
        config = _read_config(path, files)
        tensors = read_files(files)
        kwargs.setdefault("dtype", tensors["meta_queries"].dtype)
        device = kwargs.pop("device", None)
        with torch.device("meta"):
            # By torch's own layers: ComfyUI's may have no weights before they are loaded.
            expected = cls(**config).state_dict()
            model = cls(**config, **kwargs)
        _check_tensors(expected, {k: tuple(t.shape) for k, t in tensors.items()}, path)
        tensors = {k: t.to(device=device, dtype=kwargs["dtype"]) for k, t in tensors.items()}
        model.load_state_dict(tensors, assign=True)
        return model


def _read_config(path: Path, files: list[Path]) -> dict:
    """Return the config of a connector in a folder, or in one file, checked against the weights in its files.

    Raises:
        InputError: see `StableDiffusion3Conditioner.from_pretrained`.
    """
    headers = [read_header(file) for file in files]
    shapes = {key: shape for header in headers for key, shape in header.shapes.items()}
    real = conditioner_config(shapes, path)
    if path.is_dir():
        source = path / "config.json"
        written = read_json(source, "the sizes of the connector")
    elif METADATA_KEY in headers[0].metadata:
        source = f"the metadata of {path}"
        try:
            written = dict(json.loads(headers[0].metadata[METADATA_KEY]))
        except (ValueError, TypeError):
            raise InputError(f"{METADATA_KEY} in {source}", found="broken JSON", expected="an object") from None
    else:
        return real
    _check_config(written, source)
    if "positions" in written:
        real["positions"] = written["positions"]
    heads = written["connector_config"]["num_attention_heads"]
    real["connector_config"]["num_attention_heads"] = heads
    for name, value in real["connector_config"].items():
        if written["connector_config"].get(name) != value:
            raise config_disagrees(name, written["connector_config"].get(name), value, source)
    for name, value in real.items():
        if name != "connector_config" and written.get(name, value) != value:
            raise config_disagrees(name, written[name], value, source)
    return real


def conditioner_config(shapes: Mapping[str, tuple[int, ...]], source: object = "connector weights") -> dict:
    """Derive the config from the shapes of the weights; heads, which are not in them, as 64 wide.

    Raises:
        InputError: the keys are not those of a connector.
    """
    layers = {int(m[1]) for key in shapes if (m := _LAYER.match(key))}
    needed = [
        "meta_queries", "projector_1.weight", "projector_2.weight", "projector_3.weight",
        "connector.layers.0.mlp.fc1.weight",
    ]  # fmt: skip
    missing = [key for key in needed if len(shapes.get(key, ())) != 2]
    if missing:
        raise InputError(
            f"{source}",
            found=f"no {', '.join(missing)}",
            expected="a MetaQuery connector (the conditioner folder of a UniPic2-MetaQuery model)",
        )
    width = shapes["projector_1.weight"][0]
    return {
        "connector_config": {
            "hidden_size": width,
            "intermediate_size": shapes["connector.layers.0.mlp.fc1.weight"][0],
            "num_hidden_layers": len(layers),
            "num_attention_heads": max(1, width // _HEAD_DIM),
        },
        "num_queries": shapes["meta_queries"][0],
        "llm_hidden_size": shapes["meta_queries"][1],
        "pooled_projection_dim": shapes["projector_2.weight"][0],
        "joint_attention_dim": shapes["projector_3.weight"][0],
    }


def _check_config(config: Mapping, source: object) -> None:
    connector = config.get("connector_config")
    if not isinstance(connector, Mapping):
        raise InputError(f"connector_config in {source}", found=connector, expected=f"{', '.join(_SIZES)}")
    for name in _SIZES:
        value = connector.get(name)
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{name} in {source}", found=value, expected="a whole number from 1 on")
    heads, width = connector["num_attention_heads"], connector["hidden_size"]
    if width % heads:
        raise InputError(f"num_attention_heads in {source}", found=heads, expected=f"a divisor of {width}")
    if config.get("positions", POSITIONS[0]) not in POSITIONS:
        expected = f"one of {', '.join(POSITIONS)}"
        raise InputError(f"positions in {source}", found=repr(config["positions"]), expected=expected)
    for name, value in _FIXED.items():
        if connector.get(name, value) != value:
            raise InputError(f"{name} in {source}", found=connector[name], expected=value)


def _check_tensors(expected: Mapping[str, torch.Tensor], found: Mapping[str, tuple[int, ...]], path: Path) -> None:
    for kind, names in (("missing", expected.keys() - found.keys()), ("unknown", found.keys() - expected.keys())):
        if names:
            raise InputError(
                f"connector {path}",
                found=f"{len(names)} {kind} tensors, for example {min(names)!r}",
                expected="the tensors of a MetaQuery connector",
                remedy="Fetch or export the file again.",
            )
    for name, tensor in expected.items():
        if found[name] != tuple(tensor.shape):
            raise InputError(f"{name} in {path}", found=f"shape {found[name]}", expected=f"{tuple(tensor.shape)}")
