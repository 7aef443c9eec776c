"""The pipeline: recipe -> sources -> similarity -> plan -> merge -> artifact."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from moecc.alignment import align
from moecc.build import Build
from moecc.calibration import calibrate
from moecc.files import to_json, write_file
from moecc.forms import candidate_forms
from moecc.grouping import make_plan, restore_plan
from moecc.manifest import MANIFEST
from moecc.opened import Opened, Planned, Progress, Studied, silent
from moecc.parallel import in_background
from moecc.plan import Inputs
from moecc.planning import plan_forms
from moecc.rates import RateSources, measure_rates
from moecc.recipe import Budget, Recipe
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
        studied = study(opened, device=device, on_progress=on_progress)
        try:
            planned = plan_studied(studied, saved=saved_plan)
            Build(planned, hashes, device, on_progress).write(out, force)
        finally:
            studied.close()
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


def study(opened: Opened, *, device: str = "cpu", on_progress: Progress = silent) -> Studied:
    """Measures all that plans are made from; alignment, calibration and similarity are cached.

    Raises SourceError for weights that are not finite, RecipeError for a calibration text that
    cannot be used.
    """

    def stage(name: str) -> Callable[[int, int], None]:
        return lambda done, total: on_progress(name, done, total)

    recipe, architecture, cache = opened.recipe, opened.architecture, cache_folder()
    if recipe.match.scope == "any-index":
        aligned = align(
            architecture,
            opened.variants,
            opened.base,
            device=device,
            cache=cache,
            on_progress=stage("alignment"),
        )
        opened = replace(opened, variants=aligned)
    similarity = measure(
        architecture,
        opened.variants,
        cka=recipe.similarity.metric == "cka" and recipe.calibration is None,
        device=device,
        cache=cache,
        on_progress=stage("similarity"),
    )
    measured = None
    if recipe.calibration is not None:
        measured = calibrate(
            architecture,
            opened.variants,
            recipe.calibration,
            recipe.calibration.files(recipe.folder),
            device=device,
            cache=cache,
            on_progress=stage("calibration"),
        )
    choices = None
    if recipe.merge.planned:
        sources = RateSources(
            architecture,
            opened.variants,
            similarity.distances("l2"),
            similarity.distinct,
            opened.base,
            measured,
        )
        forms = candidate_forms(recipe.merge)
        choices = tuple(measure_rates(sources, forms, device=device, on_progress=stage("rates")))
    return Studied(opened, similarity, measured, choices)


def plan_studied(studied: Studied, *, budget: Budget | None = None, saved: Any = None) -> Planned:
    """Plans for the recipe's budget, or another; `saved` is the JSON of a plan to use instead.

    Raises PlanError for a budget or a saved plan that does not fit.
    """
    opened, recipe = studied.opened, studied.opened.recipe
    budget = budget or recipe.budget
    inputs = Inputs(
        architecture=opened.architecture,
        variants=opened.names,
        distances=studied.distances(recipe.similarity.metric),
        errors=studied.similarity.distances("l2"),
        distinct=studied.similarity.distinct,
        non_expert_bytes=opened.non_expert_bytes,
        merge=recipe.merge,
    )
    if saved is not None:
        plan = restore_plan(saved, inputs)
    elif studied.choices is not None:
        plan = plan_forms(inputs, budget, studied.choices, studied.measured is not None)
    else:
        plan = make_plan(inputs, budget, recipe.match)
    return Planned(studied, plan)


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
