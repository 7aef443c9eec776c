"""Runs a source checkpoint one block at a time, forward and backward, in float32.

The model is transformers' own, its parameters on the meta device. A block is a child of an
outermost `nn.ModuleList`, such as `model.layers.7`; it has weights only while it runs. Its forward
is wrapped: it loads the block, runs the batch in micro-batches, and frees the block. What lies
outside of blocks (embeddings, last norm, head) stays loaded.

The backward pass recomputes a block from its inputs, as gradient checkpointing does (Chen et al.,
"Training Deep Nets with Sublinear Memory Cost", 2016), and loads it again to do so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from moecc import routed
from moecc.architecture import Architecture
from moecc.checkpoint import TORCH_DTYPES
from moecc.errors import SourceError
from moecc.parallel import ordered, worker_pool
from moecc.routed import Observer, Routed
from moecc.skeleton import load_config, model_class
from moecc.variants import OpenVariant

MICRO_TOKENS = 4096


class Watcher(Observer, Protocol):
    """An observer of experts that is told which part of the batch is run."""

    def enter(self, layers: Sequence[int], rows: range, learning: bool) -> None:
        """Sequences `rows` come next, through a block with these layers of experts."""

    def leave(self, layers: Sequence[int], learning: bool) -> None:
        """The whole batch has been through the block."""

    def loaded(self, nbytes: int) -> None:
        """Bytes of experts have been read."""


class _LastBlockError(Exception):
    """Leaves the model's forward after its last block: the head is too large for a batch."""


@dataclass(slots=True, eq=False)
class Block:
    """A repeated part of the model, by its name.

    Attributes:
        tensors: (canonical name, the dict it is in, its key there) of what is not an expert's.
        arity: how many values its forward returns; 0 for one that is not in a tuple.
    """

    name: str
    module: Any
    tensors: list[tuple[str, dict[str, Any], str]]
    experts: list[Routed]
    arity: int = 0

    @property
    def layers(self) -> list[int]:
        return [r.number for r in self.experts]


@dataclass(slots=True, eq=False)
class _Call:
    """A call of a block without its tensors."""

    block: Block
    spec: Any
    leaves: list[Any]  # None where there is a tensor
    places: list[int]  # of the tensors among the leaves
    batched: list[bool]  # which of them have a row for each sequence
    out_spec: Any = None
    out_leaves: list[Any] = field(default_factory=list)
    out_places: list[int] = field(default_factory=list)

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = tree_unflatten(leaves, self.spec)
        return type(self.block.module).forward(self.block.module, *args, **kwargs)

    def cut(self, tensors: Sequence[Tensor], rows: range) -> list[Tensor]:
        """Arguments of some sequences."""
        return [
            t[rows.start : rows.stop] if batched else t
            for t, batched in zip(tensors, self.batched, strict=True)
        ]

    def result(self, tensors: Sequence[Tensor]) -> Any:
        """What the block returns, from its tensors."""
        leaves = list(self.out_leaves)
        for place, tensor in zip(self.out_places, tensors, strict=True):
            leaves[place] = tensor
        return tree_unflatten(leaves, self.out_spec)


class Streamed:
    """One variant's model, a block of it in memory at a time.

    Raises SourceError for a model that cannot be built or followed.
    """

    def __init__(
        self, variant: OpenVariant, architecture: Architecture, device: str, watcher: Watcher
    ) -> None:
        self.variant, self.device, self.watcher = variant, torch.device(device), watcher
        self.model = _build(variant)
        self.is_encoder_decoder = bool(self.model.config.is_encoder_decoder)
        self._architecture = architecture
        self.blocks = self._find_blocks()
        self._converted = self._find_converted()
        self._outside = self._split()
        self._final = self._find_final()
        self._batch = self._learn = 0
        self._leaf: Tensor | None = None
        self._last: Tensor | None = None
        for block in self.blocks:
            block.module.forward = partial(self._forward, block)

    def _find_blocks(self) -> list[Block]:
        found: list[Block] = []
        lists: list[str] = []
        for name, module in self.model.named_modules():
            inside = any(name.startswith(f"{outer}.") for outer in lists)
            if isinstance(module, nn.ModuleList) and not inside:
                lists.append(name)
                found += [Block(f"{name}.{n}", m, [], []) for n, m in module.named_children()]
        return found

    def _split(self) -> list[tuple[str, dict[str, Any], str]]:
        """Gives every block its tensors and experts; what is left over is returned."""
        owner = {block.name: block for block in self.blocks}
        prefixes = {name.rsplit(".", 1)[0] for name in owner}
        experts = set()
        for number, layer in enumerate(self._architecture.layers):
            home = _home(layer.name, prefixes)
            if home not in owner:
                what = f"`{layer.name}` of variant `{self.variant.name}` is in no list of layers"
                raise SourceError(what, "this architecture cannot be calibrated yet")
            module = self.model.get_submodule(layer.name)
            canonical = torch.from_numpy(self.variant.own_index(number)).argsort()
            one = Routed(number, layer, module, canonical.to(self.device))
            one.observer = self.watcher
            owner[home].experts.append(one)
            if isinstance(module, nn.ModuleDict):
                experts |= {f"{layer.name}.{name}" for name, _ in module.named_parameters()}
            else:
                experts |= {f"{layer.name}.{p.name}" for p in layer.projections}
        stored = {*self.variant.layout.non_expert, *self._converted.values()}
        outside: list[tuple[str, dict[str, Any], str]] = []
        for name, where, key in _places(self.model):
            if name in experts or (not where[key].is_meta and name not in stored):
                continue  # what is computed from the config stays
            home = _home(name, prefixes)
            (owner[home].tensors if home in owner else outside).append((name, where, key))
        return outside

    def _find_final(self) -> Block:
        """The last block of the stack that the head is on: the decoder, or the one with experts."""
        if self.is_encoder_decoder:
            return self.blocks[-1]
        last = next(b for b in reversed(self.blocks) if b.experts)
        stack = last.name.rsplit(".", 1)[0]
        return [b for b in self.blocks if b.name.rsplit(".", 1)[0] == stack][-1]

    @contextmanager
    def opened(self) -> Iterator[Streamed]:
        """With what lies outside of the blocks loaded."""
        self._load(self._outside)
        for _, where, key in _places(self.model):
            if not where[key].is_meta:
                where[key] = _on(where[key], where[key].to(self.device))
        try:
            yield self
        finally:
            self._free(self._outside)

    @contextmanager
    def loaded(self, block: Block) -> Iterator[None]:
        """With the weights of a block."""
        try:
            self._load(block.tensors)
            for one in block.experts:
                self._load_experts(one)
            yield
        finally:
            self._free(block.tensors)
            for one in block.experts:
                one.values.clear()

    @contextmanager
    def shared_by_experts(self, number: int) -> Iterator[Routed]:
        """A layer's experts without their weights, with what their module has besides them."""
        ((block, one),) = ((b, r) for b in self.blocks for r in b.experts if r.number == number)
        inside = [t for t in block.tensors if t[0].startswith(f"{one.layer.name}.")]
        self._load(inside)
        try:
            yield one
        finally:
            self._free(inside)

    def _load(self, places: Sequence[tuple[str, dict[str, Any], str]]) -> None:
        disk = self.variant.layout.non_expert
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        at = {name: (where, key) for name, where, key in places}
        here = [(name, where, key) for name, where, key in places if name in disk]
        with worker_pool() as pool:
            for (_, where, key), value in zip(
                here, ordered(pool, self._read, [name for name, _, _ in here], 4), strict=True
            ):
                where[key] = _on(where[key], value.to(self.device))
        for name, (where, key) in at.items():
            if name not in disk and tied.get(name) in at:
                owner, source = at[tied[name]]
                where[key] = owner[source]
        self._convert({name: place for name, place in at.items() if place[0][place[1]].is_meta})

    def _read(self, name: str) -> Tensor:
        """A tensor outside the experts, by its canonical name; float32 if it is a float."""
        checkpoint = self.variant.checkpoint
        disk = self.variant.layout.non_expert[name]
        stored = checkpoint.tensors[disk]
        raw = torch.empty(stored.nbytes, dtype=torch.uint8)
        into, done = raw.numpy().data, 0
        for part in checkpoint.stream(disk):
            into[done : done + len(part)] = part
            done += len(part)
        value = raw.view(TORCH_DTYPES[stored.dtype]).view(stored.shape)
        return value.float() if value.is_floating_point() else value

    def _convert(self, missing: Mapping[str, tuple[dict[str, Any], str]]) -> None:
        """Loads what a checkpoint keeps in another form, through transformers' own loader."""
        state = {k: self._read(k) for k, target in self._converted.items() if target in missing}
        if state:
            from transformers.core_model_loading import convert_and_load_state_dict_in_model
            from transformers.modeling_utils import LoadStateDictConfig

            options = LoadStateDictConfig(dtype=torch.float32, weight_mapping=self._mapping())
            convert_and_load_state_dict_in_model(self.model, state, options)
        for name, (where, key) in missing.items():
            if where[key].is_meta:
                raise SourceError(
                    f"variant `{self.variant.name}` has no tensor for `{name}`",
                    "this checkpoint cannot be calibrated; leave `calibration` out",
                )
            where[key] = _on(where[key], where[key].to(self.device))

    def _mapping(self) -> Any:
        from transformers.conversion_mapping import get_model_conversion_mapping

        return get_model_conversion_mapping(self.model)

    def _find_converted(self) -> dict[str, str]:
        """Disk name -> parameter of the tensors outside the experts that need a conversion."""
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )

        state = self.model.state_dict()
        unknown = [name for name in self.variant.layout.non_expert if name not in state]
        if not unknown:
            return {}
        mapping = self._mapping()
        renamings = [w for w in mapping if isinstance(w, WeightRenaming)]
        converters = [w for w in mapping if isinstance(w, WeightConverter)]
        prefix = self.model.base_model_prefix
        return {
            name: rename_source_key(name, renamings, converters, prefix, state)[0]
            for name in unknown
        }

    def _load_experts(self, one: Routed) -> None:
        def read(item: tuple[str, int, int]) -> Tensor:
            name, rows, expert = item
            return self.variant.rows(one.number, name, expert, range(rows))

        with worker_pool() as pool:
            for p in one.layer.projections:
                items = [(p.name, p.matrix[0], e) for e in range(one.layer.num_experts)]
                shape = (one.layer.num_experts, *p.shape)
                dtype = TORCH_DTYPES[p.dtype]
                values = torch.empty(shape, dtype=dtype, device=self.device)
                for expert, rows in enumerate(ordered(pool, read, items)):
                    values[expert].copy_(rows.view(p.shape))
                one.values[p.name] = values
        self.watcher.loaded(one.layer.exact_bytes * one.layer.num_experts)

    def read_expert(self, one: Routed, expert: int) -> dict[str, Tensor]:
        """Float32 weights of one expert, by projection, on the device."""
        return {
            p.name: self.variant.rows(one.number, p.name, expert, range(p.matrix[0]))
            .view(p.shape)
            .to(self.device)
            .float()
            for p in one.layer.projections
        }

    @staticmethod
    def _free(places: Sequence[tuple[str, dict[str, Any], str]]) -> None:
        for _, where, key in places:
            where[key] = _on(where[key], torch.empty_like(where[key], device="meta"))

    def forward(self, learn: int, **inputs: Tensor) -> Tensor:
        """Runs the blocks on a batch of sequences and returns the last one's output.

        Args:
            learn: that many first sequences, at least one, keep what a backward pass needs.
            inputs: int64 [batch, length], by the names of the model's own arguments.

        Returns:
            Float32 [learn, length, H], a node of the graph.
        """
        self._batch, self._learn = len(inputs["input_ids"]), learn
        self._last = None
        try:
            with torch.enable_grad():
                self.model(**inputs, use_cache=False)
        except _LastBlockError:
            pass
        last, self._last = self._last, None
        if last is None:
            what = f"`{self._final.name}` of variant `{self.variant.name}` is never run"
            raise SourceError(what, "this architecture cannot be calibrated yet")
        return last

    def logits(self, states: Tensor) -> Tensor:
        """The head of the model on states of its last block: [n, H] to [n, vocabulary].

        The model's own forward with the blocks left out, so that it scales and caps as it does.
        """
        self._leaf = states[None]
        ids = torch.zeros(1, len(states), dtype=torch.long, device=states.device)
        try:
            if self.is_encoder_decoder:
                out = self.model(input_ids=ids[:, :1], decoder_input_ids=ids, use_cache=False)
            else:
                out = self.model(input_ids=ids, use_cache=False)
        finally:
            self._leaf = None
        logits: Tensor = out.logits[0].float()
        return logits

    def _forward(self, block: Block, *args: Any, **kwargs: Any) -> Any:
        last = block is self._final
        if self._leaf is not None:
            hidden = self._leaf if last else (args[0] if args else kwargs["hidden_states"])
            return (hidden, *[None] * (block.arity - 1)) if block.arity else hidden
        leaves, spec = tree_flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        tensors = [leaves[i] for i in places]
        rest = [None if i in set(places) else leaf for i, leaf in enumerate(leaves)]
        # A mask or a table of positions that is the same for all sequences has a first axis of 1.
        batched = [t.dim() > 1 and len(t) == self._batch for t in tensors]
        call = _Call(block, spec, rest, places, batched)
        with self.loaded(block):
            found = self._parts(call, tensors)
        self.watcher.leave(block.layers, learning=False)
        if last:
            raise _LastBlockError
        return call.result(found)

    def _parts(self, call: _Call, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Runs the sequences to learn from, then the others."""
        learned = call.cut(tensors, range(self._learn))
        if self._learn < self._batch:
            learned[0] = learned[0].clone()  # it is kept, the whole batch should not be
        # Nothing before the first layer of experts needs a gradient, but that layer does.
        anchor = torch.zeros((), requires_grad=bool(call.block.experts))
        first = list(_Recomputed.apply(self, call, anchor, *learned))  # type: ignore[no-untyped-call]
        if call.block is self._final:
            self._last = first[0]
        if self._learn == self._batch:
            return first
        with torch.no_grad():
            others = self.run(call, tensors, range(self._learn, self._batch))
        return _join([first, others], [self._learn, self._batch - self._learn])

    def run(self, call: _Call, tensors: Sequence[Tensor], rows: range) -> list[Tensor]:
        """The block on sequences `rows`, in micro-batches; its tensors, joined."""
        parts, sizes = [], []
        for part in self._micro_batches(tensors[0], rows):
            self.watcher.enter(call.block.layers, part, learning=False)
            out = call(call.cut(tensors, part))
            leaves, call.out_spec = tree_flatten(out)
            call.block.arity = len(out) if isinstance(out, tuple) else 0
            call.out_places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
            call.out_leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            parts.append([leaves[i] for i in call.out_places])
            sizes.append(len(part))
            if not torch.isfinite(parts[-1][0].sum(dtype=torch.float64)):
                what = f"`{call.block.name}` of variant `{self.variant.name}` gives NaN or infinite"
                raise SourceError(
                    f"{what} hidden states on its calibration text",
                    "the checkpoint is broken; look at how it was trained or converted",
                )
        return _join(parts, sizes)

    def rerun(
        self,
        call: _Call,
        tensors: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        needed: Sequence[bool],
    ) -> list[Tensor | None]:
        """Gradients of a block's arguments, from those of its results, by running it again."""
        found = [torch.zeros_like(t) if n else None for t, n in zip(tensors, needed, strict=True)]
        with self.loaded(call.block), torch.enable_grad():
            for rows in self._micro_batches(tensors[0], range(self._learn)):
                self.watcher.enter(call.block.layers, rows, learning=True)
                inputs = [t.detach() for t in call.cut(tensors, rows)]
                for tensor, need in zip(inputs, needed, strict=True):
                    tensor.requires_grad_(need)
                leaves = tree_flatten(call(inputs))[0]
                out = [leaves[place] for place in call.out_places]
                _backward(out, gradients, rows, self._learn)
                for total, tensor, batched in zip(found, inputs, call.batched, strict=True):
                    if total is not None and tensor.grad is not None:
                        (total[rows.start : rows.stop] if batched else total).add_(tensor.grad)
        self.watcher.leave(call.block.layers, learning=True)
        return found

    def _micro_batches(self, hidden: Tensor, rows: range) -> list[range]:
        """Parts of `rows`, never of one sequence: what is one row is the same for all of them."""
        size = max(2, MICRO_TOKENS // hidden.shape[1])
        starts = list(range(0, len(rows), size))
        if len(starts) > 1 and len(rows) - starts[-1] == 1:
            starts.pop()
        stops = [*starts[1:], len(rows)]
        return [rows[a:b] for a, b in zip(starts, stops, strict=True)]


class _Recomputed(torch.autograd.Function):
    """A block whose backward pass runs it again."""

    @staticmethod
    def forward(
        ctx: Any, streamed: Streamed, call: _Call, anchor: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.streamed, ctx.call = streamed, call
        ctx.save_for_backward(*tensors)
        out = streamed.run(call, tensors, range(streamed._learn))
        ctx.mark_non_differentiable(*[t for t in out if not t.is_floating_point()])
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        found = ctx.streamed.rerun(ctx.call, ctx.saved_tensors, gradients, ctx.needs_input_grad[3:])
        return (None, None, None, *found)


def _build(variant: OpenVariant) -> Any:
    """The model with parameters on the meta device and its computed buffers in memory."""
    from accelerate import init_empty_weights

    routed.install()
    config = variant.checkpoint.config
    loaded, cls = load_config(variant.name, config), model_class(variant.name, config)
    try:
        with init_empty_weights(include_buffers=False):
            model = cls._from_config(
                loaded, dtype=torch.float32, experts_implementation=routed.NAME
            )
    except Exception as error:
        raise SourceError(
            f"transformers cannot build variant `{variant.name}` from its config: {error}"
        ) from None
    if hasattr(model.config, "output_router_logits"):
        model.config.output_router_logits = False  # a loss for training
    return model.eval()


def _places(model: nn.Module) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(name, the dict it is in, its key there) of every parameter and buffer."""
    for prefix, module in model.named_modules():
        for owner in (module._parameters, module._buffers):
            for key, tensor in owner.items():
                if tensor is not None:
                    yield f"{prefix}.{key}" if prefix else key, owner, key


def _home(name: str, lists: set[str]) -> str:
    """The block that a module or tensor is in: `model.layers.7` of `model.layers.7.mlp.experts`."""
    found = next((prefix for prefix in lists if name.startswith(f"{prefix}.")), None)
    return "" if found is None else f"{found}.{name[len(found) + 1 :].split('.')[0]}"


def _on(old: Tensor, new: Tensor) -> Tensor:
    """`new` as what `old` is: a parameter or a buffer."""
    return nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new


def _backward(
    out: Sequence[Tensor], gradients: Sequence[Tensor | None], rows: range, count: int
) -> None:
    """The backward pass of some sequences; what all of `count` share is the first one's."""
    pairs = []
    for tensor, gradient in zip(out, gradients, strict=True):
        if gradient is None or not tensor.requires_grad:
            continue
        if len(gradient) == count and count > 1:
            gradient = gradient[rows.start : rows.stop]
        elif rows.start:
            continue
        pairs.append((tensor, gradient))
    if pairs:
        torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])


def _join(parts: Sequence[Sequence[Tensor]], sizes: Sequence[int]) -> list[Tensor]:
    """Tensors of parts of a batch as those of the batch; what all share is taken once."""
    if len(parts) == 1:
        return list(parts[0])
    return [
        torch.cat(pieces)
        if all(p.dim() > 1 and len(p) == n for p, n in zip(pieces, sizes, strict=True))
        else pieces[0]
        for pieces in zip(*parts, strict=True)
    ]
