"""A weight of all variants at once, `[variants, *shape]`, in a model that knows of only one.

Every function transformers' modeling code calls on such a weight comes here. Each row of an
activation meets its own variant's weight: a linear layer is one product a variant over its rows,
anything elementwise gathers. A function that is not known here raises, so that a family is served
right in a mixed batch or not at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moecc.errors import RuntimeUnfitError
from moecc.kernels.device import on_gpu
from moecc.kernels.linear import linear as drawn_linear
from moecc.runtime import step
from moecc.runtime.linear import linear

_ELEMENTWISE = frozenset(
    [
        "add",
        "__add__",
        "__radd__",
        "mul",
        "__mul__",
        "__rmul__",
        "sub",
        "__sub__",
        "__rsub__",
        "div",
        "__truediv__",
    ]
)
# Of an activation, by a weight.
_IN_PLACE = frozenset(
    ["__iadd__", "__imul__", "__isub__", "__itruediv__", "add_", "mul_", "sub_", "div_"]
)
_SAME_SHAPE = frozenset(
    [
        *("float", "half", "bfloat16", "to", "type", "type_as", "detach", "contiguous", "clone"),
        *("neg", "__neg__", "abs", "exp", "sqrt", "rsqrt", "square"),
        *("sigmoid", "softplus", "tanh"),
    ]
)
# What may be asked of a weight without its values.
_QUERIES = {
    getattr(Tensor, name).__get__
    for name in ("dtype", "device", "shape", "ndim", "is_cuda", "is_meta", "layout", "grad_fn")
} | {Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.is_floating_point}
_QUERIES |= {Tensor.requires_grad.__get__, Tensor.__len__, Tensor.__hash__}  # type: ignore[attr-defined]


class Stacked(Tensor):
    """The weights of all variants, `stack`; to modeling code one weight without storage."""

    stack: Tensor

    @staticmethod
    def of(stack: Tensor) -> Stacked:
        """`stack` is `[variants, *shape]`."""
        found = torch.Tensor._make_wrapper_subclass(
            Stacked, stack.shape[1:], dtype=stack.dtype, device=stack.device
        )
        found.stack = stack
        return found

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        with torch._C.DisableTorchFunctionSubclass():
            if func in _FUNCTIONS:
                return _FUNCTIONS[func](*args, **kwargs)
            if name in _ELEMENTWISE:
                return _elementwise(func, *args, **kwargs)
            if name in _IN_PLACE and not isinstance(args[0], Stacked):
                return _elementwise(func, *args, **kwargs)
            if func in _QUERIES or not isinstance(args[0], Stacked):
                return func(*args, **kwargs)
            if name in _SAME_SHAPE or (name == "clamp" and _only_numbers(args[1:], kwargs)):
                return Stacked.of(func(args[0].stack, *args[1:], **kwargs))
            if name == "squeeze" and len(args) == 1 and not kwargs:
                shape = [n for n in args[0].shape if n != 1]
                return Stacked.of(args[0].stack.view(-1, *shape))
            if name == "unsqueeze" and args[1] == 0:
                return gathered(args[0])
            if name == "__getitem__" and isinstance(args[1], Tensor):
                return _looked_up(*args)
            if name == "__getitem__" and isinstance(args[1], tuple) and args[1][0] is None:
                index = (slice(None), *args[1][1:])
                return gathered(args[0])[index]
        raise RuntimeUnfitError(f"`{name}` of a per-variant weight is not known in mixed batches")

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise RuntimeUnfitError(f"`{func}` of a per-variant weight is not known in mixed batches")


def gathered(weight: Stacked) -> Tensor:
    """Each row's own weight, `[rows, *shape]`."""
    return weight.stack[_rows().variants]


def _looked_up(weight: Stacked, index: Tensor) -> Tensor:
    """`weight[index]`, where each row of an index looks into its own variant's weight."""
    _check_rows(index)
    if index.dtype == torch.bool or isinstance(index, Stacked):
        raise RuntimeUnfitError("a mask of a per-variant weight is not known in mixed batches")
    variants = _rows().variants
    return weight.stack[variants.view(-1, *[1] * (index.dim() - 1)), index]


def _only_numbers(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return not any(isinstance(value, Tensor) for value in (*args, *kwargs.values()))


def _rows() -> step.Rows | step.Drawn:
    running = step.current()
    if running is None or running.rows is None:
        raise RuntimeUnfitError("a per-variant weight meets rows in an order of their own")
    return running.rows


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    _check_rows(x)
    rows = _rows()
    flat = x.reshape(x.shape[0], -1, x.shape[-1])
    if isinstance(rows, step.Drawn):
        return _drawn_linear(rows, flat, weight, bias).view(*x.shape[:-1], weight.shape[0])
    out = flat.new_empty(*flat.shape[:2], weight.shape[0])
    for span in rows.spans:
        part = slice(span.start, span.stop)
        own = bias.stack[span.variant] if isinstance(bias, Stacked) else bias
        out[part] = linear(flat[part], _of(weight, span.variant), own)
    return out.view(*x.shape[:-1], weight.shape[0])


def _drawn_linear(rows: step.Drawn, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[rows, n, out] of [rows, n, in], with nothing that the host would have to know."""
    count = rows.variant_count
    stack = weight.stack if isinstance(weight, Stacked) else weight.expand(count, -1, -1)
    biases = bias.stack if isinstance(bias, Stacked) else bias
    if biases is not None and biases.dim() == 1:  # equal in all variants
        biases = biases.expand(count, -1)
    if on_gpu(x):
        flat, many = x.flatten(0, 1), rows
        if x.shape[1] > 1:
            many = rows.repeated(x.shape[1])
            flat = flat.clone()  # a launch between: kernels read rows early
        own = None if biases is None else [biases]
        out = drawn_linear(flat, [stack], many.for_kernels, biases=own)
        return out.view(*x.shape[:2], -1)
    # float32, of routers: every row by every weight.
    every = F.linear(x, stack.flatten(0, 1)).view(*x.shape[:2], *stack.shape[:2])
    found: Tensor = every.take_along_dim(rows.variants[:, None, None, None], 2).squeeze(2)
    return found if biases is None else found + biases[rows.variants, None]


def _embedding(ids: Tensor, weight: Stacked, *args: Any, **kwargs: Any) -> Tensor:
    _check_rows(ids)
    rows = _rows()
    if isinstance(rows, step.Drawn):
        return _looked_up(weight, ids)
    out = weight.stack.new_empty(*ids.shape, weight.shape[1])
    for span in rows.spans:
        part = slice(span.start, span.stop)
        out[part] = F.embedding(ids[part], _of(weight, span.variant))
    return out


def _layer_norm(
    x: Tensor,
    shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    if isinstance(_rows(), step.Drawn):
        return _scaled(x, F.layer_norm(x.float(), shape, eps=eps), weight, bias)

    def run(part: Tensor, variant: int) -> Tensor:
        return F.layer_norm(part, shape, _of(weight, variant), _of(bias, variant), eps)

    return _by_variant(run, x)


def _rms_norm(
    x: Tensor, shape: list[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    if isinstance(_rows(), step.Drawn):
        return _scaled(x, F.rms_norm(x.float(), shape, eps=eps), weight, None)
    return _by_variant(lambda part, v: F.rms_norm(part, shape, _of(weight, v), eps), x)


def _scaled(x: Tensor, normed: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """What a norm in float32 gives, by weights and biases, in the dtype of `x`."""
    _check_rows(x)
    if weight is not None:
        normed = normed * _beside(weight, x).float()
    if bias is not None:
        normed = normed + _beside(bias, x).float()
    return normed.to(x.dtype)


def _by_variant(run: Callable[[Tensor, int], Tensor], x: Tensor) -> Tensor:
    _check_rows(x)
    rows = _rows()
    assert isinstance(rows, step.Rows)
    return torch.cat([run(x[s.start : s.stop], s.variant) for s in rows.spans])


def _of(weight: Any, variant: int) -> Any:
    return weight.stack[variant] if isinstance(weight, Stacked) else weight


def _elementwise(func: Callable[..., Any], a: Any, b: Any, **kwargs: Any) -> Any:
    """A weight with a number or its like stays one; with an activation, each row meets its own."""
    plain = b if isinstance(a, Stacked) else a
    if isinstance(a, Stacked) and isinstance(b, Stacked) and a.dim() != b.dim():
        raise RuntimeUnfitError("two per-variant weights of different ranks meet")
    if not isinstance(plain, Tensor) or isinstance(plain, Stacked) or plain.dim() == 0:
        return Stacked.of(func(_stack(a), _stack(b), **kwargs))
    _check_rows(plain)
    return func(_beside(a, plain), _beside(b, plain), **kwargs)


def _stack(value: Any) -> Any:
    return value.stack if isinstance(value, Stacked) else value


def _beside(value: Any, x: Tensor) -> Any:
    """A weight's rows, shaped to broadcast over `x` as the one weight would."""
    if not isinstance(value, Stacked):
        return value
    rows = gathered(value)
    if rows.dim() > x.dim():
        raise RuntimeUnfitError(f"{tuple(x.shape)} meets a weight of shape {tuple(value.shape)}")
    return rows.view(rows.shape[0], *[1] * (x.dim() - rows.dim()), *rows.shape[1:])


def _check_rows(x: Tensor) -> None:
    if x.shape[0] != _rows().count:
        raise RuntimeUnfitError(
            f"a per-variant weight meets {tuple(x.shape)}, whose rows are not the batch's tokens"
        )


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
}
