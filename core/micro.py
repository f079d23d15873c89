"""The micro preset: a complete UniPic2 of a few million weights, in the published formats and code paths.

Both wings read these figures: the trainer builds the models from them, the pack builds ComfyUI's
text encoder from them and finds the bundled weights here.
"""

from pathlib import Path

IMAGE_SIZE = 64
"""Edge of a micro picture in pixels."""

NUM_INFERENCE_STEPS = 20
GUIDANCE_SCALE = 1.5
"""Sampling defaults of the micro models (scheduler: FlowMatchEuler with `SHIFT`; ComfyUI: euler + normal)."""

EDIT_GUIDANCE_SCALE = 1.0
"""Edits by `micro`, which PDTR trained without guidance, at half the time; those of the other models want 1.5."""

SHIFT = 3.0
"""Timestep shift of training and sampling. SD3's own value, so ComfyUI needs no extra node."""

MAX_TOKENS = 14
"""Prompt length in tokens, start and end included."""

TEXT_ENCODER_CONFIG = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "max_position_embeddings": MAX_TOKENS,
    "projection_dim": 128,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
}
"""CLIP text model with projection; conditioning is the state before the last layer, as for SD3's CLIPs."""

TRANSFORMER_CONFIG = {
    # ComfyUI derives depth and heads from the width: width = 64 x layers = 64 x heads.
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 3,
    "attention_head_dim": 64,
    "num_attention_heads": 3,
    "joint_attention_dim": TEXT_ENCODER_CONFIG["hidden_size"],
    "caption_projection_dim": 192,
    "pooled_projection_dim": TEXT_ENCODER_CONFIG["projection_dim"],
    "pos_embed_max_size": 16,
    "dual_attention_layers": (0, 1),
    "qk_norm": "rms_norm",
}

VAE_CONFIG = {"latent_channels": 16, "scaling_factor": 1.0, "shift_factor": 0.0}
"""TAESD architecture (diffusers `AutoencoderTiny`): its latents are already what the transformer reads."""

QWEN_TEXT_CONFIG = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-6,
    # Turned by 0.3 to 1 a step: the four tokens of a picture are one row or column apart, which 10000 hardly turns.
    "rope_parameters": {"rope_type": "default", "rope_theta": 3.0, "mrope_section": [2, 15, 15]},
    "max_position_embeddings": 1024,
}
QWEN_VISION_CONFIG = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "depth": 4,
    "num_heads": 2,
    "fullatt_block_indexes": [1, 3],
}
"""Micro Qwen2.5-VL: the published classes, heads 64 wide; a picture of 64x64 pixels is seen at 56x56, four tokens."""

MICRO_QWEN_KEY = "unipic2_micro_qwen"
"""ComfyUI's name of it inside a CLIP, as `qwen25_7b` is that of the published size."""

CONNECTOR_CONFIG = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
NUM_QUERIES = 16
"""The connector of the micro MetaQuery model, and its queries: about as many as a micro prompt has tokens."""

BUNDLED_MODELS = ("micro", "micro-pretrained", "micro-metaquery")
"""Names of the bundled weights: after PDTR, what PDTR started from, and MetaQuery on that."""

_WEIGHTS = Path(__file__).resolve().parent.parent / "weights"

LORAS_DIR = _WEIGHTS / "loras"
"""LoRAs of `micro`, which ComfyUI's LoRA loaders offer."""


def weights_dir(name: str = "micro") -> Path:
    """Return the folder of one of `BUNDLED_MODELS`, in the published layout but for the parts it shares."""
    return _WEIGHTS / name


def component_dir(folder: Path, name: str) -> Path:
    """Return the folder of a pipeline's component (`vae`, ...): its own.

    A bundled model that lacks it shares that of `micro-pretrained`, which no later training changed.
    """
    own = folder / name
    shared = _WEIGHTS / "micro-pretrained" / name
    return own if own.is_dir() or folder.resolve().parent != _WEIGHTS.resolve() or not shared.is_dir() else shared
