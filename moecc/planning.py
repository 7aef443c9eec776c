"""From rates to a plan: every expert in the forms that lose least within the budget."""

from __future__ import annotations

from collections.abc import Sequence

from moecc.allocate import Chosen, LayerChoices, allocate
from moecc.forms import EXACT
from moecc.plan import (
    Group,
    Groups,
    Inputs,
    Plan,
    assemble,
    expert_target,
    impossible,
    significant,
)
from moecc.recipe import Budget


def plan_forms(
    inputs: Inputs, budget: Budget, choices: Sequence[LayerChoices], calibrated: bool
) -> Plan:
    """The plan with the least expected loss.

    Raises PlanError, with the smallest budget that can be met, if this one cannot.
    """
    target = expert_target(budget, inputs)
    chosen = allocate(choices, target - _bias_bytes(inputs))
    groups: Groups = {
        (layer, expert): _groups(choices[layer], one)
        for layer, experts in enumerate(chosen)
        for expert, one in enumerate(experts)
    }
    loss = sum(one.loss for experts in chosen for one in experts) / len(inputs.variants)
    plan = assemble(inputs, groups, budget.text, significant(loss) if calibrated else None)
    if plan.expert_bytes > target:
        raise impossible(budget, inputs, plan.expert_bytes)
    return plan


def _bias_bytes(inputs: Inputs) -> int:
    """Bytes of all biases, which are kept whatever is chosen."""
    total = 0
    for layer, distinct in zip(inputs.architecture.layers, inputs.distinct, strict=True):
        biases = sum(p.exact_bytes for p in layer.projections if p.is_bias)
        total += biases * sum(len(set(labels.tolist())) for labels in distinct)
    return total


def _groups(choices: LayerChoices, chosen: Chosen) -> list[Group]:
    found = []
    for cluster, projections in zip(chosen.clusters, chosen.forms, strict=True):
        forms = tuple(tuple(choices.forms[f] for f in own) for own in projections)
        if all(form == EXACT for own in forms for form in own):
            found.append(Group(choices.clusters[cluster], False))
        else:
            found.append(Group(choices.clusters[cluster], True, forms))
    return sorted(found)
