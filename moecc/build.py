"""Writes a planned artifact: bank, variants, manifest, card; staged, journaled, resumable."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moecc import __version__
from moecc.alignment import to_own_index
from moecc.bank import LayerBank, coded_groups, lay_out
from moecc.blocks import load_solvers
from moecc.card import model_card
from moecc.errors import ArtifactError, PlanError
from moecc.files import current_umask, to_json
from moecc.forms import PLAIN
from moecc.manifest import (
    CARD,
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    NON_EXPERT,
    SIMILARITY,
    describe_layer,
    seal,
    variant_file,
)
from moecc.merging import Merging
from moecc.opened import Planned, Progress, Studied
from moecc.parallel import MAX_WORKERS, column_workers, worker_pool
from moecc.plan import significant
from moecc.rates import importance
from moecc.recipe import format_size
from moecc.staging import Staging
from moecc.writer import (
    Place,
    Seen,
    shard_layers,
    write_layer,
    write_remap_file,
    write_variant,
)

DTYPES = {"bfloat16": "BF16", "float16": "F16"}
SPARE_BYTES = 1 << 20

Entry = dict[str, Any]  # of the staging journal


class Build:
    """One planned artifact on its way to disk.

    Raises PlanError if 16-bit centers would lose bits of the sources' dtype unasked.
    """

    def __init__(
        self,
        planned: Planned,
        hashes: Future[list[dict[str, str]]],
        device: str,
        on_progress: Progress,
    ) -> None:
        self.planned = planned
        self.hashes = hashes  # of the sources' weights
        self.opened = planned.opened
        self.recipe = planned.opened.recipe
        self.device = device
        self.banks = _lay_out(planned)
        self.shards = shard_layers(self.banks, self.recipe.output.shard_size)
        self._progress = on_progress
        self._total = self.opened.non_expert_bytes + self.opened.expert_bytes
        self._done = 0

    def write(self, out: Path, force: bool) -> None:
        """Writes everything and publishes it; raises ArtifactError if the disk is too small."""
        with Staging(out, self._job(), force=force, replaceable=MANIFEST) as staging:
            self._check_space(staging)
            layers = self._write_layers(staging)
            variants = self._write_variants(staging)
            self._write_manifest(staging, layers, variants, self.hashes.result())
            staging.publish()

    def _job(self) -> str:
        """What a partial folder must have been written for, to be gone on with."""
        job = [
            __version__,
            self.recipe.to_dict(),
            self.planned.plan.to_json(),
            [v.fingerprint for v in self.opened.variants],
        ]
        return hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()

    def _check_space(self, staging: Staging) -> None:
        needed = SPARE_BYTES + self.opened.non_expert_bytes
        needed += max(v.non_expert_bytes for v in self.opened.variants)  # while one is spooled
        needed += sum(shard.nbytes for shards in self.shards for shard in shards)
        present = sum(f.stat().st_size for f in staging.folder.rglob("*") if f.is_file())
        free = shutil.disk_usage(staging.folder).free + present
        if needed > free:
            raise ArtifactError(
                f"not enough disk for `{staging.out}`: "
                f"it needs up to {format_size(needed)}, {format_size(free)} are free",
                "free some space, choose another folder, or a smaller `budget`",
            )

    def _advance(self, nbytes: int) -> None:
        self._done += nbytes
        self._progress("artifact", self._done, self._total)

    def _write_layers(self, staging: Staging) -> list[Entry]:
        """The journal's entry of every layer, with the squared error of its coded experts."""
        entries: list[Future[Entry]] = []
        load_solvers(self.device)
        # While a layer's files are synced and hashed, the next one is coded.
        with worker_pool(self._workers()) as pool, ThreadPoolExecutor(1) as finisher:
            for index, bank in enumerate(self.banks):
                entries.append(self._write_layer(staging, index, bank, pool, finisher))
                if index > 0:
                    entries[index - 1].result()
            return [entry.result() for entry in entries]

    def _workers(self) -> int:
        if self.recipe.merge.method != "joint":
            return MAX_WORKERS
        layers = self.opened.architecture.layers
        return column_workers(max(p.params for a in layers for p in a.projections), self.device)

    def _write_layer(
        self,
        staging: Staging,
        index: int,
        bank: LayerBank,
        pool: ThreadPoolExecutor,
        finisher: ThreadPoolExecutor,
    ) -> Future[Entry]:
        step, layer = f"layer {bank.layer.name}", bank.layer
        entry = staging.finished(step)
        if entry is not None:
            self._advance(layer.exact_bytes * layer.num_experts * len(self.opened.variants))
            return finisher.submit(dict, entry)
        error = write_layer(
            staging.folder, self.shards[index], bank, self._merging(index), pool, self._advance
        )
        files = [shard.file for shard in self.shards[index]]
        return finisher.submit(staging.record, step, files, error)

    def _merging(self, index: int) -> Merging:
        layer, measured = self.opened.architecture.layers[index], self.planned.studied.measured
        return Merging(
            variants=self.opened.variants,
            base=self.opened.base,
            merge=self.recipe.merge,
            index=index,
            layer=layer,
            device=self.device,
            measured=measured,
            importance=None if measured is None else importance(measured, index, layer),
        )

    def _write_variants(self, staging: Staging) -> list[Entry]:
        """The journal's entry of every variant, the base first."""
        base = self.opened.variants[self.opened.base]
        seen: Seen = {}
        entries = []
        for variant in (base, *(v for v in self.opened.variants if v is not base)):
            step = f"variant {variant.name}"
            entry = staging.finished(step)
            if entry is None:
                files = write_variant(staging.folder, variant, base, seen, self._advance)
                places = [[*content, p.owner, p.delta] for content, p in seen.items()]
                entry = staging.record(step, files, places)
            else:
                self._advance(variant.non_expert_bytes)
                seen = {(n, sha): Place(owner, delta) for n, sha, owner, delta in entry["data"]}
            entries.append(entry)
        return entries

    def _write_manifest(
        self,
        staging: Staging,
        layers: list[Entry],
        variants: list[Entry],
        hashes: list[dict[str, str]],
    ) -> None:
        folder = staging.folder
        similarity = _similarity_json(self.planned.studied)
        (folder / SIMILARITY).write_bytes(to_json(similarity, indent=None))
        small = [SIMILARITY, write_remap_file(folder, self.banks)]
        entries = [*layers, *variants, staging.record("tables", small)]
        files = {name: known for entry in entries for name, known in entry["files"].items()}
        manifest = self._manifest(layers, hashes, files)
        (folder / CARD).write_text(model_card(manifest), encoding="utf-8")
        files.update(staging.record("card", [CARD])["files"])
        for path in [folder, *folder.rglob("*")]:
            os.chmod(path, (0o777 if path.is_dir() else 0o666) & ~current_umask())
        (folder / MANIFEST).write_bytes(seal(manifest))
        staging.record("manifest", [MANIFEST])

    def _manifest(
        self, layers: list[Entry], hashes: list[dict[str, str]], files: dict[str, Entry]
    ) -> dict[str, Any]:
        plan, opened = self.planned.plan, self.opened
        errors = [entry["data"] for entry in layers]
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "moecc_version": __version__,
            "architecture": opened.architecture.class_name,
            "base": opened.names[opened.base],
            "variants": [
                _describe_variant(v, h) for v, h in zip(opened.variants, hashes, strict=True)
            ],
            "recipe": self.recipe.to_dict(),
            "plan": plan.to_json(),
            "layers": [
                {
                    **describe_layer(bank.layer, tuple(p.pools for p in bank.projections)),
                    "slots": layer.slots,
                    "bytes": layer.nbytes,
                    "expected_error": layer.expected_error,
                    "measured_error": _relative(error, gram),
                }
                for bank, layer, error, gram in zip(
                    self.banks, plan.layers, errors, self.planned.similarity.gram, strict=True
                )
            ],
            "experts": {
                "bytes": plan.expert_bytes,
                "params": plan.expert_params,
                "ratio": round(plan.ratio, 6),
                "slots_per_layer": [layer.slots for layer in plan.layers],
            },
            "non_expert": {
                "bytes": opened.non_expert_bytes,
                "stored_bytes": sum(
                    files[variant_file(name, NON_EXPERT)]["size"] for name in opened.names
                ),
            },
            "budget": plan.budget,
            "files": files,
        }


def _describe_variant(variant: Any, hashes: dict[str, str]) -> dict[str, Any]:
    source = variant.checkpoint.source
    return {
        "name": variant.name,
        "source": source.reference,
        "commit": source.commit,
        "license": source.license,
        "weights": hashes,
        "quantized": variant.checkpoint.quantized,
        "dropped": list(variant.layout.dropped),
        "non_expert_bytes": variant.non_expert_bytes,
    }


def _lay_out(planned: Planned) -> list[LayerBank]:
    dtype = _center_dtype(planned)
    number = 0
    banks = []
    layers = planned.opened.architecture.layers
    distinct = planned.similarity.distinct
    parts = zip(layers, planned.plan.layers, distinct, strict=True)
    for index, (layer, plan, labels) in enumerate(parts):
        bank = lay_out(layer, plan, labels, dtype, number)
        banks.append(replace(bank, remap=to_own_index(bank.remap, planned.opened.variants, index)))
        number += coded_groups(plan)
    return banks


def _center_dtype(planned: Planned) -> str:
    """The dtype of 16-bit centers; a cast that loses bits has to be asked for by name."""
    recipe = planned.opened.recipe
    if recipe.output.dtype != "auto":
        return DTYPES[recipe.output.dtype]
    dtypes = {
        p.dtype
        for layer in planned.opened.architecture.layers
        for p in layer.projections
        if not p.is_bias
    }
    needed = any(
        form.center == PLAIN
        for layer in planned.plan.layers
        for groups in layer.experts
        for group in groups
        for forms in group.forms
        for form in forms
    )
    if needed and dtypes not in ({"BF16"}, {"F16"}):
        raise PlanError(
            f"16-bit centers would lose bits of {' and '.join(sorted(dtypes))} experts",
            "allow it with `output: {dtype: bfloat16}`, or choose `merge.center: 8bit`",
        )
    return "F16" if dtypes == {"F16"} else "BF16"


def _relative(squared_error: float, gram: Any) -> float:
    """Root mean squared error relative to the weights', over all variants of a layer."""
    total = float(np.einsum("evv->", gram))
    return significant((squared_error / total) ** 0.5) if total else 0.0


def _similarity_json(studied: Studied) -> dict[str, Any]:
    """metric -> per layer, per expert, the distances of the pairs of variants in order."""
    metrics = ["l2", "cosine"]
    metrics += ["delta-cosine"] if studied.opened.recipe.base else []
    metrics += ["cka"] if studied.similarity.cka_gram is not None else []
    metrics += ["cka", "output"] if studied.measured is not None else []
    left, right = np.triu_indices(len(studied.opened.variants), 1)
    return {
        metric: [
            [[significant(float(d)) for d in expert[left, right]] for expert in layer]
            for layer in studied.distances(metric)
        ]
        for metric in metrics
    }
