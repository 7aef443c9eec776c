"""moecc.bank: random plans laid out, and everything counted again from the plan."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moecc.architecture import Architecture, ExpertLayer, Projection
from moecc.bank import (
    ABSENT,
    CENTER_POOL,
    CENTER_SLOT,
    NONE,
    RESIDUAL_POOL,
    RESIDUAL_SLOT,
    Job,
    LayerBank,
    Pool,
    coded_groups,
    lay_out,
)
from moecc.checkpoint import TORCH_DTYPES
from moecc.coding import Coding
from moecc.forms import EXACT, Form
from moecc.grouping import make_plan, restore_plan
from moecc.lowrank import LowRank
from moecc.merge import code_tile
from moecc.plan import Group, Inputs, LayerPlan, Plan, assemble
from moecc.recipe import Budget, Match, Merge
from moecc.similarity import Labels

PLENTY = Budget(None, 2**62, "plenty")
ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "U8": 1}

merges = st.builds(
    Merge,
    method=st.sampled_from(["mean", "representative"]),
    center=st.sampled_from([16, 8, 6, 5, 4]),
    residual=st.sampled_from([0, 1, 2, 3]),
    group=st.sampled_from([0, 32, 64, 128]),
)


@dataclass(frozen=True)
class Case:
    """A plan with random groups, and its layers laid out."""

    inputs: Inputs
    plan: Plan
    dtype: str
    banks: list[LayerBank]


def layers_of(plan: Plan, inputs: Inputs, dtype: str) -> list[LayerBank]:
    banks, number = [], 0
    for layer, planned, labels in zip(
        inputs.architecture.layers, plan.layers, inputs.distinct, strict=True
    ):
        banks.append(lay_out(layer, planned, labels, dtype, number))
        number += coded_groups(planned)
    return banks


def inputs_of(
    layers: list[ExpertLayer], count: int, merge: Merge, distinct: list[Labels] | None = None
) -> Inputs:
    zeros = [np.zeros((layer.num_experts, count, count)) for layer in layers]
    own = [np.tile(np.arange(count), (layer.num_experts, 1)) for layer in layers]
    return Inputs(
        architecture=Architecture("Synthetic", tuple(layers)),
        variants=tuple(f"v{i}" for i in range(count)),
        distances=zeros,
        errors=zeros,
        distinct=own if distinct is None else distinct,
        non_expert_bytes=0,
        merge=merge,
    )


def plan_of(inputs: Inputs, layers: list[list[list[list[Any]]]]) -> Plan:
    """A plan with exactly these groups."""
    value = make_plan(inputs, PLENTY, Match()).to_json()
    for layer, experts in zip(value["layers"], layers, strict=True):
        layer["experts"] = experts
    return restore_plan(value, inputs)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    count = draw(st.integers(2, 6))
    layers, distinct, groups = [], [], []
    for index in range(draw(st.integers(1, 3))):
        projections = []
        for p in range(draw(st.integers(1, 3))):
            rows, cols = draw(st.sampled_from([1, 3, 8])), draw(st.sampled_from([1, 16, 70, 130]))
            dtype = draw(st.sampled_from(["BF16", "F16", "F32"]))
            projections.append(Projection(f"w{p}", (rows, cols), dtype))
            if draw(st.booleans()):
                projections.append(Projection(f"w{p}_bias", (rows,), dtype))
        experts = draw(st.integers(1, 4))
        layers.append(ExpertLayer(f"layers.{index}", experts, tuple(projections)))
        kinds = st.lists(st.integers(0, count - 1), min_size=count, max_size=count)
        labels = [[k.index(kind) for kind in k] for k in (draw(kinds) for _ in range(experts))]
        distinct.append(np.array(labels))
        groups.append([])
        for own in labels:
            parts: dict[int, list[int]] = {}
            for variant, part in enumerate(draw(kinds)):
                parts.setdefault(part, []).append(variant)
            groups[-1].append(
                [
                    [*members, len({own[m] for m in members}) > 1 or draw(st.booleans())]
                    for members in parts.values()
                ]
            )
    inputs = inputs_of(layers, count, draw(merges), distinct)
    plan = plan_of(inputs, groups)
    dtype = draw(st.sampled_from(["BF16", "F16"]))
    return Case(inputs, plan, dtype, layers_of(plan, inputs, dtype))


def group_of(plan: LayerPlan, expert: int, variant: int) -> Group:
    (group,) = [g for g in plan.experts[expert] if variant in g.members]
    return group


def pool_of(case: Case, layer: int, projection: int, pool: int) -> Pool:
    pools = case.banks[layer].projections[projection].pools
    assert 0 <= pool < len(pools)
    return pools[pool]


# What every plan gives


@settings(deadline=None, max_examples=100)
@given(cases())
def test_everyone_has_one_center_and_maybe_a_residual(case: Case) -> None:
    merge, variants = case.inputs.merge, len(case.inputs.variants)
    for layer, (bank, plan) in enumerate(zip(case.banks, case.plan.layers, strict=True)):
        projections = bank.layer.projections
        assert bank.remap.dtype == np.int32
        assert bank.remap.shape == (variants, bank.layer.num_experts, len(projections), 4)
        for variant, expert, p in np.ndindex(bank.remap.shape[:3]):
            entry, projection = bank.remap[variant, expert, p], projections[p]
            group = group_of(plan, expert, variant)
            center = pool_of(case, layer, p, entry[CENTER_POOL])
            assert 0 <= entry[CENTER_SLOT] < center.slots
            assert center.role == "center"
            if not group.coded or projection.is_bias:
                assert center.coding == projection.dtype
            elif merge.center == 16:
                assert center.coding == case.dtype
            else:
                assert center.packed == Coding(merge.center, merge.group)
            if group.coded and merge.residual and not projection.is_bias:
                residual = pool_of(case, layer, p, entry[RESIDUAL_POOL])
                assert residual.role == "residual"
                assert residual.packed == Coding(merge.residual, merge.group)
                assert 0 <= entry[RESIDUAL_SLOT] < residual.slots
            else:
                assert entry[RESIDUAL_POOL] == entry[RESIDUAL_SLOT] == NONE


@settings(deadline=None, max_examples=100)
@given(cases())
def test_who_shares_what(case: Case) -> None:
    """A center with the whole group, a residual or bias only with the identical."""
    for layer, (bank, plan) in enumerate(zip(case.banks, case.plan.layers, strict=True)):
        labels = case.inputs.distinct[layer]
        for p, projection in enumerate(bank.layer.projections):
            centers: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
            residuals: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
            for variant, expert in np.ndindex(bank.remap.shape[:2]):
                entry = tuple(bank.remap[variant, expert, p].tolist())
                group = group_of(plan, expert, variant).members
                kind = (expert, *group, int(labels[expert][variant]))
                whole = kind if projection.is_bias else (expert, *group)
                centers.setdefault(entry[:2], set()).add(whole)
                if entry[2] != NONE:
                    residuals.setdefault(entry[2:], set()).add(kind)
            for owners in (centers, residuals):
                assert all(len(found) == 1 for found in owners.values())
            kinds = [
                len({int(labels[e][m]) for m in g.members}) if projection.is_bias else 1
                for e, groups in enumerate(plan.experts)
                for g in groups
            ]
            assert len(centers) == sum(kinds)


@settings(deadline=None, max_examples=100)
@given(cases())
def test_every_slot_of_every_pool_is_used_once(case: Case) -> None:
    for bank in case.banks:
        for p, found in enumerate(bank.projections):
            assert found.projection == bank.layer.projections[p]
            written = Counter(at for job in found.jobs for at in (job.center, *job.residuals))
            expected = {(i, s) for i, pool in enumerate(found.pools) for s in range(pool.slots)}
            assert set(written) == expected
            assert set(written.values()) == {1}
            table = bank.remap[:, :, p].reshape(-1, 2).tolist()
            assert {tuple(at) for at in table} - {(NONE, NONE)} == expected
            names = [(pool.role, pool.coding) for pool in found.pools]
            assert len(set(names)) == len(names)


@settings(deadline=None, max_examples=100)
@given(cases())
def test_jobs_are_what_the_remap_says(case: Case) -> None:
    for layer, bank in enumerate(case.banks):
        labels = case.inputs.distinct[layer]
        for p, found in enumerate(bank.projections):
            seen = []
            for job in found.jobs:
                own = labels[job.expert]
                if job.coded and case.inputs.merge.residual:
                    assert len(job.residuals) == len(job.members)
                else:
                    assert job.residuals == ()
                assert len({int(own[v]) for v, _ in job.members}) == len(job.members)
                for i, (first, times) in enumerate(job.members):
                    entries = bank.remap[:, job.expert, p]
                    users = [
                        v
                        for v in range(len(own))
                        if tuple(entries[v, :2]) == job.center and own[v] == own[first]
                    ]
                    assert (users[0], len(users)) == (first, times)
                    seen += [(job.expert, v) for v in users]
                    if job.residuals:
                        assert {tuple(entries[v, 2:].tolist()) for v in users} == {job.residuals[i]}
            assert sorted(seen) == sorted(np.ndindex(len(labels), labels.shape[1]))


@settings(deadline=None, max_examples=150)
@given(cases())
def test_the_tensors_take_the_bytes_of_the_plan(case: Case) -> None:
    total, names = 0, []
    for bank, plan in zip(case.banks, case.plan.layers, strict=True):
        size = 0
        for name, dtype, shape in bank.tensors():
            names.append(name)
            count = ITEM_BYTES[dtype]
            for n in shape:
                count *= n
            assert count > 0
            size += count
        assert size == plan.nbytes
        total += size
    assert total == case.plan.expert_bytes
    assert len(set(names)) == len(names)


@settings(deadline=None, max_examples=60)
@given(cases())
def test_the_tensors_hold_what_coding_a_group_gives(case: Case) -> None:
    """Dtype and shape of every part of a slot, as merge.py writes them."""
    merge = case.inputs.merge
    for bank in case.banks:
        for found in bank.projections:
            rows, cols = found.projection.matrix
            for job in found.jobs:
                pools = [found.pools[job.center[0]]]
                parts: list[tuple[torch.Tensor, ...]]
                if job.coded:
                    pools += [found.pools[pool] for pool, _ in job.residuals[:1]]
                    coding = Coding(merge.residual, merge.group) if merge.residual else None
                    tile = code_tile(
                        [torch.ones(rows, cols)],
                        [1],
                        wanted=torch.ones(rows, cols),
                        center=pools[0].packed or TORCH_DTYPES[pools[0].coding],
                        residuals=[coding],
                    )
                    parts = [tile.center, *(tile.residuals if coding else ())]
                else:
                    dtype = TORCH_DTYPES[found.projection.dtype]
                    parts = [(torch.zeros(found.projection.shape, dtype=dtype),)]
                for pool, tensors in zip(pools, parts, strict=True):
                    declared = pool.tensors(bank.layer.name, found.projection)
                    for (_, dtype, shape), tensor in zip(declared, tensors, strict=True):
                        assert TORCH_DTYPES[dtype] == tensor.dtype
                        assert shape == (pool.slots, *tensor.shape)


@settings(deadline=None, max_examples=100)
@given(cases())
def test_representatives_alternate_over_the_whole_model(case: Case) -> None:
    """The paper: group i of the model takes variant i mod V; the next best if it is elsewhere."""
    number, count = 0, len(case.inputs.variants)
    for layer, (bank, plan) in enumerate(zip(case.banks, case.plan.layers, strict=True)):
        for expert, groups in enumerate(plan.experts):
            labels = case.inputs.distinct[layer][expert]
            for group in groups:
                if not group.coded:
                    continue
                wanted = number % count
                if wanted not in group.members:
                    wanted = group.members[number % len(group.members)]
                for found in bank.projections:
                    if found.projection.is_bias:
                        continue
                    (job,) = [
                        j
                        for j in found.jobs
                        if j.expert == expert and j.members[0][0] in group.members
                    ]
                    variant, _ = job.members[job.representative]
                    assert labels[variant] == labels[wanted]
                number += 1
    assert number == sum(coded_groups(plan) for plan in case.plan.layers)


# By hand


def by_hand(merge: Merge) -> tuple[Inputs, Plan]:
    """Expert 0: 0 and 2 coded, 1 as it is. Expert 1: 0 and 1 are identical, all coded."""
    layer = ExpertLayer(
        "model.layers.3.mlp.experts",
        2,
        (Projection("w", (8, 100), "F16"), Projection("w_bias", (8,), "F32")),
    )
    inputs = inputs_of([layer], 3, merge, [np.array([[0, 1, 2], [0, 0, 2]])])
    return inputs, plan_of(inputs, [[[[0, 2, True], [1, False]], [[0, 1, 2, True]]]])


def test_a_layer_by_hand() -> None:
    inputs, plan = by_hand(Merge("mean", 4, 3, 64))
    (bank,) = layers_of(plan, inputs, "F16")
    weights, biases = bank.projections
    assert weights.pools == (
        Pool("center", "4bit-g64", 2),
        Pool("residual", "3bit-g64", 4),
        Pool("center", "F16", 1),
    )
    assert weights.jobs == (
        Job(0, ((0, 1), (2, 1)), True, (0, 0), ((1, 0), (1, 1)), 0, ((0,), (2,)), False),
        Job(0, ((1, 1),), False, (2, 0), (), 0, ((1,),), True),
        Job(1, ((0, 2), (2, 1)), True, (0, 1), ((1, 2), (1, 3)), 0, ((0, 1), (2,)), False),
    )
    assert biases.pools == (Pool("center", "F32", 5),)
    assert [(job.expert, job.members, job.coded) for job in biases.jobs] == [
        (0, ((0, 1),), False),
        (0, ((2, 1),), False),
        (0, ((1, 1),), False),
        (1, ((0, 2),), False),
        (1, ((2, 1),), False),
    ]
    assert bank.remap[:, :, 0].tolist() == [
        [[0, 0, 1, 0], [0, 1, 1, 2]],
        [[2, 0, NONE, NONE], [0, 1, 1, 2]],
        [[0, 0, 1, 1], [0, 1, 1, 3]],
    ]
    assert bank.remap[:, :, 1, CENTER_SLOT].tolist() == [[0, 3], [2, 3], [1, 4]]
    prefix = "model.layers.3.mlp.experts"
    assert bank.tensors() == [
        (f"{prefix}.w.center.4bit-g64.plane0", "U8", (2, 8, 52)),
        (f"{prefix}.w.center.4bit-g64.scales", "BF16", (2, 8, 2)),
        (f"{prefix}.w.residual.3bit-g64.plane0", "U8", (4, 8, 28)),
        (f"{prefix}.w.residual.3bit-g64.plane1", "U8", (4, 8, 16)),
        (f"{prefix}.w.residual.3bit-g64.scales", "BF16", (4, 8, 2)),
        (f"{prefix}.w.center.F16.weight", "F16", (1, 8, 100)),
        (f"{prefix}.w_bias.center.F32.weight", "F32", (5, 8)),
    ]


@pytest.mark.parametrize(("dtype", "pools"), [("F16", 1), ("BF16", 2)])
def test_plain_centers_share_the_pool_of_their_dtype(dtype: str, pools: int) -> None:
    """A 16-bit center is stored like an expert that was never merged, where the dtypes agree."""
    inputs, plan = by_hand(Merge("mean", 16, 0, 64))
    (bank,) = layers_of(plan, inputs, dtype)
    found = bank.projections[0].pools
    assert len(found) == pools
    assert sum(pool.slots for pool in found) == 3
    assert all(pool.packed is None for pool in found)
    assert (bank.remap[..., RESIDUAL_POOL] == NONE).all()


def test_representatives_by_hand() -> None:
    """Three variants, one group an expert: 0, 1, 2, 0, ... on through the next layer."""
    layers = [ExpertLayer(f"l{i}", 4, (Projection("w", (2, 16), "BF16"),)) for i in range(2)]
    inputs = inputs_of(layers, 3, Merge("representative", 16, 0, 64))
    everyone = [[0, 1, 2, True]]
    plan = plan_of(inputs, [[everyone] * 4] * 2)
    banks = layers_of(plan, inputs, "BF16")
    chosen = [job.representative for bank in banks for job in bank.projections[0].jobs]
    assert chosen == [0, 1, 2, 0, 1, 2, 0, 1]
    # Exact groups have no number.
    plan = plan_of(
        inputs, [[everyone, [[0, False], [1, 2, True]], [[0, 1, True], [2, False]], everyone]] * 2
    )
    banks = layers_of(plan, inputs, "BF16")
    chosen = [
        job.members[job.representative][0]
        for bank in banks
        for job in bank.projections[0].jobs
        if job.coded
    ]
    # 1 is in {1, 2}; 2 is not in {0, 1}: its first; then 0 again, and so on.
    assert chosen == [0, 1, 0, 0, 1, 2, 0, 1]


def test_a_representative_that_is_identical_to_another() -> None:
    """Variant 1 is wanted; it is stored as variant 0, which has the same bits."""
    layer = ExpertLayer("l", 1, (Projection("w", (2, 16), "BF16"),))
    inputs = inputs_of([layer], 3, Merge("representative", 16, 0, 64), [np.array([[0, 1, 1]])])
    plan = plan_of(inputs, [[[[0, 1, 2, True]]]])
    for number, index in [(0, 0), (1, 1), (2, 1), (3, 0)]:
        bank = lay_out(layer, plan.layers[0], inputs.distinct[0], "BF16", number)
        (job,) = bank.projections[0].jobs
        assert job.members == ((0, 1), (1, 2))
        assert job.representative == index


def test_the_order_of_slots_is_that_of_experts() -> None:
    layer = ExpertLayer("l", 3, (Projection("w", (2, 16), "BF16"),))
    inputs = inputs_of([layer], 2, Merge())
    plan = make_plan(inputs, PLENTY, Match())
    (bank,) = layers_of(plan, inputs, "BF16")
    assert bank.remap[:, :, 0, CENTER_SLOT].tolist() == [[0, 2, 4], [1, 3, 5]]
    assert bank.tensors() == [("l.w.center.BF16.weight", "BF16", (6, 2, 16))]
    assert bank.projections[0].pools == (Pool("center", "BF16", 6),)


def test_mixed_forms_by_hand() -> None:
    """Members with residuals of several codings or none, and a projection that is exact."""
    layer = ExpertLayer("l", 2, (Projection("w", (8, 64), "F16"), Projection("x", (4, 128), "F16")))
    merge = Merge("joint", "auto", "auto", 64)
    inputs = inputs_of([layer], 4, merge, [np.array([[0, 1, 2, 3], [0, 1, 1, 3]])])

    def group(members: tuple[int, ...], *forms: str) -> Group:
        """`forms` are those of a projection, separated by spaces."""
        parsed = tuple(tuple(map(Form.parse, own.split())) for own in forms)
        return Group(members, True, parsed)

    rank = "4bit-g64+rank4"
    groups = {
        (0, 0): [
            group((0, 1, 2, 3), f"4bit-g64 4bit-g64+2bit-g64 {rank} 4bit-g64", "16bit " * 4),
        ],
        (0, 1): [
            group((0,), "exact", "8bit-g64"),
            group((1, 2, 3), f"{rank} {rank} 4bit-g64", "16bit+1bit-g64 " * 3),
        ],
    }
    plan = assemble(inputs, groups, "1x")
    (bank,) = layers_of(plan, inputs, "BF16")
    w, x = bank.projections
    assert w.pools == (
        Pool("center", "4bit-g64", 2),
        Pool("residual", "2bit-g64", 1),
        Pool("residual", "rank4", 2),
        Pool("center", "F16", 1),
    )
    assert x.pools == (
        Pool("center", "BF16", 2),
        Pool("center", "8bit-g64", 1),
        Pool("residual", "1bit-g64", 2),
    )
    assert [job.residuals for job in w.jobs] == [
        (ABSENT, (1, 0), (2, 0), ABSENT),
        (),
        ((2, 1), ABSENT),
    ]
    assert [job.residuals for job in x.jobs] == [(), (), ((2, 0), (2, 1))]
    assert [job.coded for job in w.jobs] == [True, False, True]
    assert [job.own_order for bank in (w, x) for job in bank.jobs] == [False] * 6
    assert w.residuals(w.jobs[0]) == [None, Coding(2, 64), LowRank(4), None]
    assert w.residuals(w.jobs[1]) == [None]
    assert w.residuals(w.jobs[2]) == [LowRank(4), None]
    none = [NONE, NONE]
    assert bank.remap[:, :, 0].tolist() == [
        [[0, 0, *none], [3, 0, *none]],
        [[0, 0, 1, 0], [0, 1, 2, 1]],
        [[0, 0, 2, 0], [0, 1, 2, 1]],
        [[0, 0, *none], [0, 1, *none]],
    ]
    assert bank.remap[:, 1, 1].tolist() == [
        [1, 0, *none],
        [0, 1, 2, 0],
        [0, 1, 2, 0],
        [0, 1, 2, 1],
    ]
    assert ("l.w.residual.rank4.left", "BF16", (2, 8, 4)) in bank.tensors()
    assert ("l.w.residual.rank4.right", "BF16", (2, 4, 64)) in bank.tensors()
    total = sum(ITEM_BYTES[dtype] * int(np.prod(shape)) for _, dtype, shape in bank.tensors())
    assert total == plan.layers[0].nbytes == plan.expert_bytes
    assert EXACT in groups[0, 1][0].forms[0]


@st.composite
def mixed_cases(draw: st.DrawFn) -> Case:
    """Any groups, with any forms of one center for each projection."""
    count = draw(st.integers(2, 5))
    weights = tuple(Projection(f"w{p}", (8, 64), "BF16") for p in range(draw(st.integers(1, 2))))
    layer = ExpertLayer("l", draw(st.integers(1, 3)), weights)
    kinds = st.lists(st.integers(0, count - 1), min_size=count, max_size=count)
    labels = np.array(
        [[k.index(v) for v in k] for k in (draw(kinds) for _ in range(layer.num_experts))]
    )
    inputs = inputs_of([layer], count, Merge("joint", "auto", "auto", 64), [labels])
    centers = st.sampled_from(["16bit", "4bit-g64", "8bit-g64"])
    residuals = st.sampled_from(["", "1bit-g64", "3bit-g64", "rank4"])
    groups: dict[tuple[int, int], list[Group]] = {}
    for expert in range(layer.num_experts):
        own = labels[expert]
        parts: dict[int, list[int]] = {}
        for variant, part in enumerate(draw(kinds)):
            parts.setdefault(part, []).append(variant)
        groups[0, expert] = []
        for members in parts.values():
            forms = []
            for _ in weights:
                center = draw(centers)
                of_kind = {int(own[m]): Form(center, draw(residuals)) for m in members}
                forms.append(tuple(of_kind[int(own[m])] for m in members))
            groups[0, expert].append(Group(tuple(members), True, tuple(forms)))
    plan = assemble(inputs, groups, "1x")
    return Case(inputs, plan, "BF16", layers_of(plan, inputs, "BF16"))


@settings(deadline=None, max_examples=100)
@given(mixed_cases())
def test_mixed_forms_are_where_the_remap_says(case: Case) -> None:
    (bank,), plan = case.banks, case.plan.layers[0]
    for variant, expert, p in np.ndindex(bank.remap.shape[:3]):
        entry, pools = bank.remap[variant, expert, p], bank.projections[p].pools
        group = group_of(plan, expert, variant)
        form = group.forms[p][group.members.index(variant)]
        assert pools[entry[CENTER_POOL]].packed == form.center_coding
        if form.residual:
            assert pools[entry[RESIDUAL_POOL]].packed == form.residual_coding
        else:
            assert tuple(entry[2:]) == ABSENT
    for p, found in enumerate(bank.projections):
        written = Counter(at for job in found.jobs for at in (job.center, *job.residuals))
        del written[ABSENT]
        expected = {(i, s) for i, pool in enumerate(found.pools) for s in range(pool.slots)}
        assert set(written) == expected
        assert set(written.values()) == {1}
        table = bank.remap[:, :, p].reshape(-1, 2).tolist()
        assert {tuple(at) for at in table} - {ABSENT} == expected
    total = sum(ITEM_BYTES[dtype] * int(np.prod(shape)) for _, dtype, shape in bank.tensors())
    assert total == plan.nbytes


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [0, 32, 64, 128])
def test_a_pool_knows_its_coding(bits: int, group: int) -> None:
    coding = Coding(bits, group)
    assert Pool("center", coding.name, 1).packed == coding
    for dtype in ("BF16", "F16", "F32"):
        assert Pool("center", dtype, 1).packed is None
