"""From an artifact to models that compute: skeletons, the bank, and the variants' own rows.

Experts are read once, straight to where they stay. Of what is outside them about CHUNK_BYTES are in
memory at a time, beyond what is then served.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moecc.artifact import Artifact, PoolReader, StoredTensor
from moecc.checkpoint import TORCH_DTYPES
from moecc.compatibility import compare_configs
from moecc.errors import DamagedArtifactError, RuntimeUnfitError, SourceError
from moecc.kernels.device import on_gpu
from moecc.manifest import StoredLayer, variant_file
from moecc.runtime import attention, experts, step
from moecc.runtime.devices import STAGING_BYTES
from moecc.runtime.experts import REMAP, KernelExperts, LayerExperts, SlotPool
from moecc.runtime.nonexpert import RowLayout, places
from moecc.skeleton import load_config, model_class

CHUNK_BYTES = 512 << 20
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Numbers in a module that do not matter when it is run: of training, of limits, of padding.
_INERT_STATE = re.compile(r"p|.*(dropout|jitter|_coef|_std|max_seq|max_position|padding_idx).*")
Progress = Callable[[str, int, int], None]  # stage, bytes done, of bytes


@dataclass(eq=False)
class Skeletons:
    """The variants' transformers models without weights, and where weights go.

    Attributes:
        models: one a variant; what is not an expert's lies on the meta device until it is bound.
        dtype: what they compute in.
        layout: of a row of everything outside the experts.
        tied: name of a parameter that has no slot of its own -> the slot it shares.
    """

    artifact: Artifact
    models: tuple[Any, ...]
    dtype: torch.dtype
    layout: RowLayout
    tied: dict[str, str]
    _own_attention: str

    def use_own_attention(self) -> None:
        """Attention as transformers has it, instead of ours over the paged cache."""
        for model in self.models:
            model.set_attn_implementation(self._own_attention)

    @contextmanager
    def first_layers(self, count: int) -> Iterator[None]:
        """Inside, the models end after so many layers."""
        bodies = [model.base_model for model in self.models]
        layers = [body.layers for body in bodies]
        for body, own in zip(bodies, layers, strict=True):
            body.layers = own[:count]
        try:
            yield
        finally:
            for body, own in zip(bodies, layers, strict=True):
                body.layers = own

    def difference(self) -> str | None:
        """Why one model cannot stand for all: what they compute with besides tensors, if unlike."""
        first, *others = self.models
        for variant, other in zip(self.artifact.variants[1:], others, strict=True):
            for (name, a), (_, b) in zip(first.named_modules(), other.named_modules(), strict=True):
                for key, value in vars(a).items():
                    plain = isinstance(value, (bool, int, float))
                    if plain and vars(b).get(key) != value and not _INERT_STATE.fullmatch(key):
                        return f"`{name}.{key}` of variant `{variant}` is its own"
            if _rope_form(first) != _rope_form(other):
                return f"`rope_parameters` of variant `{variant}` are its own"
        return None

    @property
    def expert_bytes(self) -> int:
        """Bytes of the whole bank on the device."""
        return sum(
            TORCH_DTYPES[dtype].itemsize * int(torch.Size(shape).numel())
            for stored in self.artifact.layers
            for projection, pools in zip(stored.layer.projections, stored.pools, strict=True)
            for pool in pools
            for _, dtype, shape in pool.tensors(stored.layer.name, projection)
        )


def skeletons(artifact: Artifact, dtype: str) -> Skeletons:
    """Builds the models of all variants.

    `dtype` is a torch dtype's name or `auto`, as `from_pretrained` takes it. Attention is ours
    where the family can. Raises RuntimeUnfitError, and DamagedArtifactError where a config does
    not fit the artifact.
    """
    configs = [_config(artifact, variant) for variant in artifact.variants]
    for variant, config in zip(artifact.variants[1:], configs[1:], strict=True):
        try:
            compare_configs((artifact.variants[0], variant), configs[0], config)
        except SourceError as error:
            raise DamagedArtifactError(f"`{artifact.path}`: {error.message}") from None
    chosen = _dtype(dtype, configs[artifact.variants.index(artifact.base)], artifact)
    experts.install()
    attention.install()
    models = []
    for variant, config in zip(artifact.variants, configs, strict=True):
        model = _skeleton(variant, config, chosen)
        own = model.config._attn_implementation
        if attention.refusal(model) is None:
            model.set_attn_implementation(attention.NAME)
            model.get_output_embeddings().register_forward_pre_hook(step.only_outputs)
        for stored in artifact.layers:
            _strip_experts(model, stored)
        models.append(model)
    tied = _tied(artifact, models[0])
    recast = _recast(models[0])
    tensors = {
        name: (
            recast.get(name) or _planned_dtype(models[0], name, owner[key], chosen),
            tuple(owner[key].shape),
        )
        for name, owner, key in places(models[0])
        if name not in tied
    }
    return Skeletons(artifact, tuple(models), chosen, RowLayout(tensors), tied, own)


def load_experts(
    skeletons: Skeletons, device: torch.device, on_progress: Progress
) -> tuple[LayerExperts, ...]:
    """Reads the bank to the device and gives every model its experts."""
    artifact = skeletons.artifact
    done, total = 0, skeletons.expert_bytes
    layers = []
    for index, stored in enumerate(artifact.layers):
        pools: list[tuple[SlotPool, ...]] = []
        for projection, found in zip(stored.layer.projections, stored.pools, strict=True):
            slots = []
            for pool in found:
                tensors = []
                for name, dtype, shape in pool.tensors(stored.layer.name, projection):
                    reader = artifact.read_pool_tensor(name, dtype, shape)
                    tensors.append(_read(reader, TORCH_DTYPES[dtype], shape, device))
                    done += tensors[-1].nbytes
                    on_progress("experts", done, total)
                slots.append(SlotPool(tuple(tensors), pool.packed))
            pools.append(tuple(slots))
        names = [p.name for p in stored.layer.projections]
        matrices = [p.matrix for p in stored.layer.projections]
        layer = LayerExperts(names, matrices, pools, artifact.remap[index])
        for model in skeletons.models:
            model.get_submodule(stored.layer.name).moecc = layer
        layers.append(layer)
    return tuple(layers)


def use_kernels(
    skeletons: Skeletons, layers: tuple[LayerExperts, ...], device: torch.device
) -> tuple[KernelExperts, ...] | None:
    """Lays the bank out for kernels, which from here on is all there is of it; None: as it is."""
    like = torch.empty(0, dtype=skeletons.dtype, device=device)
    modules = [stored.layer.name for stored in skeletons.artifact.layers]
    model = skeletons.models[0]
    if not on_gpu(like) or not all(hasattr(model.get_submodule(m), "has_gate") for m in modules):
        return None
    found = []
    for name, layer in zip(modules, layers, strict=True):
        found.append(KernelExperts(layer, skeletons.dtype))
        for model in skeletons.models:
            model.get_submodule(name).moecc = found[-1]
    return tuple(found)


def load_rows(
    skeletons: Skeletons,
    layers: tuple[LayerExperts, ...],
    rows: Tensor,
    on_progress: Progress,
) -> None:
    """Fills `rows`, uint8 `[variants, layout.nbytes]` on any device."""
    artifact, layout = skeletons.artifact, skeletons.layout
    done, total = 0, rows.numel()
    for v, (variant, model) in enumerate(zip(artifact.variants, skeletons.models, strict=True)):
        views = layout.views(rows[v])
        filled = {n for n, owner, key in places(model) if _keep(owner[key], n, views)}
        for loaded in _loaded(artifact, variant, model, skeletons.dtype):
            for name, tensor in loaded.items():
                slot = skeletons.tied.get(name, name)
                if slot in views:
                    views[slot].copy_(tensor)
                    filled.add(slot)
        for stored, layer in zip(artifact.layers, layers, strict=True):
            name = f"{stored.layer.name}.{REMAP}"
            views[name].copy_(layer.remap[v])
            filled.add(name)
        for pair in (getattr(model, "all_tied_weights_keys", None) or {}).items():
            for name, other in (pair, pair[::-1]):  # tied in this variant, if not in all
                if name in views and name not in filled and other in filled:
                    views[name].copy_(views[other])
                    filled.add(name)
        missing = sorted(set(views) - filled)
        if missing:
            raise DamagedArtifactError(
                f"`{artifact.path}` has no tensor for `{missing[0]}` of variant `{variant}`"
            )
        done += layout.nbytes
        on_progress("non-expert weights", done, total)


def _keep(tensor: Tensor, name: str, views: Mapping[str, Tensor]) -> bool:
    """Copies a buffer that the model computed for itself; parameters are on the meta device."""
    if tensor.is_meta or name not in views:
        return False
    views[name].copy_(tensor)
    return True


def _loaded(
    artifact: Artifact, variant: str, model: Any, dtype: torch.dtype
) -> Iterator[dict[str, Tensor]]:
    """What transformers' own loader makes of a variant's tensors, some at a time."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    options = LoadStateDictConfig(
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=get_model_conversion_mapping(model),
    )
    known = {name for name, _, _ in places(model)}
    for chunk in _chunks(artifact.non_expert(variant), known):
        state = {t.disk: _tensor(artifact, variant, name, t) for name, t in chunk.items()}
        info, _ = convert_and_load_state_dict_in_model(model, state, options)
        problems = [*info.mismatched_keys, *info.conversion_errors.values(), *info.error_msgs]
        if problems:
            raise DamagedArtifactError(f"variant `{variant}` does not load: {problems[0]}")
        loaded = {}
        for name, owner, key in places(model):
            if owner is not None and not owner[key].is_meta:
                loaded[name] = owner[key].detach()
                owner[key] = _meta_like(owner[key])
        yield loaded


def _meta_like(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def _chunks(
    tensors: Mapping[str, StoredTensor], known: set[str]
) -> Iterator[dict[str, StoredTensor]]:
    """Tensors of about CHUNK_BYTES; those under names of the disk are converted, and together."""
    chunk: dict[str, StoredTensor] = {}
    nbytes = 0
    for name in sorted(known & tensors.keys()):
        chunk[name] = tensors[name]
        nbytes += tensors[name].nbytes
        if nbytes >= CHUNK_BYTES:
            yield chunk
            chunk, nbytes = {}, 0
    yield chunk | {name: tensors[name] for name in sorted(tensors.keys() - known)}


def _tensor(artifact: Artifact, variant: str, name: str, stored: StoredTensor) -> Tensor:
    raw = torch.empty(stored.nbytes, dtype=torch.uint8)
    into, done = raw.numpy().data, 0
    for block in artifact.stream(variant, name):
        into[done : done + len(block)] = block
        done += len(block)
    return raw.view(TORCH_DTYPES[stored.dtype]).view(stored.shape)


def _read(
    reader: PoolReader, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """A tensor of the bank, read in place on the CPU and in blocks to a GPU."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    flat = tensor.view(-1).view(torch.uint8)
    if device.type == "cpu":
        reader(0, flat.numpy().data)
        return tensor
    staging = torch.empty(min(STAGING_BYTES, flat.numel()), dtype=torch.uint8)
    for start in range(0, flat.numel(), STAGING_BYTES):
        block = staging[: flat.numel() - start]
        reader(start, block.numpy().data)
        flat[start : start + block.numel()].copy_(block)
    return tensor


def _config(artifact: Artifact, variant: str) -> dict[str, Any]:
    path = artifact.path / variant_file(variant, "config.json")
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedArtifactError(f"cannot read `{path}`: {error}") from None
    if not isinstance(config, dict):
        raise DamagedArtifactError(f"`{path}` is not an object")
    return config


def _skeleton(variant: str, config: dict[str, Any], dtype: torch.dtype) -> Any:
    """The model with parameters on the meta device and its computed buffers in memory."""
    from accelerate import init_empty_weights

    try:
        loaded, cls = load_config(variant, config), model_class(variant, config)
        with init_empty_weights(include_buffers=False):
            model = cls._from_config(loaded, dtype=dtype, experts_implementation=experts.NAME)
    except SourceError as error:
        raise RuntimeUnfitError(error.message, error.hint) from None
    except Exception as error:
        raise DamagedArtifactError(
            f"transformers cannot build variant `{variant}` from its config: {error}"
        ) from None
    if hasattr(model.config, "output_router_logits"):
        model.config.output_router_logits = False  # a loss for training
    return model.eval()


def _strip_experts(model: Any, stored: StoredLayer) -> None:
    """Takes the expert weights out of a layer; ours come from the bank."""
    try:
        module = model.get_submodule(stored.layer.name)
    except AttributeError:
        raise DamagedArtifactError(
            f"a config does not fit the artifact: it has no `{stored.layer.name}`"
        ) from None
    if isinstance(module, nn.ModuleDict):  # Switch Transformers
        module.moecc_activation = next(iter(module.values())).act
        for name in [n for n in module if n.startswith("expert_")]:
            del module[name]
        module.forward = partial(experts.switch_experts, module)
    for projection in stored.layer.projections:
        module._parameters.pop(projection.name, None)
    remap = torch.empty(stored.layer.num_experts, dtype=torch.int32, device="meta")
    module.register_buffer(REMAP, remap, persistent=False)


def _tied(artifact: Artifact, model: Any) -> dict[str, str]:
    """Names that share another's slot: tied by the config, and not untied by any variant.

    A checkpoint may hold both; transformers ties them if they are equal, and so do we.
    """
    tied = {}
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if all(_is_tied(artifact, variant, target, source) for variant in artifact.variants):
            tied[target] = source
    return tied


def _is_tied(artifact: Artifact, variant: str, target: str, source: str) -> bool:
    stored = artifact.non_expert(variant)
    if target not in stored or source not in stored:
        return True
    left, right = (_tensor(artifact, variant, name, stored[name]) for name in (target, source))
    return torch.equal(left, right)


def _dtype(name: str, config: dict[str, Any], artifact: Artifact) -> torch.dtype:
    """As `from_pretrained(dtype="auto")`: the config's, else that of the first weights."""
    if name == "auto":
        name = str(config.get("dtype") or config.get("torch_dtype") or "")
        if not name:
            floats = [
                dtype
                for dtype, _, _ in artifact.source_tensors(artifact.base).values()
                if TORCH_DTYPES[dtype].is_floating_point
            ]
            return TORCH_DTYPES[floats[0]]
    known = {str(t).removeprefix("torch."): t for t in _DTYPES}
    dtype = known.get(name.removeprefix("torch."))
    if dtype is None:
        raise RuntimeUnfitError(
            f"cannot compute in `{name}`", "`--dtype` is auto, bfloat16, float16 or float32"
        )
    return dtype


def _rope_form(model: Any) -> Any:
    """The rotary parameters that modeling code may read as it runs: all but the base."""

    def without_base(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {k: without_base(v) for k, v in value.items() if k != "rope_theta"}

    return without_base(getattr(model.config.get_text_config(), "rope_parameters", None))


def _recast(model: Any) -> dict[str, torch.dtype]:
    """What Switch Transformers' routers turn their weights into when they first run.

    They do it in place, which would take the weights out of their row.
    """
    return {
        f"{name}.classifier.{key}": module.dtype
        for name, module in model.named_modules()
        if type(module).__name__ == "SwitchTransformersTop1Router"
        for key, _ in module.classifier.named_parameters()
    }


def _planned_dtype(model: Any, name: str, tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What `from_pretrained` would load a tensor as: some stay in float32."""
    plan = model._get_dtype_plan(dtype)
    if plan and name in model.state_dict():
        from transformers.core_model_loading import build_glob_alternation

        pattern, names, _ = build_glob_alternation(list(plan))
        match = pattern.search(name)
        if match is not None and match.lastgroup is not None:
            found: torch.dtype = plan[names[match.lastgroup]]
            return found
    return tensor.dtype
