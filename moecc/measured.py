"""What a calibration measured, and the folder it is kept in.

A folder holds `measured.npz` with the small arrays, and a safetensors file a layer with the moments
of the experts' inputs, read one expert at a time. It is filled under another name and renamed when
it is whole; its files are hashed when it is opened.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moecc.architecture import Architecture, ExpertLayer, Projection
from moecc.errors import SourceError
from moecc.files import current_umask, sha256_file
from moecc.parallel import ordered, worker_pool
from moecc.tensorfile import TensorInfo, build_header, pread_full, pwrite_full

Array = npt.NDArray[np.float64]
ARRAYS = ("frequency", "output_norm", "sensitivity", "output", "cka")
LARGEST_BLOCK = 512
LEAST_BYTES = 2 << 30  # of moments that are always allowed
_SMALL, _HASHES, _LOCK = "measured.npz", "sha256", "lock"


def weights(layer: ExpertLayer) -> tuple[Projection, ...]:
    """The projections that have inputs, in the order of the arrays' last axis: biases have none."""
    return tuple(p for p in layer.projections if not p.is_bias)


def choose_block(architecture: Architecture, variants: int) -> int:
    """Rows of a block of moments: a power of two, 512 unless all moments take too much.

    They may take 2 GiB, or a quarter of the bytes of the sources' experts if that is more.
    """
    layers = architecture.layers
    allowed = sum(a.exact_bytes * a.num_experts for a in layers) * variants // 4
    block = LARGEST_BLOCK
    while block > 1 and moment_bytes(architecture, variants, block) > max(LEAST_BYTES, allowed):
        block //= 2
    return block


def moment_bytes(architecture: Architecture, variants: int, block: int) -> int:
    """Bytes of all moments, float32, in blocks of `block`."""
    return sum(
        4 * variants * layer.num_experts * int(np.prod(block_shape(projection, block)))
        for layer in architecture.layers
        for projection in weights(layer)
    )


def block_shape(projection: Projection, block: int) -> tuple[int, int, int]:
    """`[blocks, B, B]` of the moments of a projection's inputs; the last block may be padded."""
    size = min(projection.matrix[1], block)
    return (-(-projection.matrix[1] // size), size, size)


class MomentFiles:
    """The moments of all layers, in a safetensors file a layer.

    A tensor a projection: float32 `[experts, variants, blocks, B, B]`, under the projection's name.
    """

    def __init__(
        self, folder: Path, architecture: Architecture, variants: int, block: int, *, new: bool
    ) -> None:
        """`new` creates the files, full of zeros. Raises OSError, ValueError for wrong ones."""
        self._fds: list[int] = []
        self._infos: list[dict[str, TensorInfo]] = []
        self.files: list[Path] = []
        try:
            for number, layer in enumerate(architecture.layers):
                path = folder / f"layer-{number:05d}.safetensors"
                header, infos = build_header(
                    [
                        (p.name, "F32", (layer.num_experts, variants, *block_shape(p, block)))
                        for p in weights(layer)
                    ],
                    path.name,
                )
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL if new else os.O_RDONLY
                self._fds.append(os.open(path, flags | os.O_CLOEXEC, 0o666))
                self._infos.append(infos)
                self.files.append(path)
                size = max(i.offset + i.nbytes for i in infos.values())
                if new:
                    os.ftruncate(self._fds[-1], size)
                    pwrite_full(self._fds[-1], header, 0)
                elif os.fstat(self._fds[-1]).st_size != size:
                    raise ValueError(f"`{path.name}` has another size")
        except BaseException:
            self.close()
            raise

    def write(self, layer: int, projection: str, variant: int, moments: Tensor) -> None:
        """Keeps float32 `[experts, blocks, B, B]` of one variant."""
        for expert, values in enumerate(moments.cpu()):
            data = values.contiguous().view(-1).view(torch.uint8).numpy().data
            offset, nbytes = self._place(layer, projection, expert, variant)
            assert len(data) == nbytes
            pwrite_full(self._fds[layer], data, offset)

    def read(self, layer: int, projection: str, expert: int, variant: int) -> Tensor:
        """Float32 `[blocks, B, B]`."""
        offset, nbytes = self._place(layer, projection, expert, variant)
        raw = pread_full(self._fds[layer], nbytes, offset)
        shape = self._infos[layer][projection].shape[2:]
        return torch.frombuffer(raw, dtype=torch.float32).view(shape)

    def _place(self, layer: int, projection: str, expert: int, variant: int) -> tuple[int, int]:
        info = self._infos[layer][projection]
        experts, variants = info.shape[:2]
        if not (0 <= expert < experts and 0 <= variant < variants):
            raise IndexError(f"expert {expert} of variant {variant}")
        nbytes = info.nbytes // (experts * variants)
        return info.offset + (expert * variants + variant) * nbytes, nbytes

    def close(self) -> None:
        """Closes the files; harmless twice."""
        while self._fds:
            os.close(self._fds.pop())


@dataclass(slots=True, eq=False)
class Measured:
    """What the experts of V variants do to their own texts, per layer of E experts.

    P counts the weight projections of a layer (`weights(layer)`); a token is one of the variant's
    own calibration text.

    Attributes:
        frequency: float64 `[E, V]`, fraction of the tokens that are routed to an expert.
        output_norm: float64 `[E, V]`, mean over all tokens of g^2 |f(x)|^2.
        sensitivity: float64 `[E, V, P]`, nats of KL divergence a predicted token for each unit of
            a weight error weighted by the moments; 0 where no token is routed.
        output: float64 `[E, V, V]`, distance of what the experts add to the hidden states.
        cka: float64 `[E, V, V]`, 1 - linear CKA of the experts' outputs.
        block: rows of a block of moments.
    """

    frequency: list[Array]
    output_norm: list[Array]
    sensitivity: list[Array]
    output: list[Array]
    cka: list[Array]
    block: int
    _moments: MomentFiles
    _temporary: Workspace | None = None

    def moments(self, layer: int, projection: str, expert: int, variant: int) -> Tensor:
        """Float32 `[blocks, B, B]`: sum over routed tokens of g^2 x x^T, over all tokens.

        The blocks lie on the diagonal along in-features; the last one may be padded with zeros.
        Raises KeyError, IndexError for what is not there.
        """
        return self._moments.read(layer, projection, expert, variant)

    def close(self) -> None:
        """Closes the files, and removes them if they are in no cache; harmless twice."""
        self._moments.close()
        if self._temporary is not None:
            self._temporary.discard()
            self._temporary = None

    def __enter__(self) -> Measured:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def load(folder: Path, architecture: Architecture, variants: int, block: int) -> Measured | None:
    """What a folder of the cache holds; None if that is not whole."""
    try:
        with np.load(folder / _SMALL, allow_pickle=False) as arrays:
            found = {
                k: [arrays[f"{k}{i}"] for i in range(len(architecture.layers))] for k in ARRAYS
            }
            hashes = arrays[_HASHES].tolist()
        if _shapes(found) != _expected(architecture, variants):
            return None
        files = MomentFiles(folder, architecture, variants, block, new=False)
    except Exception:  # numpy and zipfile raise all kinds for a damaged file
        return None
    try:
        if _hash(files.files) == hashes:
            return Measured(*_arrays(found), block, files)
    except OSError:
        pass
    files.close()
    return None


class Workspace:
    """A folder that is being filled; `finish` gives it its name in the cache.

    Without a cache that can be written it is a temporary one, that goes away with the result.
    """

    def __init__(self, cache: Path | None, key: str, need: int) -> None:
        """`need` is the bytes it will take. Raises SourceError where no disk has them."""
        self._final = cache / f"{key}.calibration" if cache is not None else None
        self._lock = -1
        for parent in (cache, Path(tempfile.gettempdir())):
            with suppress(OSError):
                if parent is not None and self._create(parent, need):
                    return
        raise SourceError(
            f"the calibration needs {need / 2**30:.1f} GiB on disk, which are not there",
            "free some, or set MOECC_CACHE to a folder on a larger disk",
        )

    def _create(self, parent: Path, need: int) -> bool:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_left_over(parent)
        if shutil.disk_usage(parent).free < need:
            return False
        self.folder = Path(tempfile.mkdtemp(prefix=".calibration-", dir=parent))
        self._lock = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        if self._final is not None and parent != self._final.parent:
            self._final = None
        return True

    def finish(self, found: dict[str, list[Array]], files: MomentFiles, block: int) -> Measured:
        """Writes the small arrays and gives the folder its name."""
        arrays: dict[str, Any] = {f"{k}{i}": a for k, v in found.items() for i, a in enumerate(v)}
        arrays[_HASHES] = np.array(_hash(files.files))
        with open(self.folder / _SMALL, "wb") as file:
            np.savez(file, **arrays)
        kept = self._final is not None and self._rename(self._final)
        if kept:
            self._unlock()
        temporary = None if kept else self
        return Measured(*_arrays(found), block, files, temporary)

    def _rename(self, final: Path) -> bool:
        try:
            for path in self.folder.iterdir():
                fd = os.open(path, os.O_RDONLY)
                os.fsync(fd)
                os.close(fd)
            os.chmod(self.folder, 0o777 & ~current_umask())
            shutil.rmtree(final, ignore_errors=True)  # a damaged one
            (self.folder / _LOCK).unlink()
            os.rename(self.folder, final)
        except OSError:
            return False
        return True

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder for what is only needed meanwhile."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            yield Path(folder)

    def discard(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._unlock()

    def _unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _remove_left_over(parent: Path) -> None:
    """Removes folders of processes that were killed: nobody holds their locks."""
    for folder in parent.glob(".calibration-*"):
        with suppress(OSError):
            fd = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(fd)


def _hash(paths: Sequence[Path]) -> list[str]:
    with worker_pool() as pool:
        return list(ordered(pool, sha256_file, paths))


def _arrays(
    found: dict[str, list[Array]],
) -> tuple[list[Array], list[Array], list[Array], list[Array], list[Array]]:
    a, b, c, d, e = (found[name] for name in ARRAYS)
    return a, b, c, d, e


def _shapes(found: dict[str, list[Array]]) -> dict[str, list[tuple[int, ...]]]:
    return {name: [a.shape for a in arrays] for name, arrays in found.items()}


def _expected(architecture: Architecture, v: int) -> dict[str, list[tuple[int, ...]]]:
    layers = architecture.layers
    single: list[tuple[int, ...]] = [(a.num_experts, v) for a in layers]
    pairs: list[tuple[int, ...]] = [(a.num_experts, v, v) for a in layers]
    each: list[tuple[int, ...]] = [(a.num_experts, v, len(weights(a))) for a in layers]
    return dict(zip(ARRAYS, (single, single, each, pairs, pairs), strict=True))
