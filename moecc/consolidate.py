"""The pipeline: recipe -> sources -> similarity -> plan -> merge -> artifact."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from moecc.build import Build
from moecc.files import to_json, write_file
from moecc.manifest import MANIFEST
from moecc.opened import Opened, Planned, Progress, silent
from moecc.parallel import in_background
from moecc.plan import Inputs, make_plan, restore_plan
from moecc.recipe import Recipe
from moecc.similarity import cache_folder, measure
from moecc.sources import Source, resolve
from moecc.staging import check_output
from moecc.variants import open_variants


def run(
    recipe: Recipe,
    out: Path,
    *,
    saved_plan: Any = None,
    force: bool = False,
    device: str = "cpu",
    on_progress: Progress = silent,
) -> Planned:
    """Consolidates a recipe into the folder `out`.

    Killed at any point and called again, it resumes. Raises MoeccError, leaving nothing behind.
    """
    check_output(out, force=force, replaceable=MANIFEST)
    opened = open_recipe(recipe, on_progress=on_progress)
    hashes = in_background(_content_hashes, [v.checkpoint.source for v in opened.variants])
    try:
        planned = plan_recipe(opened, saved=saved_plan, device=device, on_progress=on_progress)
        Build(planned, hashes, device, on_progress).write(out, force)
    finally:
        opened.close()
    return planned


def open_recipe(recipe: Recipe, *, weights: bool = True, on_progress: Progress = silent) -> Opened:
    """Finds the sources (downloading from the Hub if `weights`) and checks that they fit.

    Raises SourceError.
    """
    sources: list[Source] = []
    for number, variant in enumerate(recipe.variants):
        on_progress("sources", number, len(recipe.variants))
        sources.append(resolve(variant.name, variant.source, recipe.folder, weights=weights))
    on_progress("sources", len(sources), len(sources))
    architecture, variants = open_variants(sources)
    return Opened(recipe, architecture, tuple(variants))


def plan_recipe(
    opened: Opened,
    *,
    saved: Any = None,
    device: str = "cpu",
    on_progress: Progress = silent,
) -> Planned:
    """Measures the similarity of the experts (once: it is cached) and plans.

    `saved` is the JSON of a plan to use instead of a new one. Raises SourceError for weights that
    are not finite, PlanError for a budget or a saved plan that does not fit.
    """
    recipe = opened.recipe
    similarity = measure(
        opened.architecture,
        opened.variants,
        cka=recipe.similarity.metric == "cka",
        device=device,
        cache=cache_folder(),
        on_progress=lambda done, total: on_progress("similarity", done, total),
    )
    inputs = Inputs(
        architecture=opened.architecture,
        variants=opened.names,
        distances=similarity.distances(recipe.similarity.metric, opened.base),
        errors=similarity.distances("l2"),
        distinct=similarity.distinct,
        non_expert_bytes=opened.non_expert_bytes,
        merge=recipe.merge,
    )
    if saved is None:
        plan = make_plan(inputs, recipe.budget, recipe.match)
    else:
        plan = restore_plan(saved, inputs)
    return Planned(opened, similarity, plan)


def _content_hashes(sources: Sequence[Source]) -> list[dict[str, str]]:
    """Per variant, file -> SHA-256 of its weights; kept in the cache of measurements."""
    return [_cached_hashes(source) for source in sources]


def _cached_hashes(source: Source) -> dict[str, str]:
    path = cache_folder() / f"{source.fingerprint}.sha256.json"
    try:
        cached = json.loads(path.read_bytes())
        if isinstance(cached, dict) and all(isinstance(v, str) for v in cached.values()):
            return cached
    except (OSError, ValueError):
        pass
    hashes = source.content_hashes()
    with suppress(OSError):  # a cache that cannot be written is done without
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, to_json(hashes))
    return hashes
