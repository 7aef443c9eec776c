"""Reads an artifact (docs/format.md): rows of any variant's experts, and its other tensors.

manifest.json                    everything below, with sizes and hashes
experts-00000.safetensors ...    the bank: pools of slots
remap.safetensors                (variant, expert, projection) -> slots, per layer
similarity.json                  distances between the variants' experts
variants/NAME/                   config, tokenizer, templates as the source has them
    tensors.json                 the source's tensors; where those outside the experts are
    non-expert.safetensors       what the variant keeps of its own
README.md                        model card
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from moecc import nonexpert
from moecc.architecture import Projection
from moecc.bank import CENTER_POOL, CENTER_SLOT, NONE, RESIDUAL_POOL, RESIDUAL_SLOT, Pool
from moecc.checkpoint import TORCH_DTYPES
from moecc.coding import Coded, decode
from moecc.errors import ArtifactError, DamagedArtifactError
from moecc.files import sha256_file
from moecc.lowrank import LowRank, expand
from moecc.manifest import (
    MANIFEST,
    NON_EXPERT,
    REMAP,
    TENSORS,
    StoredLayer,
    checked_dtype,
    checked_shape,
    read_manifest,
    read_object,
    remap_tensor,
    safe_path,
    stored_layer,
    variant_file,
)
from moecc.merge import add_residual
from moecc.tensorfile import HeaderError, TensorInfo, pread_into, read_header

STREAM_BYTES = 8 << 20

PoolReader = Callable[[int, memoryview], None]  # (first byte, memory to fill)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor outside the experts: its name in the source, and where its bits are.

    `owner` is the variant whose file holds it; `delta` says that they are the XOR with `base`'s.
    """

    disk: str
    dtype: str
    shape: tuple[int, ...]
    owner: str
    delta: bool

    @property
    def itemsize(self) -> int:
        return TORCH_DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.itemsize


class Artifact:
    """An opened artifact; reads rows of any variant's experts and its other tensors.

    Raises ArtifactError if the folder is no artifact or a newer moecc made it, and
    DamagedArtifactError if its parts do not fit together.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = read_manifest(path)
        self.variants = tuple(str(v["name"]) for v in self.manifest["variants"])
        self.base = str(self.manifest["base"])
        self.files: dict[str, dict[str, Any]] = self.manifest["files"]
        try:
            self.layers = tuple(stored_layer(layer) for layer in self.manifest["layers"])
        except (TypeError, ValueError) as error:
            raise DamagedArtifactError(f"`{path / MANIFEST}` is damaged: {error}") from None
        self._fds: dict[str, int] = {}

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.popitem()[1])

    def __enter__(self) -> Artifact:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check_variant(self, name: str) -> None:
        """Raises ArtifactError if there is no such variant."""
        if name not in self.variants:
            raise ArtifactError(
                f"the artifact has no variant `{name}`", f"it has {', '.join(self.variants)}"
            )

    def rows(
        self, variant: str, layer: int, projection: str, expert: int, span: range
    ) -> torch.Tensor:
        """Rows `span` of an expert's canonical matrix `[out, in]`.

        Of the stored dtype where the weights are plain, bfloat16 where they are coded.
        """
        stored = self.layers[layer]
        index, found = stored.projection(projection)
        entry = self.remap[layer][self.variants.index(variant), expert, index]
        pools = stored.pools[index]
        center_pool = pools[entry[CENTER_POOL]]
        center = self._slot(stored, found, center_pool, int(entry[CENTER_SLOT]), span)
        if entry[RESIDUAL_POOL] == NONE:
            return center if center_pool.packed is None else center.bfloat16()
        residual_pool = pools[entry[RESIDUAL_POOL]]
        residual = self._slot(stored, found, residual_pool, int(entry[RESIDUAL_SLOT]), span)
        return add_residual(center.float(), residual)

    @cached_property
    def remap(self) -> tuple[npt.NDArray[np.int32], ...]:
        """Per layer int32 `[variants, experts, projections, 4]`; see bank.py for the columns."""
        tables = []
        for stored in self.layers:
            layer = stored.layer
            shape = (len(self.variants), layer.num_experts, len(layer.projections), 4)
            info = self._info(REMAP, remap_tensor(layer.name), "I32", shape)
            raw = self._read(info, 0, info.nbytes)
            table = np.frombuffer(raw, dtype="<i4").reshape(shape)
            _check_remap(self.path, stored, table)
            tables.append(table)
        return tuple(tables)

    def check_layer(self, layer: int) -> None:
        """Raises DamagedArtifactError if a layer is not as large as the manifest says."""
        stored = self.layers[layer]
        assert self.remap, "checked when it is read"
        for projection, pools in zip(stored.layer.projections, stored.pools, strict=True):
            for pool in pools:
                for name, dtype, shape in pool.tensors(stored.layer.name, projection):
                    self._info(self._bank_file(name), name, dtype, shape)

    def source_tensors(self, variant: str) -> dict[str, tuple[str, tuple[int, ...], str]]:
        """name -> (dtype, shape, file) of every tensor of the variant's checkpoint."""
        with self._reading_table(variant) as table:
            return {
                name: (checked_dtype(dtype), checked_shape(shape), safe_path(file))
                for name, (dtype, shape, file) in table["source"].items()
            }

    def non_expert(self, variant: str) -> dict[str, StoredTensor]:
        """canonical name -> tensor outside the experts."""
        if variant not in self._non_expert:
            self._non_expert[variant] = self._read_non_expert(variant)
        return self._non_expert[variant]

    @cached_property
    def _non_expert(self) -> dict[str, dict[str, StoredTensor]]:
        return {}

    def _read_non_expert(self, variant: str) -> dict[str, StoredTensor]:
        with self._reading_table(variant) as table:
            found = {
                name: StoredTensor(
                    str(disk), checked_dtype(dtype), checked_shape(shape), owner, bool(delta)
                )
                for name, (disk, dtype, shape, owner, delta) in table["non_expert"].items()
            }
            for tensor in found.values():
                if tensor.owner not in self.variants:
                    raise ValueError(f"there is no variant `{tensor.owner}`")
            return found

    def stream(self, variant: str, name: str) -> Iterator[bytes | memoryview]:
        """The bytes of a tensor outside the experts, in blocks."""
        return self._stream(name, self.non_expert(variant)[name])

    def _stream(self, name: str, tensor: StoredTensor) -> Iterator[bytes | memoryview]:
        file = variant_file(tensor.owner, NON_EXPERT)
        if not tensor.delta:
            info = self._info(file, name, tensor.dtype, tensor.shape)
            for start in range(0, info.nbytes, STREAM_BYTES):
                yield self._read(info, start, min(STREAM_BYTES, info.nbytes - start))
            return
        base = self.non_expert(self.base)[name]
        if base.delta:
            raise DamagedArtifactError(f"`{self.path}`: the base variant's `{name}` is a delta")
        info = self._info(file, name, "U8", None)
        frame = io.BytesIO(self._read(info, 0, info.nbytes))
        try:
            yield from nonexpert.restore_delta(frame, self._stream(name, base), tensor.itemsize)
        except ValueError as error:
            raise DamagedArtifactError(f"`{self.path / file}`: tensor `{name}`: {error}") from None

    def read_pool_tensor(self, name: str, dtype: str, shape: tuple[int, ...]) -> PoolReader:
        """Reads parts of one of `Pool.tensors` into memory of the caller's."""
        info = self._info(self._bank_file(name), name, dtype, shape)
        return lambda start, into: self._read_into(info, start, into)

    def check_sizes(self) -> None:
        """Raises DamagedArtifactError if a file is missing or not as large as it should be."""
        for name in sorted(self.files):
            problem = self._size_problem(self.path / name, int(self.files[name]["size"]))
            if problem:
                raise DamagedArtifactError(
                    f"`{self.path / name}` {problem}",
                    "copy the artifact again; `moecc inspect --verify` checks every file",
                )

    def verify(self, on_file: Any = lambda name, size: None) -> list[str]:
        """Hashes every file; returns one line for each that is not what the manifest says."""
        problems = []
        with ThreadPoolExecutor(2) as pool:
            names = sorted(self.files)
            for name, problem in zip(names, pool.map(self._verify_file, names), strict=True):
                on_file(name, int(self.files[name]["size"]))
                if problem:
                    problems.append(f"`{name}` {problem}")
        return problems

    def _verify_file(self, name: str) -> str | None:
        path, known = self.path / name, self.files[name]
        try:
            problem = self._size_problem(path, int(known["size"]))
            if problem:
                return problem
            return None if sha256_file(path) == known["sha256"] else "is damaged: its hash differs"
        except OSError as error:
            return f"cannot be read: {error.strerror}"

    @staticmethod
    def _size_problem(path: Path, size: int) -> str | None:
        try:
            found = path.stat().st_size
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            return f"cannot be read: {error.strerror}"
        return None if found == size else f"has {found} bytes, not {size}"

    def _slot(
        self, stored: StoredLayer, projection: Projection, pool: Pool, slot: int, span: range
    ) -> torch.Tensor:
        """Rows of a slot: plain in the pool's dtype, or decoded to float32."""
        rows, cols = projection.matrix
        parts = []
        for name, dtype, shape in pool.tensors(stored.layer.name, projection):
            info = self._info(self._bank_file(name), name, dtype, shape)
            # A right factor has no rows of its own: it is read whole.
            whole = range(shape[1]) if name.endswith(".right") else span
            height = shape[1] if name.endswith(".right") else rows
            row_bytes = info.nbytes // (pool.slots * height)
            start = (slot * height + whole.start) * row_bytes
            raw = self._read(info, start, len(whole) * row_bytes)
            parts.append(torch.frombuffer(raw, dtype=TORCH_DTYPES[dtype]).view(len(whole), -1))
        if pool.packed is None:
            return parts[0]
        if isinstance(pool.packed, LowRank):
            return expand(*parts)
        return decode(Coded(tuple(parts[:-1]), parts[-1]), pool.packed, cols)

    def _bank_file(self, tensor: str) -> str:
        if tensor not in self._expert_tensors:
            raise DamagedArtifactError(f"`{self.path}` does not hold the tensor `{tensor}`")
        return self._expert_tensors[tensor]

    @cached_property
    def _expert_tensors(self) -> dict[str, str]:
        """name -> file of every tensor of the bank."""
        files = [name for name in self.files if re.fullmatch(r"experts-\d+\.safetensors", name)]
        return {tensor: file for file in sorted(files) for tensor in self._header(file)}

    @contextmanager
    def _reading_table(self, variant: str) -> Iterator[dict[str, Any]]:
        """The table of a variant's tensors; whatever is wrong with it is damage."""
        table = self._tensors(variant)
        try:
            yield table
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            path = self.path / variant_file(variant, TENSORS)
            raise DamagedArtifactError(f"`{path}` is damaged: {error}") from None

    def _tensors(self, variant: str) -> dict[str, Any]:
        self.check_variant(variant)
        if variant not in self._tables:
            self._tables[variant] = read_object(self.path / variant_file(variant, TENSORS))
        return self._tables[variant]

    @cached_property
    def _tables(self) -> dict[str, dict[str, Any]]:
        return {}

    @cached_property
    def _headers(self) -> dict[str, dict[str, TensorInfo]]:
        return {}

    def _header(self, file: str) -> dict[str, TensorInfo]:
        if file not in self._headers:
            try:
                self._headers[file] = read_header(self.path / file)[0]
            except (HeaderError, EOFError) as error:
                raise DamagedArtifactError(f"`{self.path / file}` is damaged: {error}") from None
            except OSError as error:
                raise DamagedArtifactError(
                    f"cannot read `{self.path / file}`: {error.strerror}",
                    "run `moecc inspect --verify` to see what else is missing",
                ) from None
        return self._headers[file]

    def _info(self, file: str, name: str, dtype: str, shape: tuple[int, ...] | None) -> TensorInfo:
        info = self._header(file).get(name)
        if info is None or info.dtype != dtype or (shape is not None and info.shape != shape):
            raise DamagedArtifactError(
                f"`{self.path / file}` does not hold `{name}` as the manifest describes it"
            )
        return TensorInfo(name, info.dtype, info.shape, file, info.offset, info.nbytes)

    def _read(self, info: TensorInfo, start: int, nbytes: int) -> memoryview:
        buffer = np.empty(nbytes, dtype=np.uint8).data
        self._read_into(info, start, buffer)
        return buffer

    def _read_into(self, info: TensorInfo, start: int, into: memoryview) -> None:
        if info.file not in self._fds:
            self._fds[info.file] = os.open(self.path / info.file, os.O_RDONLY)
        try:
            pread_into(self._fds[info.file], into, info.offset + start)
        except EOFError as error:
            raise DamagedArtifactError(f"`{self.path / info.file}` is damaged: {error}") from None


def _check_remap(path: Path, stored: StoredLayer, table: npt.NDArray[np.int32]) -> None:
    """Every entry points into a pool of the right role, so that no reader has to check."""
    for p, pools in enumerate(stored.pools):
        for entry in table[:, :, p].reshape(-1, 4):
            center = _pool(pools, int(entry[CENTER_POOL]), "center")
            ok = center is not None and 0 <= entry[CENTER_SLOT] < center.slots
            if entry[RESIDUAL_POOL] != NONE:
                residual = _pool(pools, int(entry[RESIDUAL_POOL]), "residual")
                ok = ok and residual is not None and 0 <= entry[RESIDUAL_SLOT] < residual.slots
            if not ok:
                raise DamagedArtifactError(
                    f"`{path / REMAP}` points `{stored.layer.name}` outside its pools"
                )


def _pool(pools: tuple[Pool, ...], index: int, role: str) -> Pool | None:
    found = pools[index] if 0 <= index < len(pools) else None
    return found if found is not None and found.role == role else None
