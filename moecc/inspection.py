"""Similarity of an artifact's experts: what the compiler measured, or measured anew."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from moecc.architecture import Projection
from moecc.artifact import Artifact
from moecc.errors import ArtifactError, DamagedArtifactError
from moecc.manifest import SIMILARITY
from moecc.similarity import METRICS, Array, distance, gram_matrix
from moecc.tensorfile import parse_object


def layer_distances(artifact: Artifact, layer: int, metric: str) -> list[list[float]]:
    """Distances between the sources' experts of one index, `[experts][pairs of variants]`.

    Raises ArtifactError if the metric was not measured.
    """
    path = artifact.path / SIMILARITY
    try:
        measured = parse_object(path.read_bytes())
        if metric not in measured:
            raise ArtifactError(
                f"`{metric}` was not measured for this artifact",
                f"there is {', '.join(sorted(measured))}",
            )
        distances = np.array(measured[metric][layer], dtype=np.float64)
        count = len(artifact.variants)
        expected = (artifact.layers[layer].layer.num_experts, count * (count - 1) // 2)
        if distances.shape != expected:
            raise ValueError(f"shape {distances.shape} is not {expected}")
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise DamagedArtifactError(f"`{path}` is damaged: {error}") from None
    found: list[list[float]] = distances.tolist()
    return found


def all_pairs_distances(artifact: Artifact, layer: int, metric: str, device: str) -> Array:
    """Distances `[n, n]` of all n = variants x experts of a layer, as the artifact serves them."""
    if metric not in METRICS or metric == "delta-cosine":
        raise ArtifactError(
            f"`--all-pairs` cannot use the metric `{metric}`", "use l2, cosine or cka"
        )
    stored = artifact.layers[layer].layer
    artifact.check_layer(layer)

    def read(variant: str, expert: int, projection: Projection, span: range) -> torch.Tensor:
        return artifact.rows(variant, layer, projection.name, expert, span)

    readers = [
        partial(read, variant, expert)
        for variant in artifact.variants
        for expert in range(stored.num_experts)
    ]
    return distance(gram_matrix(stored, readers, metric, device), metric)
