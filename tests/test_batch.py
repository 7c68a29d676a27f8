"""BATCH: plans are right for any order of events, shown on a simulated memory that knows what llama.cpp's would."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import localaid
from localaid import (
    Batch,
    BatchSequence,
    Capacity,
    Holder,
    MemoryKind,
    Plan,
    PrefixTree,
)

Cell = tuple[int, int, int]  # a unique number, position, token: a cell can be shared but never changed


def next_token(tokens: list[int]) -> int:
    """Return the simulated model's answer: it depends on every token before it, and on nothing else."""
    return hash(tuple(tokens)) % 50


@dataclass
class SimulatedMemory:
    """Cells of every sequence id, as llama.cpp's unified cache would hold them; refuses what that cannot do."""

    capacity: Capacity
    cells: dict[int, list[Cell]] = field(default_factory=dict)
    parked: dict[int, tuple[list[Cell], int]] = field(default_factory=dict)
    first: dict[int, int] = field(default_factory=dict)  # sequence id -> first position that a restored one still has
    number: itertools.count[int] = field(default_factory=itertools.count)
    decoded_tokens: int = 0
    fault_share: float = 0.0  # of what is parked or restored
    faults: random.Random = field(default_factory=lambda: random.Random(1))

    @property
    def used(self) -> int:
        """Count the distinct cells."""
        return len({cell for cells in self.cells.values() for cell in cells})

    def pos_min(self, seq_id: int) -> int:
        """Return the first position that the memory has: what leaves a window lingers, but is not saved."""
        return self.first.get(seq_id, 0)

    def copy_cells(self, source: int, target: int, end: int, *, whole: bool) -> None:
        """Let a sequence share the cells of another one."""
        recurrent = self.capacity.kind == "recurrent"
        assert len(self.cells[source]) >= end > 0
        assert whole == recurrent
        assert not recurrent or len(self.cells[source]) == end
        assert not self.cells.get(target)
        self.cells[target] = self.cells[source][:end]
        self.first[target] = self.first.get(source, 0)

    def drop_cells(self, seq_id: int) -> None:
        """Free them."""
        self.cells[seq_id] = []
        self.first[seq_id] = 0

    def park_cells(self, seq_id: int, segment: int, start: int, end: int, *, whole: bool) -> int:
        """Save them."""
        if self.fails():
            return 0
        cells = self.cells[seq_id][start:end]
        assert len(cells) == end - start
        assert not whole or (start == 0 and end == len(self.cells[seq_id]))
        behind = end - self.capacity.window if self.capacity.kind == "window" else 0
        self.parked[segment] = (cells, max(behind, self.first.get(seq_id, 0)))
        return len(cells)

    def restore_cells(self, segment: int, target: int, start: int, end: int, *, whole: bool) -> bool:
        """Bring them back."""
        del whole
        if self.fails():
            return False
        cells, pos_min = self.parked[segment]
        mine = self.cells.setdefault(target, [])
        assert len(mine) == start == cells[0][1]
        if self.capacity.kind == "recurrent":
            assert end == len(cells)
        if self.capacity.kind == "window" and end < len(cells):
            assert pos_min <= max(0, end - self.capacity.window)
        self.first[target] = max(pos_min, 0)
        mine += [(next(self.number), position, token) for _, position, token in cells[: end - start]]
        return True

    def forget_segment(self, segment: int) -> None:
        """Free what was saved."""
        del self.parked[segment]

    def fails(self) -> bool:
        """Tell whether this call is one of those that fail."""
        return self.faults.random() < self.fault_share

    def decode(self, plan: Plan) -> None:
        """Feed a plan's tokens; positions must follow on."""
        for token, position, seq_id in zip(plan.tokens, plan.positions, plan.seq_ids, strict=True):
            mine = self.cells.setdefault(seq_id, [])
            assert position == len(mine)
            mine.append((next(self.number), position, token))
        self.decoded_tokens += len(plan.tokens)
        assert self.used <= self.capacity.cells

    def tokens(self, seq_id: int) -> list[int]:
        """Return what a sequence's cells stand for."""
        return [token for _, _, token in self.cells[seq_id]]


def run_step(batch: Batch, memory: SimulatedMemory, wanted: dict[BatchSequence, int]) -> Plan:
    """Run one step and finish the sequences that have the tokens they want."""
    plan = batch.plan()
    memory.decode(plan)
    assert batch.used_cells + len(plan.tokens) == memory.used
    sampled = []
    for sequence in plan.rows:
        assert memory.tokens(sequence.seq_id) == sequence.tokens
        sampled.append(next_token(sequence.tokens))
    batch.commit(plan, sampled, 0.01)
    for sequence, _ in plan.fed:
        sequence.pos_min = memory.pos_min(sequence.seq_id)
    for sequence in plan.rows:
        if len(sequence.tokens) - sequence.n_prompt >= wanted[sequence]:
            batch.finish(sequence)
    return plan


def finish_all(batch: Batch, memory: SimulatedMemory, wanted: dict[BatchSequence, int]) -> None:
    """Step until nothing is left; two steps one after the other must do something."""
    idle = 0
    while batch.busy:
        parked = len(memory.parked)
        plan = run_step(batch, memory, wanted)
        idle = 0 if plan.tokens or len(memory.parked) != parked else idle + 1
        assert idle < 20


def expected(prompt: list[int], count: int) -> list[int]:
    """Return what the simulated model says alone."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens


def capacity(
    kind: MemoryKind = "attention", *, attend_cost: float = 0.0, logits_share: float = 0.0, **changes: int
) -> Capacity:
    """Return a small capacity."""
    sizes = {"ctx_size": 600, "cells": 1200, "parallel": 4, "batch_tokens": 128, "window": 40, "parked_bytes": 4000}
    return Capacity(kind=kind, attend_cost=attend_cost, logits_share=logits_share, **(sizes | changes))


Event = tuple[str, list[int] | int, int]  # what, of which prompt or how often, how many tokens

PROMPTS = st.builds(
    lambda shared, own, salt: [7] * shared + [salt + 10 + i % 3 for i in range(own)],
    st.integers(0, 120),
    st.integers(1, 90),
    st.integers(0, 2),
)
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), PROMPTS, st.integers(1, 60)),
        st.tuples(st.just("cancel"), st.integers(0, 30), st.just(0)),
        st.tuples(st.just("step"), st.integers(1, 40), st.just(0)),
        st.tuples(st.just("preempt"), st.just(0), st.just(0)),
    ),
    max_size=15,
)


@pytest.mark.parametrize("kind", ["attention", "window", "recurrent"])
@settings(max_examples=300)
@given(
    events=EVENTS,
    cells=st.sampled_from([620, 900, 1200]),
    parked=st.sampled_from([0, 300, 4000]),
    costs=st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 0.4])),
)
def test_every_answer_is_the_one_it_would_be_alone(
    kind: MemoryKind, events: list[Event], cells: int, parked: int, costs: tuple[float, float]
) -> None:
    """Whatever comes, goes, is cancelled, preempted, parked, restored, or not: nobody's tokens change or are lost."""
    limits = capacity(kind, cells=cells, parked_bytes=parked, attend_cost=costs[0])
    memory = SimulatedMemory(limits, fault_share=costs[1])
    batch = Batch(memory.capacity, memory)
    wanted: dict[BatchSequence, int] = {}
    prompts: dict[BatchSequence, list[int]] = {}
    cancelled = set()
    for what, value, count in events:
        match what:
            case "add" if isinstance(value, list):
                sequence = BatchSequence(list(value), len(value))
                wanted[sequence], prompts[sequence] = count, value
                batch.add(sequence)
            case "cancel" if wanted and isinstance(value, int):
                sequence = list(wanted)[value % len(wanted)]
                cancelled.add(sequence)
                batch.finish(sequence)
            case "preempt":
                batch.preempt_youngest()
            case "step" if isinstance(value, int):
                for _ in range(value):
                    run_step(batch, memory, wanted)
    finish_all(batch, memory, wanted)
    assert memory.used == 0
    assert batch.used_cells == 0
    assert set(batch.segments) == set(memory.parked)
    assert batch.parked_bytes == sum(s.size_bytes for s in batch.segments.values())
    for sequence, prompt in prompts.items():
        if sequence not in cancelled:
            assert sequence.tokens == expected(prompt, wanted[sequence])


@pytest.mark.parametrize("kind", ["attention", "window", "recurrent"])
def test_a_prefix_is_computed_once_for_all_who_arrive_together(kind: MemoryKind) -> None:
    """Four prompts share 100 tokens: these are fed once, whatever the memory is."""
    memory = SimulatedMemory(capacity(kind))
    batch = Batch(memory.capacity, memory)
    sequences = [BatchSequence([7] * 100 + [20 + i, 30], 102) for i in range(4)]
    for sequence in sequences:
        batch.add(sequence)
    finish_all(batch, memory, dict.fromkeys(sequences, 1))
    assert memory.decoded_tokens == 100 + 4 * 2
    assert [s.n_cached for s in sequences] == [0, 100, 100, 100]


@pytest.mark.parametrize("kind", ["attention", "window", "recurrent"])
def test_sequences_of_one_prompt_fork_after_it(kind: MemoryKind) -> None:
    """`n > 1`: all but one token of the prompt are fed once."""
    memory = SimulatedMemory(capacity(kind))
    batch = Batch(memory.capacity, memory)
    sequences = [BatchSequence(list(range(60)), 60) for _ in range(3)]
    for sequence in sequences:
        batch.add(sequence)
    finish_all(batch, memory, dict.fromkeys(sequences, 1))
    assert memory.decoded_tokens == 60 + 2


@pytest.mark.parametrize("kind", ["attention", "window", "recurrent"])
def test_the_next_turn_of_a_chat_feeds_only_what_is_new(kind: MemoryKind) -> None:
    """A finished sequence is parked, and its continuation takes it up again."""
    memory = SimulatedMemory(capacity(kind))
    batch = Batch(memory.capacity, memory)
    first = BatchSequence(list(range(50)), 50)
    batch.add(first)
    finish_all(batch, memory, {first: 10})
    before = memory.decoded_tokens
    second = BatchSequence(first.tokens[:59] + [99] * 5, 64)
    batch.add(second)
    finish_all(batch, memory, {second: 1})
    assert second.n_cached == 59
    assert memory.decoded_tokens - before == 5


@pytest.mark.parametrize("kind", ["window", "recurrent"])
def test_memory_that_cannot_be_cut_is_kept_where_prompts_branch_off(kind: MemoryKind) -> None:
    """The second chat with a common opening shows where it ends; from the third on it is not fed any more."""
    memory = SimulatedMemory(capacity(kind))
    batch = Batch(memory.capacity, memory)
    cached = []
    for i in range(4):
        sequence = BatchSequence([7] * 100 + [20 + i] * 30, 130)
        batch.add(sequence)
        finish_all(batch, memory, {sequence: 20})
        cached.append(sequence.n_cached)
    assert cached == [0, 0, 100, 100]


def test_a_long_prompt_does_not_stall_the_others() -> None:
    """While others generate, a step feeds no more of a prompt than the measured speed allows in the target time."""
    memory = SimulatedMemory(capacity(cells=4000, ctx_size=4000, batch_tokens=512))
    batch = Batch(memory.capacity, memory)
    running = BatchSequence([1, 2, 3], 3)
    batch.add(running)
    wanted = {running: 500}
    run_step(batch, memory, wanted)
    batch.feed_token_s = 0.002
    newcomer = BatchSequence([9] * 1000, 1000)
    wanted[newcomer] = 1
    batch.add(newcomer)
    plan = batch.plan()
    assert running in plan.rows
    assert plan.prompt_tokens == int(localaid.CHUNK_TARGET_S / 0.002)


def start_four(
    known: int, attend_cost: float = 3.3e-4
) -> tuple[Batch, SimulatedMemory, dict[BatchSequence, int], BatchSequence]:
    """Return a batch in which four sequences of `known` tokens generate, and a prompt of 600 has joined.

    A row takes 4 ms and a prompt's token 2 ms, as for SmolLM2 on two cores.
    """
    room = capacity(attend_cost=attend_cost, logits_share=0.2, cells=9000, ctx_size=4000, batch_tokens=512, parallel=8)
    memory = SimulatedMemory(room)
    batch = Batch(memory.capacity, memory)
    running = [BatchSequence([salt] * known, known) for salt in range(4)]
    wanted = dict.fromkeys(running, 500)
    for sequence in running:
        batch.add(sequence)
    while any(sequence.n_fed < known for sequence in running):
        run_step(batch, memory, wanted)
    batch.row_s, batch.feed_token_s = 0.004, 0.002
    newcomer = BatchSequence([9] * 600, 600)
    wanted[newcomer] = 1
    batch.add(newcomer)
    return batch, memory, wanted, newcomer


def test_rows_and_prompts_take_turns_where_their_contexts_are_long() -> None:
    """Rows with long contexts go in a step of their own, each second one, so that no prompt's tokens look at them."""
    batch, memory, wanted, newcomer = start_four(1000)
    steps = []
    while newcomer.phase != "gone" and newcomer.n_fed < 600:
        batch.row_s, batch.feed_token_s = 0.004, 0.002
        plan = run_step(batch, memory, wanted)
        steps.append((plan.single, plan.prompt_tokens))
    assert [single for single, _ in steps[:-1]] == [4, 0] * ((len(steps) - 1) // 2) + [4] * ((len(steps) - 1) % 2)
    assert all(bool(single) != bool(fed) for single, fed in steps)
    assert max(fed for _, fed in steps) == 150
    assert sum(fed for _, fed in steps) == 600


@pytest.mark.parametrize(
    ("known", "attend_cost", "row_s"),
    [
        pytest.param(60, 3.3e-4, 0.004, id="short contexts"),
        pytest.param(1000, 3.3e-4, 0.1, id="weights that are slow to read"),
        pytest.param(1000, 0.0, 0.004, id="no attention"),
        pytest.param(1000, 3.3e-4, 0.0, id="nothing measured"),
    ],
)
def test_rows_and_prompts_share_a_step_where_two_cost_more(known: int, attend_cost: float, row_s: float) -> None:
    """A second pass over the weights is not worth it for a few cells."""
    batch, *_ = start_four(known, attend_cost)
    batch.row_s = row_s
    plan = batch.plan()
    assert plan.single == 4
    assert plan.prompt_tokens == 150


def test_the_rest_of_a_prompt_is_a_whole_tile() -> None:
    """Fewer than 64 tokens would be attended row by row; a chunk before them that can spare some gives them."""
    batch, memory, wanted, newcomer = start_four(60)
    newcomer.tokens[170:] = []
    newcomer.n_prompt = 170
    plan = run_step(batch, memory, wanted)
    assert plan.prompt_tokens == 170 - localaid.TILE_TOKENS
    batch.feed_token_s = 0.002
    assert run_step(batch, memory, wanted).prompt_tokens == localaid.TILE_TOKENS


def test_the_last_token_of_a_seeded_prompt_is_fed_alone() -> None:
    """Cold and warm then end in the same step, so that a seed repeats its text."""
    memory = SimulatedMemory(capacity())
    batch = Batch(memory.capacity, memory)
    for _ in range(2):
        sequence = BatchSequence(list(range(60)), 60, apart=True)
        batch.add(sequence)
        wanted = {sequence: 1}
        plan = run_step(batch, memory, wanted)
        if plan.rows == []:
            plan = run_step(batch, memory, wanted)
        assert (plan.rows, len(plan.tokens)) == ([sequence], 1)
        finish_all(batch, memory, wanted)


def test_a_short_prompt_overtakes_a_long_one() -> None:
    """The oldest prompt gets half of a step, the shortest the rest."""
    batch = Batch(capacity(), SimulatedMemory(capacity()))
    long, short = BatchSequence([9] * 500, 500), BatchSequence([8] * 30, 30)
    batch.add(long)
    batch.add(short)
    plan = batch.plan()
    assert short in plan.rows
    assert dict(plan.fed)[long] == 128 - 30


def test_a_cancelled_leader_does_not_strand_its_followers() -> None:
    """Whoever waits for a prefix takes what there is of it when the one who computes it goes."""
    memory = SimulatedMemory(capacity())
    batch = Batch(memory.capacity, memory)
    leader, follower = BatchSequence([7] * 400, 400), BatchSequence([7] * 400, 400)
    wanted = {leader: 1, follower: 1}
    batch.add(leader)
    batch.add(follower)
    run_step(batch, memory, wanted)
    assert follower.phase == "following"
    batch.finish(leader)
    finish_all(batch, memory, wanted)
    assert follower.tokens == expected([7] * 400, 1)
    assert follower.n_cached == 128


def test_a_restore_that_fails_is_known_before_anything_is_copied() -> None:
    """Who shares the prefix with a sequence that could not have it back is fed it too, and no cell is leaked."""
    memory = SimulatedMemory(capacity())
    batch = Batch(memory.capacity, memory)
    chat = BatchSequence([7] * 300, 300)
    batch.add(chat)
    finish_all(batch, memory, {chat: 1})
    memory.fault_share = 1.0
    pair = [BatchSequence([7] * 200 + [9], 201) for _ in range(2)]
    for sequence in pair:
        batch.add(sequence)
    finish_all(batch, memory, dict.fromkeys(pair, 3))
    assert [sequence.tokens for sequence in pair] == [expected([7] * 200 + [9], 3)] * 2
    assert (memory.used, batch.used_cells) == (0, 0)


def test_a_segment_that_could_not_be_saved_is_not_relied_on() -> None:
    """Nobody finds it."""
    memory = SimulatedMemory(capacity(), fault_share=1.0)
    batch = Batch(memory.capacity, memory)
    sequence = BatchSequence([7] * 100, 100)
    batch.add(sequence)
    finish_all(batch, memory, {sequence: 1})
    assert not batch.segments
    assert batch.parked_bytes == 0


TOKENS = st.lists(st.integers(0, 2), max_size=12)


@given(st.lists(TOKENS, max_size=8), TOKENS)
def test_the_tree_finds_the_longest_prefix(known: list[list[int]], asked: list[int]) -> None:
    """What `find` says equals a comparison with every holder, and removing all leaves nothing behind."""
    tree = PrefixTree()
    holders: list[Holder] = []
    for tokens in known:
        if tokens:
            holder = BatchSequence(tokens, len(tokens))
            tree.add(holder, tokens, 0, len(tokens))
            holders.append(holder)
    found: dict[Holder, int] = {}
    for node, length in tree.find(asked, len(asked)):
        found |= dict.fromkeys(node.holders, length)

    def common(tokens: list[int]) -> int:
        return next(
            (i for i, (a, b) in enumerate(zip(tokens, asked, strict=False)) if a != b), min(len(tokens), len(asked))
        )

    assert found == {h: common(h.tokens) for h in holders if common(h.tokens)}
    for known_holder in holders:
        tree.remove(known_holder)
    assert not tree.root.children
