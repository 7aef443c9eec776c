"""Plans: which experts share a slot, in what form, and what that takes.

The variants' experts of one layer and index are split into groups. A group of one distinct expert
can be stored exactly; any other is *coded*: one center and a residual, or none, for each member.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from moecc.architecture import Architecture, ExpertLayer
from moecc.coding import distortion
from moecc.errors import PlanError
from moecc.forms import EXACT, Form, smallest_form
from moecc.recipe import Budget, Merge, Params
from moecc.similarity import Array, Labels

PLAN_VERSION = 1


@dataclass(frozen=True, slots=True, order=True)
class Group:
    """Variants (by index) that share the center of one expert; `coded` says how it is stored.

    `forms` are those of the members, per weight projection; empty while groups are being made of
    a recipe whose form is fixed, and where `coded` is false.
    """

    members: tuple[int, ...]
    coded: bool
    forms: tuple[tuple[Form, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """Per expert its groups, sorted by first member; with sizes and the error to expect.

    Attributes:
        expected_error: root mean squared error of the layer's expert weights, relative to their
            root mean square, over all variants.
    """

    experts: tuple[tuple[Group, ...], ...]
    slots: int
    nbytes: int
    expected_error: float


@dataclass(frozen=True, slots=True)
class Plan:
    """Every group of every layer, and what it costs."""

    variants: tuple[str, ...]
    merge: Merge
    layers: tuple[LayerPlan, ...]
    expert_bytes: int
    expert_params: int  # of one variant
    non_expert_bytes: int  # of all variants
    budget: str
    layout: str  # fingerprint of the architecture the plan was made for
    loss: float | None = None  # expected, nats of KL divergence a token; None if not calibrated

    @property
    def ratio(self) -> float:
        """Expert bytes over two bytes for each expert parameter of one variant."""
        return self.expert_bytes / (2 * self.expert_params)

    def to_json(self) -> dict[str, Any]:
        used = {f for x in self.layers for e in x.experts for g in e for p in g.forms for f in p}
        number = {form: i for i, form in enumerate(sorted(used))}
        layers = [
            {
                "experts": [[self._group(g, number) for g in groups] for groups in layer.experts],
                "slots": layer.slots,
                "bytes": layer.nbytes,
                "expected_error": layer.expected_error,
            }
            for layer in self.layers
        ]
        return {
            "plan_version": PLAN_VERSION,
            "variants": list(self.variants),
            "merge": asdict(self.merge),
            "layers": layers,
            "expert_bytes": self.expert_bytes,
            "expert_params": self.expert_params,
            "non_expert_bytes": self.non_expert_bytes,
            "budget": self.budget,
            "layout": self.layout,
            **({"forms": [form.name for form in number]} if self.merge.planned else {}),
            **({"loss": self.loss} if self.loss is not None else {}),
        }

    def _group(self, group: Group, number: dict[Form, int]) -> list[Any]:
        """Its members, then whether it is coded, or the numbers of its planned forms."""
        planned = group.coded and self.merge.planned
        forms = [[number[form] for form in forms] for forms in group.forms]
        return [*group.members, forms if planned else group.coded]


def group_bytes(layer: ExpertLayer, labels: npt.NDArray[np.int64], group: Group) -> int:
    """Bytes of a group with its forms; `labels` `[V]` tell the distinct experts.

    Biases are kept for each of them.
    """
    kinds = {int(labels[m]): i for i, m in reversed(list(enumerate(group.members)))}
    biases = sum(p.exact_bytes for p in layer.projections if p.is_bias)
    matrices = [p for p in layer.projections if not p.is_bias]
    total = len(kinds) * biases
    if not group.coded:
        return total + sum(p.exact_bytes for p in matrices)
    for projection, forms in zip(matrices, group.forms, strict=True):
        total += forms[0].center_bytes(projection)
        total += sum(forms[i].residual_bytes(projection) for i in kinds.values())
    return total


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a plan is made from.

    Attributes:
        distances: by the recipe's metric, per layer `[experts, variants, variants]`.
        errors: the relative L2 distances of the same shape, for the error to expect.
        distinct: per layer `[experts, variants]`, see similarity.py.
        non_expert_bytes: of all variants.
    """

    architecture: Architecture
    variants: tuple[str, ...]
    distances: Sequence[Array]
    errors: Sequence[Array]
    distinct: Sequence[Labels]
    non_expert_bytes: int
    merge: Merge


def same_form(layer: ExpertLayer, group: Group, form: Form) -> Group:
    """The group with one form for everything, if it is coded."""
    matrices = sum(not p.is_bias for p in layer.projections)
    forms = ((form,) * len(group.members),) * matrices if group.coded else ()
    return replace(group, forms=forms)


Groups = dict[tuple[int, int], list[Group]]  # (layer, expert) -> its groups


def assemble(inputs: Inputs, groups: Groups, budget: str, loss: float | None = None) -> Plan:
    """The plan of some groups that have their forms."""
    layers = tuple(
        _layer_plan(inputs, index, [sorted(groups[index, e]) for e in range(layer.num_experts)])
        for index, layer in enumerate(inputs.architecture.layers)
    )
    return Plan(
        variants=inputs.variants,
        merge=inputs.merge,
        layers=layers,
        expert_bytes=sum(layer.nbytes for layer in layers),
        expert_params=inputs.architecture.expert_params,
        non_expert_bytes=inputs.non_expert_bytes,
        budget=budget,
        layout=layout_fingerprint(inputs.architecture),
        loss=loss,
    )


def _layer_plan(inputs: Inputs, index: int, experts: list[list[Group]]) -> LayerPlan:
    layer, distinct = inputs.architecture.layers[index], inputs.distinct[index]
    placed = [(e, group) for e, groups in enumerate(experts) for group in groups]
    squared = sum(_squared_error(inputs, index, *at) for at in placed)
    return LayerPlan(
        experts=tuple(map(tuple, experts)),
        slots=len(placed),
        nbytes=sum(group_bytes(layer, distinct[e], group) for e, group in placed),
        expected_error=significant((squared / (layer.num_experts * len(inputs.variants))) ** 0.5),
    )


def _squared_error(inputs: Inputs, index: int, expert: int, group: Group) -> float:
    """Summed over members: D_residual * (spread + D_center), Gaussian rounding errors."""
    if not group.coded:
        return 0.0
    apart = inputs.errors[index][expert][np.ix_(group.members, group.members)] ** 2
    # |x_i - mean|^2 = sum_j |x_i - x_j|^2 / n - half their mean; one member as center: their mean
    spread = apart.mean(1) - (apart.mean() / 2 if inputs.merge.method != "representative" else 0)
    matrices = [p.params for p in inputs.architecture.layers[index].projections if not p.is_bias]
    total = 0.0
    for params, forms in zip(matrices, group.forms, strict=True):
        for form, own in zip(forms, spread, strict=True):
            if form != EXACT:
                kept = distortion(form.residual_bits) * (own + distortion(form.center_bits))
                total += params / sum(matrices) * float(kept)
    return total


def parse_plan(value: Any, inputs: Inputs) -> tuple[Groups, str, float | None]:
    """The groups, the budget and the loss of a plan in JSON.

    Raises PlanError if it is not a plan, or was made for other variants, shapes or codings, or
    would store experts once that differ.
    """
    try:
        if value["plan_version"] != PLAN_VERSION:
            raise ValueError(f"plan_version is {value['plan_version']}, not {PLAN_VERSION}")
        merge = _merge(value["merge"])
        made_for = (tuple(value["variants"]), value["layout"], merge)
        forms = [_form(name) for name in value["forms"]] if merge.planned else None
        layers = [
            [[_group(g, forms) for g in groups] for groups in layer["experts"]]
            for layer in value["layers"]
        ]
        budget, loss = str(value["budget"]), value.get("loss") if merge.planned else None
        if loss is not None and (type(loss) not in (int, float) or not 0 <= loss < math.inf):
            raise ValueError(f"`{loss}` is not a loss")
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise PlanError(f"the file is not a plan: {type(error).__name__}: {error}") from None
    if made_for != (inputs.variants, layout_fingerprint(inputs.architecture), inputs.merge):
        raise PlanError(
            "the plan was made for other variants, shapes or `merge` settings than the recipe's",
            "make a new one with `--dry-run --plan-out`",
        )
    return _checked(layers, inputs), budget, loss


def _merge(value: Any) -> Merge:
    """A recipe's `merge` from its JSON; TypeError if it is none."""
    values = {**value}
    params = values.get("params")
    return Merge(**(values | {"params": None if params is None else Params(**params)}))


def _form(name: Any) -> Form:
    if type(name) is not str:
        raise ValueError(f"`{name}` is not the name of a form")
    return Form.parse(name)


def _group(value: Any, forms: Sequence[Form] | None) -> Group:
    """A group from its JSON, `[variant, ..., coded]` or `[variant, ..., numbers of forms]`.

    `forms` are those of a planned merge, which every coded group then has.
    """
    if type(value) is not list or any(type(m) is not int for m in value[:-1]) or len(value) < 2:
        raise ValueError(f"`{value}` is not a group")
    *members, last = value
    if last is False or (last is True and forms is None):
        return Group(tuple(sorted(members)), last)
    if forms is None or not _is_numbers(last, len(members), len(forms)):
        raise ValueError(f"`{value}` has no form for every member")
    order = sorted(range(len(members)), key=members.__getitem__)
    chosen = tuple(tuple(forms[own[i]] for i in order) for own in last)
    return Group(tuple(sorted(members)), True, chosen)


def _is_numbers(value: Any, members: int, forms: int) -> bool:
    """True for a list of lists, each with a number below `forms` for every member."""
    return (
        type(value) is list
        and bool(value)
        and all(type(own) is list and len(own) == members for own in value)
        and all(type(i) is int and 0 <= i < forms for own in value for i in own)
    )


def _checked(layers: list[list[list[Group]]], inputs: Inputs) -> Groups:
    """The groups, if they place every expert and lose nothing."""
    everyone, architecture = list(range(len(inputs.variants))), inputs.architecture
    if len(layers) > len(architecture.layers):
        raise PlanError(f"the plan has {len(layers)} layers, not {len(architecture.layers)}")
    found: Groups = {}
    for index, layer in enumerate(architecture.layers):
        experts = layers[index] if index < len(layers) else []
        if len(experts) != layer.num_experts:
            raise PlanError(f"the plan does not place every expert of `{layer.name}`")
        for expert, groups in enumerate(experts):
            name = f"expert {expert} of `{layer.name}`"
            if sorted(m for g in groups for m in g.members) != everyone:
                raise PlanError(f"the plan does not place every variant of {name}")
            for group in groups:
                _check_group(group, layer, inputs.distinct[index][expert], name)
            found[index, expert] = sorted(groups)
    return found


def _check_group(
    group: Group, layer: ExpertLayer, labels: npt.NDArray[np.int64], name: str
) -> None:
    exact = not group.coded or any(form == EXACT for own in group.forms for form in own)
    if exact and len({int(labels[m]) for m in group.members}) > 1:
        raise PlanError(f"the plan stores {name} once for variants that differ")
    matrices = sum(not p.is_bias for p in layer.projections)
    if group.forms and len(group.forms) != matrices:
        raise PlanError(f"the plan has no form for every projection of {name}")
    if any(len({form.center for form in own}) > 1 for own in group.forms):
        raise PlanError(f"the plan gives {name} several centers")


def smallest_bytes(architecture: Architecture, count: int, merge: Merge) -> int:
    """The least expert bytes any plan can reach if no two variants share an expert's bits."""
    total = 0
    labels, alone = np.arange(count), Group((0,), False)
    for layer in architecture.layers:
        shared = same_form(layer, Group(tuple(range(count)), True), smallest_form(merge))
        each = count * group_bytes(layer, labels, alone)
        total += layer.num_experts * min(group_bytes(layer, labels, shared), each)
    return total


def layout_fingerprint(architecture: Architecture) -> str:
    """Hex SHA-256 of names, shapes and dtypes: what a saved plan must match."""
    text = json.dumps(asdict(architecture), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def expert_target(budget: Budget, inputs: Inputs) -> int:
    if budget.ratio is not None:
        # In fractions of the decimal number: 1.35 is not 1.3499999.
        return int(Fraction(str(budget.ratio)) * 2 * inputs.architecture.expert_params)
    assert budget.nbytes is not None
    return budget.nbytes - inputs.non_expert_bytes


def impossible(budget: Budget, inputs: Inputs, smallest: int) -> PlanError:
    least = smallest_budget(budget, inputs.architecture, inputs.non_expert_bytes, smallest)
    return PlanError(
        f"a budget of `{budget.text}` cannot be met; the smallest possible one is `{least}`",
        "raise `budget`, or choose fewer bits for `merge.center` and `merge.residual`",
    )


def smallest_budget(
    budget: Budget, architecture: Architecture, non_expert_bytes: int, expert_bytes: int
) -> str:
    """The least budget that admits so many expert bytes, in the unit of `budget`."""
    if budget.ratio is not None:
        return f"{-(-expert_bytes * 10000 // (2 * architecture.expert_params)) / 10000:g}x"
    return f"{expert_bytes + non_expert_bytes} B"


def significant(value: float) -> float:
    """Six significant digits: what is written must not depend on the last bits of a sum."""
    return float(f"{value:.6g}")
