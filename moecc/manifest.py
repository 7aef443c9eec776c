"""The manifest of an artifact and the names of its files (docs/format.md)."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from moecc.architecture import ExpertLayer, Projection
from moecc.bank import Pool
from moecc.checkpoint import TORCH_DTYPES
from moecc.errors import ArtifactError, DamagedArtifactError
from moecc.files import to_json
from moecc.tensorfile import parse_object

FORMAT = "moecc"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
REMAP = "remap.safetensors"
SIMILARITY = "similarity.json"
CARD = "README.md"
TENSORS = "tensors.json"
NON_EXPERT = "non-expert.safetensors"
MAX_JSON_BYTES = 512 << 20

_VARIANT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_NUMBER = (int, float)
_NUMBER_OR_NULL = (int, float, type(None))
_TEXT_OR_NULL = (str, type(None))
_SCHEMA: dict[str, Any] = {
    "moecc_version": str,
    "architecture": str,
    "base": str,
    "budget": str,
    "variants": [
        {
            "name": str,
            "source": str,
            "commit": _TEXT_OR_NULL,
            "license": _TEXT_OR_NULL,
            "non_expert_bytes": int,
        }
    ],
    "recipe": {
        "merge": {"method": str, "center": str, "residual": str, "group": (int, str)},
        "similarity": {"metric": str},
    },
    "layers": [
        {
            "name": str,
            "num_experts": int,
            "slots": int,
            "bytes": int,
            "measured_error": _NUMBER,
            "projections": [
                {
                    "name": str,
                    "shape": [int],
                    "dtype": str,
                    "transposed": bool,
                    "pools": [{"role": str, "coding": str, "slots": int}],
                }
            ],
        }
    ],
    "experts": {"bytes": int, "params": int, "ratio": _NUMBER, "slots_per_layer": [int]},
    "non_expert": {"bytes": int, "stored_bytes": int},
    "files": {str: {"size": int, "sha256": str}},
}
# Of `quality`, which is there once `moecc eval --save` has measured it.
_QUALITY: dict[str, Any] = {
    "variants": {
        str: {
            "perplexity": _NUMBER,
            "reference_perplexity": _NUMBER_OR_NULL,
            "ratio": _NUMBER_OR_NULL,
            "kl": _NUMBER_OR_NULL,
            "top1": _NUMBER_OR_NULL,
            "standard_error": _NUMBER_OR_NULL,
            "tokens": int,
            "windows": int,
        }
    },
    "mean_ratio": _NUMBER_OR_NULL,
    "mean_kl": _NUMBER_OR_NULL,
    "worst_ratio": _NUMBER_OR_NULL,
    "window": (int, type(None)),
    "dtype": str,
}
_ROUGE: dict[str, Any] = {
    "rouge1": _NUMBER,
    "reference_rouge1": _NUMBER_OR_NULL,
    "difference": _NUMBER_OR_NULL,
    "interval": (list, type(None)),
}


def expert_file(number: int) -> str:
    return f"experts-{number:05d}.safetensors"


def variant_folder(name: str) -> str:
    return f"variants/{name}"


def variant_file(name: str, file: str) -> str:
    return f"{variant_folder(name)}/{file}"


def remap_tensor(layer: str) -> str:
    return f"{layer}.remap"


def seal(manifest: dict[str, Any]) -> bytes:
    """The bytes of manifest.json: the manifest with the hash of itself."""
    return to_json({**manifest, "manifest_sha256": _own_hash(manifest)})


def _own_hash(manifest: dict[str, Any]) -> str:
    plain = {k: v for k, v in manifest.items() if k != "manifest_sha256"}
    return hashlib.sha256(to_json(plain)).hexdigest()


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """A layer of experts and the pools of each of its projections."""

    layer: ExpertLayer
    pools: tuple[tuple[Pool, ...], ...]

    def projection(self, name: str) -> tuple[int, Projection]:
        for index, projection in enumerate(self.layer.projections):
            if projection.name == name:
                return index, projection
        raise KeyError(name)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the artifact in a folder, checked against its hash and its schema.

    Raises ArtifactError if the folder is no artifact or a newer moecc made it, and
    DamagedArtifactError if the manifest is not what moecc wrote.
    """
    if not path.is_dir():
        raise ArtifactError(f"`{path}` is not a folder", "give the folder `consolidate` wrote")
    if not (path / MANIFEST).is_file():
        raise ArtifactError(
            f"`{path}` is not a moecc artifact: it has no `{MANIFEST}`",
            "give the folder `consolidate` wrote",
        )
    manifest = read_object(path / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise ArtifactError(f"`{path / MANIFEST}` does not describe a moecc artifact")
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise ArtifactError(
            f"`{path}` has format version {version}, this moecc reads {FORMAT_VERSION}",
            "upgrade moecc, or consolidate again",
        )
    if manifest.get("manifest_sha256") != _own_hash(manifest):
        raise DamagedArtifactError(f"`{path / MANIFEST}` is damaged: its hash differs")
    try:
        _check(manifest, _SCHEMA, "the manifest")
        _check_names([v["name"] for v in manifest["variants"]], manifest["base"])
        for name in manifest["files"]:
            safe_path(name)
        if "quality" in manifest:
            _check_quality(manifest["quality"], [v["name"] for v in manifest["variants"]])
    except ValueError as error:
        raise DamagedArtifactError(f"`{path / MANIFEST}` is damaged: {error}") from None
    return manifest


def _check_names(variants: list[str], base: str) -> None:
    if len(set(variants)) < len(variants) or base not in variants:
        raise ValueError("a variant's name comes twice, or the base is none of them")
    if not all(map(_VARIANT_NAME.fullmatch, variants)):
        raise ValueError("a variant has a name that no folder can have")


def _check_quality(quality: Any, variants: list[str]) -> None:
    _check(quality, _QUALITY, "`quality`")
    if not quality["variants"].keys() <= set(variants):
        raise ValueError("`quality` has a variant that the artifact has not")
    for variant in quality["variants"].values():
        if "rouge" in variant:
            _check(variant["rouge"], _ROUGE, "`rouge`")
            _check(variant["rouge"]["interval"] or [], [_NUMBER], "`interval`")


def read_object(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object from a file of the artifact; DamagedArtifactError if it is not one."""
    try:
        if path.stat().st_size > limit:
            raise DamagedArtifactError(f"`{path}` is larger than {limit} bytes")
        return parse_object(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DamagedArtifactError(f"`{path}` is damaged: {error}") from None
    except OSError as error:
        raise DamagedArtifactError(f"cannot read `{path}`: {error.strerror}") from None


def stored_layer(value: dict[str, Any]) -> StoredLayer:
    """A layer from the manifest; ValueError if moecc cannot read its shapes or codings."""
    projections, pools = [], []
    for p in value["projections"]:
        shape = tuple(int(n) for n in p["shape"])
        if len(shape) not in (1, 2) or p["dtype"] not in TORCH_DTYPES:
            raise ValueError(f"projection `{p['name']}` has shape {shape}, dtype `{p['dtype']}`")
        projections.append(Projection(str(p["name"]), shape, p["dtype"], bool(p["transposed"])))
        pools.append(tuple(Pool(q["role"], q["coding"], int(q["slots"])) for q in p["pools"]))
        for pool in pools[-1]:
            if pool.packed is None and pool.coding not in TORCH_DTYPES:
                raise ValueError(f"unknown coding `{pool.coding}`")
    layer = ExpertLayer(str(value["name"]), int(value["num_experts"]), tuple(projections))
    return StoredLayer(layer, tuple(pools))


def describe_layer(layer: ExpertLayer, pools: tuple[tuple[Pool, ...], ...]) -> dict[str, Any]:
    """A layer as the manifest holds it; `stored_layer` reads it."""
    return {
        "name": layer.name,
        "num_experts": layer.num_experts,
        "projections": [
            {
                "name": p.name,
                "shape": list(p.shape),
                "dtype": p.dtype,
                "transposed": p.transposed,
                "pools": [{"role": q.role, "coding": q.coding, "slots": q.slots} for q in found],
            }
            for p, found in zip(layer.projections, pools, strict=True)
        ],
    }


def checked_dtype(value: Any) -> str:
    """A safetensors dtype that moecc knows; ValueError for anything else."""
    if value not in TORCH_DTYPES:
        raise ValueError(f"unknown dtype `{value}`")
    return str(value)


def checked_shape(value: Any) -> tuple[int, ...]:
    """A shape; ValueError for anything else."""
    _check(value, [int], "a shape")
    return tuple(value)


def _check(value: Any, schema: Any, where: str) -> None:
    """Raises ValueError where a JSON value is not as the schema has it.

    A schema is a type, a list or an object of schemas, or a tuple of alternatives; integers are
    not negative. Keys that the schema does not name are left alone.
    """
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            raise ValueError(f"{where} is not an object")
        for key in value if str in schema else schema:
            if key not in value:
                raise ValueError(f"{where} has no `{key}`")
            _check(value[key], schema.get(str, schema.get(key)), f"`{key}` of {where}")
    elif isinstance(schema, list):
        if not isinstance(value, list):
            raise ValueError(f"{where} is not a list")
        for i, item in enumerate(value):
            _check(item, schema[0], f"entry {i} of {where}")
    elif not isinstance(value, schema) or (isinstance(value, bool) and schema is not bool):
        raise ValueError(f"{where} has the wrong type")
    elif isinstance(value, int) and not 0 <= value < 2**63:
        raise ValueError(f"{where} is out of range")


def safe_path(name: str) -> str:
    """A path inside the artifact; raises ValueError for any other."""
    path = PurePosixPath(name)
    # Only one spelling: in `variants/a//etc/x` the part after the prefix is an absolute path.
    if name != str(path) or path.is_absolute() or {".", ".."} & {*path.parts, name}:
        raise ValueError(f"`{name}` is not a path inside the artifact")
    if "\\" in name or "\0" in name:
        raise ValueError(f"`{name}` is not a path inside the artifact")
    return name
