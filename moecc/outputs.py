"""How far apart experts are in what they do: their outputs on tokens that reach them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moecc.measured import Array
from moecc.parallel import ordered, worker_pool
from moecc.routed import Routed, Seen
from moecc.streaming import Streamed

FEWEST = 2  # tokens that a comparison needs; experts with fewer are compared on all of them


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Tokens of all variants that come to a layer.

    Attributes:
        hidden: float32 [n, H].
        index: int64 [n, k], the experts that their own variants' routers chose, or -1.
        gates: float32 [n, k].
        owner: int64 [n], whose they are.
    """

    hidden: Tensor
    index: Tensor
    gates: Tensor
    owner: Tensor

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        """Whether each token is routed to an expert, bool [n], and its weight, float64 [n]."""
        chosen = self.index == expert
        return chosen.any(-1), (self.gates.double() * chosen).sum(-1)

    def take(self, rows: Tensor) -> Sample:
        """Some of the tokens."""
        return Sample(self.hidden[rows], self.index[rows], self.gates[rows], self.owner[rows])


def load_samples(folders: Sequence[Path], layer: int, device: torch.device) -> Sample:
    """The sampled tokens of a layer, from a folder of each variant."""
    found = [torch.load(folder / f"{layer}.pt", weights_only=True) for folder in folders]
    owner = [torch.full((len(hidden),), v) for v, (hidden, _, _) in enumerate(found)]
    hidden, index, gates = (torch.cat(parts).to(device) for parts in zip(*found, strict=True))
    return Sample(hidden, index, gates, torch.cat(owner).to(device))


def layer_distances(
    streamed: Sequence[Streamed], number: int, sample: Sample, on_read: Callable[[int], None]
) -> tuple[Array, Array]:
    """Distances of outputs and of linear CKA in a layer, each float64 `[E, V, V]`.

    Reads one expert of one variant after the other, in as many threads as there are workers.
    """
    with ExitStack() as stack, worker_pool() as pool:
        experts = [stack.enter_context(s.shared_by_experts(number)) for s in streamed]
        layer = experts[0].layer

        def compare(expert: int) -> tuple[Array, Array]:
            with torch.no_grad():
                return _compare(streamed, experts, expert, sample)

        found = []
        for pair in ordered(pool, compare, range(layer.num_experts)):
            found.append(pair)
            on_read(layer.exact_bytes * len(streamed))
    output, cka = (np.stack(parts) for parts in zip(*found, strict=True))
    return output, cka


def _compare(
    streamed: Sequence[Streamed], experts: Sequence[Routed], expert: int, sample: Sample
) -> tuple[Array, Array]:
    reached, _ = sample.of(expert)
    counts = torch.bincount(sample.owner[reached], minlength=len(experts)).tolist()
    if len(experts) < 2 or sum(sorted(counts)[:2]) >= FEWEST:  # no pair has fewer
        sample = sample.take(reached)
    outputs = []
    for one, source in zip(experts, streamed, strict=True):
        values = source.read_expert(one, expert)
        outputs.append(one.apply(sample.hidden, values, Seen(sample.gates)))
    return pair_distances(outputs, *sample.of(expert), sample.owner)


def pair_distances(
    outputs: Sequence[Tensor], reached: Tensor, gates: Tensor, owner: Tensor
) -> tuple[Array, Array]:
    """Distances `[V, V]` of V experts with outputs float32 [n, H] on the same tokens.

    Of a and b, on the tokens of either variant that are routed to the expert:
    sqrt(E[g^2 |f_a - f_b|^2] / E[g^2 (|f_a|^2 + |f_b|^2) / 2]), and 1 - linear CKA of f_a and f_b.
    With fewer than two such tokens, on all tokens of both, with g = 1.
    """
    count = len(outputs)
    output, cka = np.zeros((count, count)), np.zeros((count, count))
    for a, b in combinations(range(count), 2):
        both = (owner == a) | (owner == b)
        rows, squares = both & reached, gates.square()
        if int(rows.sum()) < FEWEST:
            rows, squares = both, torch.ones_like(gates)
        left, right = (outputs[v][rows].double() for v in (a, b))
        if torch.equal(left, right):
            continue
        output[a, b] = output[b, a] = _relative(left, right, squares[rows])
        cka[a, b] = cka[b, a] = 1 - linear_cka(left, right)
    return output, cka


def _relative(left: Tensor, right: Tensor, squares: Tensor) -> float:
    apart = float(squares @ (left - right).square().sum(-1))
    size = float(squares @ (left.square() + right.square()).sum(-1)) / 2
    return float(np.sqrt(apart / size)) if size > 0 else 0.0


def linear_cka(left: Tensor, right: Tensor) -> float:
    """Linear CKA, 0 to 1, of two float64 [n, H] (Kornblith et al., ICML 2019, eq. 5).

    1 where either does not vary, so that there is nothing to tell apart.
    """
    left, right = left - left.mean(0), right - right.mean(0)
    grams = left @ left.T, right @ right.T
    norms = float(grams[0].norm() * grams[1].norm())
    product = float((grams[0] * grams[1]).sum())
    return min(max(product / norms, 0.0), 1.0) if norms > 0 else 1.0
