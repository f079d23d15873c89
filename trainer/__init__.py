"""The trainer: models, pipelines and trainers of UniPic2. Names are imported when they are first used."""

import importlib

_EXPORTS = {
    "FlowGRPOConfig": "flow_grpo_config",
    "FlowGRPOTrainer": "flow_grpo_trainer",
    "FlowMatchingConfig": "flow_matching_config",
    "FlowMatchingTrainer": "flow_matching_trainer",
    "MetaQueryConfig": "metaquery_config",
    "MetaQueryPipeline": "metaquery_pipeline",
    "MetaQueryTrainer": "metaquery_trainer",
    "SD3Transformer2DKontextModel": "kontext_transformer",
    "StableDiffusion3KontextPipeline": "kontext_pipeline",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
