"""Residuals of low rank: what is left of fine-tunes that were trained as adapters.

The best approximation of a matrix D `[out, in]` of rank r, as it acts on inputs with the second
moments H = S S^T, is the truncated SVD of D S times the inverse of S (the whitening of X. Wang et
al., "SVD-LLM", ICLR 2025). Its right singular vectors are found by subspace iteration from fixed
random ones (N. Halko et al., "Finding structure with randomness", 2011).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from moecc.blocks import Blocks

OVERSAMPLED = 8
ITERATIONS = 4
SEED = 20110502


@dataclass(frozen=True, slots=True)
class LowRank:
    """A matrix kept as bfloat16 factors: left `[out, rank]`, right `[rank, in]`."""

    rank: int

    @classmethod
    def parse(cls, name: str) -> LowRank:
        """The coding called `name`, for example `rank16`."""
        match = re.fullmatch(r"rank([1-9][0-9]{0,3})", name, re.ASCII)
        if match is None:
            raise ValueError(f"not the name of a coding: {name!r}")
        return cls(int(match[1]))

    @property
    def name(self) -> str:
        """The name that `parse` reads."""
        return f"rank{self.rank}"

    def nbytes(self, rows: int, in_features: int) -> int:
        """Bytes of both factors."""
        return 2 * self.rank * (rows + in_features)


def factorize(matrix: Tensor, rank: int, moments: Tensor | None) -> tuple[Tensor, Tensor]:
    """Bfloat16 factors `[R, rank]` and `[rank, K]` of float32 `[R, K]`.

    `moments` float32 [blocks, B, B], positive definite, or None for the identity. A rank beyond
    that of the matrix is filled with zeros.
    """
    whitened = whiten(matrix, moments)
    right = leading(whitened, rank)
    left = whitened @ right
    width = right.shape[1]
    found = unwhiten(right.T.contiguous(), moments)[:, : matrix.shape[1]]
    full_left = matrix.new_zeros(matrix.shape[0], rank, dtype=torch.bfloat16)
    full_right = matrix.new_zeros(rank, matrix.shape[1], dtype=torch.bfloat16)
    full_left[:, :width], full_right[:width] = left.bfloat16(), found.bfloat16()
    return full_left, full_right


def leading(matrix: Tensor, rank: int) -> Tensor:
    """Orthonormal columns `[K, rank or fewer]` that span the leading right singular vectors."""
    rows, columns = matrix.shape
    width = min(rank + OVERSAMPLED, rows, columns)
    generator = torch.Generator().manual_seed(SEED)
    basis = torch.randn(columns, width, generator=generator).to(matrix.device)
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(matrix.T @ (matrix @ basis)).Q
    # Rotated to singular vectors, so that the first of them are the leading ones.
    rotation = torch.linalg.svd(matrix @ basis, full_matrices=False).Vh
    found: Tensor = (basis @ rotation.T)[:, :rank].contiguous()
    return found


def whiten(matrix: Tensor, moments: Tensor | None) -> Tensor:
    """D S for moments S S^T, padded columns included."""
    if moments is None:
        return matrix
    blocks = Blocks(matrix.shape[1], moments[None])
    return blocks.whole(blocks.cut(matrix) @ torch.linalg.cholesky(moments))


def unwhiten(rows: Tensor, moments: Tensor | None) -> Tensor:
    """Rows `[n, padded K]` times the inverse of S, `[n, K]`."""
    if moments is None:
        return rows
    factor = torch.linalg.cholesky(moments)
    cut = rows.view(len(rows), *moments.shape[:2]).movedim(1, 0)
    solved = torch.linalg.solve_triangular(factor, cut, upper=False, left=False)
    whole: Tensor = solved.movedim(0, 1).flatten(1)
    return whole


def expand(left: Tensor, right: Tensor) -> Tensor:
    """The float32 matrix that factors stand for."""
    product: Tensor = left.float() @ right.float()
    return product
