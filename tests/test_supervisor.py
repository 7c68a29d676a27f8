"""Section 15, SUPERVISOR: real processes and sockets, with workers that fail on command (scripted_worker.py)."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import os
import random
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import localaid
from localaid import (
    TASKS_AHEAD,
    Accepted,
    BrokenFrame,
    Delta,
    Embed,
    Embedded,
    FairQueue,
    Generation,
    LoadModel,
    LoadOptions,
    ModelFailed,
    ModelInfo,
    ModelRemoved,
    ModelTooLarge,
    QueueFull,
    Ranked,
    Rerank,
    Sampling,
    ServiceRate,
    ShuttingDown,
    Submit,
    Supervisor,
    Target,
    TextPrompt,
    Tokenize,
    Tokenized,
    WorkerDied,
    WorkerStatus,
)

WORKER = (sys.executable, str(Path(__file__).with_name("scripted_worker.py")))
LIMIT_S = 30.0  # that a broken test waits, never a passing one


class Bench:
    """A supervisor with scripted workers, and what it reported."""

    def __init__(self, folder: Path, **options: float) -> None:
        """Supervise scripted workers."""
        self.folder = folder
        self.states: list[tuple[str, ...]] = []
        self._changed = asyncio.Event()
        settings = {"budget_bytes": 10**12, "turn_s": 0.01, "backoff_s": 0.01} | options
        self.supervisor = Supervisor(worker_argv=WORKER, on_change=self._note, **settings)  # type: ignore[arg-type]

    def _note(self) -> None:
        """Keep what a change led to."""
        states = tuple(worker.state for worker in self.workers)
        if self.states[-1:] != [states]:
            self.states.append(states)
        self._changed.set()

    @property
    def workers(self) -> tuple[WorkerStatus, ...]:
        """The workers' status."""
        return self.supervisor.status().workers

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait for changes until something holds."""
        async with asyncio.timeout(LIMIT_S):
            while not holds():
                self._changed.clear()
                await self._changed.wait()

    def target(self, script: str = "ok", name: str = "m", *, size: int = 0, **options: int) -> Target:
        """Return a model whose worker loads as `script` says."""
        path = self.folder / f"{name}.gguf"
        path.write_text(script, encoding="utf-8")
        return Target(
            sha256=hashlib.sha256(name.encode()).hexdigest(),
            file=path.name,
            load=LoadModel(path=str(path), options=LoadOptions(**options)),  # type: ignore[arg-type]
            info=ModelInfo(weights_bytes=size),
        )

    def ask(self, target: Target, text: str, *, client: str = "client", n: int = 1) -> Generation:
        """Submit a command."""
        return self.supervisor.submit(target, Submit(id=0, prompt=TextPrompt(text=text), n=n), client=client)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    """Supervise until the test ends."""
    bench = Bench(tmp_path)
    yield bench
    await bench.supervisor.stop(5.0)


@contextlib.asynccontextmanager
async def supervise(folder: Path, **options: float) -> AsyncIterator[Bench]:
    """Supervise with other options."""
    bench = Bench(folder, **options)
    try:
        yield bench
    finally:
        await bench.supervisor.stop(5.0)


async def read(generation: Generation) -> str:
    """Return the whole text of a request."""
    async with asyncio.timeout(LIMIT_S):
        return "".join([event.text async for event in generation if isinstance(event, Delta)])


async def first(generation: Generation) -> Accepted | Delta:
    """Return the next event."""
    async with asyncio.timeout(LIMIT_S):
        return await anext(generation)


# -- a process --


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ({}, "glibc.malloc.hugetlb=1"),
        ({"GLIBC_TUNABLES": "glibc.malloc.check=3"}, "glibc.malloc.check=3:glibc.malloc.hugetlb=1"),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, "glibc.malloc.hugetlb=0"),
    ],
)
def test_a_workers_environment(given: dict[str, str], made: str) -> None:
    """The daemon's, with large pages unless the user says otherwise."""
    environ = localaid.worker_environ({"HOME": "/root", "PYTHONPATH": "x", **given}, "INFO")
    assert (environ["GLIBC_TUNABLES"], environ["HOME"]) == (made, "/root")
    assert environ["LOCALAID_LOG_LEVEL"] == "INFO"


# -- a request --


async def test_request_loads_its_model_and_gets_every_event(bench: Bench) -> None:
    """Accepted, then the deltas in order, then the end; the model is then in memory."""
    target = bench.target()
    async with asyncio.timeout(LIMIT_S):
        events = [event async for event in bench.ask(target, "say 3")]
    number = events[0].id
    assert events == [
        Accepted(number, 7, 3),
        Delta(number, 0, "0 ", 1),
        Delta(number, 0, "1 ", 2),
        Delta(number, 0, "2 ", 3, "stop"),
    ]
    assert bench.supervisor.loaded == {target.sha256}
    (worker,) = bench.workers
    assert (worker.state, worker.running, worker.waiting, worker.failures) == ("loaded", 0, 0, 0)
    assert worker.rss_bytes > 0
    assert worker.steps == 4


async def test_all_sequences_of_a_request_must_finish(bench: Bench) -> None:
    """With n = 3 the iterator ends after the third `finish`."""
    async with asyncio.timeout(LIMIT_S):
        events = [event async for event in bench.ask(bench.target(), "say 2", n=3)]
    assert sorted(event.index for event in events if isinstance(event, Delta)) == [0, 0, 1, 1, 2, 2]


async def test_batches_bring_all_there_is(bench: Bench) -> None:
    """`next_batch` loses and repeats nothing, whatever the wake-ups were; an empty one is the end."""
    generation = bench.ask(bench.target(), "say 500")
    texts = []
    async with asyncio.timeout(LIMIT_S):
        while batch := await generation.next_batch():
            texts += [event.text for event in batch if isinstance(event, Delta)]
        assert await generation.next_batch() == []
    assert texts == [f"{number} " for number in range(500)]


async def test_cancelled_wait_loses_nothing(bench: Bench) -> None:
    """A reader may give up waiting (to send an SSE comment) and wait again."""
    target = bench.target()
    generation = bench.ask(target, "hold")
    await first(generation)
    await first(generation)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await generation.next_batch()
    bench.ask(target, "release")
    assert await read(generation) == "released"


async def test_requests_for_other_options_have_their_own_worker(bench: Bench) -> None:
    """The same file with other load options is another worker; with the same ones it is the same."""
    one, other = bench.target(parallel=1), bench.target(parallel=2)
    await asyncio.gather(*(read(bench.ask(target, "say 1")) for target in (one, other, one)))
    assert len(bench.workers) == 2
    assert len({worker.pid for worker in bench.workers}) == 2


async def test_rejected_request_gets_the_workers_error(bench: Bench) -> None:
    """The error crosses the wire with its fields; the worker goes on."""
    target = bench.target()
    with pytest.raises(ModelRemoved) as caught:
        await read(bench.ask(target, "reject"))
    assert caught.value.file == "some.gguf"
    assert await read(bench.ask(target, "say 1")) == "0 "


async def test_together_in_one_write(bench: Bench) -> None:
    """What is submitted at one moment reaches a loaded worker before it has answered any of it."""
    target = bench.target(parallel=4)
    await read(bench.ask(target, "say 1"))
    requests = [bench.ask(target, f"say {number}") for number in (1, 2, 3)]
    log = bench.ask(target, "log")
    assert await read(log) == "say 1|say 1|say 2|say 3|log"
    assert [await read(request) for request in requests] == ["0 ", "0 1 ", "0 1 2 "]


# -- the queue --


async def test_only_the_look_ahead_goes_to_the_worker(bench: Bench) -> None:
    """With one place in the batch two sequences are inside the worker, the rest waits here."""
    target = bench.target(parallel=1)
    held = [bench.ask(target, "hold") for _ in range(5)]
    await first(held[1])
    (worker,) = bench.workers
    assert (worker.running, worker.waiting) == (localaid.LOOK_AHEAD, 3)
    for generation in held:
        generation.close()
    (worker,) = bench.workers
    assert (worker.running, worker.waiting) == (0, 0)


async def test_clients_take_turns(bench: Bench) -> None:
    """One client's ten requests do not hold up another's first; each client's own stay in order."""
    target = bench.target(parallel=1)
    gate = [bench.ask(target, "hold", client="gate") for _ in range(2)]
    await first(gate[1])
    many = [bench.ask(target, f"say 1 many{number}", client="many") for number in range(3)]
    few = bench.ask(target, "say 1 few", client="few")
    log = bench.ask(target, "log", client="log")
    for generation in gate:
        generation.close()
    text = await read(log)
    for generation in (*many, few):
        await read(generation)
    assert text.split("|")[-3:] == ["say 1 many0", "say 1 few", "log"]


async def test_full_queue_is_refused_with_a_measured_time(tmp_path: Path) -> None:
    """429; the place of one that is cancelled is free at once."""
    async with supervise(tmp_path, queue_size=2) as bench:
        target = bench.target(parallel=1)
        gate = [bench.ask(target, "hold") for _ in range(2)]
        await first(gate[1])
        waiting = [bench.ask(target, "say 1") for _ in range(2)]
        with pytest.raises(QueueFull) as caught:
            bench.ask(target, "say 1")
        assert caught.value.status == 429
        assert caught.value.waiting == 2
        assert 1 <= caught.value.retry_after_s <= localaid.RETRY_AFTER_LIMIT_S
        waiting[0].close()
        again = bench.ask(target, "say 1")
        for generation in gate:
            generation.close()
        assert await read(waiting[1]) == await read(again) == "0 "


async def test_request_that_need_not_wait_is_not_refused(tmp_path: Path) -> None:
    """A burst fills the worker first, then the queue."""
    async with supervise(tmp_path, queue_size=2) as bench:
        target = bench.target(parallel=2)
        await read(bench.ask(target, "say 1"))
        burst = [bench.ask(target, "silent") for _ in range(2 * localaid.LOOK_AHEAD + 2)]
        with pytest.raises(QueueFull):
            bench.ask(target, "silent")
        for generation in burst:
            generation.close()


async def test_cancel_of_a_waiting_request_never_reaches_the_worker(bench: Bench) -> None:
    """It leaves the queue; the worker hears neither of it nor of its end."""
    target = bench.target(parallel=1)
    gate = [bench.ask(target, "hold") for _ in range(2)]
    await first(gate[1])
    waiting = bench.ask(target, "say 9")
    waiting.close()
    assert await read(waiting) == ""
    for generation in gate:
        generation.close()
    assert await read(bench.ask(target, "log")) == "hold|hold|cancelled|cancelled|log"


async def test_leaving_the_with_block_cancels(bench: Bench) -> None:
    """A reader that ends early takes its request out of the batch."""
    target = bench.target()
    with bench.ask(target, "hold") as generation:
        await first(generation)
    assert await read(bench.ask(target, "log")) == "hold|cancelled|log"


# -- death --


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("die", "SIGKILL, most likely as memory ran out"),
        ("abort", "SIGABRT"),
        ("exit", "exit status 3"),
        ("garbage", "do not understand each other"),
    ],
)
async def test_death_before_an_answer_runs_again_once(bench: Bench, command: str, words: str) -> None:
    """A request that kills two workers fails with how the second one ended; the next request gets a new one."""
    target = bench.target()
    with pytest.raises(WorkerDied, match=words):
        await read(bench.ask(target, command))
    (worker,) = bench.workers
    assert worker.failures == (1 if command == "abort" else 2)  # after a fault the second one follows at once
    assert worker.last_error is not None
    assert words in worker.last_error
    assert bench.states.count(("loaded",)) == 2
    assert await read(bench.ask(target, "say 1")) == "0 "
    assert bench.workers[0].failures == 0


async def test_innocent_requests_survive_a_death(bench: Bench, tmp_path: Path) -> None:
    """Those that had received nothing run again, in their order; who had begun gets the error."""
    target = bench.target()
    flag = tmp_path / "flag"
    flag.touch()
    begun = bench.ask(target, "hold")
    await first(begun)
    silent = [bench.ask(target, "silent") for _ in range(2)]
    deadly = bench.ask(target, f"die-once {flag}")
    with pytest.raises(WorkerDied, match="SIGKILL"):
        await read(begun)
    assert await read(deadly) == "0 "
    assert await read(bench.ask(target, "log")) == f"silent|silent|die-once {flag}|log"
    bench.ask(target, "release")
    assert [await read(generation) for generation in silent] == ["released", "released"]


async def test_a_worker_that_hangs_is_replaced_alone(bench: Bench) -> None:
    """Its requests get a clear error, or run again; one that says something is left alone."""
    bench.supervisor.stall_s = 0.3
    hangs, works = bench.target(), bench.target(name="other")
    begun = bench.ask(hangs, "hold")
    await first(begun)
    assert await read(bench.ask(works, "say 1")) == "0 "
    before = {worker.file: worker.pid for worker in bench.workers}
    with pytest.raises(WorkerDied, match=r"said nothing of its 1 requests for 0\.3 s"):
        await read(begun)
    assert await read(bench.ask(hangs, "say 1")) == "0 "
    after = {worker.file: worker.pid for worker in bench.workers}
    assert [file for file in before if before[file] != after[file]] == [hangs.file]


async def test_a_worker_that_cannot_even_be_killed_is_told_of(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The watchdog of systemd is not fed then."""
    begun = bench.ask(bench.target(), "hold")
    await first(begun)
    before = bench.supervisor.stuck
    bench.supervisor.stall_s = 0.0
    monkeypatch.setattr(localaid, "STUCK_S", 0.0)
    assert (before, bench.supervisor.stuck) == ((), (bench.target().file,))


async def test_what_came_before_a_death_is_read_first(bench: Bench) -> None:
    """The deltas that the worker sent are delivered, then the error."""
    generation = bench.ask(bench.target(), "start-and-die")
    assert isinstance(await first(generation), Accepted)
    assert isinstance(await first(generation), Delta)
    with pytest.raises(WorkerDied):
        await first(generation)


async def test_killed_from_outside(bench: Bench) -> None:
    """The daemon notices without asking, and the next request starts a new worker at once."""
    target = bench.target()
    await read(bench.ask(target, "say 1"))
    pid = bench.workers[0].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await bench.until(lambda: not bench.supervisor.loaded)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert await read(bench.ask(target, "say 1")) == "0 "


async def test_refused_load_is_reported_with_its_reason(bench: Bench) -> None:
    """503 for all who waited; while the model backs off a request fails at once and says for how long."""
    async with supervise(bench.folder, backoff_s=1000) as slow:
        target = slow.target("refuse")
        waiting = [slow.ask(target, "say 1") for _ in range(2)]
        for generation in waiting:
            with pytest.raises(ModelFailed, match="unknown architecture"):
                await read(generation)
        with pytest.raises(ModelFailed) as caught:
            slow.ask(target, "say 1")
        assert 0 < caught.value.retry_after_s <= 60
        (worker,) = slow.workers
        assert (worker.state, worker.last_error) == ("failed", "unknown architecture")
    target = bench.target("refuse")
    with pytest.raises(ModelFailed):
        await read(bench.ask(target, "say 1"))


async def test_repaired_model_is_tried_again(bench: Bench) -> None:
    """After the backoff the next request loads, and success forgets the failures."""
    target = bench.target("crash")
    with pytest.raises(ModelFailed, match="SIGKILL"):
        await read(bench.ask(target, "say 1"))
    assert bench.workers[0].failures == localaid.FAILED_AFTER
    target = bench.target("ok")
    async with asyncio.timeout(LIMIT_S):
        while True:
            try:
                generation = bench.ask(target, "say 1")
                break
            except ModelFailed as error:
                await asyncio.sleep(error.retry_after_s)  # as a client does
    assert await read(generation) == "0 "
    assert bench.workers[0].failures == 0


async def test_program_that_cannot_be_started(tmp_path: Path) -> None:
    """An `OSError` is a failed load with its reason."""
    async with supervise(tmp_path) as bench:
        bench.supervisor.worker_argv = ("/nonexistent/python",)
        with pytest.raises(ModelFailed, match="could not be started"):
            await read(bench.ask(bench.target(), "say 1"))


async def test_load_that_hangs_is_ended(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """No progress for the time limit counts as a failure."""
    monkeypatch.setattr(localaid, "STALL_LIMIT_S", 0.5)
    with pytest.raises(ModelFailed, match="no progress"):
        await read(bench.ask(bench.target("stuck"), "say 1"))


# -- memory --


async def test_idle_model_leaves_after_keep_alive(tmp_path: Path) -> None:
    """0 s: as soon as it is idle; the process ends in order and nothing is left of it."""
    async with supervise(tmp_path, keep_alive_s=0) as bench:
        target = bench.target()
        assert await read(bench.ask(target, "say 1")) == "0 "
        await bench.until(lambda: not bench.workers)
        assert ("stopping",) in bench.states
        assert bench.supervisor.loaded == frozenset()
        assert await read(bench.ask(target, "say 1")) == "0 "


@pytest.fixture
def one_gigabyte(monkeypatch: pytest.MonkeyPatch) -> int:
    """Let every worker measure 1 GB."""
    monkeypatch.setattr(localaid, "load_rss_bytes", lambda _: 10**9)
    return 10**9


async def test_two_models_that_do_not_fit_together_take_turns(tmp_path: Path, one_gigabyte: int) -> None:
    """Eight clients of each: all are served, and never both models are in memory."""
    size = one_gigabyte
    async with supervise(tmp_path, budget_bytes=int(1.9 * size)) as bench:
        one, other = bench.target("ok large", "one", size=size), bench.target("ok large", "other", size=size)
        answers = await asyncio.gather(
            *(read(bench.ask(target, "say 2", client=f"{number}")) for number in range(8) for target in (one, other))
        )
        assert answers == ["0 1 "] * 16
        assert not any(set(states) <= {"loaded", "loading"} and len(states) == 2 for states in bench.states)


async def test_busy_model_gives_way_when_its_requests_have_ended(tmp_path: Path, one_gigabyte: int) -> None:
    """A held worker takes no new request; when the running one has ended the other model has its turn."""
    size = one_gigabyte
    async with supervise(tmp_path, budget_bytes=int(1.9 * size)) as bench:
        bench.supervisor.keep_alive_s = -1
        one, other = bench.target("ok large", "one", size=size), bench.target("ok large", "other", size=size)
        running = bench.ask(one, "hold")
        await first(running)
        waits = bench.ask(other, "say 1")
        await bench.until(lambda: bench.workers[0].state == "draining")
        late = bench.ask(one, "say 1")
        assert bench.workers[0].waiting == 1
        running.close()
        assert await read(waits) == "0 "
        assert await read(late) == "0 "


async def test_model_that_never_fits(bench: Bench) -> None:
    """503 with both numbers, and no trace in the table."""
    with pytest.raises(ModelTooLarge, match=r"953674 MiB") as caught:
        bench.ask(bench.target(size=10**13), "say 1")
    assert caught.value.budget_bytes == 10**12
    assert bench.workers == ()


# -- files that go, and the end --


async def test_removed_file_drains(bench: Bench) -> None:
    """Running requests end whole, waiting ones are served from memory, then the worker ends."""
    target = bench.target(parallel=1)
    held = [bench.ask(target, "hold") for _ in range(2)]
    waiting = bench.ask(target, "say 1")
    await first(held[1])
    bench.supervisor.drain(target.key)
    assert bench.supervisor.loaded == frozenset(), "no new request is sent there"
    for generation in held:
        generation.close()
    assert await read(waiting) == "0 "
    await bench.until(lambda: not bench.workers)


def weights_of(path: Path) -> localaid.WeightsFile:
    """Return a file as it is now."""
    return localaid.WeightsFile(str(path), localaid.stamp_of(path.stat()).content)


@pytest.mark.parametrize("script", ["refuse", "crash"])
async def test_a_load_from_a_file_that_has_changed_is_no_failure(bench: Bench, script: str) -> None:
    """Whoever the worker blames: the index hears of it first, then those that wait may look for the model anew."""
    target = bench.target(script)
    path = Path(target.load.path)
    load = msgspec.structs.replace(target.load, weights=[weights_of(path)])
    target = msgspec.structs.replace(target, load=load)
    os.utime(path, (1, 1))
    heard: list[tuple[str, ...]] = []
    generation = bench.ask(target, "say 1")
    bench.supervisor.on_written = lambda paths: heard.append((*paths, str(generation.error)))
    with pytest.raises(ModelRemoved):
        await read(generation)
    assert heard == [(str(path), "None")]
    assert not bench.workers, "nothing is held against the next one"


async def test_a_part_that_is_replaced_means_another_worker(bench: Bench) -> None:
    """A model is more than the file of its SHA: what lies beside it, its further parts and adapters, counts too."""
    target, part = bench.target(), bench.folder / "part2.gguf"
    keys, entries = [], []
    for content in ("one", "other"):
        part.write_text(content, encoding="utf-8")
        weights = (weights_of(Path(target.load.path)), weights_of(part))
        entries.append(
            localaid.FileEntry(
                path=target.load.path,
                relative="m.gguf",
                sha256=target.sha256,
                stamp=weights[0].content,
                later_parts=weights[1:],
            )
        )
        load = msgspec.structs.replace(target.load, weights=list(weights))
        keys.append(msgspec.structs.replace(target, load=load))
    assert await read(bench.ask(keys[0], "say 1")) == "0 "
    pid = bench.workers[0].pid
    bench.supervisor.retain(entries[:1])
    assert bench.workers[0].state == "loaded"
    bench.supervisor.retain(entries[1:])
    assert await read(bench.ask(keys[1], "say 1")) == "0 "
    await bench.until(lambda: len(bench.workers) == 1)
    assert bench.workers[0].pid != pid


async def test_removed_file_while_loading(bench: Bench) -> None:
    """Who waits is told to look for another model; the process is ended."""
    target = bench.target("stuck")
    generation = bench.ask(target, "say 1")
    bench.supervisor.retain([localaid.FileEntry(path="/m.gguf", relative="m.gguf", sha256=target.sha256)])
    assert not generation.error
    bench.supervisor.retain([localaid.FileEntry(path="/m.gguf", relative="m.gguf", sha256=None)])
    with pytest.raises(ModelRemoved):
        await read(generation)
    await bench.until(lambda: not bench.workers)


async def test_stop_lets_running_requests_end_and_refuses_the_rest(tmp_path: Path) -> None:
    """In order: the worker gets Stop, ends with its last sequence, and is gone when `stop` returns."""
    async with supervise(tmp_path) as bench:
        target = bench.target(parallel=1)
        running = [bench.ask(target, "hold") for _ in range(localaid.LOOK_AHEAD)]
        waiting = [bench.ask(target, "say 1"), bench.ask(bench.target("stuck", "other"), "say 1")]
        await first(running[1])
        pids = [worker.pid for worker in bench.workers]
        async with asyncio.timeout(LIMIT_S):
            await bench.supervisor.stop(20.0)
        assert [await read(generation) for generation in running] == ["held stopped"] * len(running)
        for generation in waiting:
            with pytest.raises(ShuttingDown):
                await read(generation)
        with pytest.raises(ShuttingDown):
            bench.ask(target, "say 1")
        for pid in pids:
            assert pid is not None
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)


async def test_stop_insists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that ignores Stop and SIGTERM is killed; its request gets the error."""
    monkeypatch.setattr(localaid, "TERM_LIMIT_S", 0.01)
    async with supervise(tmp_path) as bench:
        running = bench.ask(bench.target("ok stubborn"), "hold")
        await first(running)
        async with asyncio.timeout(LIMIT_S):
            await bench.supervisor.stop(0.01)
        with pytest.raises(WorkerDied, match="did not end when told to"):
            await read(running)


# -- all at once --


async def test_chaos_leaves_nobody_behind(tmp_path: Path, one_gigabyte: int) -> None:
    """80 requests for three models of which two fit, with cancels, deaths and removals: each ends, nothing is left."""
    chance = random.Random(7)
    commands = ["say 1", "say 40", "silent", "hold", "release", "release", "log", "die", "start-and-die", "reject"]
    async with supervise(tmp_path, budget_bytes=int(2.9 * one_gigabyte), queue_size=1000) as bench:
        targets = [bench.target("ok large", name, size=one_gigabyte, parallel=2) for name in ("one", "two", "three")]

        async def one_client(number: int) -> str:
            try:
                with bench.ask(chance.choice(targets), chance.choice(commands), client=f"{number % 5}") as generation:
                    for _ in range(chance.randrange(4)):
                        if not await generation.next_batch():
                            return "complete"
                    return "cancelled"
            except localaid.LocalaidError as error:
                return type(error).__name__

        outcomes: list[str] = []
        async with asyncio.timeout(2 * LIMIT_S):
            for number in range(0, 80, 10):
                outcomes += await asyncio.gather(*(one_client(number + place) for place in range(10)), releases(bench))
                bench.supervisor.drain(chance.choice(targets).key)
        outcomes = [outcome for outcome in outcomes if outcome != "released"]
        assert set(outcomes) <= {"complete", "cancelled", "WorkerDied", "ModelFailed", "ModelRemoved"}
        assert {"complete", "cancelled", "WorkerDied"} <= set(outcomes)
        assert all((worker.running, worker.waiting) == (0, 0) for worker in bench.workers)
        for row in bench.supervisor.table.rows.values():
            assert (row.running, row.waiting) == (0, 0)


async def releases(bench: Bench) -> str:
    """Let held requests of every loaded worker end again and again, until none is left."""
    while any(worker.running or worker.waiting for worker in bench.workers):
        for owner in list(bench.supervisor._owners.values()):
            with contextlib.suppress(localaid.LocalaidError):
                await read(bench.ask(owner.target, "release"))
    return "released"


# -- the real worker --


def real_target(path: Path, **options: int) -> Target:
    """Return a real model."""
    with path.open("rb") as file:
        info = localaid.parse_gguf(file.read(32 << 20), size_bytes=path.stat().st_size, file=path.name)
    load = LoadModel(path=str(path), options=LoadOptions(**options))  # type: ignore[arg-type]
    return Target(sha256=path.name, file=path.name, load=load, info=info)


def count_up(max_tokens: int) -> Submit:
    """Return a greedy request that does not end early."""
    sampling = Sampling(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    return Submit(id=0, prompt=TextPrompt(text="one two three"), sampling=sampling)


async def test_real_worker_answers_dies_and_answers_again(tiny_llama: Path) -> None:
    """The program starts itself as worker; killed in the middle of an answer it is replaced."""
    supervisor = Supervisor(budget_bytes=2**33)
    target = real_target(tiny_llama)
    try:
        text = await read(supervisor.submit(target, count_up(8), client="a"))
        running = supervisor.submit(target, count_up(100_000), client="a")
        await first(running)
        (worker,) = supervisor.status().workers
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(WorkerDied, match="SIGKILL"):
            await read(running)
        assert await read(supervisor.submit(target, count_up(8), client="a")) == text
    finally:
        await supervisor.stop()


async def test_real_worker_says_why_it_cannot_load(tmp_path: Path) -> None:
    """A file that is no model: the reason reaches the client, and the process is gone."""
    supervisor = Supervisor(budget_bytes=2**33)
    path = tmp_path / "no.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    target = Target(sha256="no", file="no.gguf", load=LoadModel(path=str(path)), info=ModelInfo())
    try:
        with pytest.raises(ModelFailed) as caught:
            await read(supervisor.submit(target, count_up(8), client="a"))
        (worker,) = supervisor.status().workers
        assert worker.last_error == caught.value.reason
        assert worker.pid is None
    finally:
        await supervisor.stop()


async def test_estimate_is_near_what_a_real_worker_takes(smollm2: Path) -> None:
    """Within 20 % below and 100 % above, so that the budget is neither exceeded nor wasted."""
    supervisor = Supervisor(budget_bytes=2**40)
    try:
        for options in ({}, {"ctx_size": 1024, "parallel": 1}):
            target = real_target(smollm2, **options)
            await read(supervisor.submit(target, count_up(2), client="a"))
            measured = supervisor.status().workers[-1].rss_bytes
            estimated = localaid.estimate_bytes(target.info, target.load.options)
            assert 0.8 * measured < estimated < 2 * measured
    finally:
        await supervisor.stop()


# -- pure parts --


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans())))
def test_fair_queue_takes_turns_in_order(steps: list[tuple[str, bool]]) -> None:
    """Each client's items come in order, and between two of one client every other that waits has its turn."""
    queue: FairQueue[tuple[str, int]] = FairQueue()
    model: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    passed_over = dict.fromkeys("abc", 0)
    for number, (client, push) in enumerate(steps):
        if push:
            queue.push(client, (client, number))
            model[client].append(number)
        elif queue:
            taken, item = queue.pop()
            assert item == model[taken].pop(0)
            passed_over = {one: passed_over[one] + 1 if model[one] and one != taken else 0 for one in passed_over}
            assert max(passed_over.values()) <= 2
        assert len(queue) == sum(map(len, model.values()))
    assert sorted(queue.drain()) == sorted((client, number) for client in model for number in model[client])
    assert len(queue) == 0


def test_fair_queue_puts_back_and_removes() -> None:
    """What is put back is next; what is removed never comes."""
    queue: FairQueue[int] = FairQueue()
    for client, item in (("a", 1), ("a", 2), ("b", 3)):
        queue.push(client, item)
    assert queue.pop() == 1
    queue.push_front("a", 1)
    queue.remove("a", 2)
    assert (queue.pop(), queue.pop(), len(queue)) == (1, 3, 0)


def test_service_rate_stands_still_while_idle() -> None:
    """Two requests in 4 s of work, whatever lies between them; time since the last end counts."""
    rate = ServiceRate()
    assert rate.interval_s(0) is None
    rate.note_busy(10)
    rate.note_end(12, idle=True)
    rate.note_busy(100)
    rate.note_end(102, idle=True)
    assert rate.interval_s(1000) == 2
    rate.note_busy(1000)
    assert rate.interval_s(1006) == 5


@pytest.mark.parametrize("error", [QueueFull("f", 3, 2.5), ModelFailed("f", "why", 1.0), ShuttingDown()])
def test_errors_cross_the_wire(error: localaid.LocalaidError) -> None:
    """Class and fields survive, so the sentence does."""
    back = localaid.error_from_wire(*localaid.error_to_wire(error))
    assert type(back) is type(error)
    assert str(back) == str(error)


@pytest.mark.parametrize(("name", "fields"), [("Unheard", {"a": 1}), ("QueueFull", {"other": 1}), ("Exception", {})])
def test_unknown_errors_are_reported_as_such(name: str, fields: dict[str, str | int | float | None]) -> None:
    """No class is looked up but those of section 1."""
    assert isinstance(localaid.error_from_wire(name, fields), localaid.WorkerFault)


# -- a reader that takes events at once --


async def test_what_a_reader_takes_at_once_and_what_waits_come_in_order(bench: Bench) -> None:
    """After it has declined it is asked again only when it has read what waits."""
    generation, seen, asked = bench.ask(bench.target(), "say 40"), [], itertools.count()

    def take(event: Accepted | Delta) -> bool:
        if next(asked) % 3 == 2:
            return False
        seen.append(event)
        return True

    generation.take = take
    async with asyncio.timeout(LIMIT_S):
        async for event in generation:
            seen.append(event)  # noqa: PERF401 - between what `take` appends
    assert next(asked) >= 3
    assert isinstance(seen[0], Accepted)
    assert "".join(event.text for event in seen if isinstance(event, Delta)).split() == list(map(str, range(40)))


async def test_a_fault_of_the_taker_is_the_readers(bench: Bench) -> None:
    """The worker and its other requests go on."""
    target = bench.target()
    broken = bench.ask(target, "hold")

    def take(_: Accepted | Delta) -> bool:
        raise ZeroDivisionError

    broken.take = take
    with pytest.raises(ZeroDivisionError):
        await read(broken)
    broken.close()
    assert await read(bench.ask(target, "say 2")) == "0 1 "
    (worker,) = bench.workers
    assert (worker.state, worker.running) == ("loaded", 0)


# -- tasks with one reply --


def tokenize(bench: Bench, target: Target, text: str, client: str = "client") -> Generation:
    """Submit a task with one reply."""
    return bench.supervisor.submit(target, Tokenize(id=0, parts=[text]), client=client)


async def reply(generation: Generation) -> int:
    """Return how many tokens a reply has."""
    async with asyncio.timeout(LIMIT_S):
        return len((await generation.reply(Tokenized)).tokens)


async def test_task_loads_its_model_and_gets_its_reply(bench: Bench) -> None:
    """A reply is of the kind that was asked for; the worker is idle after it."""
    target = bench.target()
    assert await reply(tokenize(bench, target, "say 3")) == 3
    async with asyncio.timeout(LIMIT_S):
        ranked = await bench.supervisor.submit(
            target, Rerank(id=0, query="say 2", documents=["a", "b"]), client="c"
        ).reply(Ranked)
        embedded = await bench.supervisor.submit(target, Embed(id=0, inputs=["say 1"]), client="c").reply(Embedded)
        with pytest.raises(BrokenFrame, match="Tokenized came where Embedded was due"):
            await tokenize(bench, target, "say 1").reply(Embedded)
    assert (ranked.scores, embedded.vectors) == ([0.5, 0.5], [b"\0\0\0\0"])
    (worker,) = bench.workers
    assert (worker.state, worker.running, worker.waiting) == ("loaded", 0, 0)


async def test_tasks_and_answers_do_not_wait_for_each_other(bench: Bench) -> None:
    """With every place in the batch taken, and more waiting, a task is answered; held tasks keep no answer waiting."""
    target = bench.target(parallel=1)
    held = [bench.ask(target, "hold") for _ in range(5)]
    await first(held[0])
    assert bench.workers[0].waiting == 3
    assert await reply(tokenize(bench, target, "say 2")) == 2
    tasks = [tokenize(bench, target, "silent") for _ in range(TASKS_AHEAD + 3)]
    for generation in held:
        generation.close()
    assert await read(bench.ask(target, "say 1")) == "0 "
    assert (bench.workers[0].running, bench.workers[0].waiting) == (TASKS_AHEAD, 3)
    assert await read(bench.ask(target, "release")) == ""
    for generation in tasks[:TASKS_AHEAD]:
        assert await reply(generation) == 0
    assert await read(bench.ask(target, "release")) == ""
    assert [await reply(generation) for generation in tasks[TASKS_AHEAD:]] == [0] * 3


async def test_tasks_are_fair_between_clients(bench: Bench) -> None:
    """One client's many tasks leave another's its turn."""
    target = bench.target()
    assert await reply(tokenize(bench, target, "say 1")) == 1
    busy = [tokenize(bench, target, "silent", "many") for _ in range(TASKS_AHEAD)]
    assert await read(bench.ask(target, "say 1")) == "0 "
    late = [tokenize(bench, target, f"say {number}", "many") for number in range(3)]
    other = tokenize(bench, target, "say 9", "other")
    assert (bench.workers[0].running, bench.workers[0].waiting) == (TASKS_AHEAD, 4)
    busy[0].close()
    assert [await reply(generation) for generation in (*late, other)] == [0, 1, 2, 9]
    log = await read(bench.ask(target, "log"))
    assert log.endswith("|cancelled|say 0|say 9|say 1|say 2|log")


async def test_a_full_queue_of_tasks(tmp_path: Path) -> None:
    """Tasks are counted on their own: they fill no queue of answers, and the other way round."""
    async with supervise(tmp_path, queue_size=2) as bench:
        target = bench.target("stuck")
        waiting = [tokenize(bench, target, "say 1") for _ in range(2)]
        with pytest.raises(QueueFull) as told:
            tokenize(bench, target, "say 1")
        assert told.value.waiting == 2
        bench.ask(target, "say 1")
        waiting[0].close()
        tokenize(bench, target, "say 1")
        assert bench.workers[0].waiting == 3


async def test_a_rejected_task(bench: Bench) -> None:
    """What the worker refuses comes as its error."""
    with pytest.raises(ModelRemoved):
        await reply(tokenize(bench, bench.target(), "reject"))


async def test_a_task_survives_its_worker_once(bench: Bench, tmp_path: Path) -> None:
    """A worker that dies under a task is replaced and the task runs again; a second death ends it."""
    mark = tmp_path / "mark"
    mark.touch()
    target = bench.target()
    assert await reply(tokenize(bench, target, f"die-once {mark}")) == 1
    with pytest.raises(WorkerDied):
        await reply(tokenize(bench, target, "die"))


async def test_a_cancelled_task_leaves_the_worker(bench: Bench) -> None:
    """The worker hears of it and is idle then; a reply that comes all the same is dropped."""
    target = bench.target()
    with tokenize(bench, target, "silent"):
        assert await reply(tokenize(bench, target, "say 1")) == 1
        assert bench.workers[0].running == 1
    assert bench.workers[0].running == 0
    assert "cancelled" in await read(bench.ask(target, "log"))
    with tokenize(bench, target, "say 5"):
        pass
    assert await read(bench.ask(target, "say 1")) == "0 "


async def test_waiting_tasks_are_refused_at_the_end(tmp_path: Path) -> None:
    """A supervisor that stops leaves no task without an answer."""
    async with supervise(tmp_path) as bench:
        task = tokenize(bench, bench.target("stuck"), "say 1")
    with pytest.raises(ShuttingDown):
        await reply(task)
