"""ENGINE: real models answer the same alone, in a batch and on a warm prefix, whatever their memory is."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from localaid import (
    COPY_WEIGHTS_BYTES,
    RUN_CELLS,
    Batch,
    BatchSequence,
    Engine,
    EngineFailed,
    LoadModel,
    LoadOptions,
    Plan,
    Sampling,
    choose_mmap,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

# How far log-probabilities of the ten likeliest tokens may be apart, between one way of feeding a context and another.
# llama.cpp itself is that far apart: its matrix kernels for one row and for several add in another order, the flash
# attention of single tokens sums in 16 bits, and 4-bit weights make much of little.  `test_the_tolerance_is_rounding`
# holds it against what feeding one prompt in chunks of another size gives, and against a real mistake.
TOLERANCE = 1.0
MEAN_TOLERANCE = 0.4
LIKELIEST = 10
GREEDY = Sampling(temperature=0.0)


@dataclasses.dataclass
class Course:
    """What one greedy generation chose, and the log-probabilities it chose from."""

    tokens: list[int]
    rows: list[NDArray[np.float64]]


def start_engine(path: Path, ctx_size: int = 1024) -> Engine:
    """Load a model for tests: two threads, a small context."""
    load = LoadModel(path=str(path), options=LoadOptions(threads=2, ctx_size=ctx_size), cache_bytes=1 << 28)
    return Engine(load, lambda _: None)


@pytest.fixture(scope="module", params=["smollm2", "gemma", "tiny_mamba"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """One engine for each kind of memory: attention, sliding window, recurrent."""
    loaded = start_engine(request.getfixturevalue(request.param))
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def smol(smollm2: Path) -> Iterator[Engine]:
    """An engine on SmolLM2."""
    loaded = start_engine(smollm2)
    yield loaded
    loaded.close()


def generate(
    engine: Engine, batch: Batch, prompts: list[list[int]], count: int, sampling: Sampling = GREEDY
) -> list[Course]:
    """Let all prompts generate `count` tokens in one batch, then park everything."""
    courses = {BatchSequence(list(prompt), len(prompt)): Course([], []) for prompt in prompts}
    samplers = {sequence: engine.start_sampler(sampling, sequence.tokens) for sequence in courses}
    for sequence in courses:
        batch.add(sequence)
    while batch.busy:
        plan = batch.plan()
        if not plan.tokens:
            continue
        assert engine.decode(plan)
        for row, sequence in enumerate(plan.rows):
            courses[sequence].rows.append(engine.logprobs(row, len(plan.rows), 0)[0].astype(np.float64))
        sampled = engine.sample(plan, [samplers[sequence] for sequence in plan.rows])
        batch.commit(plan, sampled, engine.decode_s)
        for sequence, _ in plan.fed:
            sequence.pos_min = max(0, engine.pos_min(sequence.seq_id))
        for sequence, token in zip(plan.rows, sampled, strict=True):
            courses[sequence].tokens.append(token)
            if len(courses[sequence].tokens) == count:
                batch.finish(sequence)
    for sampler in samplers.values():
        engine.stop_sampler(sampler)
    return list(courses.values())


def difference(mine: NDArray[np.float64], theirs: NDArray[np.float64]) -> tuple[float, float]:
    """Return how far two rows are apart on the likeliest tokens: at most, and on average by their probability."""
    best = np.argsort(-mine)[:LIKELIEST]
    apart = np.abs(mine[best] - theirs[best])
    return float(apart.max()), float(np.average(apart, weights=np.exp(mine[best])))


def assert_same(course: Course, other: Course) -> None:
    """Two courses agree up to the first token that the tolerance explains; then they must have been that close."""
    for step, (mine, theirs) in enumerate(zip(course.rows, other.rows, strict=True)):
        most, mean = difference(mine, theirs)
        assert most < TOLERANCE, f"step {step}"
        assert mean < MEAN_TOLERANCE, f"step {step}"
        if course.tokens[step] != other.tokens[step]:
            gap = mine[course.tokens[step]] - mine[other.tokens[step]]
            assert abs(gap) < 2 * TOLERANCE, f"step {step}: the choice differs by more than rounding"
            return


def prompts_of(engine: Engine) -> list[list[int]]:
    """Return eight prompts with nothing in common, of different lengths."""
    if engine.n_vocab < 1000:  # the random models' vocabulary
        return [[3 + (i * 7 + k * (i + 2)) % (engine.n_vocab - 4) for k in range(40 + 9 * i)] for i in range(8)]
    subjects = ["bread", "rivers", "the moon", "bees", "chess", "glass", "winter", "trains"]
    return [
        engine.tokenize(
            f"{subject.title()} are" + f" and {subject} will be" * (6 + i) + ". In short,",
            add_bos=True,
            parse_special=False,
        )
        for i, subject in enumerate(subjects)
    ]


def feed(engine: Engine, tokens: list[int], chunk: int, start: int = 0) -> NDArray[np.float64]:
    """Feed a prompt in chunks, without BATCH, and return the log-probabilities at its end."""
    for at in range(0, len(tokens), chunk):
        part = tokens[at : at + chunk]
        places = list(range(start + at, start + at + len(part)))
        assert engine.decode(Plan(part, places, [0] * len(part), [len(part) - 1]))
    logprobs = engine.logprobs(0, 1, 0)[0].astype(np.float64)
    engine.drop_cells(0)
    return logprobs


def test_the_tolerance_is_rounding(engine: Engine) -> None:
    """Chunks of another size stay below it; a prompt that lacks its first tokens does not."""
    for prompt in prompts_of(engine)[::3]:
        whole = feed(engine, prompt, 512)
        for chunk in (1, 7, 64):
            most, mean = difference(whole, feed(engine, prompt, chunk))
            assert most < TOLERANCE
            assert mean < MEAN_TOLERANCE
    wrong = feed(engine, prompt[1:-2] + prompt[-1:], 512)
    most, mean = difference(whole, wrong)
    assert most > TOLERANCE or mean > MEAN_TOLERANCE


def test_greedy_is_the_same_alone_and_in_a_batch_of_eight(engine: Engine) -> None:
    """What the others do does not change an answer."""
    prompts = prompts_of(engine)
    together = generate(engine, Batch(engine.capacity, engine), prompts, 24)
    for prompt, course in zip(prompts[::3], together[::3], strict=True):
        (alone,) = generate(engine, Batch(engine.capacity, engine), [prompt], 24)
        assert_same(alone, course)


def test_greedy_is_the_same_on_a_warm_prefix(engine: Engine) -> None:
    """A prompt that is taken up from host memory, cut or whole, gives what it gives when it is computed."""
    first = prompts_of(engine)[7]
    turn = first + prompts_of(engine)[0][:20]
    (cold,) = generate(engine, Batch(engine.capacity, engine), [turn], 24)
    batch = Batch(engine.capacity, engine)
    generate(engine, batch, [first], 1)
    assert batch.segments
    (warm,) = generate(engine, batch, [turn], 24)
    assert_same(cold, warm)


def test_greedy_is_the_same_for_those_who_share_a_prefix(engine: Engine) -> None:
    """Followers that take over a prefix from its leader get what they would compute."""
    base = prompts_of(engine)[5]
    prompts = [base + prompts_of(engine)[i][:12] for i in range(4)]
    batch = Batch(engine.capacity, engine)
    together = generate(engine, batch, prompts, 16)
    for prompt, course in zip(prompts, together, strict=True):
        (alone,) = generate(engine, Batch(engine.capacity, engine), [prompt], 16)
        assert_same(alone, course)


def test_a_window_that_has_moved_on_is_not_taken_for_a_prefix(gemma: Path) -> None:
    """Beyond its sliding window gemma forgets; a prompt that branches off there is fed anew, and right."""
    engine = start_engine(gemma, ctx_size=2048)
    try:
        assert engine.capacity.kind == "window"
        long = engine.tokenize("One two three four five six seven. " * 140, add_bos=True, parse_special=False)
        assert len(long) > 2 * engine.capacity.window > 0
        branch = long[: engine.capacity.window // 2] + prompts_of(engine)[0]
        batch = Batch(engine.capacity, engine)
        generate(engine, batch, [long], 2)
        (after,) = generate(engine, batch, [branch], 16)
        (alone,) = generate(engine, Batch(engine.capacity, engine), [branch], 16)
        assert_same(alone, after)
    finally:
        engine.close()


def test_the_same_seed_gives_the_same_text(smol: Engine) -> None:
    """And another seed another one."""
    prompt = prompts_of(smol)[:1]

    def tokens(seed: int) -> list[int]:
        return generate(smol, Batch(smol.capacity, smol), prompt, 24, Sampling(temperature=1.0, top_k=0, seed=seed))[
            0
        ].tokens

    assert tokens(7) == tokens(7)
    assert tokens(7) != tokens(8)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, top_k=1),
        Sampling(temperature=1.0, top_k=0, top_p=1e-6),
        Sampling(temperature=1.0, top_k=0, min_p=1.0),
        Sampling(temperature=1.0, top_k=0, typical_p=1.0, top_p=1e-6),
        Sampling(temperature=1e-4, top_k=0, top_p=1.0, min_p=0.0),
        Sampling(temperature=0.0, repeat_penalty=1.0, repeat_last_n=64),
    ],
)
def test_each_sampler_can_narrow_the_choice_to_the_likeliest(smol: Engine, sampling: Sampling) -> None:
    """Each of them, at its narrowest, is greedy."""
    prompt = prompts_of(smol)[1:2]
    greedy = generate(smol, Batch(smol.capacity, smol), prompt, 12)[0]
    assert generate(smol, Batch(smol.capacity, smol), prompt, 12, sampling)[0].tokens == greedy.tokens


def test_penalties_keep_an_answer_from_repeating_itself(smol: Engine) -> None:
    """A presence penalty beyond all logits lets no token come twice; prompt tokens count as well."""
    prompt = prompts_of(smol)[2]
    for sampling in (
        Sampling(temperature=0.0, presence_penalty=200.0, repeat_last_n=-1),
        Sampling(temperature=0.0, frequency_penalty=200.0, repeat_last_n=-1),
        Sampling(temperature=0.0, repeat_penalty=100.0, repeat_last_n=-1),
    ):
        tokens = generate(smol, Batch(smol.capacity, smol), [prompt], 20, sampling)[0].tokens
        assert len(set(tokens)) == 20
        assert not set(tokens) & set(prompt)


def test_a_bias_forbids_or_forces_a_token(smol: Engine) -> None:
    """With and without a sampler chain."""
    prompt = prompts_of(smol)[3:4]
    first = generate(smol, Batch(smol.capacity, smol), prompt, 1)[0].tokens[0]
    forced = first + 1
    for temperature in (0.0, 0.5):
        forbid = Sampling(temperature=temperature, logit_bias={first: -100.0})
        assert generate(smol, Batch(smol.capacity, smol), prompt, 1, forbid)[0].tokens != [first]
        force = Sampling(temperature=temperature, logit_bias={forced: 100.0})
        assert generate(smol, Batch(smol.capacity, smol), prompt, 3, force)[0].tokens == [forced] * 3


def test_ignore_eos_goes_on_where_the_model_would_end(smol: Engine) -> None:
    """No token that ends a generation is ever chosen."""
    chat = "<|im_start|>user\nSay hi.<|im_end|>\n<|im_start|>assistant\n"
    prompt = smol.tokenize(chat, add_bos=False, parse_special=True)
    plain = generate(smol, Batch(smol.capacity, smol), [prompt], 200)[0].tokens
    assert any(smol.piece(token)[1] for token in plain)
    on = generate(smol, Batch(smol.capacity, smol), [prompt], 200, Sampling(temperature=0.0, ignore_eos=True))[0].tokens
    assert not any(smol.piece(token)[1] for token in on)


def test_pieces_are_the_bytes_of_the_text(smol: Engine) -> None:
    """Token by token, also where a character is torn between tokens."""
    text = "Grüße, 世界! 👩‍🚀 naïve\ttabs\n"
    tokens = smol.tokenize(text, add_bos=False, parse_special=False)
    assert b"".join(smol.piece(token)[0] for token in tokens) == text.encode()


def test_the_logprobs_are_those_of_the_model(smol: Engine) -> None:
    """They add up to one, and the likeliest come first."""
    batch = Batch(smol.capacity, smol)
    prompt = prompts_of(smol)[0]
    sequence = BatchSequence(list(prompt), len(prompt))
    batch.add(sequence)
    plan = batch.plan()
    assert smol.decode(plan)
    for top in (0, 20, 5):
        logprobs, best = smol.logprobs(0, 1, top)
        assert np.exp(logprobs.astype(np.float64)).sum() == pytest.approx(1.0)
        assert best == np.argsort(-logprobs, kind="stable")[:top].tolist()
    assert smol.sample(plan, [smol.start_sampler(GREEDY, prompt)]) == best[:1]
    batch.commit(plan, best[:1], 0.1)
    batch.finish(sequence)
    batch.plan()


def test_what_the_parts_of_a_token_cost(smol: Engine, tiny_mamba: Path) -> None:
    """SmolLM2: 576 wide in 30 layers, 106 million parameters and 28 more for the logits."""
    assert smol.capacity.attend_cost == pytest.approx(2 * 576 * 30 / 106.2e6, rel=0.01)
    assert smol.capacity.logits_share == pytest.approx(28.3 / 134.5, rel=0.01)
    mamba = start_engine(tiny_mamba)
    assert mamba.capacity.attend_cost == 0
    mamba.close()


def cells_of(log: pytest.LogCaptureFixture) -> str:
    """Return who has each cell, as llama.cpp drew it last: a digit is a sequence id, `.` is free, `M` has several."""
    drawn = "".join(f"{record.getMessage()}\n" for record in log.records)
    lines = [line.removesuffix(" *") for line in drawn.splitlines() if line.endswith(" *") and " " not in line[:-2]]
    return "".join(lines[-3:])


def test_cells_of_who_generates_lie_together(
    smollm2: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Three sequences that generate side by side take cells in runs, also where one ends and another one joins."""
    monkeypatch.setenv("LLAMA_KV_CACHE_DEBUG", "3")  # llama.cpp draws its cells before each decode
    caplog.set_level(logging.DEBUG, "localaid.llama.cpp")
    options = LoadOptions(threads=2, ctx_size=256, parallel=3)
    engine = Engine(LoadModel(path=str(smollm2), options=options, cache_bytes=1 << 28), lambda _: None)
    batch = Batch(engine.capacity, engine)
    prompts = prompts_of(engine)
    sampler = engine.start_sampler(Sampling(temperature=0.0, ignore_eos=True), [])

    def step() -> None:
        plan = batch.plan()
        if plan.tokens:
            caplog.clear()
            assert engine.decode(plan)
            batch.commit(plan, engine.sample(plan, [sampler] * len(plan.rows)), engine.decode_s)

    def begin(prompt: list[int]) -> BatchSequence:
        sequence = BatchSequence(list(prompt), len(prompt))
        batch.add(sequence)
        return sequence

    def stretches() -> dict[str, int]:
        drawn = [who for who, _ in itertools.groupby(cells_of(caplog))]
        return {who: drawn.count(who) for who in "012"}

    first, *others = (begin(prompt) for prompt in prompts[:3])
    for _ in range(2 * RUN_CELLS + 8):
        step()
    assert len(cells_of(caplog)) == engine.capacity.cells
    assert max(stretches().values()) <= 5, cells_of(caplog)  # the prompt, three runs, and where one step went astray
    batch.finish(first)
    others.append(begin(prompts[3]))
    for _ in range(2 * RUN_CELLS + 8):
        step()
    assert max(stretches().values()) <= 12, cells_of(caplog)  # of 75 generated tokens, some in what the first one left
    for sequence in others:
        batch.finish(sequence)
    while batch.busy:
        step()
    begin(prompts[4])
    step()
    assert set(cells_of(caplog)) == {"."}  # nothing is held for anybody
    engine.stop_sampler(sampler)
    engine.close()


def test_a_full_cache_holds_no_cells_back(smollm2: Path) -> None:
    """Eight sequences that fill the cache to the last cell get all of it."""
    options = LoadOptions(threads=2, ctx_size=256, parallel=8)
    engine = Engine(LoadModel(path=str(smollm2), options=options, cache_bytes=1 << 28), lambda _: None)
    batch = Batch(engine.capacity, engine)
    prompts = [(tokens * 9)[:150] for tokens in prompts_of(engine)]
    assert batch.capacity.cells < 8 * 150 + 8 * 100 + 8 * RUN_CELLS  # at the end there is no room for runs
    courses = generate(engine, batch, prompts, 100)
    assert [len(course.tokens) for course in courses] == [100] * 8
    assert engine.log.first_error == ""  # llama.cpp was never asked for more than there is
    engine.close()


def test_a_file_that_is_no_model_is_refused_in_words(tmp_path: Path) -> None:
    """llama.cpp's own reason is in the error."""
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(EngineFailed) as caught:
        start_engine(file)
    assert str(file) in str(caught.value)


def test_marks_that_are_control_tokens(smol: Engine) -> None:
    """Only what is one token, and shows no text of its own."""
    found = smol.find_controls(["<|im_start|>", "<tool_call>", "hello", "[TOOL_CALLS]", "<|im_start|>user"])
    assert found == {"<|im_start|>": 1}


@pytest.mark.parametrize(
    ("wanted", "name", "size_bytes", "mapped"),
    [
        (None, "a.gguf", COPY_WEIGHTS_BYTES, False),
        (None, "a.gguf", COPY_WEIGHTS_BYTES + 1, True),
        (None, "a-00001-of-00003.gguf", 100, True),  # who knows how large the others are
        (None, "a.gguf", None, True),  # llama.cpp tells what is wrong
        (True, "a.gguf", 100, True),
        (False, "a.gguf", COPY_WEIGHTS_BYTES + 1, False),
    ],
)
def test_large_files_are_mapped(
    tmp_path: Path, *, wanted: bool | None, name: str, size_bytes: int | None, mapped: bool
) -> None:
    """Copying takes time at a cold start; what the user says of it holds."""
    if size_bytes is not None:
        with (tmp_path / name).open("wb") as file:
            file.truncate(size_bytes)
    assert choose_mmap(wanted, str(tmp_path / name)) is mapped
