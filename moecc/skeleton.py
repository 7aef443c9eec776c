"""The transformers model of a config: its class, its config object, its shapes without memory."""

from __future__ import annotations

from typing import Any

import torch

from moecc.errors import SourceError


def model_class(variant: str, config: dict[str, Any]) -> Any:
    """The transformers class of a checkpoint, by `architectures`, never remote code."""
    import transformers

    names = config.get("architectures") or []
    name = names[0] if isinstance(names, list) and names else None
    cls = getattr(transformers, str(name), None) or _spelt_otherwise(str(name), config)
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        raise SourceError(
            f"variant `{variant}` has the architecture `{name}`, "
            f"which transformers {transformers.__version__} does not know",
            "check `architectures` in its config.json, or upgrade transformers",
        )
    return cls


def _spelt_otherwise(name: str, config: dict[str, Any]) -> Any:
    """The class of checkpoints such as Phi-3.5-MoE, whose own code wrote `PhiMoEForCausalLM`."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(config.get("model_type")))
    same = isinstance(known, str) and known.lower() == name.lower()
    return getattr(transformers, str(known), None) if same else None


def load_config(variant: str, config: dict[str, Any]) -> Any:
    """The transformers config object of a parsed config.json: what the model is.

    Its quantization and the kernels it was last run with are left out.
    """
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise SourceError(
            f"variant `{variant}` has the model type `{model_type}`, "
            "which this version of transformers does not know",
            "check `model_type` in its config.json, or upgrade transformers",
        )
    plain = {
        k: v for k, v in config.items() if k != "quantization_config" and "_implementation" not in k
    }
    try:
        return CONFIG_MAPPING[model_type].from_dict(_decode_floats(plain))
    except Exception as error:
        raise SourceError(f"the config of variant `{variant}` is not valid: {error}") from None


def _decode_floats(value: Any) -> Any:
    """transformers writes an infinity as `{"__float__": "Infinity"}`."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {k: _decode_floats(v) for k, v in value.items()}
    return [_decode_floats(v) for v in value] if isinstance(value, list) else value


def skeleton(variant: str, config: dict[str, Any]) -> Any:
    """The model on the meta device: names and shapes, no memory."""
    cls = model_class(variant, config)
    loaded = load_config(variant, config)
    if cls.config_class is None or not isinstance(loaded, cls.config_class):
        raise SourceError(
            f"variant `{variant}` has the architecture `{cls.__name__}`, "
            f"which is not one of model type `{loaded.model_type}`",
            "check `architectures` and `model_type` in its config.json",
        )
    try:
        with torch.device("meta"):
            return cls._from_config(loaded)
    except Exception as error:
        raise SourceError(
            f"transformers cannot build variant `{variant}` from its config: {error}"
        ) from None
