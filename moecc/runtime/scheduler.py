"""Which tokens of which sequences the next forward pass computes, and which cache they get.

A sequence waits until it is admitted: then it has a seat (of `max_num_seqs`) and cache blocks for
all of its tokens, and gets another block whenever it has filled the last. When none is free, the
least urgent admitted sequence is preempted: it waits again in its old place and is recomputed
later, with what it has generated. So the most urgent one always proceeds.

With `mixed` a batch holds sequences of any variants. Otherwise one variant has its turn:

- `fifo`: nobody overtakes. The next variant has its turn when all earlier requests have finished
  (Algorithm 2 of Imani et al., ICML 2025, with batches).
- `grouped`: a variant keeps its turn while it has work, until another has waited for longer than
  `patience`, and for longer than `patience` during this turn: else a crowd that is past its
  patience would change variants at every step. Who loses the turn keeps seat and cache.
"""

from __future__ import annotations

import bisect
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from moecc.errors import BusyError
from moecc.runtime.sequence import Sequence

Policy = Literal["fifo", "grouped"]


@dataclass(frozen=True, slots=True)
class Piece:
    """`count` tokens of a sequence from position `start`; `samples`: the last one is its last."""

    sequence: Sequence
    start: int
    count: int
    samples: bool


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward pass computes, at least one piece; by variant, then by arrival."""

    pieces: tuple[Piece, ...]

    @property
    def variants(self) -> list[int]:
        """The variants in it, each once, in the order of the pieces."""
        return list(dict.fromkeys(p.sequence.variant for p in self.pieces))


class BlockPool:
    """The numbers of the cache's blocks; each belongs to one sequence or to nobody."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(reversed(range(total)))
        self._used: set[int] = set()

    @property
    def used(self) -> int:
        return len(self._used)

    @property
    def available(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """So many blocks, or None, and nothing is taken, if there are fewer."""
        if count > len(self._free):
            return None
        blocks = [self._free.pop() for _ in range(count)]
        self._used.update(blocks)
        return blocks

    def free(self, blocks: list[int]) -> None:
        for block in blocks:
            assert block in self._used, f"block {block} is freed twice"
            self._used.remove(block)
            self._free.append(block)


class _Sorted:
    """Sequences in the order of a key that does not change; no two have the same one.

    A list: with ten thousand sequences it still inserts and removes in microseconds.
    """

    def __init__(self, key: Callable[[Sequence], tuple[float, int]]) -> None:
        self._key = key
        self._items: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._items)

    def __getitem__(self, index: int) -> Sequence:
        return self._items[index]

    def add(self, sequence: Sequence) -> None:
        bisect.insort(self._items, sequence, key=self._key)

    def remove(self, sequence: Sequence) -> None:
        at = bisect.bisect_left(self._items, self._key(sequence), key=self._key)
        assert self._items[at : at + 1] == [sequence], "the sequence is not here"
        del self._items[at]


def _by_urgency(sequence: Sequence) -> tuple[int, int]:
    return sequence.urgency


def _by_deadline(sequence: Sequence) -> tuple[float, int]:
    assert sequence.deadline is not None
    return sequence.deadline, sequence.order


class Scheduler:
    """Sequences go in with `add` and leave with `remove`, finished or not; not thread-safe.

    After each `next_batch` the engine advances `computed` of every piece's sequence by the piece's
    count, and appends a token to those that sample, or removes them.
    """

    def __init__(
        self,
        policy: Policy,
        mixed: bool,
        max_num_seqs: int,
        max_batch_tokens: int,
        block_size: int,
        blocks: int,
        max_waiting: int,
        patience: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`mixed` overrides the policy; `patience` is in seconds of the clock."""
        # So that all who generate get their token, and who reads its prompt gets on too.
        assert max_batch_tokens >= max_num_seqs, "a batch must have a token for every seat"
        self.pool = BlockPool(blocks)
        self.max_num_seqs = max_num_seqs
        self.max_batch_tokens = max_batch_tokens
        self.block_size = block_size
        self.max_waiting = max_waiting
        self.patience = patience
        self._mixed = mixed
        self._grouped = policy == "grouped" and not mixed
        self._clock = clock
        self._waiting: defaultdict[int, _Sorted] = defaultdict(lambda: _Sorted(_by_urgency))
        self._admitted = _Sorted(_by_urgency)
        self._deadlines = _Sorted(_by_deadline)
        self._turn: int | None = None
        # Of `grouped` only: when the turn began, whether it owes a token (see _admit), and since
        # when the other variants with work have waited, the longest first.
        self._began = 0.0
        self._owes = False
        self._since: dict[int, float] = {}

    def fits(self, total_tokens: int) -> bool:
        """Whether a sequence of so many tokens can run, at least alone."""
        return self._blocks_for(total_tokens) <= self.pool.total

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence whose tokens, at their most, fit.

        Raises BusyError if `max_waiting` sequences wait.
        """
        assert self.fits(len(sequence.tokens)), "the engine refuses what cannot fit"
        waiting = sum(len(q) for q in self._waiting.values())
        if waiting >= self.max_waiting:
            raise BusyError(f"the queue is full: {waiting} requests wait", "try again later")
        self._waiting[sequence.variant].add(sequence)
        if sequence.deadline is not None:
            self._deadlines.add(sequence)
        if self._grouped and sequence.variant != self._turn:
            self._since.setdefault(sequence.variant, self._clock())

    def remove(self, sequence: Sequence) -> None:
        """Forgets a sequence, waiting or admitted, and frees its blocks."""
        if sequence.blocks:
            self._release(sequence)
        else:
            self._waiting[sequence.variant].remove(sequence)
        if sequence.deadline is not None:
            self._deadlines.remove(sequence)
        if not self._has_work(sequence.variant):
            self._since.pop(sequence.variant, None)

    def next_batch(self) -> Batch | None:
        """What to compute now; None if there is nothing."""
        self._pass_turn()
        self._admit()
        running = [s for s in self._admitted if self._on_turn(s)]
        if not running:
            return None
        room = self.max_batch_tokens
        pieces: list[Piece] = []
        for sequence in running:
            # One without blocks was preempted for another in this loop.
            if sequence.pending == 1 and sequence.blocks and self._grow(sequence, running[0]):
                pieces.append(Piece(sequence, sequence.computed, 1, True))
                room -= 1
        for sequence in running:
            if room and sequence.pending > 1 and sequence.blocks:
                count = min(room, sequence.pending)
                samples = count == sequence.pending
                pieces.append(Piece(sequence, sequence.computed, count, samples))
                room -= count
        if any(p.samples for p in pieces):
            self._owes = False
        pieces.sort(key=lambda p: (p.sequence.variant, p.sequence.order))
        return Batch(tuple(pieces))

    def upcoming(self) -> int | None:
        """The variant whose turn is most likely next; None if there is none but the current."""
        if self._mixed:
            return None
        if self._grouped:
            return next(iter(self._since), None)
        others = (head for head in self._heads() if head.variant != self._turn)
        head = min(others, key=_by_urgency, default=None)
        return head.variant if head else None

    def running(self) -> dict[int, int]:
        """How many sequences are admitted, by variant, paused ones included; no zeros."""
        return dict(Counter(s.variant for s in self._admitted))

    def waiting(self) -> dict[int, int]:
        """How many sequences wait to be admitted, by variant; no zeros."""
        return {variant: len(queue) for variant, queue in self._waiting.items() if queue}

    def expired(self, now: float) -> list[Sequence]:
        """The sequences whose deadline has come, the earliest first; they stay until removed."""
        found: list[Sequence] = []
        for sequence in self._deadlines:
            if _by_deadline(sequence)[0] > now:
                break
            found.append(sequence)
        return found

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def _has_work(self, variant: int) -> bool:
        return bool(self._waiting[variant]) or any(s.variant == variant for s in self._admitted)

    def _on_turn(self, sequence: Sequence) -> bool:
        return self._mixed or sequence.variant == self._turn

    def _heads(self) -> list[Sequence]:
        """The most urgent waiting sequence of every variant that has one."""
        return [queue[0] for queue in self._waiting.values() if queue]

    def _head(self) -> Sequence | None:
        """The most urgent waiting sequence."""
        return min(self._heads(), key=_by_urgency, default=None)

    def _pass_turn(self) -> None:
        if self._grouped:
            self._pass_turn_grouped()
        elif not self._admitted and (head := self._head()):
            self._turn = head.variant

    def _pass_turn_grouped(self) -> None:
        if not self._since:
            return
        now = self._clock()
        longest, since = next(iter(self._since.items()))
        if self._turn is not None and self._has_work(self._turn):
            if self._owes or now - max(since, self._began) <= self.patience:
                return
            self._since[self._turn] = now
        del self._since[longest]
        self._turn, self._began, self._owes = longest, now, False

    def _admissible(self) -> Sequence | None:
        """The sequence to admit next; none goes before it, even if it has to wait."""
        if self._grouped:
            return next(filter(self._on_turn, self._heads()), None)
        head = self._head()
        return head if head and self._on_turn(head) else None

    def _admit(self) -> None:
        """Admits sequences while there is room.

        Room includes one more block for each that runs. So a sequence that was just admitted is
        not preempted before others have filled a block, and cannot go in and out at every step.
        """
        running = sum(map(self._on_turn, self._admitted))
        while sequence := self._admissible():
            needs = self._blocks_for(len(sequence.tokens))
            while not self._has_room(needs + running):
                if running:
                    return
                # Paused sequences of other variants hold everything, and the turn would be lost.
                # It lasts until it has generated a token: two variants that take the cache from
                # each other must not recompute forever.
                self._preempt(self._admitted[-1])
                self._owes = True
            blocks = self.pool.allocate(needs)
            assert blocks is not None
            sequence.blocks = blocks
            self._waiting[sequence.variant].remove(sequence)
            self._admitted.add(sequence)
            running += 1

    def _has_room(self, blocks: int) -> bool:
        return len(self._admitted) < self.max_num_seqs and blocks <= self.pool.available

    def _grow(self, sequence: Sequence, first: Sequence) -> bool:
        """Gives a sequence the block of its next token, if it needs one.

        If none is free the least urgent sequence is preempted, but never `first`, the most urgent
        one on turn: others may be more urgent, but they are paused. False if it was this one.
        """
        if self._blocks_for(len(sequence.tokens)) == len(sequence.blocks):
            return True
        if not self.pool.available:
            victim = next(s for s in reversed(list(self._admitted)) if s is not first)
            self._preempt(victim)
            if victim is sequence:
                return False
        blocks = self.pool.allocate(1)
        assert blocks is not None
        sequence.blocks += blocks
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        sequence.computed = 0
        self._waiting[sequence.variant].add(sequence)

    def _release(self, sequence: Sequence) -> None:
        self._admitted.remove(sequence)
        self.pool.free(sequence.blocks)
        sequence.blocks = []
