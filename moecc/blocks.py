"""Second moments of inputs, in diagonal blocks along in-features."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

DAMPING = 0.02  # of the mean of the moments' diagonal, added to it


def load_solvers(device: str) -> None:
    """Has torch load its linear algebra for a GPU, which several threads cannot do at once."""
    if torch.device(device).type == "cuda":
        one = torch.ones(1, 1, device=device)
        torch.cholesky_inverse(torch.linalg.cholesky(one))
        torch.linalg.solve(torch.linalg.qr(one).R, torch.linalg.svd(one).Vh)


def damped(moments: Tensor) -> Tensor:
    """Moments [V, blocks, B, B] at a mean diagonal of one, with some of the identity added."""
    level = moments.diagonal(dim1=-2, dim2=-1).mean((-2, -1))[:, None, None, None]
    scaled = torch.where(level > 0, moments / level.clamp(min=1e-38), 0.0)
    return scaled + DAMPING * torch.eye(moments.shape[-1], device=moments.device)


class Blocks:
    """Rows [..., R, K] cut along the columns into [..., blocks, R, B], the last padded."""

    def __init__(self, columns: int, moments: Tensor | None) -> None:
        self.columns = columns
        self.count, self.size = (1, columns) if moments is None else moments.shape[1:3]

    def cut(self, rows: Tensor) -> Tensor:
        rows = pad(rows, (0, self.count * self.size - self.columns))
        cut = rows.view(*rows.shape[:-1], self.count, self.size)
        return cut.movedim(-2, -3).contiguous()

    def whole(self, cut: Tensor) -> Tensor:
        """Rows as they were cut, with the padding."""
        return cut.movedim(-3, -2).flatten(-2)

    def join(self, cut: Tensor) -> Tensor:
        """Rows as they were before they were cut."""
        return self.whole(cut)[..., : self.columns]
