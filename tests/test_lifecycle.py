"""Section 9, LIFECYCLE: the table of workers, without processes and without a clock."""

from __future__ import annotations

import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import localaid
from localaid import (
    Effect,
    EndWorker,
    HoldQueue,
    Lifecycle,
    LoadOptions,
    ModelFailed,
    ModelInfo,
    ModelRemoved,
    ModelTooLarge,
    RefuseWaiting,
    ReleaseQueue,
    StartWorker,
    WorkerKey,
    estimate_bytes,
)

TURN_S = 10.0
KEEP_S = 600.0
A, B, C, D, HUGE = (WorkerKey(letter * 64, LoadOptions()) for letter in "abcdf")
SIZES = {A: 60, B: 60, C: 30, D: 10, HUGE: 150}
BUDGET = 100


def make(budget: int = BUDGET) -> Lifecycle:
    """Return an empty table."""
    return Lifecycle(budget, turn_s=TURN_S)


def ask(table: Lifecycle, key: WorkerKey, now: float, keep_alive_s: float = KEEP_S) -> list[Effect]:
    """Let one request for `key` arrive."""
    return table.requested(key, f"{key.sha256[0]}.gguf", SIZES[key], keep_alive_s, now)


def load(table: Lifecycle, key: WorkerKey, now: float, *, keep_alive_s: float = KEEP_S) -> None:
    """Bring `key` into memory and let its request run to the end."""
    assert ask(table, key, now, keep_alive_s) == [StartWorker(key)]
    table.loaded(key, SIZES[key], now)
    table.started(key, now)
    table.finished(key, keep_alive_s, now, served=True)


# -- load, keep, unload --


def test_first_request_loads_and_others_join() -> None:
    """One load serves all requests of a worker."""
    table = make()
    assert ask(table, A, 0) == [StartWorker(A)]
    assert ask(table, A, 0) == []
    assert table.loaded(A, 60, 1) == []
    assert table.rows[A].waiting == 2


def test_idle_worker_ends_at_its_age_and_not_before() -> None:
    """`next_wakeup` names the moment; a tick before it does nothing."""
    table = make()
    load(table, A, 5.0)
    assert table.next_wakeup() == 5.0 + KEEP_S
    assert table.tick(5.0 + KEEP_S - 0.001) == []
    assert table.tick(5.0 + KEEP_S) == [EndWorker(A, "idle for 600 s")]
    assert table.next_wakeup() is None
    assert table.used_bytes == 60, "its memory is not free before it has ended"
    table.ended(A, 606.0)
    assert table.used_bytes == 0
    assert not table.rows


def test_busy_worker_has_no_age() -> None:
    """While something runs or waits there is nothing to wake up for."""
    table = make()
    ask(table, A, 0)
    table.loaded(A, 60, 0)
    assert table.next_wakeup() is None
    table.started(A, 0)
    assert table.next_wakeup() is None
    assert table.tick(1e9) == []


def test_keep_alive_for_ever_and_not_at_all() -> None:
    """-1 keeps for ever, 0 ends at once, and of rules that share a worker the most generous one holds."""
    table = make()
    load(table, A, 0, keep_alive_s=-1)
    assert table.next_wakeup() is None
    assert ask(table, D, 0, 0) == [StartWorker(D)]
    table.loaded(D, 10, 0)
    table.started(D, 0)
    assert table.finished(D, 0, 1, served=True) == [EndWorker(D, "idle for 0 s")]
    ask(table, A, 1, 0)
    table.started(A, 1)
    assert table.finished(A, 0, 2, served=True) == []


# -- room --


def test_least_recently_used_idle_one_goes_first() -> None:
    """Of two idle workers the one that was used longer ago makes room; one to be kept for ever goes last."""
    table = make()
    load(table, C, 0)
    load(table, D, 20)
    assert ask(table, A, 100) == [StartWorker(A)], "60 + 30 + 10 fit"
    table.loaded(A, 60, 100)
    table.started(A, 100)
    table.finished(A, KEEP_S, 100, served=True)
    assert ask(table, B, 200) == [EndWorker(A, "makes room for b.gguf")], "C and D alone would not be enough"
    table = make()
    load(table, A, 0, keep_alive_s=-1)
    load(table, C, 20)
    table.resized(90, 30)
    assert ask(table, D, 100) == [EndWorker(C, "makes room for d.gguf")]


def test_no_more_are_evicted_than_needed() -> None:
    """A worker that alone is large enough spares the smaller one that was used longer ago."""
    table = make()
    load(table, D, 0)
    load(table, A, 20)
    assert ask(table, B, 100) == [EndWorker(A, "makes room for b.gguf")]
    assert table.ended(A, 101) == [StartWorker(B)]


def test_load_waits_until_memory_is_free() -> None:
    """The new worker starts when the old one has gone, not when it has been told to go."""
    table = make()
    load(table, A, 0)
    assert ask(table, B, 50) == [EndWorker(A, "makes room for b.gguf")]
    assert ask(table, A, 50) == []
    assert table.ended(A, 51) == [StartWorker(B)]


def test_busy_worker_is_held_after_its_turn_and_ends_when_it_is_through() -> None:
    """Requests for the loaded model overtake for one turn; then it takes no more, and ends with the last that runs."""
    table = make()
    ask(table, A, 0)
    table.loaded(A, 60, 1)
    table.started(A, 1)
    assert ask(table, B, 2) == []
    assert table.next_wakeup() == 2 + TURN_S
    ask(table, A, 3)
    assert table.started(A, 3) == [], "overtakes"
    assert table.tick(2 + TURN_S) == [HoldQueue(A)]
    assert ask(table, A, 13) == []
    assert table.finished(A, KEEP_S, 14, served=True) == []
    assert table.finished(A, KEEP_S, 15, served=True) == [EndWorker(A, "makes room for b.gguf")]
    assert table.ended(A, 16) == [StartWorker(B)]
    assert table.rows[A].waiting == 1
    table.loaded(B, 60, 17)
    table.started(B, 17)
    assert table.next_wakeup() == 17 + TURN_S, "and A's request has the same right after B's turn"


def test_long_load_gets_a_long_turn() -> None:
    """Who took 100 s to load serves for 100 s, or swapping would take most of the time."""
    table = make()
    ask(table, A, 0)
    ask(table, B, 0)
    table.loaded(A, 60, 100)
    table.started(A, 100)
    assert table.next_wakeup() == 200


def test_held_worker_is_released_when_nobody_needs_its_room() -> None:
    """The one first in line gives up: the held worker takes requests again."""
    table = make()
    ask(table, A, 0)
    table.loaded(A, 60, 0)
    table.started(A, 0)
    ask(table, B, 0)
    assert table.tick(TURN_S) == [HoldQueue(A)]
    assert table.withdrawn(B, 11) == [ReleaseQueue(A)]


def test_idle_worker_lingers_a_moment_in_its_turn() -> None:
    """A client that asks one by one keeps its model for a turn, though it is idle between two requests."""
    table = make()
    load(table, A, 0)
    assert ask(table, B, 0.1) == []
    assert table.next_wakeup() == localaid.LINGER_S
    ask(table, A, 0.2)
    table.started(A, 0.2)
    assert table.tick(0.5) == []
    table.finished(A, KEEP_S, 0.6, served=True)
    assert table.next_wakeup() == 0.6 + localaid.LINGER_S
    assert table.tick(1.1) == [EndWorker(A, "makes room for b.gguf")]


def test_line_is_first_come_first_served() -> None:
    """A small model behind a large one loads only into what the large one leaves free."""
    table = make()
    ask(table, A, 0)
    table.loaded(A, 60, 0)
    table.started(A, 0)
    assert ask(table, B, 1) == []
    assert ask(table, C, 2) == [StartWorker(C)], "30 fit beside A now and beside B later"
    table = make()
    ask(table, A, 0)
    table.loaded(A, 60, 0)
    table.started(A, 0)
    table.resized(80, 0)
    assert ask(table, B, 1) == []
    assert ask(table, D, 2) == [StartWorker(D)]
    assert ask(table, C, 3) == [], "30 are not free, and will not be when B is loaded"


def test_who_is_behind_leaves_what_the_first_needs() -> None:
    """30 of 100 are in use, 95 are wanted by the first in line: 10 would fit now, and take what it waits for."""
    table = make()
    ask(table, C, 0)
    table.loaded(C, 30, 0)
    table.started(C, 0)
    assert table.requested(HUGE, "f.gguf", 95, KEEP_S, 1) == []
    assert ask(table, D, 2) == []
    assert table.finished(C, KEEP_S, 20, served=True) == [EndWorker(C, "makes room for f.gguf")]
    assert table.ended(C, 21) == [StartWorker(HUGE)]


def test_only_the_first_in_line_evicts() -> None:
    """While the first waits for a busy worker, the second leaves the idle ones alone; and nobody goes in vain."""
    table = make()
    load(table, D, 0)
    ask(table, A, 20)
    assert table.requested(HUGE, "f.gguf", 95, KEEP_S, 30) == [], "D alone makes no room, and A loads"
    table.loaded(A, 60, 31)
    table.started(A, 31)
    assert ask(table, B, 32) == [], "40 would be there without D, but the first in line needs them"
    assert table.next_wakeup() == 31 + 11
    assert table.tick(42) == [EndWorker(D, "makes room for f.gguf"), HoldQueue(A)]


def test_second_in_line_evicts_nobody() -> None:
    """An idle worker that the second needs stays while the first waits for a busy one."""
    table = make()
    load(table, C, 0)
    ask(table, A, 20)
    table.loaded(A, 60, 20)
    table.started(A, 20)
    assert table.requested(HUGE, "f.gguf", 95, KEEP_S, 30) == []
    assert table.requested(B, "b.gguf", 15, KEEP_S, 30) == []


def test_whose_turn_ends_first_is_held() -> None:
    """Of two busy workers of which one is enough, the one that has served longer gives way."""
    table = make()
    ask(table, C, 0)
    ask(table, A, 0)
    table.loaded(A, 60, 1)
    table.loaded(C, 30, 5)
    table.started(C, 5)
    table.started(A, 5)
    assert table.requested(D, "d.gguf", 20, KEEP_S, 6) == []
    assert table.tick(16) == [HoldQueue(A)]


def test_model_that_never_fits_is_refused_with_both_numbers() -> None:
    """503 at once, nothing is evicted for it."""
    table = make()
    load(table, A, 0)
    (effect,) = ask(table, HUGE, 1)
    match effect:
        case RefuseWaiting(key, ModelTooLarge(file="f.gguf", needed_bytes=150, budget_bytes=100) as error):
            assert key == HUGE
            assert error.status == 503
        case _:
            pytest.fail(f"{effect}")
    assert HUGE not in table.rows


def test_measured_size_replaces_the_estimate() -> None:
    """What a worker really takes counts, is remembered, and never makes a model that ran impossible."""
    table = make()
    ask(table, A, 0)
    table.loaded(A, 35, 0)
    table.started(A, 0)
    assert ask(table, B, 0) == [StartWorker(B)]
    table.finished(A, 0, 1, served=True)
    table.tick(KEEP_S + 1)
    table.ended(A, 700)
    assert A not in table.rows
    table.loaded(B, 60, 700)
    assert ask(table, A, 700) == [StartWorker(A)], "35, not 60"
    table.measured({A: 1000}, 701)
    assert table.rows[A].size_bytes == BUDGET


def test_too_large_by_measure_ends_idle_ones() -> None:
    """When the budget turns out to be exceeded, who is idle goes; who is busy stays."""
    table = make()
    load(table, C, 0)
    load(table, A, 50)
    ask(table, A, 60)
    table.started(A, 60)
    assert table.measured({A: 80}, 70) == [EndWorker(C, "the memory budget is exceeded")]


# -- failure --


def test_failing_loads_back_off_and_are_then_refused() -> None:
    """1 s, 2 s; after the third failure in a row requests are refused at once until the next attempt is due."""
    table = make()
    ask(table, A, 0)
    assert table.failed(A, "was killed", 0) == []
    assert table.next_wakeup() == 1
    assert table.tick(1) == [StartWorker(A)]
    assert table.failed(A, "was killed", 1) == []
    assert table.next_wakeup() == 3
    assert table.tick(3) == [StartWorker(A)]
    (effect,) = table.failed(A, "was killed", 3)
    match effect:
        case RefuseWaiting(_, ModelFailed(reason="was killed", retry_after_s=4.0) as error):
            assert error.status == 503
        case _:
            pytest.fail(f"{effect}")
    (effect,) = ask(table, A, 5)
    match effect:
        case RefuseWaiting(_, ModelFailed(retry_after_s=2.0)):
            pass
        case _:
            pytest.fail(f"{effect}")
    assert ask(table, A, 7) == [StartWorker(A)]
    for _ in range(10):
        table.failed(A, "again", 7)
    assert table.rows[A].retry_at == 7 + localaid.BACKOFF_LIMIT_S


def test_final_failure_refuses_at_once_with_the_reason() -> None:
    """A worker that says why it cannot load the model is believed."""
    table = make()
    ask(table, A, 0)
    (effect,) = table.failed(A, "unknown architecture", 1, final=True)
    assert isinstance(effect, RefuseWaiting)
    assert isinstance(effect.error, ModelFailed)
    assert "unknown architecture" in str(effect.error)
    assert effect.error.retry_after_s == 1


def test_death_after_success_restarts_at_once() -> None:
    """A worker that was sound is replaced without delay; requests that may run again wait for it."""
    table = make()
    load(table, A, 0)
    ask(table, A, 1)
    table.started(A, 1)
    assert table.failed(A, "was killed", 2, again=1) == [StartWorker(A)]
    assert table.rows[A].waiting == 1
    assert table.failed(A, "was killed", 2) == []
    assert table.next_wakeup() == 4


def test_success_forgets_failures() -> None:
    """One whole answer, and the next failure is a first one again."""
    table = make()
    ask(table, A, 0)
    table.failed(A, "x", 0)
    table.tick(1)
    table.loaded(A, 60, 1)
    assert table.rows[A].failures == 1, "a load alone proves nothing"
    table.started(A, 1)
    table.finished(A, KEEP_S, 2, served=True)
    assert (table.rows[A].failures, table.rows[A].reason) == (0, None)


def test_old_failures_are_forgotten() -> None:
    """The table does not grow for ever."""
    table = make()
    ask(table, A, 0)
    table.failed(A, "x", 0, final=True)
    assert A in table.rows
    table.tick(localaid.FORGET_FAILURE_S + 2)
    assert not table.rows


# -- removed files --


def test_removed_file_drains_its_worker() -> None:
    """What waits is served from memory, then the worker ends."""
    table = make()
    load(table, A, 0)
    ask(table, A, 1)
    assert table.removed(A, 2) == []
    table.started(A, 3)
    assert table.finished(A, KEEP_S, 4, served=True) == [EndWorker(A, "its file is gone")]
    table.ended(A, 5)
    assert not table.rows


def test_removed_file_refuses_who_waits_for_a_load() -> None:
    """Not loaded, or half loaded from nobody knows which file: the request may look for another."""
    table = make()
    ask(table, A, 0)
    end, refuse = table.removed(A, 1)
    assert end == EndWorker(A, "a.gguf was removed")
    assert isinstance(refuse, RefuseWaiting)
    assert isinstance(refuse.error, ModelRemoved)
    table.ended(A, 2)
    assert not table.rows
    assert ask(table, A, 3) == [StartWorker(A)], "the file has come back"


def test_a_changed_file_is_no_failure() -> None:
    """Who waits may look for the model anew, and the next load begins at once."""
    table = make()
    ask(table, A, 0)
    (refuse,) = table.changed(A, 1)
    assert isinstance(refuse, RefuseWaiting)
    assert isinstance(refuse.error, ModelRemoved)
    assert not table.rows
    assert ask(table, A, 1) == [StartWorker(A)]


# -- estimates --


SMOL = ModelInfo(
    architecture="llama",
    context_tokens=8192,
    embedding_length=576,
    block_count=30,
    head_count=9,
    head_count_kv=3,
    vocab_tokens=49152,
    weights_bytes=90_000_000,
)


def test_estimate_counts_weights_and_cache() -> None:
    """30 layers x 3 heads x 64 x 2 (K, V) x 2 bytes: 23,040 bytes a token; q8_0 takes 34/64 of that."""
    low = estimate_bytes(SMOL, LoadOptions(ctx_size=20000))
    high = estimate_bytes(SMOL, LoadOptions(ctx_size=40000))
    mask = 512 * 4
    assert (high - low) == pytest.approx(20000 * (23040 + mask))
    small = estimate_bytes(SMOL, LoadOptions(ctx_size=20000, cache_type_k="q8_0", cache_type_v="q8_0"))
    assert low - small == pytest.approx(20000 * 23040 * (1 - 34 / 64))
    assert low > SMOL.weights_bytes + localaid.WORKER_BASE_BYTES


def test_estimate_leaves_out_what_a_gpu_holds() -> None:
    """All layers on a GPU: no weights and no cache in host memory."""
    assert estimate_bytes(SMOL, LoadOptions(n_gpu_layers=-1)) < SMOL.weights_bytes + localaid.WORKER_BASE_BYTES
    half = estimate_bytes(SMOL, LoadOptions(n_gpu_layers=15))
    assert estimate_bytes(SMOL, LoadOptions(n_gpu_layers=99)) < half < estimate_bytes(SMOL, LoadOptions())


def test_estimate_of_a_recurrent_model_does_not_grow_with_the_context() -> None:
    """Its memory is one state a sequence."""
    info = ModelInfo(architecture="mamba", recurrent=True, embedding_length=768, block_count=24, weights_bytes=10**8)
    more = estimate_bytes(info, LoadOptions(parallel=16)) - estimate_bytes(info, LoadOptions(parallel=8))
    assert more == 8 * 768 * 24 * localaid.STATE_FLOATS * 4
    assert estimate_bytes(ModelInfo(), LoadOptions()) > 0, "a header that says nothing is no error"


# -- any order of events --


class World(RuleBasedStateMachine):
    """Workers without processes: any events in any order that section 15 could see."""

    def __init__(self) -> None:
        """Start with an empty table."""
        super().__init__()
        self.now = 0.0
        self.table = make()
        self.process: dict[WorkerKey, str] = {}  # living ones -> loading, loaded, stopping
        self.size = dict(SIZES)
        self.waiting = dict.fromkeys(SIZES, 0)
        self.running = dict.fromkeys(SIZES, 0)
        self.held: set[WorkerKey] = set()
        self.loaded_at: dict[WorkerKey, float] = {}

    def apply(self, effects: list[Effect]) -> None:
        """Carry out effects and check what must hold of each."""
        for effect in effects:
            key = effect.key
            match effect:
                case StartWorker():
                    assert key not in self.process
                    assert self.waiting[key], "nothing is loaded for nobody"
                    self.process[key] = "loading"
                    row_sizes = [self.table.rows[living].size_bytes for living in self.process]
                    assert sum(row_sizes) <= BUDGET, "the budget is exceeded"
                case EndWorker():
                    assert self.process[key] in ("loading", "loaded")
                    assert not self.running[key], "a busy worker was evicted"
                    if self.process[key] == "loaded" and self.waiting[key]:
                        assert self.now >= self.loaded_at[key] + TURN_S, "it was just loaded for somebody"
                    self.process[key] = "stopping"
                case HoldQueue():
                    assert key not in self.held
                    assert self.now >= self.loaded_at[key] + TURN_S
                    self.held.add(key)
                case ReleaseQueue():
                    self.held.remove(key)
                case RefuseWaiting():
                    assert self.waiting[key]
                    self.waiting[key] = 0

    def gone(self, key: WorkerKey) -> None:
        """Forget a process."""
        del self.process[key]
        self.held.discard(key)
        self.running[key] = 0

    def those(self, *states: str) -> list[WorkerKey]:
        """Return the keys of processes in one of these states."""
        return [key for key, state in self.process.items() if state in states]

    @rule(key=st.sampled_from(list(SIZES)), keep_alive_s=st.sampled_from([-1, 0, 30, KEEP_S]))
    def request(self, key: WorkerKey, keep_alive_s: float) -> None:
        """A request arrives."""
        self.waiting[key] += 1
        self.apply(ask(self.table, key, self.now, keep_alive_s))

    @precondition(lambda self: any(self.waiting.values()))
    @rule(draw=st.data())
    def withdraw(self, draw: st.DataObject) -> None:
        """A waiting request is cancelled."""
        key = draw.draw(st.sampled_from([key for key, count in self.waiting.items() if count]))
        self.waiting[key] -= 1
        self.apply(self.table.withdrawn(key, self.now))

    @precondition(lambda self: any(self.waiting[key] for key in self.those("loaded") if key not in self.held))
    @rule(draw=st.data())
    def start(self, draw: st.DataObject) -> None:
        """A worker takes a waiting request."""
        keys = [key for key in self.those("loaded") if self.waiting[key] and key not in self.held]
        self.start_one(draw.draw(st.sampled_from(keys)))

    def start_one(self, key: WorkerKey) -> None:
        """Hand one request to a worker."""
        self.waiting[key] -= 1
        self.running[key] += 1
        self.apply(self.table.started(key, self.now))

    @precondition(lambda self: any(self.running.values()))
    @rule(draw=st.data(), served=st.booleans())
    def finish(self, draw: st.DataObject, *, served: bool) -> None:
        """A running request ends or is cancelled."""
        key = draw.draw(st.sampled_from([key for key, count in self.running.items() if count]))
        self.running[key] -= 1
        self.apply(self.table.finished(key, 30, self.now, served=served))

    @precondition(lambda self: self.those("loading"))
    @rule(draw=st.data(), grows=st.sampled_from([0.5, 1.0, 1.2]))
    def finish_load(self, draw: st.DataObject, grows: float) -> None:
        """A load succeeds; the worker is smaller or larger than estimated."""
        self.load_one(draw.draw(st.sampled_from(self.those("loading"))), grows)

    def load_one(self, key: WorkerKey, grows: float = 1.0) -> None:
        """Let a load succeed."""
        self.process[key] = "loaded"
        self.loaded_at[key] = self.now
        self.apply(self.table.loaded(key, int(SIZES[key] * grows), self.now))

    @precondition(lambda self: self.those("loading", "loaded"))
    @rule(draw=st.data(), final=st.booleans())
    def die(self, draw: st.DataObject, *, final: bool) -> None:
        """A worker dies, while it loads or later; some of its requests will run again."""
        key = draw.draw(st.sampled_from(self.those("loading", "loaded")))
        final = final and self.process[key] == "loading"
        again = draw.draw(st.integers(0, self.running[key]))
        self.gone(key)
        self.waiting[key] += again
        self.apply(self.table.failed(key, "died", self.now, final=final, again=again))

    @precondition(lambda self: self.those("stopping"))
    @rule(draw=st.data())
    def end(self, draw: st.DataObject) -> None:
        """A worker that was told to end is gone."""
        key = draw.draw(st.sampled_from(self.those("stopping")))
        self.gone(key)
        self.apply(self.table.ended(key, self.now))

    @rule(key=st.sampled_from(list(SIZES)))
    def remove(self, key: WorkerKey) -> None:
        """A file is deleted."""
        self.apply(self.table.removed(key, self.now))

    @rule(seconds=st.floats(0, 100))
    def pass_time(self, seconds: float) -> None:
        """Time passes, with a tick at each wake-up as section 15 does it."""
        until = self.now + seconds
        while (wakeup := self.table.next_wakeup()) is not None and wakeup <= until:
            assert wakeup > self.now, "would spin"
            self.now = wakeup
            self.apply(self.table.tick(self.now))
        self.now = until

    @invariant()
    def counts_agree(self) -> None:
        """The table knows exactly what the world knows, and never asks to be woken for nothing."""
        for key in SIZES:
            row = self.table.row(key)
            assert (row.waiting if row else 0) == self.waiting[key]
            assert (row.running if row else 0) == self.running[key]
            assert (row.phase if row else "absent") == self.process.get(key, "absent")
        wakeup = self.table.next_wakeup()
        assert wakeup is None or wakeup > self.now, "would spin"

    def teardown(self) -> None:
        """From here on nothing fails and nothing new comes: everybody who waits is served or refused."""
        for _ in range(100):
            if not any(self.waiting.values()):
                return
            moved = bool(self.process.keys() - set(self.those("loaded")))
            for key in self.those("loading"):
                self.load_one(key)
            for key in self.those("stopping"):
                self.gone(key)
                self.apply(self.table.ended(key, self.now))
            for key in self.those("loaded"):
                while self.waiting[key] and key not in self.held and self.process[key] == "loaded":
                    self.start_one(key)
                    moved = True
                while self.running[key]:
                    self.running[key] -= 1
                    self.apply(self.table.finished(key, 30, self.now, served=True))
                    moved = True
            if not moved:
                wakeup = self.table.next_wakeup()
                assert wakeup is not None, f"{self.waiting} wait for ever"
                assert wakeup < math.inf
                self.now = max(self.now, wakeup)
                self.apply(self.table.tick(self.now))
        assert not any(self.waiting.values()), "somebody starves"


World.TestCase.settings = settings(max_examples=300, stateful_step_count=60, deadline=None)
TestWorld = World.TestCase
