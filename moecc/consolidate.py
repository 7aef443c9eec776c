"""The pipeline: recipe -> sources -> similarity -> plan -> merge -> artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moecc.build import Build
from moecc.manifest import MANIFEST
from moecc.opened import Opened, Planned, Progress, silent
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
    try:
        planned = plan_recipe(opened, saved=saved_plan, device=device, on_progress=on_progress)
        Build(planned, device, on_progress).write(out, force)
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
