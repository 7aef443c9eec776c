"""Whether checkpoints can share experts: configs first, then every tensor on canonical names."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from moecc.architecture import Architecture, Layout
from moecc.checkpoint import Checkpoint
from moecc.errors import SourceError
from moecc.skeleton import load_config

# Keys that say how a model was made or is run, not what it computes.
_MAY_DIFFER = re.compile(
    r"""_name_or_path|architectures|transformers_version|torch_dtype|dtype|use_cache|chunk_size.*
    |(.*_)?token_(id|index)|forced_.*|.*dropout.*|.*_loss.*|.*jitter.*|initializer_.*|output_.*
    |head_dim  # the tensors' shapes tell
    |return_dict|.*_drop|max_position_embeddings|max_length|seq_length|max_sequence_length
    |original_max_position_embeddings|rope_theta|task_specific_params|quantization_config
    |problem_type|id2label|label2id|num_labels|_.*
    |is_decoder|pruned_heads|finetuning_task|tokenizer_class|prefix|pretraining_tp""",
    re.VERBOSE,
)
# Some of them do change the result: rotary embeddings of these types depend on the position limits,
# and the router of Phi-MoE cuts at its jitter noise even when it is not trained.
_SCALED_BY_LENGTH = {"longrope", "dynamic"}
_LENGTHS = {"max_position_embeddings", "original_max_position_embeddings"}


def compare(variants: list[tuple[Checkpoint, Architecture, Layout]]) -> None:
    """Checks that variants can share experts: configs first, then every tensor.

    Raises SourceError naming the key or tensor and both values.
    """
    first, architecture, layout = variants[0]
    for other, other_architecture, other_layout in variants[1:]:
        pair = (first.source.name, other.source.name)
        if architecture.class_name != other_architecture.class_name:
            raise SourceError(
                f"`{pair[0]}` is `{architecture.class_name}` "
                f"but `{pair[1]}` is `{other_architecture.class_name}`",
                "all variants must be fine-tunes of one base model",
            )
        compare_configs(pair, first.config, other.config)
        _compare_architectures(pair, architecture, other_architecture)
        _compare_non_expert(pair, (first, layout), (other, other_layout))


def compare_configs(pair: tuple[str, str], a: dict[str, Any], b: dict[str, Any]) -> None:
    """Checks that two models compute the same function of their weights; raises SourceError."""
    left, right = (_flat(load_config(n, c).to_dict()) for n, c in zip(pair, (a, b), strict=True))
    known = _flat(_default_config(str(a["model_type"])))
    rope_types = {str(value) for key, value in left.items() if key.endswith("rope_type")}
    computed = _LENGTHS if rope_types & _SCALED_BY_LENGTH else set()
    computed = computed | ({"router_jitter_noise"} if a["model_type"] == "phimoe" else set())
    for key in sorted(left.keys() | right.keys()):
        leaf = key.rsplit(".", 1)[-1]
        # A key the config class does not know cannot change what the model computes.
        unknown = key not in known and ".rope_" not in f".{key}"
        may_differ = any(map(_MAY_DIFFER.fullmatch, key.split("."))) and leaf not in computed
        if unknown or may_differ or left.get(key) == right.get(key):
            continue
        raise SourceError(
            f"config key `{key}` is `{left.get(key)}` in `{pair[0]}` "
            f"but `{right.get(key)}` in `{pair[1]}`",
            "added tokens are a common cause: resize every variant to the same vocabulary"
            if leaf == "vocab_size"
            else "variants must compute the same function of their weights",
        )


@lru_cache
def _default_config(model_type: str) -> dict[str, Any]:
    from transformers import CONFIG_MAPPING

    config: dict[str, Any] = CONFIG_MAPPING[model_type]().to_dict()
    return config


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + str(key)] = value
    return flat


def _compare_architectures(pair: tuple[str, str], a: Architecture, b: Architecture) -> None:
    for left, right in zip(a.layers, b.layers, strict=True):
        if (left.name, left.num_experts) != (right.name, right.num_experts):
            raise SourceError(
                f"`{pair[0]}` has {left.num_experts} experts in `{left.name}`, "
                f"`{pair[1]}` has {right.num_experts} in `{right.name}`"
            )
        for p, q in zip(left.projections, right.projections, strict=True):
            name = f"{left.name}.{p.name}"
            _compare_tensor(pair, name, (p.dtype, p.shape), (q.dtype, q.shape))


def _compare_non_expert(
    pair: tuple[str, str], a: tuple[Checkpoint, Layout], b: tuple[Checkpoint, Layout]
) -> None:
    left, right = a[1].non_expert, b[1].non_expert
    for name in sorted(left.keys() | right.keys()):
        if name not in left or name not in right:
            if name in a[1].optional | b[1].optional:
                continue
            has, lacks = pair if name in left else pair[::-1]
            raise SourceError(
                f"tensor `{name}` is in `{has}` but not in `{lacks}`",
                "the variants may differ in tied weights or in an added head",
            )
        p, q = a[0].tensors[left[name]], b[0].tensors[right[name]]
        _compare_tensor(pair, name, (p.dtype, p.shape), (q.dtype, q.shape))


def _compare_tensor(
    pair: tuple[str, str],
    name: str,
    left: tuple[str, tuple[int, ...]],
    right: tuple[str, tuple[int, ...]],
) -> None:
    if left[1] != right[1]:
        raise SourceError(
            f"tensor `{name}` has shape {list(left[1])} in `{pair[0]}` "
            f"but {list(right[1])} in `{pair[1]}`",
            "added tokens are a common cause: resize every variant to the same vocabulary"
            if "embed" in name or "lm_head" in name
            else "all variants must be fine-tunes of one base model",
        )
    if left[0] != right[0]:
        raise SourceError(
            f"tensor `{name}` is {left[0]} in `{pair[0]}` but {right[0]} in `{pair[1]}`",
            "save all variants with the same dtype",
        )
