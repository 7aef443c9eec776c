"""Models of real shape by name, and what the benchmarks make of a config alone."""

from __future__ import annotations

import random
from typing import Any

from torch import nn

from moecc.architecture import ExpertLayer, Projection

_MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "dtype": "bfloat16",
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "tie_word_embeddings": False,
}
SHAPES: dict[str, dict[str, Any]] = {
    "mixtral-8x7b": {
        **_MIXTRAL,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    },
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "dtype": "bfloat16",
        "head_dim": 128,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
        "vocab_size": 151936,
    },
    "tiny": {
        **_MIXTRAL,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
    },
}
PROMPT_TOKENS = 20


def expert_layers(model: nn.Module) -> list[ExpertLayer]:
    """The modules that hold experts behind transformers' experts interface."""
    found = []
    for name, module in model.named_modules():
        if hasattr(module, "has_gate") and hasattr(module, "is_transposed"):
            projections = tuple(
                Projection(key, tuple(parameter.shape[1:]), "BF16")
                for key, parameter in module.named_parameters(recurse=False)
            )
            found.append(ExpertLayer(name, module.num_experts, projections))
    return found


def prompts(
    count: int, vocab: int, seed: int = 0, tokens: int = PROMPT_TOKENS
) -> list[tuple[int, ...]]:
    """Prompts of random tokens, the same ones for every contender."""
    rng = random.Random(seed)
    return [tuple(rng.randrange(vocab) for _ in range(tokens)) for _ in range(count)]
