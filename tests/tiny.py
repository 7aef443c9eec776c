"""Tiny random checkpoints of every family the tests know, as `save_pretrained` writes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FP8_BLOCK = 128

_TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MLA: dict[str, Any] = {
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_QWEN3 = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}

# family -> (class, what its config is made of)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4}),
    "qwen2-moe": (
        "Qwen2MoeForCausalLM",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 24,
        },
    ),
    "qwen3-moe": ("Qwen3MoeForCausalLM", _QWEN3 | {"num_experts": 12}),  # 10 comes after 9
    "qwen3-moe-tied": ("Qwen3MoeForCausalLM", _QWEN3 | {"tie_word_embeddings": True}),
    "olmoe": ("OlmoeForCausalLM", {"num_experts": 4, "num_experts_per_tok": 2}),
    "deepseek-v2": (
        "DeepseekV2ForCausalLM",
        _MLA | {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1},
    ),
    "deepseek-v3": ("DeepseekV3ForCausalLM", _MLA | {"n_group": 2, "topk_group": 1}),
    "phimoe": ("PhimoeForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt-oss": (
        "GptOssForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    ),
    "granitemoe": ("GraniteMoeForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "jamba": (
        "JambaForCausalLM",
        {
            "num_hidden_layers": 4,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "attn_layer_period": 4,
            "attn_layer_offset": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "switch": (
        "SwitchTransformersForConditionalGeneration",
        {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_heads": 4,
            "num_layers": 4,
            "num_decoder_layers": 4,
            "num_sparse_encoder_layers": 2,
            "num_sparse_decoder_layers": 2,
            "num_experts": 11,
            "router_jitter_noise": 0.0,
            "decoder_start_token_id": 0,
        },
    ),
    "ernie": (
        "Ernie4_5_MoeForCausalLM",
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "num_hidden_layers": 3},
    ),
    "minimax-m2": (
        "MiniMaxM2ForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    ),
}


def config(family: str, **changes: Any) -> Any:
    """The transformers config of a tiny model."""
    cls = getattr(transformers, FAMILIES[family][0])
    return cls.config_class(**(_TEXT | FAMILIES[family][1] | changes))


def model(family: str, seed: int = 0, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    """A model in which no two weights are alike; `changes` go to the config."""
    cls = getattr(transformers, FAMILIES[family][0])
    found = cls._from_config(config(family, dtype=dtype, **changes)).eval()
    randomize(found, seed)
    return found


def randomize(found: Any, seed: int) -> None:
    """Fills every parameter and saved buffer; norms stay near one, so that nothing overflows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in found.state_dict(keep_vars=True).items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator) * 0.1
            is_scale = tensor.dim() == 1 and "norm" in name
            tensor.copy_(noise + 1 if is_scale else noise)
    found.tie_weights()


def save(folder: Path, found: Any, shard_size: str = "50KB") -> Path:
    """Writes a checkpoint of several shards."""
    found.save_pretrained(folder, max_shard_size=shard_size)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by its name on disk."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def shards(folder: Path) -> dict[str, list[str]]:
    """file -> its tensors, of the weight files there are."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found[path.name] = sorted(file.keys())
    return found


def write(folder: Path, values: Mapping[str, torch.Tensor]) -> Path:
    """Puts exactly these tensors in a folder that has a config, as one file."""
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink(missing_ok=True)
    plain = {name: value.contiguous() for name, value in values.items()}
    save_file(plain, folder / SINGLE, metadata={"format": "pt"})
    return folder


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Changes a checkpoint's table of tensors in place."""
    values = tensors(folder)
    change(values)
    return write(folder, values)


def edit_config(folder: Path, **changes: Any) -> Path:
    """Sets keys of config.json; a None removes one."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return folder
