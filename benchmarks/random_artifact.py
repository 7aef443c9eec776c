"""An artifact of real shape with random weights, made where they are served: no disk, no copies.

All variants share every center, and each has residuals of its own where the form has any: S is the
number of experts, as in an artifact that is fully shared. What is outside the experts is different
in every variant. Weights are normal, with the deviation models are initialized with, so that
routers spread tokens over experts; same seed, same weights, in every mode.

    with random_weights():
        engine = start_engine(RandomArtifact(SHAPES["tiny"], folder), Options(), ...)
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shapes import expert_layers
from torch import Tensor, nn

from moecc.bank import CENTER_POOL, CENTER_SLOT, NONE, RESIDUAL_POOL, RESIDUAL_SLOT, Pool
from moecc.checkpoint import TORCH_DTYPES
from moecc.coding import Coding
from moecc.forms import Form
from moecc.manifest import StoredLayer, variant_file
from moecc.runtime import loading
from moecc.runtime.experts import REMAP
from moecc.runtime.nonexpert import places
from moecc.skeleton import skeleton

SPREAD, RESIDUAL_SPREAD = 0.02, 0.002  # standard deviations of weights


class RandomArtifact:
    """What `start_engine` reads of an `artifact.Artifact`; its folder holds configs alone."""

    def __init__(
        self,
        config: Mapping[str, Any],
        folder: Path,
        *,
        variants: int = 4,
        coding: str = "16bit",
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        """
        Args:
            config: of transformers, one of `shapes.SHAPES`.
            folder: an empty one.
            coding: the form of every expert: `16bit`, `4bit-g64+2bit-g64` and the like.
            device: where weights outside the experts are made before they go to their rows.
        """
        self.path = folder
        self.variants = tuple(f"variant-{v}" for v in range(variants))
        self.base = self.variants[0]
        self.coding = coding
        self.seed = seed
        self.device = torch.device(device)
        self.manifest = {"manifest_sha256": f"random-{seed}"}
        self.files: dict[str, dict[str, Any]] = {}
        for name in self.variants:
            path = folder / variant_file(name, "config.json")
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(config), encoding="utf-8")
        form = Form.parse(coding)
        self.has_residuals = bool(form.residual)
        model = skeleton(self.base, dict(config))
        self.layers = tuple(
            StoredLayer(
                layer, tuple(self._pools(form, layer.num_experts) for _ in layer.projections)
            )
            for layer in expert_layers(model)
        )
        self.remap = tuple(self._remap(stored) for stored in self.layers)
        # Of one variant's experts at 16 bits, and of what it has outside them.
        self.original_bytes = sum(s.layer.num_experts * s.layer.exact_bytes for s in self.layers)
        self.row_bytes = 2 * sum(p.numel() for p in model.parameters()) - self.original_bytes

    def close(self) -> None:
        pass

    @property
    def nbytes(self) -> int:
        """Bytes of the bank."""
        expert = self.slot_bytes("center") + len(self.variants) * self.slot_bytes("residual")
        return sum(stored.layer.num_experts * expert for stored in self.layers)

    def slot_bytes(self, role: str) -> int:
        """Bytes of an expert's `center` or `residual`, all projections of one layer."""
        stored = self.layers[0]
        return sum(
            TORCH_DTYPES[dtype].itemsize * int(np.prod(shape[1:]))
            for projection, pools in zip(stored.layer.projections, stored.pools, strict=True)
            for pool in pools
            if pool.role == role
            for _, dtype, shape in pool.tensors(stored.layer.name, projection)
        )

    def read_pool_tensor(self, name: str, dtype: str, shape: tuple[int, ...]) -> Any:
        """What `random_weights` fills a tensor of the bank with."""
        _, role, coding, part = name.rsplit(".", 3)
        generator = self._generator(name)
        if part.startswith("plane"):
            return lambda tensor: tensor.random_(0, 256, generator=generator(tensor))
        if part == "scales":
            # Codes are equally likely, so that the levels around zero deviate by this.
            levels = ((4 ** Coding.parse(coding).bits - 1) / 12) ** 0.5
            scale = (SPREAD if role == "center" else RESIDUAL_SPREAD) / levels
            return lambda tensor: tensor.uniform_(
                0.75 * scale, 1.25 * scale, generator=generator(tensor)
            )
        return lambda tensor: tensor.normal_(0, SPREAD, generator=generator(tensor))

    def own_weights(self, variant: str, model: nn.Module, dtype: torch.dtype) -> Iterator[Any]:
        """A variant's parameters outside the experts, each as `{name: tensor}`."""
        for name, owner, key in places(model):
            if isinstance(owner[key], nn.Parameter) and not name.endswith(REMAP):
                tensor = torch.empty(owner[key].shape, dtype=dtype, device=self.device)
                if tensor.dim() == 1:  # a norm's
                    tensor.fill_(1.0)
                else:
                    generator = self._generator(f"{variant}.{name}")(tensor)
                    tensor.normal_(0, SPREAD, generator=generator)
                yield {name: tensor}

    def _generator(self, name: str) -> Callable[[Tensor], torch.Generator]:
        seed = zlib.crc32(f"{self.seed}.{name}".encode())
        return lambda tensor: torch.Generator(tensor.device).manual_seed(seed)

    def _pools(self, form: Form, experts: int) -> tuple[Pool, ...]:
        center = "BF16" if form.center_coding is None else form.center
        pools = [Pool("center", center, experts)]
        if form.residual:
            pools.append(Pool("residual", form.residual, experts * len(self.variants)))
        return tuple(pools)

    def _remap(self, stored: StoredLayer) -> np.ndarray:
        """int32 `[variants, experts, projections, 4]`: expert e of variant v is center e."""
        variants, experts = len(self.variants), stored.layer.num_experts
        table = np.full((variants, experts, len(stored.pools), 4), NONE, dtype=np.int32)
        expert = np.arange(experts)[None, :, None]
        table[..., CENTER_POOL], table[..., CENTER_SLOT] = 0, expert
        if self.has_residuals:
            own = expert * variants + np.arange(variants)[:, None, None]
            table[..., RESIDUAL_POOL], table[..., RESIDUAL_SLOT] = 1, own
        return table


@contextmanager
def random_weights() -> Iterator[None]:
    """Inside, `moecc.runtime.loading` fills tensors by a RandomArtifact instead of reading."""

    def read(
        fill: Callable[[Tensor], Any],
        dtype: torch.dtype,
        shape: tuple[int, ...],
        device: torch.device,
    ) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype, device=device)
        fill(tensor)
        return tensor

    patched: Any = loading
    kept = patched._read, patched._loaded
    patched._read, patched._loaded = read, RandomArtifact.own_weights
    try:
        yield
    finally:
        patched._read, patched._loaded = kept
