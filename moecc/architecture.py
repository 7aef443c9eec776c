"""Which disk tensor is which expert: transformers' own loader tables, read without a weight.

`Architecture` is the shape all variants share (layers of experts and their projections);
`Layout` is where one variant's checkpoint keeps them. The canonical matrix of a projection is
`[out_features, in_features]` under the name of transformers' in-memory parameter, so
`gate_up_proj` has the gate's rows first (gpt-oss: interleaved, as its module has them).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from moecc.checkpoint import TORCH_DTYPES, Checkpoint, LogicalTensor, Tile
from moecc.errors import SourceError
from moecc.skeleton import skeleton


@dataclass(frozen=True, slots=True)
class Projection:
    """One weight (`shape` is `[out, in]`) or bias (`shape` is `[out]`) of every expert of a layer.

    `transposed` says that the module keeps it as `[in, out]`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    transposed: bool = False

    @property
    def is_bias(self) -> bool:
        return len(self.shape) == 1

    @property
    def matrix(self) -> tuple[int, int]:
        """The shape as rows and columns; a bias is one row."""
        return (1, self.shape[0]) if self.is_bias else (self.shape[0], self.shape[1])

    @property
    def params(self) -> int:
        rows, cols = self.matrix
        return rows * cols

    @property
    def exact_bytes(self) -> int:
        return self.params * TORCH_DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class ExpertLayer:
    """A module that holds experts: its name in the model, how many, and their projections."""

    name: str
    num_experts: int
    projections: tuple[Projection, ...]

    @property
    def params(self) -> int:
        return self.num_experts * sum(p.params for p in self.projections)

    @property
    def exact_bytes(self) -> int:
        """Bytes of one expert as the sources store it."""
        return sum(p.exact_bytes for p in self.projections)


@dataclass(frozen=True, slots=True)
class Architecture:
    """What all variants have in common."""

    class_name: str
    layers: tuple[ExpertLayer, ...]

    @property
    def expert_params(self) -> int:
        """Expert parameters of one variant."""
        return sum(layer.params for layer in self.layers)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where one variant's checkpoint keeps its experts and everything else.

    Attributes:
        tiles: (layer index, projection name) -> per expert, the tiles that make up its matrix.
        non_expert: canonical name -> disk name of every tensor outside the experts.
        optional: canonical names another variant need not have: tied copies, tensors that
            transformers does not load.
        dropped: disk tensors that the model class itself declares to ignore.
    """

    tiles: dict[tuple[int, str], tuple[tuple[Tile, ...], ...]]
    non_expert: dict[str, str]
    optional: frozenset[str]
    dropped: tuple[str, ...]


def read_layout(checkpoint: Checkpoint) -> tuple[Architecture, Layout]:
    """Maps every tensor of a checkpoint, from its headers and config alone.

    Raises SourceError if the architecture is unknown or has no experts, or if a tensor is missing
    or has another shape than the config says.
    """
    return map_tensors(checkpoint.source.name, checkpoint.config, checkpoint.tensors)


def interleaved_layers(checkpoint: Checkpoint) -> frozenset[str]:
    """The expert layers whose `gate_up_proj` alternates rows of gate and up, by their class.

    Raises SourceError if the architecture is unknown.
    """
    model = skeleton(checkpoint.source.name, checkpoint.config)
    modules = model.named_modules()
    return frozenset(name for name, found in modules if not getattr(found, "is_concatenated", True))


def map_tensors(
    variant: str, config: dict[str, Any], tensors: dict[str, LogicalTensor]
) -> tuple[Architecture, Layout]:
    """As `read_layout`, for any table of tensors."""
    model = skeleton(variant, config)
    plan, unexpected = _load_plan(model, tensors)
    layers: list[ExpertLayer] = []
    tiles: dict[tuple[int, str], tuple[tuple[Tile, ...], ...]] = {}
    expert_targets: set[str] = set()
    for module in _expert_modules(model):
        projections = []
        for parameter in module.parameters:
            per_expert = _expert_tiles(variant, module, parameter, plan, tensors)
            dtype = _one_dtype(variant, f"{module.name}.{parameter.name}", per_expert, tensors)
            projections.append(
                Projection(parameter.name, parameter.shape, dtype, parameter.transposed)
            )
            tiles[len(layers), parameter.name] = per_expert
            expert_targets.update(parameter.targets)
        layers.append(ExpertLayer(module.name, module.num_experts, tuple(projections)))
    if not layers:
        raise SourceError(
            f"variant `{variant}` is `{type(model).__name__}`, which has no experts moecc knows",
            "moecc consolidates Mixture-of-Experts models; see docs/architectures.md",
        )
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    dropped = tuple(key for key in unexpected if any(re.search(p, key) for p in ignored))
    extra = {key: key for key in unexpected if key not in dropped}
    non_expert = extra | _non_expert(variant, model, plan, expert_targets, tensors)
    _check_dtypes(variant, layers, [tensors[disk] for disk in non_expert.values()])
    optional = frozenset(extra) | (_tied(model).keys() & non_expert.keys())
    layout = Layout(tiles, dict(sorted(non_expert.items())), optional, dropped)
    return Architecture(type(model).__name__, tuple(layers)), layout


@dataclass(frozen=True, slots=True)
class _Parameter:
    """One projection of an experts module: canonical shape and the targets it is loaded from."""

    name: str
    shape: tuple[int, ...]
    transposed: bool
    targets: tuple[str, ...]  # one (fused) or one per expert


@dataclass(frozen=True, slots=True)
class _Module:
    name: str
    num_experts: int
    parameters: tuple[_Parameter, ...]


def _expert_modules(model: Any) -> Iterator[_Module]:
    for name, module in model.named_modules():
        if hasattr(module, "has_gate") and hasattr(module, "is_transposed"):
            parameters = tuple(_fused_parameters(name, module))
        elif type(module).__name__ == "SwitchTransformersExperts":
            parameters = tuple(_switch_parameters(name, module))
        else:
            continue
        if parameters:
            yield _Module(name, int(module.num_experts), parameters)


def _fused_parameters(name: str, module: Any) -> Iterator[_Parameter]:
    """Parameters with a leading expert axis; anything else in the module is shared state."""
    for key, parameter in sorted(module.named_parameters(recurse=False)):
        shape = tuple(parameter.shape)
        if len(shape) < 2 or shape[0] != module.num_experts:
            continue
        canonical = shape[1:]
        transposed = module.is_transposed and len(canonical) == 2
        if transposed:
            canonical = canonical[::-1]
        yield _Parameter(key, canonical, transposed, (f"{name}.{key}",))


def _switch_parameters(name: str, module: Any) -> Iterator[_Parameter]:
    for key in ("wi", "wo"):
        targets = tuple(f"{name}.{expert}.{key}.weight" for expert in module)
        shape = tuple(getattr(module["expert_0"], key).weight.shape)
        yield _Parameter(key, shape, False, targets)


# target -> (converter or None, {source pattern: disk names in expert order})
_Plan = dict[str, tuple[Any, dict[str, list[str]]]]


def _load_plan(model: Any, names: Iterable[str]) -> tuple[_Plan, list[str]]:
    """The walk of transformers' `convert_and_load_state_dict_in_model`, over names only."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    renamings = [w for w in mapping if isinstance(w, WeightRenaming)]
    converters = [w for w in mapping if isinstance(w, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    state = model.state_dict()
    prefix = model.base_model_prefix
    plan: _Plan = {}
    unexpected = []
    for key in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if target not in state and key in state:
            target, pattern = rename_source_key(key, [], [], prefix, state)
        if target not in state:
            unexpected.append(key)
            continue
        converter = by_pattern[pattern] if pattern is not None else None
        plan.setdefault(target, (converter, {}))[1].setdefault(pattern or key, []).append(key)
    return plan, unexpected


def _expert_tiles(
    variant: str,
    module: _Module,
    parameter: _Parameter,
    plan: _Plan,
    tensors: dict[str, LogicalTensor],
) -> tuple[tuple[Tile, ...], ...]:
    """Per expert, the tiles that make up its canonical matrix."""
    rows, cols = (1, *parameter.shape) if len(parameter.shape) == 1 else parameter.shape
    if len(parameter.targets) > 1:  # one parameter per expert in memory
        keys = [_single(variant, plan, target) for target in parameter.targets]
        return tuple((_matrix_tile(variant, tensors[k], 0, rows, cols),) for k in keys)
    target = parameter.targets[0]
    converter, sources = _planned(variant, plan, target)
    if converter is None:
        tensor = tensors[_single(variant, plan, target)]
        return _fused_tiles(variant, module, parameter, tensor, rows, cols)
    _check_operations(variant, target, converter)
    others = [k for p, ks in sources.items() if p not in converter.source_patterns for k in ks]
    if others:
        raise SourceError(
            f"variant `{variant}` has `{others[0]}` besides the tensors of single experts"
        )
    per_expert: list[list[Tile]] = [[] for _ in range(module.num_experts)]
    row = 0
    for pattern in converter.source_patterns:
        keys = sources.get(pattern, [])
        if len(keys) != module.num_experts:
            raise SourceError(
                f"variant `{variant}` has {len(keys)} tensors `{pattern}` for `{target}`, "
                f"not one for each of {module.num_experts} experts",
                "a shard may be missing from the folder or from its index",
            )
        height = tensors[keys[0]].shape[0] if tensors[keys[0]].shape else 0
        for expert, key in enumerate(keys):
            per_expert[expert].append(_matrix_tile(variant, tensors[key], row, height, cols))
        row += height
    if row != rows:
        raise SourceError(
            f"`{target}` of variant `{variant}` has {row} rows on disk, {rows} by its config"
        )
    return tuple(tuple(t) for t in per_expert)


def _fused_tiles(
    variant: str,
    module: _Module,
    parameter: _Parameter,
    tensor: LogicalTensor,
    rows: int,
    cols: int,
) -> tuple[tuple[Tile, ...], ...]:
    shape = parameter.shape[::-1] if parameter.transposed else parameter.shape
    expected = (module.num_experts, *shape)
    if tensor.shape != expected:
        raise _shape_error(variant, tensor, expected)
    row_stride, col_stride = (1, rows) if parameter.transposed else (cols, 1)
    return tuple(
        (Tile(tensor.name, 0, rows, cols, e * rows * cols, row_stride, col_stride),)
        for e in range(module.num_experts)
    )


def _matrix_tile(variant: str, tensor: LogicalTensor, row: int, rows: int, cols: int) -> Tile:
    if tensor.shape != (rows, cols):
        raise _shape_error(variant, tensor, (rows, cols))
    return Tile(tensor.name, row, rows, cols, 0, cols, 1)


def _check_operations(variant: str, target: str, converter: Any) -> None:
    """Only stacking experts and concatenating their rows keeps every weight where we look."""
    names = [type(op).__name__ for op in converter.operations]
    dims = [getattr(op, "dim", None) for op in converter.operations]
    if list(zip(names, dims, strict=True)) not in (
        [("MergeModulelist", 0)],
        [("MergeModulelist", 0), ("Concatenate", 1)],
    ):
        raise SourceError(
            f"`{target}` of variant `{variant}` is loaded through {names}, "
            "which moecc cannot follow yet"
        )


def _planned(variant: str, plan: _Plan, target: str) -> tuple[Any, dict[str, list[str]]]:
    if target not in plan:
        raise SourceError(
            f"variant `{variant}` has no tensor for `{target}`",
            "a shard may be missing from the folder or from its index",
        )
    return plan[target]


def _single(variant: str, plan: _Plan, target: str) -> str:
    names = [key for keys in _planned(variant, plan, target)[1].values() for key in keys]
    if len(names) != 1:
        raise SourceError(f"variant `{variant}` has several tensors for `{target}`: {names}")
    return names[0]


def _non_expert(
    variant: str,
    model: Any,
    plan: _Plan,
    expert_targets: set[str],
    tensors: dict[str, LogicalTensor],
) -> dict[str, str]:
    """Canonical -> disk name of the rest; a tensor that needs a conversion keeps its disk name."""
    state = model.state_dict()
    found: dict[str, str] = {}
    for target, (converter, sources) in plan.items():
        if target in expert_targets:
            continue
        keys = [key for names in sources.values() for key in names]
        if converter is not None:
            found.update({key: key for key in keys})
            continue
        key = _single(variant, plan, target)
        if tensors[key].shape != tuple(state[target].shape):
            raise _shape_error(variant, tensors[key], tuple(state[target].shape))
        found[target] = key
    missing = set(state) - set(plan) - set(_tied(model))
    ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    missing = {name for name in missing if not any(re.search(p, name) for p in ignored)}
    if missing:
        raise SourceError(
            f"variant `{variant}` has no tensor for `{min(missing)}`"
            + (f" and {len(missing) - 1} others" if len(missing) > 1 else ""),
            "a shard may be missing from the folder or from its index",
        )
    return found


def _tied(model: Any) -> dict[str, str]:
    """Tied parameter -> the parameter it shares, as this config has it."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return tied


def _one_dtype(
    variant: str,
    name: str,
    per_expert: tuple[tuple[Tile, ...], ...],
    tensors: dict[str, LogicalTensor],
) -> str:
    """The dtype of all experts of a projection, whose slots have one size."""
    found = [tensors[tile.tensor] for tiles in per_expert for tile in tiles]
    for tensor in found:
        if tensor.dtype != found[0].dtype:
            raise SourceError(
                f"`{name}` of variant `{variant}` mixes dtypes: `{found[0].name}` is "
                f"{found[0].dtype}, `{tensor.name}` is {tensor.dtype}",
                "save the checkpoint with one dtype",
            )
    return found[0].dtype


def _check_dtypes(variant: str, layers: list[ExpertLayer], others: list[LogicalTensor]) -> None:
    for layer in layers:
        for projection in layer.projections:
            if projection.dtype not in ("BF16", "F16", "F32"):
                raise SourceError(
                    f"`{layer.name}.{projection.name}` of variant `{variant}` has the dtype "
                    f"`{projection.dtype}`; experts must be BF16, F16 or F32",
                    "an FP8 checkpoint needs its `quantization_config` in config.json",
                )
    for tensor in others:
        if tensor.dtype.startswith("F8"):
            raise SourceError(
                f"tensor `{tensor.name}` of variant `{variant}` is {tensor.dtype} without "
                f"scales `{tensor.name}_scale_inv`",
                "an FP8 checkpoint needs its `quantization_config` in config.json",
            )


def _shape_error(variant: str, tensor: LogicalTensor, expected: tuple[int, ...]) -> SourceError:
    return SourceError(
        f"tensor `{tensor.name}` of variant `{variant}` has shape {list(tensor.shape)}, "
        f"but its config says {list(expected)}",
        "added tokens without `vocab_size` in config.json are a common cause"
        if "embed" in tensor.name or "lm_head" in tensor.name or "shared" in tensor.name
        else None,
    )
