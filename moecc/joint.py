"""Joint coding: the center of a group and all its residuals, chosen together, weight by weight.

The weights W_v `[out, in]` of members v = 1, ... are coded as Q_v = C + R_v. What is minimized is

    sum over v of importance_v * trace((W_v - Q_v) H_v (W_v - Q_v)^T)

with H_v the second moments of what the member's matrix is applied to, or the identity where
nothing was calibrated. Moments come as diagonal blocks along in-features; blocks have nothing in
common but the scales of groups that span them.

1. Scales start at the least squared error; those of residuals keep the norm of what they code
   (least squares would shrink it, and with it the skill that was tuned in). Without moments they
   go on to do so, whatever is coded anew.
2. First codes, one column after the other: the center's code and all residuals' codes of a weight
   are the best combination for all members; each member's error is then made up for in its later
   columns (E. Frantar et al., "GPTQ", ICLR 2023, here with a code that several matrices share).
3. A few passes of coordinate descent: scales by least squares, then every column again, against
   the exact gradient (K. Behdin et al., "QuantEase", 2023).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from moecc.blocks import Blocks
from moecc.coding import Coded, Coding, distortion, pack, quantize

PASSES = 2
COLUMNS = 32  # worked on one by one; those beyond them are updated at once
SEARCH = 2  # levels to both sides of the nearest that are tried for a center
_LEAST, _MOST = 0.5, 2.0  # by what one pass may change a scale


def code_jointly(
    targets: Tensor,
    importance: Tensor,
    moments: Tensor | None,
    *,
    center: Coding | torch.dtype,
    residuals: Sequence[Coding | None],
    passes: int = PASSES,
) -> tuple[Coded | Tensor, tuple[Coded | None, ...]]:
    """The coded center (a tensor of its dtype where plain) and a residual, or None, a member.

    `targets` float32 [V, R, K]; `importance` float32 [V], positive; `moments` float32
    [V, blocks, B, B] with blocks * B >= K, as `damped` gives them, or None. Rows do not depend on
    each other.
    """
    state = _State(targets, importance, moments, center, residuals)
    for number in range(passes + 1):
        if number:
            state.fit_scales()
        state.code_columns(first=number == 0)
    coded = state.center.coded(0) or state.center.plain_values()
    return coded, tuple(state.residuals.coded(v) for v in range(len(targets)))


def center_target(
    targets: Tensor, importance: Tensor, residuals: Sequence[Coding | None]
) -> Tensor:
    """The center [...] of targets [V, ...] that leaves the least coded error.

    What a residual of distortion D codes counts D times: a member without one pulls the most.
    """
    pull = _pull(importance, residuals)
    wanted: Tensor = torch.tensordot(pull / pull.sum(), targets, dims=1)
    return wanted


def _pull(importance: Tensor, residuals: Sequence[Coding | None]) -> Tensor:
    left = [1.0 if r is None else distortion(r.bits) for r in residuals]
    return importance * torch.tensor(left, device=importance.device)


class _Codes:
    """Levels and steps [N, blocks, R, B] of N matrices, one coding each; values are products.

    A plain center has a step of one and any level of its dtype; no coding (None), level zero.
    """

    def __init__(
        self, targets: Tensor, codings: Sequence[Coding | torch.dtype | None], blocks: Blocks
    ) -> None:
        """`targets` [N, R, K] give the first scales."""
        self.codings, self.blocks = codings, blocks
        self.plain = codings[0] if isinstance(codings[0], torch.dtype) else None
        tops = [(2**c.bits - 1) / 2 if isinstance(c, Coding) else 0.0 for c in codings]
        self.tops = torch.tensor(tops, device=targets.device)
        self.steps = blocks.cut(
            torch.stack([_first_steps(t, c) for t, c in zip(targets, codings, strict=True)])
        )
        self.levels = torch.zeros_like(self.steps)

    def keep_norm(self) -> None:
        """Widens scales by what least squares shrinks a Gaussian: the coded norm is the norm."""
        kept = [1 - distortion(c.bits) if isinstance(c, Coding) else 1.0 for c in self.codings]
        widen = torch.tensor(kept, device=self.steps.device).rsqrt().view(-1, 1, 1, 1)
        self.steps = (self.steps * widen).bfloat16().float()

    def nearest(self, values: Tensor, steps: Tensor) -> Tensor:
        """Levels of values [..., N, blocks, R] for steps [N, blocks, R], or both with columns."""
        if self.plain is not None:
            return values.to(self.plain).float()
        levels = (values * torch.where(steps > 0, 1 / steps, 0.0)).floor_().add_(0.5)
        top = _along(self.tops, steps)
        return levels.clamp_(-top, top)

    def around(self, levels: Tensor, reach: int) -> list[Tensor]:
        """Levels and their neighbors up to `reach` away; a plain center has none."""
        if self.plain is not None:
            return [levels]
        top = _along(self.tops, levels)
        return [(levels + i).clamp_(-top, top) for i in range(-reach, reach + 1)]

    def values(self) -> Tensor:
        return self.levels * self.steps

    def plain_values(self) -> Tensor:
        """The rows of a plain center, in its dtype."""
        assert self.plain is not None
        return self.blocks.join(self.levels[0]).to(self.plain)

    def spans(self, index: int) -> list[slice]:
        """The columns of a block that one scale of a matrix stands for, scale by scale."""
        coding, size = self.codings[index], self.blocks.size
        group = (isinstance(coding, Coding) and coding.group) or size
        return [slice(start, min(start + group, size)) for start in range(0, size, group)]

    def coded(self, index: int) -> Coded | None:
        """A coded matrix, None without a coding."""
        coding = self.codings[index]
        if not isinstance(coding, Coding):
            return None
        levels = self.blocks.join(self.levels[index])
        codes = (levels + (2**coding.bits - 1) / 2).to(torch.uint8)
        scales = self.blocks.join(self.steps[index])[:, :: coding.group or levels.shape[1]]
        return Coded(pack(codes, coding), scales.bfloat16().contiguous())


def _first_steps(target: Tensor, coding: Coding | torch.dtype | None) -> Tensor:
    """Steps [R, K] of least squared error."""
    if not isinstance(coding, Coding):
        return torch.ones_like(target)
    scales = quantize(target, coding)[1].float()
    columns = target.shape[1]
    return scales.repeat_interleave(coding.group or columns, 1)[:, :columns]


class _State:
    """Targets [V, blocks, R, B] and their codes so far."""

    def __init__(
        self,
        targets: Tensor,
        importance: Tensor,
        moments: Tensor | None,
        center: Coding | torch.dtype,
        residuals: Sequence[Coding | None],
    ) -> None:
        if moments is not None:
            groups = [c.group for c in (center, *residuals) if isinstance(c, Coding) and c.group]
            moments = _joined(moments, groups)
        blocks = Blocks(targets.shape[-1], moments)
        self.importance = importance
        self.pull = _pull(importance, residuals)
        self.targets = blocks.cut(targets)
        self.moments = moments
        wanted = center_target(targets, importance, residuals)[None]
        self.center = _Codes(wanted, [center], blocks)
        self.center.levels = self.center.nearest(blocks.cut(wanted), self.center.steps)
        self.residuals = _Codes(targets - blocks.join(self.center.values()), residuals, blocks)
        self.residuals.keep_norm()

    def code_columns(self, first: bool) -> None:
        """New codes for every weight, given all others as they are."""
        if self.moments is None:
            self._choose(..., self.targets, _along(self.importance, self.targets), first)
        elif first:
            self._compensate(self.moments)
        else:
            self._descend(self.moments)

    def _compensate(self, moments: Tensor) -> None:
        """What the codes of a column miss is made up for in the columns after it."""
        factor = torch.linalg.cholesky(
            torch.cholesky_inverse(torch.linalg.cholesky(moments)), upper=True
        )
        left = self.targets.clone()
        for part in _parts(moments.shape[-1]):
            inside = left[..., part].clone()
            missed = torch.empty_like(inside)
            for i, column in enumerate(range(part.start, part.stop)):
                own = factor[..., column, column, None]
                weight = _along(self.importance, own) / own.square()
                value = self._choose((..., column), inside[..., i], weight, True)
                missed[..., i] = (inside[..., i] - value) / own
                later = factor[..., column, column + 1 : part.stop].unsqueeze(-2)
                inside[..., i + 1 :] -= missed[..., i, None] * later
            left[..., part.stop :] -= missed @ factor[..., part, part.stop :]

    def _descend(self, moments: Tensor) -> None:
        """Coordinate descent over the columns."""
        gradient = (self.targets - self._values(...)) @ moments
        for part in _parts(moments.shape[-1]):
            inside, before = gradient[..., part].clone(), self._values((..., part))
            for i, column in enumerate(range(part.start, part.stop)):
                own = moments[..., column, column, None]
                wanted = before[..., i] + inside[..., i] / own
                weight = _along(self.importance, own) * own
                value = self._choose((..., column), wanted, weight, False)
                row = moments[..., column, part].unsqueeze(-2)
                inside -= (value - before[..., i])[..., None] * row
            gradient -= (self._values((..., part)) - before) @ moments[..., part, :]

    def _choose(self, at: Any, wanted: Tensor, weight: Tensor, first: bool) -> Tensor:
        """Sets the codes that come nearest to `wanted` [V, ...] in all; returns their values.

        `weight` is what a squared error counts. Unless `first`, codes are never made worse.
        """
        center, residuals = self.center, self.residuals
        step, steps = center.steps[at], residuals.steps[at]
        pull = weight * _along(self.pull / self.importance, weight)
        pulled = center.nearest(_mean(wanted, pull), step)
        if first:
            tried = center.around(pulled, SEARCH)
        else:
            left = _mean(wanted - residuals.levels[at] * steps, weight)
            tried = [center.levels[at], center.nearest(left, step), *center.around(pulled, 1)]
        levels = torch.stack(tried)
        apart = wanted - levels * step
        fitting = residuals.nearest(apart, steps)
        missed = (weight * (apart - fitting * steps).square_()).sum(1, keepdim=True)
        best = missed.argmin(0, keepdim=True)
        center.levels[at] = levels.gather(0, best)[0]
        residuals.levels[at] = fitting.gather(0, best.expand(1, *fitting.shape[1:]))[0]
        return self._values(at)

    def _values(self, at: Any) -> Tensor:
        """The coded weights [V, ...] at some columns."""
        center, residuals = self.center, self.residuals
        return center.levels[at] * center.steps[at] + residuals.levels[at] * residuals.steps[at]

    def fit_scales(self) -> None:
        """Every scale in turn at its best given all else, the center's last."""
        gradient = self._times_moments(self.targets - self._values(...), slice(None), ...)
        for v in range(len(self.targets)):
            self._fit(self.residuals, v, gradient, [v])
        self._fit(self.center, 0, gradient, list(range(len(self.targets))))

    def _fit(self, codes: _Codes, index: int, gradient: Tensor, members: list[int]) -> None:
        """Fits one matrix's scales, which serve `members`, and brings their gradient along.

        To the least squares; without moments, those of a residual to the norm of what it codes.
        """
        coding = codes.codings[index]
        if not isinstance(coding, Coding):
            return
        whole = not coding.group  # one scale for all blocks
        weight = self.importance[members].view(-1, 1, 1)

        def total(terms: Tensor) -> Tensor:
            summed: Tensor = (weight * terms.sum(-1)).sum(0)
            return summed.sum(0, keepdim=True) if whole else summed

        for span in codes.spans(index):
            old, left = codes.steps[index][..., span], gradient[members][..., span]
            levels = codes.levels[index][..., span]
            applied = self._times_moments(levels, span, members)
            curve = total(applied[..., span] * levels)
            if self.moments is None and codes is self.residuals:
                best = (total((left + levels * old).square()) / curve).sqrt()
            else:
                best = old[..., 0] + total(left * levels) / curve
            new = torch.where(curve > 0, best, old[..., 0])[..., None]
            new = new.clamp(old * _LEAST, old * _MOST).bfloat16().float()
            codes.steps[index][..., span] = new
            gradient[members] -= (new - old)[..., :1] * applied

    def _times_moments(self, rows: Tensor, span: slice, members: Any) -> Tensor:
        """Rows [(V,) blocks, R, n] times the moments' rows `span`: [V, blocks, R, B]."""
        if self.moments is None:
            whole = torch.zeros_like(self.targets[members])
            whole[..., span] = rows
            return whole
        return rows @ self.moments[members][..., span, :]


def _joined(moments: Tensor, groups: Sequence[int]) -> Tensor:
    """Moments [V, blocks, B, B] in blocks so wide that no group of columns spans two of them."""
    count, size = moments.shape[1:3]
    width = min(math.lcm(size, *groups), count * size)
    if width == size:
        return moments
    wide = torch.eye(width, device=moments.device)
    wide = wide.repeat(len(moments), -(-count * size // width), 1, 1)
    for i in range(count):
        block, at = divmod(i * size, width)
        wide[:, block, at : at + size, at : at + size] = moments[:, i]
    return wide


def _mean(values: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean [1, ...] of values [V, ...]."""
    return (values * weight).sum(0, keepdim=True) / weight.sum(0, keepdim=True)


def _along(values: Tensor, like: Tensor) -> Tensor:
    """Values [V] for a tensor [V, ...]."""
    return values.view(-1, *[1] * (like.dim() - 1))


def _parts(columns: int) -> Iterator[slice]:
    return (slice(s, min(s + COLUMNS, columns)) for s in range(0, columns, COLUMNS))
