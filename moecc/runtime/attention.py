"""Attention over a paged KV cache, under transformers' attention interface.

Families call the function registered as NAME with the keys and values of the pass's own tokens,
one token a batch row; it writes them to the cache and reads each sequence's past from there. No
cache object goes through the modeling code, and for a mask only the size of the window, if the
layer has one. Latent attention (DeepSeek) is cached expanded. On a GPU kernels attend; what is here
besides is plain torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moecc.errors import RuntimeUnfitError
from moecc.kernels import attention as kernels
from moecc.kernels.device import on_gpu
from moecc.runtime import step

NAME = "moecc"
# Keys gathered at once for sequences that decode together.
_DECODE_TOKENS = 1 << 16
# Arguments that say nothing of the result here: positions are in the keys already.
_INERT = frozenset(
    [
        "position_ids",
        "cache_position",
        "position_embeddings",
        "use_cache",
        "is_causal",
        "is_training",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
    ]
)
_PAGED_LAYERS = {"full_attention", "sliding_attention", "attention"}


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Rows `start..stop` of a pass: tokens `context..` of a sequence in these cache blocks."""

    start: int
    stop: int
    context: int
    blocks: Sequence[int]

    @property
    def length(self) -> int:
        """Tokens of the sequence, those of the pass included."""
        return self.context + self.stop - self.start


class KVCache:
    """Keys and values of all layers, `[blocks * block_size, heads, dim]` each.

    A layer's memory is taken when it is first written, in the shapes it has there.
    """

    def __init__(self, blocks: int, block_size: int) -> None:
        self.blocks = blocks
        self.block_size = block_size
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.windows: dict[int, int | None] = {}  # of layers that have attended

    @property
    def nbytes(self) -> int:
        return sum(k.nbytes + v.nbytes for k, v in self._layers.values())

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, over the layers seen so far."""
        return self.nbytes // self.blocks

    def resized(self, blocks: int) -> KVCache:
        """An empty cache of the same layers with other blocks, all of its memory taken."""
        found = KVCache(blocks, self.block_size)
        for layer, (keys, values) in self._layers.items():
            found._layers[layer] = (found._pool(keys), found._pool(values))
        found.windows = self.windows
        return found

    def layer(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of a layer, made to be like these `[rows, heads, dim]`."""
        if layer not in self._layers:
            self._layers[layer] = (self._pool(keys), self._pool(values))
        return self._layers[layer]

    def tensors(self, layer: int) -> tuple[Tensor, Tensor]:
        """All keys and values of a layer that was written."""
        return self._layers[layer]

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Keys and values `[rows, heads, dim]` of the tokens at `slots`, int64 [rows]."""
        for pool, new in zip(self.layer(layer, keys, values), (keys, values), strict=True):
            pool[slots] = new

    def read(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values at `slots`, `[*slots, heads, dim]`."""
        keys, values = self._layers[layer]
        return keys[slots], values[slots]

    def _pool(self, like: Tensor) -> Tensor:
        return like.new_empty(self.blocks * self.block_size, *like.shape[1:])


class _Tiled:
    """`spans` are (start, stop, row of the tables) of sequences that attend in tiles, if any do."""

    def __init__(self, spans: Sequence[tuple[int, int, int]] | None) -> None:
        self._spans = spans
        self._tiles: dict[tuple[int, int], kernels.Tiles] = {}

    def tiled(self, q: Tensor, kv_heads: int) -> kernels.Tiles | None:
        """The tiles to attend in, if it is to be in tiles; layers may differ in their heads."""
        if self._spans is None:
            return None
        shape = q.shape[1], kv_heads
        if shape not in self._tiles:
            self._tiles[shape] = kernels.tiles_of(self._spans, *shape, q.device)
        return self._tiles[shape]


class DrawnPlan(_Tiled):
    """As Plan, where all but `spans` is data on the device: see `decoder.Tokens`."""

    def __init__(
        self,
        cache: KVCache,
        slots: Tensor,
        tables: Tensor,
        sequences: Tensor,
        lengths: Tensor,
        spans: Sequence[tuple[int, int, int]] | None,
    ) -> None:
        super().__init__(spans)
        self.cache = cache
        self.for_kernels = tables, sequences, lengths
        # Rows that are none write what the first row does, to its place. It is none itself only
        # where all are: before there is anything in the cache.
        kept = slots >= 0
        self._source = torch.arange(len(slots), device=slots.device) * kept
        self._slots = slots.clamp(min=0).long()[self._source]

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Keys and values [rows, heads, dim] of the pass."""
        self.cache.write(layer, self._slots, keys[self._source], values[self._source])


class Plan(_Tiled):
    """What every layer of a pass needs of its pieces, computed once."""

    def __init__(self, pieces: Sequence[Piece], cache: KVCache, device: torch.device) -> None:
        rows = sum(p.stop - p.start for p in pieces)
        spans = [(p.start, p.stop, i) for i, p in enumerate(pieces)]
        super().__init__(spans if rows > kernels.FEW_ROWS else None)
        self.pieces = pieces
        self.cache = cache
        self.device = device
        self.writes = torch.cat([self._slots(p)[p.context :] for p in pieces])
        self.prefills = [p for p in pieces if p.stop - p.start > 1]

    @cached_property
    def for_kernels(self) -> tuple[Tensor, Tensor, Tensor]:
        """(tables, sequences, lengths) of `kernels.attention`, all int32."""
        longest = max(len(p.blocks) for p in self.pieces)
        tables = [[*p.blocks, *[0] * (longest - len(p.blocks))] for p in self.pieces]
        counts = [p.stop - p.start for p in self.pieces]
        sequences = [i for i, count in enumerate(counts) for _ in range(count)]
        lengths = [p.context + 1 + i for p in self.pieces for i in range(p.stop - p.start)]

        def tensor(values: list[Any]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=self.device)

        return tensor(tables), tensor(sequences), tensor(lengths)

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Keys and values [rows, heads, dim] of the pass."""
        self.cache.write(layer, self.writes, keys, values)

    def _slots(self, piece: Piece) -> Tensor:
        """Where each token of a sequence is in the cache, int64 [length]."""
        size = self.cache.block_size
        blocks = torch.tensor(piece.blocks, device=self.device)
        return (blocks[:, None] * size + torch.arange(size, device=self.device)).view(-1)[
            : piece.length
        ]

    @cached_property
    def decodes(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        return list(self._decode_groups([p for p in self.pieces if p.stop - p.start == 1]))

    @cached_property
    def prefill_slots(self) -> list[Tensor]:
        return [self._slots(p) for p in self.prefills]

    def _decode_groups(self, pieces: list[Piece]) -> Any:
        """(rows [R], slots [R, longest], lengths [R, 1]) of sequences with one new token each."""
        while pieces:
            longest = max(p.length for p in pieces)
            count = max(1, _DECODE_TOKENS // longest)
            group, pieces = pieces[:count], pieces[count:]
            longest = max(p.length for p in group)
            # A padded position reads the sequence's first token, and is masked.
            slots = torch.stack(
                [
                    F.pad(s, (0, longest - len(s)), value=int(p.blocks[0]) * self.cache.block_size)
                    for p, s in ((p, self._slots(p)) for p in group)
                ]
            )
            rows = torch.tensor([p.start for p in group], device=self.device)
            lengths = torch.tensor([[p.length] for p in group], device=self.device)
            yield rows, slots, lengths


@dataclass(frozen=True, slots=True)
class _Form:
    """How scores become weights."""

    scaling: float
    window: int | None
    softcap: float | None


def install() -> None:
    """Makes our functions known to transformers, for this process; harmless twice."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, paged_attention)
    AttentionMaskInterface.register(NAME, window_mask)


def refusal(model: Any) -> str | None:
    """Why this family's attention cannot be paged, or None if it can."""
    config = model.config.get_text_config()
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        return f"`{name}` has an encoder"
    if getattr(model, "_is_stateful", False):
        return f"`{name}` keeps a state besides keys and values"
    if not model.is_backend_compatible() or not getattr(model, "_supports_flash_attn", False):
        return f"the attention of `{name}` is its own"
    others = set(getattr(config, "layer_types", None) or ()) - _PAGED_LAYERS
    if others:
        return f"`{name}` has layers of `{min(others)}`"
    if any("indexer" in module for module, _ in model.named_modules()):
        return f"`{name}` chooses what it attends to"
    return None


def window_mask(
    *, mask_function: Callable[..., Tensor], local_size: int | None = None, **others: Any
) -> Tensor | None:
    """What stands for a mask: None for a causal one, the size of its window for a sliding one.

    Modeling code hands it on to `paged_attention`. Raises RuntimeUnfitError for any other mask.
    """
    size = local_size or 1
    near = torch.tensor([0, 1, size - 1, size, size + 1, 2 * size - 1, 2 * size, 2 * size + 1])
    if local_size is None:
        near = torch.tensor([0, 1, 2, 3, 1 << 7, 1 << 13])  # a window that nobody told of
    query, key = near[:, None], near[None, :]
    expected = key <= query
    if local_size is not None:
        expected &= key > query - local_size
    if others.get("use_vmap") or not torch.equal(mask_function(0, 0, query, key), expected):
        raise RuntimeUnfitError("a layer has a mask that is neither causal nor a sliding window")
    return None if local_size is None else torch.tensor(local_size)


def paged_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each token over its own sequence.

    `query` [rows, heads, 1, dim], `key` and `value` [rows, kv_heads, 1, dim]; `s_aux` are one
    attention sink a head; `attention_mask` is from `window_mask`. The window is the mask's: not
    every family passes `sliding_window`, and transformers' own default does not look at it. Returns
    [rows, 1, heads, dim]. Raises RuntimeUnfitError for an argument that would change the result in
    a way that is not known here.
    """
    unknown = [k for k, v in others.items() if k not in _INERT and v is not None]
    running = step.current()
    assert running is not None, "attention runs in a step"
    plan: Plan | DrawnPlan = running.plan
    layer = int(module.layer_idx)
    drawn = isinstance(plan, DrawnPlan)  # then no mask was made, and the window is known
    own_mask = attention_mask is not None and attention_mask.dim() > 0 and not drawn
    if unknown or own_mask or query.shape[2] != 1:
        what = f"argument `{unknown[0]}`" if unknown else "mask or layout"
        raise RuntimeUnfitError(f"the attention of `{type(module).__name__}` has its own {what}")
    if not drawn:
        plan.cache.windows[layer] = None if attention_mask is None else int(attention_mask)
    window = plan.cache.windows[layer]
    form = _Form(query.shape[-1] ** -0.5 if scaling is None else scaling, window, softcap)
    q = query[:, :, 0].contiguous()
    plan.write(layer, key[:, :, 0], value[:, :, 0])
    sinks = _sinks(s_aux, running.tokens)
    if on_gpu(q) or isinstance(plan, DrawnPlan):
        return _with_kernels(q, plan, layer, form, sinks).unsqueeze(1), None
    out = q.new_empty(*q.shape[:2], value.shape[-1])
    for piece, slots in zip(plan.prefills, plan.prefill_slots, strict=True):
        rows = slice(piece.start, piece.stop)
        keys, values = plan.cache.read(layer, slots)
        positions = torch.arange(piece.context, piece.length, device=q.device)[:, None]
        mask = _mask(positions, piece.length, form)
        attended = _attend(
            q[rows].transpose(0, 1)[None],
            keys.transpose(0, 1)[None],
            values.transpose(0, 1)[None],
            mask[None, None],
            None if sinks is None else sinks[rows].t()[None, :, :, None],
            form,
        )
        out[rows] = attended[0].transpose(0, 1)
    for singles, slots, lengths in plan.decodes:
        keys, values = plan.cache.read(layer, slots)
        mask = _mask(lengths - 1, slots.shape[1], form)
        attended = _attend(
            q[singles][:, :, None],
            keys.transpose(1, 2),
            values.transpose(1, 2),
            mask[:, None, None],
            None if sinks is None else sinks[singles][:, :, None, None],
            form,
        )
        out[singles] = attended[:, :, 0]
    return out.unsqueeze(1), None


def _with_kernels(
    q: Tensor, plan: Plan | DrawnPlan, layer: int, form: _Form, sinks: Tensor | None
) -> Tensor:
    """[rows, heads, dim]; rows of prompts share what they read, where there are many."""
    keys, values = plan.cache.tensors(layer)
    tables, sequences, lengths = plan.for_kernels
    options: dict[str, Any] = {
        "block_size": plan.cache.block_size,
        "scaling": form.scaling,
        "window": form.window,
        "softcap": form.softcap,
        "sinks": sinks,
    }
    tiles = plan.tiled(q, keys.shape[1])
    if tiles is None:
        return kernels.attend(q, keys, values, tables, sequences, lengths, **options)
    return kernels.prefill(q, keys, values, tables, tiles, lengths, **options)


def _mask(positions: Tensor, length: int, form: _Form) -> Tensor:
    """Which of `length` keys a query at each of `positions`, [n, 1], sees: bool [n, length]."""
    keys = torch.arange(length, device=positions.device)
    seen = keys <= positions
    if form.window is not None:
        seen &= keys > positions - form.window
    return seen


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor | None, form: _Form
) -> Tensor:
    """q [B, heads, n, dim], k and v [B, kv_heads, m, dim], mask broadcast to [B, 1, n, m]."""
    if sinks is None and form.softcap is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=form.scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
    groups = q.shape[1] // k.shape[1]
    dtype = v.dtype
    q, k, v = (t.float().repeat_interleave(g, dim=1) for t, g in ((q, 1), (k, groups), (v, groups)))
    scores = (q @ k.transpose(-1, -2)) * form.scaling
    if form.softcap is not None:
        scores = torch.tanh(scores / form.softcap) * form.softcap
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:  # a key that takes attention and gives nothing
        scores = torch.cat([scores, sinks.float().expand(*scores.shape[:-1], 1)], dim=-1)
    weights = scores.softmax(dim=-1)[..., : k.shape[2]]
    return (weights @ v).to(dtype)


def _sinks(s_aux: Tensor | None, tokens: step.Rows | step.Drawn) -> Tensor | None:
    """Each row's own sinks, [rows, heads]."""
    if s_aux is None:
        return None
    stack = getattr(s_aux, "stack", None)
    return s_aux.expand(tokens.count, -1) if stack is None else stack[tokens.variants]
