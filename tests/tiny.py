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
from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SMALL = _TEXT | {"moe_intermediate_size": 16}  # groups of a coding are longer than this row
_QWEN3 = _SMALL | {"head_dim": 8}
_DEEPSEEK = _SMALL | {
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "rope_theta": 150000.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 16,
    "truncate": False,
}
_JAMBA = _TEXT | {
    "num_hidden_layers": 4,
    "num_experts": 4,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "attn_layer_period": 4,
    "attn_layer_offset": 1,
    "mamba_d_state": 4,
    "mamba_dt_rank": 4,
}
_NEMOTRON = {
    **{key: _SMALL[key] for key in _SMALL if key != "num_hidden_layers"},
    "layers_block_type": ["mamba", "moe", "attention", "moe"],
    "head_dim": 8,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "moe_shared_expert_intermediate_size": 24,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "n_groups": 1,
}
_SWITCH: dict[str, Any] = {
    "vocab_size": 96,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_heads": 4,
    "num_layers": 4,
    "num_decoder_layers": 2,
    "num_sparse_encoder_layers": 2,
    "num_sparse_decoder_layers": 1,
    "num_experts": 11,  # expert_10 comes after expert_9
    "router_jitter_noise": 0.0,
    "decoder_start_token_id": 0,
}

# family -> (class, arguments of its config)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", _TEXT | {"num_local_experts": 4}),
    "qwen2-moe": (
        "Qwen2MoeForCausalLM",
        _SMALL | {"num_experts": 4, "shared_expert_intermediate_size": 24},
    ),
    "qwen3-moe": ("Qwen3MoeForCausalLM", _QWEN3 | {"num_experts": 12}),  # 10 comes after 9
    "qwen3-moe-tied": (
        "Qwen3MoeForCausalLM",
        _QWEN3 | {"num_experts": 4, "tie_word_embeddings": True},
    ),
    "olmoe": ("OlmoeForCausalLM", _TEXT | {"num_experts": 4}),
    "deepseek-v2": (
        "DeepseekV2ForCausalLM",
        _DEEPSEEK | {"topk_method": "group_limited_greedy"},
    ),
    "deepseek-v3": ("DeepseekV3ForCausalLM", _DEEPSEEK),
    "phimoe": (
        "PhimoeForCausalLM",
        _TEXT | {"num_local_experts": 4, "attention_bias": True, "lm_head_bias": True},
    ),
    "gpt-oss": (
        "GptOssForCausalLM",
        _TEXT | {"num_local_experts": 4, "head_dim": 8, "rope_parameters": _YARN},
    ),
    "granitemoe": ("GraniteMoeForCausalLM", _TEXT | {"num_local_experts": 4}),
    "jamba": ("JambaForCausalLM", _JAMBA),
    "nemotron-h": ("NemotronHForCausalLM", _NEMOTRON),  # experts without a gate
    "switch": ("SwitchTransformersForConditionalGeneration", _SWITCH),
    "ernie4.5-moe": (
        "Ernie4_5_MoeForCausalLM",
        _SMALL | {"moe_num_experts": 4, "moe_k": 2, "num_hidden_layers": 3},
    ),
    "minimax-m2": ("MiniMaxM2ForCausalLM", _TEXT | {"num_local_experts": 4, "head_dim": 8}),
}


def model(family: str, seed: int = 0, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    """A model in which no two weights are alike by design; `changes` go to its config."""
    name, arguments = FAMILIES[family]
    cls = getattr(transformers, name)
    found = cls._from_config(cls.config_class(**(arguments | changes), dtype=dtype)).eval()
    randomize(found, seed)
    return found


def randomize(found: Any, seed: int) -> None:
    """Fills every parameter and saved buffer; norms stay near one, so that nothing overflows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in found.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator) * 0.1
            tensor.copy_(noise + 1 if tensor.dim() == 1 and "norm" in name else noise)
    found.tie_weights()


def checkpoint(folder: Path, family: str, seed: int = 0, **options: Any) -> Path:
    """Saves `model(...)` in several shards."""
    model(family, seed, **options).save_pretrained(folder, max_shard_size="40KB")
    return folder


def load(folder: Path, **options: Any) -> Any:
    """The checkpoint as transformers loads it."""
    names = json.loads((folder / "config.json").read_text())["architectures"]
    return getattr(transformers, names[0]).from_pretrained(folder, dtype="auto", **options).eval()


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, by its name on disk."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def shards(folder: Path) -> dict[str, list[str]]:
    """Weight file -> the names in it."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found[path.name] = sorted(file.keys())
    return found


def write(folder: Path, values: Mapping[str, Tensor]) -> Path:
    """Replaces the weights of a checkpoint by exactly these tensors, in one file."""
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink(missing_ok=True)
    plain = {name: value.clone().contiguous() for name, value in values.items()}
    save_file(plain, folder / SINGLE, metadata={"format": "pt"})
    return folder


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """Lets `change` loose on a checkpoint's table of tensors."""
    values = tensors(folder)
    change(values)
    return write(folder, values)


def edit_config(folder: Path, **changes: Any) -> Path:
    """Sets keys of config.json; None removes one."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return folder


def to_fp8(
    folder: Path, scale_dtype: torch.dtype = torch.float32, block: tuple[int, int] = (128, 128)
) -> Path:
    """Quantizes a Qwen3-MoE in place, as Qwen's FP8 checkpoints are: experts and attention.

    Blocks of (0, 0) stand for one scale a tensor.
    """

    def change(values: dict[str, Tensor]) -> None:
        for name in [n for n in values if n.endswith("_proj.weight")]:
            values[name], scale = _fp8(values[name].float(), scale_dtype, block)
            values[f"{name}_scale_inv"] = scale if any(block) else scale[0, 0]

    edit(folder, change)
    quantization = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": list(block) if any(block) else None,
        "modules_to_not_convert": ["lm_head"],
    }
    return edit_config(folder, quantization_config=quantization)


def _fp8(weight: Tensor, dtype: torch.dtype, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Codes and scales of blocks; the last ones may be cut off."""
    height, width = (b or n for n, b in zip(weight.shape, block, strict=True))
    grid = (range(0, weight.shape[0], height), range(0, weight.shape[1], width))
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(len(grid[0]), len(grid[1]), dtype=dtype)
    for i, row in enumerate(grid[0]):
        for j, col in enumerate(grid[1]):
            part = (slice(row, row + height), slice(col, col + width))
            scales[i, j] = weight[part].abs().max() / 448
            codes[part] = (weight[part] / scales[i, j].float()).to(torch.float8_e4m3fn)
    return codes, scales


def from_fp8(folder: Path, block: tuple[int, int] = (128, 128)) -> Path:
    """Dequantizes what `to_fp8` made, in place and by the book."""

    def change(values: dict[str, Tensor]) -> None:
        for name in [n for n in values if n.endswith("_scale_inv")]:
            scale = values.pop(name).float()
            weight = values[name.removesuffix("_scale_inv")]
            if any(block):
                scale = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
                scale = scale[: weight.shape[0], : weight.shape[1]]
            values[name.removesuffix("_scale_inv")] = (weight.float() * scale).bfloat16()

    edit(folder, change)
    return edit_config(folder, quantization_config=None)


def to_mxfp4(folder: Path, seed: int = 0) -> Path:
    """Gives a gpt-oss random MXFP4 experts in place, as OpenAI's checkpoints have them."""
    generator = torch.Generator().manual_seed(seed)

    def change(values: dict[str, Tensor]) -> None:
        for name in [n for n in values if n.endswith(("gate_up_proj", "down_proj"))]:
            experts, columns, rows = values.pop(name).shape
            shape = (experts, rows, columns // 32)
            blocks = torch.randint(0, 256, (*shape, 16), generator=generator)
            values[f"{name}_blocks"] = blocks.to(torch.uint8)
            scales = torch.randint(118, 124, shape, generator=generator)
            values[f"{name}_scales"] = scales.to(torch.uint8)

    edit(folder, change)
    plain = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens"]
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": [*plain, "lm_head"]}
    return edit_config(folder, quantization_config=quantization)
