"""Decoder layers of the families we know, computed by our kernels on all variants' rows at once.

What transformers' modeling code does in some hundred launches a layer is a dozen here. Which
variant a token is of is data: one forward serves any mix, of resident rows or swapped ones.
`recognized` says whether a model is of such a family; opening.py holds a decoder against the
modeling code before it serves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moecc.kernels import attention, rotary
from moecc.kernels.attention import Tiles
from moecc.kernels.linear import Rows, linear
from moecc.kernels.newest import attend_newest
from moecc.kernels.norm import Norm, deferred, rms_norm
from moecc.kernels.packed import ACTIVATIONS
from moecc.kernels.router import route
from moecc.runtime.attention import KVCache
from moecc.runtime.experts import REMAP, KernelExperts
from moecc.runtime.loading import Skeletons

# Pre-norm layers of attention and experts, by the class transformers has for them.
_LAYERS = {"MixtralDecoderLayer", "Qwen3MoeDecoderLayer", "OlmoeDecoderLayer"}
# Their frequencies change with the length of the longest sequence of a batch.
MOVING_ROPES = {"dynamic", "longrope"}


@dataclass(eq=False)
class Tokens:
    """The tokens of a pass, one a row; rows that are none have variant and slot -1 and length 0.

    All tensors are int32 on the device.

    Attributes:
        ids, positions: [n].
        variants: [n], the row of the weights that each computes with.
        slots: [n], where in the cache its key and value go.
        sequences: [n], its row of `tables`.
        lengths: [n], how many keys it sees.
        outputs: [m], the rows whose logits are wanted.
        tables: [sequences, blocks], the blocks of the cache of every sequence.
        spans: (start, stop, row of `tables`) of the rows of each sequence, where they attend
            together; None where every row does on its own.
    """

    ids: Tensor
    positions: Tensor
    variants: Tensor
    slots: Tensor
    sequences: Tensor
    lengths: Tensor
    outputs: Tensor
    tables: Tensor
    spans: Sequence[tuple[int, int, int]] | None = None


def recognized(model: Any) -> bool:
    """Whether `Decoder` computes this model."""
    body: Any = getattr(model, "model", None)
    layers = getattr(body, "layers", ())
    return (
        len(layers) > 0
        and all(type(layer).__name__ in _LAYERS for layer in layers)
        and all(hasattr(layer.mlp, "experts") for layer in layers)
        and all(_is_plain(layer.mlp.experts) for layer in layers)
        and getattr(model.config, "clip_qkv", None) is None
        and not turns_by_length(model)
    )


def turns_by_length(model: Any) -> bool:
    """Whether its rotary frequencies change with the length of what it reads."""
    found = [getattr(module, "rope_type", None) for module in model.modules()]
    # Where layers differ in it, a module has one for each kind.
    types = [t for own in found for t in (own.values() if isinstance(own, dict) else [own])]
    return not MOVING_ROPES.isdisjoint(types)


def _is_plain(experts: Any) -> bool:
    known = getattr(experts.config, "hidden_act", None) in ACTIVATIONS
    return known and experts.has_gate and not experts.has_bias


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    """Weights [variants, ...], views of the rows."""

    index: int
    input_norm: Norm
    qkv: tuple[Tensor, ...]
    qkv_bias: tuple[Tensor, ...] | None
    q_norm: Norm | None
    k_norm: Norm | None
    out: Tensor
    out_bias: tuple[Tensor, ...] | None
    expert_norm: Norm
    router: Tensor
    remap: Tensor
    top_k: int
    renormalize: bool
    activation: str
    experts: KernelExperts


class Decoder:
    """A model's forward over `rows`, uint8 [variants, bytes] as the skeletons' layout has them."""

    def __init__(
        self,
        skeletons: Skeletons,
        layers: Sequence[KernelExperts],
        rows: Tensor,
        together: int = 1,
    ) -> None:
        """About `together` of the variants share a pass: it is quickest where that is so."""
        model = skeletons.models[0]
        views = skeletons.layout.stacked(rows)
        tied = skeletons.tied
        weights = {name: views[tied.get(name, name)] for name in [*views, *tied]}
        config = model.config
        self._count, self._together = len(rows), together
        self._embedding = weights["model.embed_tokens.weight"]
        self._head = weights["lm_head.weight"]
        self._norm = Norm(weights["model.norm.weight"], config.rms_norm_eps)
        self._frequencies = weights["model.rotary_emb.inv_freq"]
        self._rope_scaling = float(model.model.rotary_emb.attention_scaling)
        self._layers = [
            _layer(i, module, weights, layers[i]) for i, module in enumerate(model.model.layers)
        ]
        first = model.model.layers[0].self_attn
        self._heads = int(config.num_attention_heads), int(config.num_key_value_heads)
        self._scaling = float(first.scaling)
        self._dim = int(first.head_dim)
        self._window: int | None = getattr(config, "sliding_window", None)

    @torch.inference_mode()
    def __call__(self, tokens: Tokens, cache: KVCache) -> Tensor:
        """Logits [m, vocab] of `tokens.outputs`; keys and values go to the cache."""
        rows = Rows(tokens.variants, self._count, self._together)
        owners = tokens.variants.clamp(min=0)  # of rows that are none, any
        tiles = None
        if tokens.spans is not None:
            tiles = attention.tiles_of(tokens.spans, *self._heads, tokens.ids.device)
        hidden = self._embedding[owners, tokens.ids]
        for layer in self._layers:
            attended = self._attention(layer, hidden, rows, owners, tokens, tiles, cache)
            hidden = linear(attended, [layer.out], rows, biases=layer.out_bias, residual=hidden)
            x, norm = deferred(hidden, layer.expert_norm, rows.variants)
            physical, routing = route(
                x,
                layer.router,
                rows,
                norm,
                layer.remap,
                layer.top_k,
                renormalize=layer.renormalize,
            )
            hidden = layer.experts.apply(
                x,
                physical,
                routing,
                layer.activation,
                norm=norm,
                variants=rows.variants,
                residual=hidden,
            )
        variants = tokens.variants.index_select(0, tokens.outputs)
        last = Rows(variants, self._count, self._together)
        hidden = hidden.index_select(0, tokens.outputs)
        return linear(hidden, [self._head], last, norm=self._norm)

    def _attention(
        self,
        layer: _Layer,
        hidden: Tensor,
        rows: Rows,
        owners: Tensor,
        tokens: Tokens,
        tiles: Tiles | None,
        cache: KVCache,
    ) -> Tensor:
        """What the heads find, [n, heads * dim]."""
        sizes = [w.shape[1] for w in layer.qkv]
        qkv = linear(hidden, layer.qkv, rows, biases=layer.qkv_bias, norm=layer.input_norm)
        q, k, v = torch.split(qkv, sizes, -1)
        q_norm, k_norm = layer.q_norm, layer.k_norm
        if q_norm is not None and k_norm is not None and q_norm.weight.shape[1] != self._dim:
            q, k = rms_norm(q, q_norm, rows.variants), rms_norm(k, k_norm, rows.variants)
            q_norm = k_norm = None
        shape = (len(hidden), -1, self._dim)
        q, k, v = q.view(shape), k.view(shape), v.view(shape)
        keys, values = cache.layer(layer.index, k, v)
        turning: dict[str, Any] = {
            "rows": owners,
            "q_norm": None if q_norm is None else q_norm.weight,
            "k_norm": None if k_norm is None else k_norm.weight,
            "eps": self._norm.eps,
            "attention_scaling": self._rope_scaling,
        }
        seen: dict[str, Any] = {
            "block_size": cache.block_size,
            "scaling": self._scaling,
            "window": self._window,
        }
        frequencies, tables, lengths = self._frequencies, tokens.tables, tokens.lengths
        positions, slots = tokens.positions, tokens.slots
        if tiles is None:
            return attend_newest(
                q,
                k,
                v,
                frequencies,
                positions,
                slots,
                keys,
                values,
                tables,
                tokens.sequences,
                lengths,
                **turning,
                **seen,
            ).flatten(1)
        q = rotary.rotate_and_store(q, k, v, frequencies, positions, slots, keys, values, **turning)
        found = attention.prefill(q, keys, values, tables, tiles, lengths, **seen)
        return found.flatten(1)


def _layer(
    index: int, module: Any, weights: Mapping[str, Tensor], experts: KernelExperts
) -> _Layer:
    own = f"model.layers.{index}."
    attn, mlp = module.self_attn, module.mlp

    def norm(name: str, of: Any) -> Norm:
        return Norm(weights[f"{own}{name}.weight"], of.variance_epsilon)

    def biases(*names: str) -> tuple[Tensor, ...] | None:
        found = [weights.get(f"{own}self_attn.{name}.bias") for name in names]
        return None if found[0] is None else tuple(b for b in found if b is not None)

    normed = hasattr(attn, "q_norm")
    return _Layer(
        index,
        input_norm=norm("input_layernorm", module.input_layernorm),
        qkv=tuple(weights[f"{own}self_attn.{name}_proj.weight"] for name in "qkv"),
        qkv_bias=biases("q_proj", "k_proj", "v_proj"),
        q_norm=norm("self_attn.q_norm", attn.q_norm) if normed else None,
        k_norm=norm("self_attn.k_norm", attn.k_norm) if normed else None,
        out=weights[f"{own}self_attn.o_proj.weight"],
        out_bias=biases("o_proj"),
        expert_norm=norm("post_attention_layernorm", module.post_attention_layernorm),
        router=weights[f"{own}mlp.gate.weight"],
        remap=weights[f"{own}mlp.experts.{REMAP}"],
        top_k=int(mlp.gate.top_k),
        # Mixtral's routers always do; the others say.
        renormalize=bool(getattr(mlp.gate, "norm_topk_prob", True)),
        activation=str(mlp.experts.config.hidden_act),
        experts=experts,
    )
