"""One variant of an artifact as the checkpoint it came from: same names, layout and shards."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from moecc.architecture import Layout, map_tensors
from moecc.artifact import Artifact
from moecc.checkpoint import TORCH_DTYPES, LogicalTensor, Tile, tensor_bytes
from moecc.errors import ArtifactError, DamagedArtifactError, SourceError
from moecc.files import to_json
from moecc.manifest import TENSORS, variant_file, variant_folder
from moecc.skeleton import load_config, model_class
from moecc.staging import Staging
from moecc.tensorfile import TensorInfo, build_header, pwrite_full
from moecc.variants import TILE_ELEMENTS

CONFIG = "config.json"
MARK = "moecc.json"  # says what a checkpoint was exported from, and that it may be replaced
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class VariantState:
    """Every tensor of one variant's checkpoint, tensor by tensor.

    Raises ArtifactError for an unknown variant, DamagedArtifactError for inconsistent tables.
    """

    def __init__(self, artifact: Artifact, variant: str) -> None:
        self.artifact = artifact
        self.variant = variant
        self.tensors = {
            name: LogicalTensor(name, dtype, shape, TensorInfo(name, dtype, shape, file, 0, 0))
            for name, (dtype, shape, file) in artifact.source_tensors(variant).items()
        }
        path = artifact.path / variant_file(variant, CONFIG)
        try:
            config = json.loads(path.read_bytes())
            architecture, layout = map_tensors(variant, config, self.tensors)
        except (OSError, ValueError, SourceError) as error:
            raise DamagedArtifactError(f"`{path}` does not fit the artifact: {error}") from None
        if architecture.layers != tuple(stored.layer for stored in artifact.layers):
            raise DamagedArtifactError(f"`{path}` does not fit the artifact's experts")
        # Quantized sources were dequantized: what is exported is a plain checkpoint.
        self.config = {k: v for k, v in config.items() if k != "quantization_config"}
        self._tiles = _tiles_by_tensor(layout)
        self._canonical = {disk: name for name, disk in layout.non_expert.items()}

    def pieces(self, name: str) -> Iterator[tuple[int, bytes | memoryview]]:
        """(byte offset, bytes) of parts that make up a tensor, row-major."""
        if name in self._canonical:
            offset = 0
            for block in self.artifact.stream(self.variant, self._canonical[name]):
                yield offset, block
                offset += len(block)
            return
        size = TORCH_DTYPES[self.tensors[name].dtype].itemsize
        for layer, projection, expert, tile in self._tiles[name]:
            for part in _parts(tile):
                span = range(part.row, part.row + part.rows)
                rows = self.artifact.rows(self.variant, layer, projection, expert, span)
                yield part.offset * size, self._bytes(rows, part, name)

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor, as the source has it."""
        found = self.tensors[name]
        raw = bytearray(found.nbytes)
        if not raw:
            return torch.empty(found.shape, dtype=TORCH_DTYPES[found.dtype])
        for offset, block in self.pieces(name):
            raw[offset : offset + len(block)] = block
        return torch.frombuffer(raw, dtype=TORCH_DTYPES[found.dtype]).view(found.shape)

    def _bytes(self, rows: torch.Tensor, tile: Tile, name: str) -> memoryview:
        """The tile's bytes as they lie in the source's tensor."""
        values = rows.to(TORCH_DTYPES[self.tensors[name].dtype])
        out = torch.empty(tile.rows * tile.cols, dtype=values.dtype)
        out.as_strided((tile.rows, tile.cols), (tile.row_stride, tile.col_stride)).copy_(values)
        return tensor_bytes(out)


def export(
    artifact: Artifact,
    variant: str,
    out: Path,
    *,
    force: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes a variant's checkpoint to the folder `out`, which appears whole or not at all.

    A private expert and everything outside the experts is bit-equal to the source; a coded expert
    is what the artifact stands for. Raises ArtifactError.
    """
    state = VariantState(artifact, variant)
    files: dict[str, list[LogicalTensor]] = {}
    for tensor in sorted(state.tensors.values(), key=lambda t: t.name):
        files.setdefault(tensor.info.file, []).append(tensor)
    total = sum(t.nbytes for t in state.tensors.values())
    job = f"export {variant} of {artifact.manifest['manifest_sha256']}"
    with Staging(out, job, force=force, replaceable=MARK) as staging:
        _check_space(staging, total)
        done = 0
        for file, tensors in sorted(files.items()):
            for count in _write_file(staging.folder / file, tensors, state):
                done += count
                on_progress(done, total)
            staging.record(file, [file])
        _write_side_files(artifact, variant, state, staging.folder)
        if list(files) != [SINGLE]:
            (staging.folder / INDEX).write_bytes(_index(state, total))
        origin = {"artifact": artifact.manifest["manifest_sha256"], "variant": variant}
        (staging.folder / MARK).write_bytes(to_json(origin))
        staging.publish()


def _write_file(path: Path, tensors: list[LogicalTensor], state: VariantState) -> Iterator[int]:
    """Writes one shard; yields the bytes written as they are."""
    header, infos = build_header([(t.name, t.dtype, t.shape) for t in tensors])
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        pwrite_full(fd, header, 0)
        for tensor in tensors:
            for offset, block in state.pieces(tensor.name):
                pwrite_full(fd, block, infos[tensor.name].offset + offset)
                yield len(block)
    finally:
        os.close(fd)


def _write_side_files(artifact: Artifact, variant: str, state: VariantState, out: Path) -> None:
    prefix = variant_folder(variant) + "/"
    for name in sorted(artifact.files):
        file = name.removeprefix(prefix)
        if not name.startswith(prefix) or file == TENSORS or file.endswith(".safetensors"):
            continue
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        try:
            data = (artifact.path / name).read_bytes()
        except OSError as error:
            raise DamagedArtifactError(
                f"cannot read `{artifact.path / name}`: {error.strerror}"
            ) from None
        (out / file).write_bytes(data)
    stored = json.loads((out / CONFIG).read_bytes())
    if stored != state.config:
        (out / CONFIG).write_bytes(to_json(state.config, indent=2))


def _index(state: VariantState, total: int) -> bytes:
    weight_map = {name: tensor.info.file for name, tensor in state.tensors.items()}
    return to_json({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)


def _check_space(staging: Staging, total: int) -> None:
    free = shutil.disk_usage(staging.folder).free
    if total > free:
        raise ArtifactError(
            f"not enough disk for `{staging.out}`: it needs {total} bytes, {free} are free"
        )


_Piece = tuple[int, str, int, Tile]  # layer, projection, expert, tile


def _tiles_by_tensor(layout: Layout) -> dict[str, list[_Piece]]:
    found: dict[str, list[_Piece]] = {}
    for (layer, projection), experts in layout.tiles.items():
        for expert, tiles in enumerate(experts):
            for tile in tiles:
                found.setdefault(tile.tensor, []).append((layer, projection, expert, tile))
    return found


def _parts(tile: Tile) -> Iterable[Tile]:
    """A tile cut into parts that are contiguous on disk; a transposed one stays whole."""
    if tile.row_stride != tile.cols or tile.col_stride != 1:
        return [tile]
    step = max(1, TILE_ELEMENTS // tile.cols)
    return [tile.narrow(start, min(start + step, tile.rows)) for start in range(0, tile.rows, step)]


def load_model(artifact: Artifact, variant: str, **options: Any) -> Any:
    """The variant as a transformers model on the CPU; `options` go to `from_pretrained`."""
    state = VariantState(artifact, variant)
    cls = model_class(variant, state.config)
    return cls.from_pretrained(
        None,
        config=load_config(variant, state.config),
        state_dict={name: state.tensor(name) for name in sorted(state.tensors)},
        **options,
    ).eval()
