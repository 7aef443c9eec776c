"""moecc.runtime.scheduler: every rule with a clock of its own, and random days of an engine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moecc.errors import BusyError
from moecc.runtime.request import Request
from moecc.runtime.scheduler import Batch, BlockPool, Scheduler
from moecc.runtime.sequence import Sequence

GENERATED = 7


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def make(clock: Clock, policy: str = "fifo", mixed: bool = False, **limits: Any) -> Scheduler:
    defaults = {
        "max_num_seqs": 8,
        "max_batch_tokens": 64,
        "block_size": 4,
        "blocks": 100,
        "max_waiting": 100,
        "patience": 10.0,
    }
    return Scheduler(policy, mixed, **{**defaults, **limits}, clock=clock)  # type: ignore[arg-type]


def sequence(
    order: int,
    variant: int = 0,
    prompt: int = 4,
    priority: int = 0,
    timeout: float | None = None,
    arrived: float = 100.0,
) -> Sequence:
    tokens = tuple(range(prompt))
    request = Request(str(order), str(variant), tokens, priority=priority, timeout=timeout)
    return Sequence(request, variant, order, arrived)


def add(scheduler: Scheduler, *args: Any, **more: Any) -> Sequence:
    added = sequence(*args, **more)
    scheduler.add(added)
    return added


def compute(batch: Batch) -> None:
    """What the engine does with a batch."""
    for piece in batch.pieces:
        piece.sequence.computed += piece.count
        if piece.samples:
            piece.sequence.tokens.append(GENERATED)


def step(scheduler: Scheduler) -> list[tuple[int, int, int]]:
    """One step; (order, start, count) of its pieces."""
    batch = scheduler.next_batch()
    if batch is None:
        return []
    pieces = [(p.sequence.order, p.start, p.count) for p in batch.pieces]
    compute(batch)
    return pieces


def orders(pieces: Iterable[tuple[int, int, int]]) -> list[int]:
    return [order for order, _, _ in pieces]


# Sequences, blocks and queues


def test_sequence() -> None:
    found = sequence(3, prompt=5, priority=2, timeout=1.5)
    assert found.tokens == [0, 1, 2, 3, 4]
    assert (found.prompt_len, found.pending, found.urgency) == (5, 5, (2, 3))
    assert found.deadline == 101.5
    found.tokens.append(GENERATED)
    found.computed = 5
    assert (found.prompt_len, found.pending) == (5, 1)
    assert sequence(0).deadline is None


def test_block_pool() -> None:
    pool = BlockPool(5)
    first = pool.allocate(2)
    second = pool.allocate(3)
    assert first is not None
    assert second is not None
    assert sorted(first + second) == [0, 1, 2, 3, 4]
    assert (pool.used, pool.available) == (5, 0)
    assert pool.allocate(1) is None
    pool.free(first)
    assert (pool.used, pool.available) == (3, 2)
    assert pool.allocate(3) is None
    assert pool.used == 3
    with pytest.raises(AssertionError, match="twice"):
        pool.free(first)


def test_nothing_to_do(clock: Clock) -> None:
    for mixed in (True, False):
        for policy in ("fifo", "grouped"):
            scheduler = make(clock, policy, mixed)
            assert scheduler.next_batch() is None
            assert scheduler.upcoming() is None
            assert scheduler.running() == scheduler.waiting() == {}


def test_a_full_queue_is_busy(clock: Clock) -> None:
    scheduler = make(clock, max_waiting=2, max_num_seqs=1)
    first = add(scheduler, 0)
    add(scheduler, 1, variant=1)
    with pytest.raises(BusyError, match="2 requests wait"):
        add(scheduler, 2)
    step(scheduler)  # 0 is admitted
    add(scheduler, 3)
    with pytest.raises(BusyError):
        add(scheduler, 4)
    scheduler.remove(first)
    assert scheduler.waiting() == {0: 1, 1: 1}


def test_every_seat_needs_a_token(clock: Clock) -> None:
    with pytest.raises(AssertionError, match="every seat"):
        make(clock, max_num_seqs=8, max_batch_tokens=7)


def test_fits(clock: Clock) -> None:
    scheduler = make(clock, blocks=3, block_size=4)
    assert scheduler.fits(12)
    assert not scheduler.fits(13)
    add(scheduler, 0, prompt=12)
    with pytest.raises(AssertionError, match="cannot fit"):
        add(scheduler, 1, prompt=13)


def test_expired(clock: Clock) -> None:
    scheduler = make(clock, max_num_seqs=1)
    late = add(scheduler, 0, timeout=5.0)
    soon = add(scheduler, 1, timeout=2.0)
    add(scheduler, 2)
    step(scheduler)
    assert scheduler.expired(101.9) == []
    assert scheduler.expired(102.0) == [soon]
    assert scheduler.expired(200.0) == [soon, late]
    scheduler.remove(soon)
    scheduler.remove(late)
    assert scheduler.expired(200.0) == []


def test_views_by_variant(clock: Clock) -> None:
    scheduler = make(clock, mixed=True, max_num_seqs=3)
    for order, variant in enumerate([2, 0, 2, 2, 1, 1]):
        add(scheduler, order, variant)
    assert (scheduler.running(), scheduler.waiting()) == ({}, {0: 1, 1: 2, 2: 3})
    step(scheduler)
    assert (scheduler.running(), scheduler.waiting()) == ({0: 1, 2: 2}, {1: 2, 2: 1})


# Batches


def test_generating_goes_first_and_prompts_are_cut(clock: Clock) -> None:
    scheduler = make(clock, mixed=True, max_batch_tokens=10)
    add(scheduler, 0, prompt=3, priority=1)
    assert step(scheduler) == [(0, 0, 3)]
    long = add(scheduler, 1, prompt=24)
    short = add(scheduler, 2, prompt=2)
    assert step(scheduler) == [(0, 3, 1), (1, 0, 9)]
    assert long.tokens[-1] != GENERATED
    assert step(scheduler) == [(0, 4, 1), (1, 9, 9)]
    assert step(scheduler) == [(0, 5, 1), (1, 18, 6), (2, 0, 2)]
    assert long.tokens[24:] == short.tokens[2:] == [GENERATED]
    assert step(scheduler) == [(0, 6, 1), (1, 24, 1), (2, 2, 1)]


def test_a_piece_samples_only_with_the_last_token(clock: Clock) -> None:
    scheduler = make(clock, max_batch_tokens=8)
    add(scheduler, 0, prompt=9)
    for samples in (False, True, True):
        batch = scheduler.next_batch()
        assert batch is not None
        assert [p.samples for p in batch.pieces] == [samples]
        compute(batch)


def test_priority_then_arrival(clock: Clock) -> None:
    scheduler = make(clock, mixed=True, max_num_seqs=1)
    everyone = [add(scheduler, o, priority=p) for o, p in enumerate([1, 0, 1, -1, 0])]
    served = []
    while pieces := step(scheduler):
        served += orders(pieces)
        scheduler.remove(everyone[served[-1]])
    assert served == [3, 1, 4, 0, 2]


def test_batches_are_sorted_by_variant(clock: Clock) -> None:
    scheduler = make(clock, "grouped", mixed=True)
    for order, variant in enumerate([2, 0, 2, 1, 0]):
        add(scheduler, order, variant, priority=-order)
    batch = scheduler.next_batch()
    assert batch is not None
    assert [p.sequence.order for p in batch.pieces] == [1, 4, 3, 0, 2]
    assert batch.variants == [0, 1, 2]
    assert scheduler.upcoming() is None


def test_seats(clock: Clock) -> None:
    scheduler = make(clock, mixed=True, max_num_seqs=2)
    first, *_ = [add(scheduler, order) for order in range(3)]
    assert orders(step(scheduler)) == orders(step(scheduler)) == [0, 1]
    scheduler.remove(first)
    assert orders(step(scheduler)) == [1, 2]


# Blocks


def test_admission_needs_blocks_for_all_tokens_and_nobody_skips_ahead(clock: Clock) -> None:
    scheduler = make(clock, mixed=True, blocks=5)
    first = add(scheduler, 0, prompt=8)
    add(scheduler, 1, prompt=16)
    add(scheduler, 2, prompt=1)
    assert orders(step(scheduler)) == orders(step(scheduler)) == [0]
    scheduler.remove(first)
    # A block stays free for 1 to grow, so 2 waits on.
    assert orders(step(scheduler)) == [1]
    assert scheduler.pool.used == 4


def test_the_least_urgent_is_preempted_and_recomputed(clock: Clock) -> None:
    scheduler = make(clock, mixed=True, blocks=4)
    old = add(scheduler, 0, prompt=6)
    new = add(scheduler, 1, prompt=4)
    for _ in range(3):
        assert orders(step(scheduler)) == [0, 1]
    assert scheduler.pool.available == 0
    add(scheduler, 2, prompt=1)
    assert step(scheduler) == [(0, 8, 1)]  # with a block of 1
    assert (new.blocks, new.computed, new.pending) == ([], 0, 7)
    assert scheduler.waiting() == {0: 2}
    assert step(scheduler) == [(0, 9, 1)]
    scheduler.remove(old)
    # Before 2, with all it had.
    assert step(scheduler) == [(1, 0, 7), (2, 0, 1)]


def test_the_least_urgent_preempts_itself(clock: Clock) -> None:
    scheduler = make(clock, mixed=True, blocks=5)
    add(scheduler, 0, prompt=7)
    new = add(scheduler, 1, prompt=5)
    for _ in range(4):
        assert orders(step(scheduler)) == [0, 1]
    assert scheduler.pool.available == 0
    assert orders(step(scheduler)) == [0]
    assert new.blocks == []


def test_priority_decides_who_is_preempted(clock: Clock) -> None:
    scheduler = make(clock, mixed=True, blocks=4)
    old = add(scheduler, 0, prompt=4, priority=1)
    step(scheduler)
    add(scheduler, 1, prompt=7)
    for _ in range(2):
        assert orders(step(scheduler)) == [0, 1]
    assert scheduler.pool.available == 0
    assert orders(step(scheduler)) == [1]
    assert old.blocks == []


def test_one_just_admitted_is_not_preempted_at_once(clock: Clock) -> None:
    scheduler = make(clock, mixed=True, blocks=4)
    add(scheduler, 0, prompt=8)
    step(scheduler)
    add(scheduler, 1, prompt=8)
    assert orders(step(scheduler)) == [0]  # 2 blocks were free, but 0 is about to take one
    add(scheduler, 2, prompt=4, priority=-1)
    assert orders(step(scheduler)) == [0]


def test_remove_frees_at_once(clock: Clock) -> None:
    scheduler = make(clock, max_num_seqs=1, max_batch_tokens=4)
    admitted = add(scheduler, 0, prompt=9)
    waiting = add(scheduler, 1, variant=1)
    step(scheduler)
    assert scheduler.pool.used == 3
    scheduler.remove(waiting)
    scheduler.remove(admitted)
    assert scheduler.pool.used == 0
    assert scheduler.next_batch() is None
    with pytest.raises(AssertionError, match="not here"):
        scheduler.remove(waiting)


# fifo


def test_fifo_batches_neighbors_and_never_overtakes(clock: Clock) -> None:
    scheduler = make(clock, "fifo")
    everyone = [add(scheduler, o, variant) for o, variant in enumerate([0, 0, 1, 0, 1, 1])]
    assert orders(step(scheduler)) == [0, 1]
    assert scheduler.upcoming() == 1
    scheduler.remove(everyone[0])
    assert orders(step(scheduler)) == [1]
    scheduler.remove(everyone[1])
    assert orders(step(scheduler)) == [2]
    assert scheduler.upcoming() == 0
    scheduler.remove(everyone[2])
    assert orders(step(scheduler)) == [3]
    assert scheduler.upcoming() == 1
    scheduler.remove(everyone[3])
    assert orders(step(scheduler)) == [4, 5]
    assert scheduler.upcoming() is None
    add(scheduler, 6, variant=1)
    assert orders(step(scheduler)) == [4, 5, 6]


def test_fifo_with_one_seat_is_one_request_at_a_time(clock: Clock) -> None:
    scheduler = make(clock, "fifo", max_num_seqs=1)
    everyone = [add(scheduler, o, variant) for o, variant in enumerate([0, 0, 1, 0])]
    for order in range(4):
        assert orders(step(scheduler)) == orders(step(scheduler)) == [order]
        scheduler.remove(everyone[order])


def test_fifo_urgent_request_is_next_but_interrupts_nobody(clock: Clock) -> None:
    scheduler = make(clock, "fifo", max_num_seqs=1)
    first = add(scheduler, 0, variant=0)
    add(scheduler, 1, variant=0)
    step(scheduler)
    add(scheduler, 2, variant=1, priority=-1)
    assert orders(step(scheduler)) == [0]
    assert scheduler.upcoming() == 1
    scheduler.remove(first)
    assert orders(step(scheduler)) == [2]


def test_fifo_looks_past_its_own_variant_for_the_upcoming(clock: Clock) -> None:
    scheduler = make(clock, "fifo", max_num_seqs=1)
    for order, variant in enumerate([0, 0, 0, 3, 2]):
        add(scheduler, order, variant)
    step(scheduler)
    assert scheduler.upcoming() == 3


# grouped


def test_grouped_takes_newcomers_of_its_variant(clock: Clock) -> None:
    scheduler = make(clock, "grouped")
    first = add(scheduler, 0, variant=1)
    assert scheduler.upcoming() == 1
    step(scheduler)
    add(scheduler, 1, variant=0)
    second = add(scheduler, 2, variant=1)
    assert orders(step(scheduler)) == [0, 2]
    assert scheduler.upcoming() == 0
    scheduler.remove(first)
    scheduler.remove(second)
    assert orders(step(scheduler)) == [1]  # the turn passes at once
    assert scheduler.upcoming() is None


def test_grouped_patience_and_pausing(clock: Clock) -> None:
    scheduler = make(clock, "grouped", max_batch_tokens=8)
    paused = add(scheduler, 0, variant=0, prompt=20)
    step(scheduler)
    clock.now += 3
    add(scheduler, 1, variant=1)
    clock.now += 10
    assert step(scheduler) == [(0, 8, 8)]  # 1 has waited for 10 seconds, not longer
    clock.now += 0.1
    held = list(paused.blocks)
    assert step(scheduler) == [(1, 0, 4)]
    assert (paused.blocks, paused.computed) == (held, 16)
    assert scheduler.running() == {0: 1, 1: 1}
    assert scheduler.upcoming() == 0
    clock.now += 10
    assert step(scheduler) == [(1, 4, 1)]
    clock.now += 0.1
    assert step(scheduler) == [(0, 16, 4)]  # where it was


def test_grouped_takes_turns_of_patience_each(clock: Clock) -> None:
    scheduler = make(clock, "grouped", patience=2.5)
    for order in range(3):
        add(scheduler, order, variant=order)
    turns = []
    for _ in range(18):
        turns += orders(step(scheduler))
        clock.now += 1
    assert turns == [0, 0, 0, 1, 1, 1, 2, 2, 2] * 2


def test_grouped_newcomers_do_not_renew_the_wait(clock: Clock) -> None:
    """However urgent: or a stream of urgent requests would starve its own variant."""
    scheduler = make(clock, "grouped")
    add(scheduler, 0, variant=0)
    step(scheduler)
    add(scheduler, 1, variant=1)
    clock.now += 9
    add(scheduler, 2, variant=1, priority=-5)
    clock.now += 2
    assert orders(step(scheduler)) == [1, 2]


def test_grouped_forgets_the_wait_of_those_who_left(clock: Clock) -> None:
    scheduler = make(clock, "grouped")
    add(scheduler, 0, variant=0)
    step(scheduler)
    gone = add(scheduler, 1, variant=1)
    clock.now += 9
    scheduler.remove(gone)
    assert scheduler.upcoming() is None
    add(scheduler, 2, variant=1)
    clock.now += 9
    assert orders(step(scheduler)) == [0]
    clock.now += 2
    assert orders(step(scheduler)) == [2]


def test_grouped_removes_a_paused_sequence(clock: Clock) -> None:
    scheduler = make(clock, "grouped")
    paused = add(scheduler, 0, variant=0)
    step(scheduler)
    add(scheduler, 1, variant=1)
    clock.now += 11
    assert orders(step(scheduler)) == [1]
    scheduler.remove(paused)
    assert scheduler.upcoming() is None
    assert scheduler.pool.used == 1


@pytest.mark.parametrize("limits", [{"max_num_seqs": 3}, {"blocks": 8, "max_num_seqs": 9}])
def test_grouped_turn_takes_what_paused_sequences_hold(
    clock: Clock, limits: dict[str, int]
) -> None:
    scheduler = make(clock, "grouped", **limits)
    everyone = [add(scheduler, o, variant=0, priority=p, prompt=6) for o, p in enumerate([0, 2, 1])]
    step(scheduler)
    assert scheduler.running() == {0: 3}
    add(scheduler, 3, variant=1, priority=9, prompt=12)
    add(scheduler, 4, variant=1, priority=9, prompt=12)
    clock.now += 11
    # Only one, the least urgent, loses its place, and only for the first of the variant.
    assert orders(step(scheduler)) == [3]
    assert [bool(s.blocks) for s in everyone] == [True, False, True]
    assert scheduler.running() == {0: 2, 1: 1}


def test_grouped_growing_takes_from_the_paused_rather_than_stop(clock: Clock) -> None:
    scheduler = make(clock, "grouped", blocks=3)
    paused = add(scheduler, 0, variant=0, prompt=7)
    step(scheduler)
    add(scheduler, 1, variant=1, prompt=4, priority=1)
    clock.now += 11
    assert step(scheduler) == [(1, 0, 4)]
    assert step(scheduler) == [(1, 4, 1)]  # its second block, of 0: less urgent, but on turn
    assert paused.blocks == []


def test_grouped_turn_lasts_until_what_it_took_has_paid_off(clock: Clock) -> None:
    """Two variants that both need the whole cache, and no patience at all."""
    scheduler = make(clock, "grouped", blocks=5, patience=0.0, max_batch_tokens=3, max_num_seqs=2)
    for variant in range(2):
        add(scheduler, variant, variant=variant, prompt=12)
    turns: list[int] = []
    while len(turns) < 19:
        turns += orders(step(scheduler))
        clock.now += 1
    # 0 loses its first piece; after that every turn reads all tokens again, and adds one.
    assert turns == [0] + [1] * 4 + [0] * 4 + [1] * 5 + [0] * 5


# Random days

VARIANTS = 4
STEP = 1.0


@dataclass(frozen=True)
class Arrival:
    """A request that comes before the step `at`; cancelled before step `cancel`, if there."""

    at: int
    variant: int
    prompt: int
    new: int
    priority: int
    cancel: int | None


@dataclass(frozen=True)
class Day:
    """A scheduler's settings and what it gets to do; `ample`: nobody ever lacks seat or blocks."""

    policy: str
    mixed: bool
    ample: bool
    max_num_seqs: int
    extra_tokens: int
    block_size: int
    extra_blocks: int
    patience: float
    arrivals: list[Arrival]


arrivals = st.builds(
    Arrival,
    at=st.integers(0, 40),
    variant=st.integers(0, VARIANTS - 1),
    prompt=st.integers(1, 20),
    new=st.integers(1, 12),
    priority=st.sampled_from([0, 0, 0, 1, -1]),
    cancel=st.none() | st.integers(0, 60),
)
days = st.builds(
    Day,
    policy=st.sampled_from(["fifo", "grouped"]),
    mixed=st.sampled_from([False, False, True]),
    ample=st.booleans(),
    max_num_seqs=st.integers(1, 6),
    extra_tokens=st.integers(0, 12),
    block_size=st.integers(1, 5),
    extra_blocks=st.integers(0, 12),
    patience=st.sampled_from([0.0, 1.5, 6.0]),
    arrivals=st.lists(arrivals, min_size=1, max_size=25),
)


class Engine:
    """Lives through a day and checks everything that must hold after every step."""

    def __init__(self, day: Day) -> None:
        self.day = day
        self.clock = Clock()
        self.now = 0
        longest = max(a.prompt + a.new for a in day.arrivals)
        needs = -(-longest // day.block_size)
        blocks = needs + day.extra_blocks
        seats = day.max_num_seqs
        if day.ample:
            blocks, seats = 2 * needs * len(day.arrivals), len(day.arrivals)
        batch_tokens = seats + day.extra_tokens
        self.scheduler = make(
            self.clock,
            day.policy,
            day.mixed,
            max_num_seqs=seats,
            max_batch_tokens=batch_tokens,
            block_size=day.block_size,
            blocks=blocks,
            patience=day.patience,
        )
        self.held: dict[Sequence, Arrival] = {}
        self.waits: dict[int, float] = {}  # by variant with work: since when
        variants = {a.variant for a in day.arrivals}
        priorities = {a.priority for a in day.arrivals}
        cancelled = [a for a in day.arrivals if a.cancel is not None]
        # One that took the cache of others keeps its turn until a prompt has been read.
        prompts = 0 if day.ample else len(priorities) + len(cancelled)
        turn = day.patience + STEP * (1 + prompts * -(-longest // batch_tokens))
        self.longest_wait = (len(variants) - 1) * turn + STEP

    def live(self) -> None:
        coming = sorted(enumerate(self.day.arrivals), key=lambda a: a[1].at)
        while coming or self.held:
            while coming and coming[0][1].at <= self.now:
                self.arrive(*coming.pop(0))
            for gone in [s for s, a in self.held.items() if a.cancel == self.now]:
                self.leave(gone)
            self.step()
            self.now += 1
            self.clock.now += STEP
            assert self.now < 10_000, "somebody never finishes"
        assert self.scheduler.next_batch() is None
        assert self.scheduler.pool.used == 0
        assert self.scheduler.running() == self.scheduler.waiting() == {}
        assert self.scheduler.upcoming() is None

    def arrive(self, order: int, arrival: Arrival) -> None:
        # Orders are those of arrival; hypothesis numbers them as they come in the list.
        added = sequence(
            arrival.at * 100 + order, arrival.variant, arrival.prompt, arrival.priority
        )
        self.scheduler.add(added)
        self.held[added] = arrival
        self.waits.setdefault(added.variant, self.clock.now)

    def leave(self, gone: Sequence) -> None:
        self.scheduler.remove(gone)
        del self.held[gone]
        if all(s.variant != gone.variant for s in self.held):
            self.waits.pop(gone.variant, None)

    def step(self) -> None:
        before = self.admitted()
        batch = self.scheduler.next_batch()
        assert (batch is None) == (not self.held)
        if batch is None:
            return
        self.check_blocks()
        self.check_batch(batch)
        if self.day.mixed:
            # The most urgent one keeps what it has.
            assert not before or before[0].blocks
        elif self.day.policy == "fifo":
            self.check_order(batch, before)
        else:
            self.check_waits(batch)
        compute(batch)
        for piece in batch.pieces:
            found = piece.sequence
            if len(found.tokens) == found.prompt_len + self.held[found].new:
                assert found.tokens[found.prompt_len :] == [GENERATED] * self.held[found].new
                self.leave(found)

    def admitted(self) -> list[Sequence]:
        return sorted((s for s in self.held if s.blocks), key=lambda s: s.urgency)

    def check_blocks(self) -> None:
        pool = self.scheduler.pool
        blocks = [b for s in self.held for b in s.blocks]
        assert len(set(blocks)) == len(blocks) == pool.used
        assert pool.used + pool.available == pool.total
        assert len(self.admitted()) <= self.scheduler.max_num_seqs
        assert sum(self.scheduler.running().values()) == len(self.admitted())
        assert sum(self.scheduler.waiting().values()) == len(self.held) - len(self.admitted())
        for found in self.held:
            assert found.blocks or found.computed == 0

    def check_batch(self, batch: Batch) -> None:
        pieces = batch.pieces
        assert len({p.sequence for p in pieces}) == len(pieces) > 0
        assert sum(p.count for p in pieces) <= self.scheduler.max_batch_tokens
        places = [(p.sequence.variant, p.sequence.order) for p in pieces]
        assert places == sorted(places)
        assert batch.variants == sorted({variant for variant, _ in places})
        assert self.day.mixed or len(batch.variants) == 1
        assert self.scheduler.upcoming() not in batch.variants
        for piece in pieces:
            found = piece.sequence
            assert found in self.held
            assert piece.start == found.computed
            assert 1 <= piece.count <= found.pending
            assert piece.samples == (piece.count == found.pending)
            assert len(found.blocks) * self.day.block_size >= piece.start + piece.count
        able = [s for s in self.admitted() if s.variant in batch.variants]
        taking_part = {p.sequence for p in pieces}
        assert able[0] in taking_part, "the most urgent one does not proceed"
        assert all(s in taking_part for s in able if s.pending == 1), "a token is skipped"

    def check_order(self, batch: Batch, before: list[Sequence]) -> None:
        """fifo: who comes in leaves nobody behind who is more urgent, of whatever variant."""
        for found in self.admitted():
            assert found.variant == batch.variants[0]
            if found not in before:
                overtaken = [s for s in self.held if s.urgency < found.urgency and not s.blocks]
                assert overtaken == []

    def check_waits(self, batch: Batch) -> None:
        """grouped: every variant's turn comes in time."""
        (variant,) = batch.variants
        for other in self.waits:
            assert self.clock.now - self.waits[other] <= self.longest_wait, "a variant starves"
        self.waits[variant] = self.clock.now


@settings(max_examples=400, deadline=None)
@given(days)
def test_random_days(day: Day) -> None:
    Engine(day).live()
