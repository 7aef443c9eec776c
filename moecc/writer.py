"""Fills an artifact's files: the expert bank by tiles and threads, then what each variant keeps."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from moecc import nonexpert
from moecc.bank import ABSENT, Job, LayerBank, Pool, ProjectionBank
from moecc.checkpoint import TORCH_DTYPES, tensor_bytes
from moecc.files import to_json
from moecc.lowrank import LowRank
from moecc.manifest import (
    NON_EXPERT,
    REMAP,
    TENSORS,
    expert_file,
    remap_tensor,
    variant_file,
    variant_folder,
)
from moecc.merging import Merging
from moecc.parallel import ordered
from moecc.tensorfile import TensorInfo, build_header, pwrite_full
from moecc.variants import OpenVariant

Tensor = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of the bank and the tensors it holds, in order."""

    file: str
    tensors: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        header, infos = build_header(self.tensors)
        return len(header) + sum(info.nbytes for info in infos.values())


def shard_layers(banks: Sequence[LayerBank], shard_size: int) -> list[list[Shard]]:
    """Per layer its files, none larger than `shard_size` unless one tensor is."""
    shards, number = [], 0
    for bank in banks:
        parts: list[list[Tensor]] = []
        for tensor in sorted(bank.tensors(), key=lambda t: -TORCH_DTYPES[t[1]].itemsize):
            if parts and Shard("", (*parts[-1], tensor)).nbytes <= shard_size:
                parts[-1].append(tensor)
            else:
                parts.append([tensor])
        shards.append([Shard(expert_file(number + i), tuple(p)) for i, p in enumerate(parts)])
        number += len(parts)
    return shards


def write_layer(
    folder: Path,
    shards: Sequence[Shard],
    bank: LayerBank,
    merging: Merging,
    pool: ThreadPoolExecutor,
    on_bytes: Callable[[int], None],
) -> float:
    """Writes a layer's files; returns the squared error of its coded experts, over all variants.

    Memory holds a few tiles a worker. `on_bytes` gets the source bytes of each tile when done.
    """
    tasks = [
        (projection, job, span)
        for projection in bank.projections
        for job in projection.jobs
        for span in merging.spans(projection, job)
    ]
    error = 0.0
    with _open_shards(folder, shards) as slots:

        def run(task: tuple[ProjectionBank, Job, range]) -> float:
            return _Tile(bank, *task, merging, slots).write()

        for task, squared in zip(tasks, ordered(pool, run, tasks), strict=True):
            error += squared
            projection, job, span = task
            row = projection.projection.exact_bytes // projection.projection.matrix[0]
            on_bytes(row * len(span) * sum(times for _, times in job.members))
    return error


class _Slots:
    """Writes rows into the slots of open shards."""

    def __init__(self) -> None:
        self.tensors: dict[str, tuple[int, TensorInfo]] = {}

    def write(self, name: str, row: int, rows_in_all: int, part: torch.Tensor) -> None:
        """Writes rows from `row` on, counted over all slots of the tensor."""
        fd, info = self.tensors[name]
        start, data = info.offset + row * (info.nbytes // rows_in_all), tensor_bytes(part)
        pwrite_full(fd, data, start)
        # Starts writing it to the disk, without waiting: the sync at the end is short then.
        os.posix_fadvise(fd, start, data.nbytes, os.POSIX_FADV_DONTNEED)


@contextmanager
def _open_shards(folder: Path, shards: Sequence[Shard]) -> Iterator[_Slots]:
    """Files of their final size with their headers in place."""
    slots, fds = _Slots(), []
    try:
        for shard in shards:
            header, infos = build_header(shard.tensors)
            fd = os.open(folder / shard.file, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
            fds.append(fd)
            os.ftruncate(fd, len(header) + sum(info.nbytes for info in infos.values()))
            pwrite_full(fd, header, 0)
            slots.tensors |= {name: (fd, info) for name, info in infos.items()}
        yield slots
    finally:
        for fd in fds:
            os.close(fd)


@dataclass(frozen=True, slots=True)
class _Tile:
    """Some rows of one group's projection: read from its members, coded, written."""

    bank: LayerBank
    projection: ProjectionBank
    job: Job
    span: range
    merging: Merging
    slots: _Slots

    def write(self) -> float:
        job, projection = self.job, self.projection.projection
        if not job.coded:
            self._put(job.center, [self.merging.exact_rows(projection, job, self.span)])
            return 0.0
        pool = self._pool(job.center)
        center = pool.packed or TORCH_DTYPES[pool.coding]
        assert not isinstance(center, LowRank), "only residuals are"
        residuals = self.projection.residuals(job)
        coded = self.merging.code(projection, job, self.span, center=center, residuals=residuals)
        self._put(job.center, coded.center)
        for at, parts in zip(job.residuals, coded.residuals, strict=False):
            if at != ABSENT:
                self._put(at, parts)
        return coded.squared_error

    def _pool(self, at: tuple[int, int]) -> Pool:
        return self.projection.pools[at[0]]

    def _put(self, at: tuple[int, int], parts: Sequence[torch.Tensor]) -> None:
        pool, projection = self._pool(at), self.projection.projection
        tensors = pool.tensors(self.bank.layer.name, projection)
        for (name, _, shape), part in zip(tensors, parts, strict=True):
            # Right factors have rows of their own, and come with the first tile, which is all.
            rows = projection.matrix[0] if projection.is_bias else shape[1]
            self.slots.write(name, at[1] * rows + self.span.start, pool.slots * rows, part.cpu())


def write_remap_file(folder: Path, banks: Sequence[LayerBank]) -> str:
    """Writes the remap tables of all layers; returns the file."""
    header, _ = build_header(
        [(remap_tensor(bank.layer.name), "I32", bank.remap.shape) for bank in banks]
    )
    tables = [bank.remap.astype("<i4").tobytes() for bank in banks]
    (folder / REMAP).write_bytes(b"".join([header, *tables]))
    return REMAP


@dataclass(frozen=True, slots=True)
class Place:
    """Which variant's file holds a tensor, and whether as a delta to the base's."""

    owner: str
    delta: bool


Seen = dict[tuple[str, str], Place]  # (canonical name, content hash) -> where it is


def write_variant(
    folder: Path,
    variant: OpenVariant,
    base: OpenVariant,
    seen: Seen,
    on_bytes: Callable[[int], None],
) -> list[str]:
    """Writes what a variant keeps of its own, and adds it to `seen`; returns the files.

    The base variant must come first.
    """
    name = variant.name
    (folder / variant_folder(name)).mkdir(parents=True, exist_ok=True)
    files = [variant_file(name, file) for file in (NON_EXPERT, TENSORS)]
    for file in variant.checkpoint.source.side_files:
        target = folder / variant_file(name, file)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(variant.checkpoint.source.file(file), target)
        files.append(variant_file(name, file))
    with tempfile.TemporaryFile(dir=folder) as spool:
        stored, table = _spool(variant, base, seen, spool, on_bytes)
        with (folder / variant_file(name, NON_EXPERT)).open("wb") as whole:
            whole.write(build_header(stored)[0])
            spool.seek(0)
            shutil.copyfileobj(spool, whole, 8 << 20)
    source = {
        t.name: [t.dtype, list(t.shape), t.info.file]
        for t in variant.checkpoint.tensors.values()
        if t.name not in variant.layout.dropped
    }
    document = {"source": source, "non_expert": table}
    (folder / variant_file(name, TENSORS)).write_bytes(to_json(document, indent=None))
    return files


def _spool(
    variant: OpenVariant,
    base: OpenVariant,
    seen: Seen,
    spool: IO[bytes],
    on_bytes: Callable[[int], None],
) -> tuple[list[Tensor], dict[str, list[object]]]:
    """Appends every tensor that is not stored yet; returns those, and the table of all."""
    checkpoint = variant.checkpoint
    stored: list[Tensor] = []
    table: dict[str, list[object]] = {}
    for name, disk in variant.layout.non_expert.items():
        tensor = checkpoint.tensors[disk]
        content = (name, nonexpert.sha256(checkpoint.stream(disk)))
        if content not in seen:
            kept = _spool_tensor(variant, base, name, spool)
            stored.append(kept)
            seen[content] = Place(variant.name, kept[1:] != (tensor.dtype, tensor.shape))
        place = seen[content]
        table[name] = [disk, tensor.dtype, list(tensor.shape), place.owner, place.delta]
        on_bytes(tensor.nbytes)
    return stored, table


def _spool_tensor(variant: OpenVariant, base: OpenVariant, name: str, spool: IO[bytes]) -> Tensor:
    """Appends a tensor as its compressed delta where that is smaller, else as it is."""
    checkpoint, disk = variant.checkpoint, variant.layout.non_expert[name]
    tensor = checkpoint.tensors[disk]
    start = spool.tell()
    base_disk = base.layout.non_expert.get(name)
    base_tensor = base.checkpoint.tensors[base_disk] if base_disk else None
    if (
        variant is not base
        and base_tensor is not None
        and (base_tensor.dtype, base_tensor.shape) == (tensor.dtype, tensor.shape)
    ):
        size = nonexpert.compress_delta(
            checkpoint.stream(disk),
            base.checkpoint.stream(base_tensor.name),
            TORCH_DTYPES[tensor.dtype].itemsize,
            spool,
            tensor.nbytes,
        )
        if size is not None:
            return name, "U8", (size,)
        spool.seek(start)
        spool.truncate()
    spool.writelines(checkpoint.stream(disk))
    return name, tensor.dtype, tensor.shape
