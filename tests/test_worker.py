"""WORKER: a real process with a real model, driven frame by frame."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jsonschema
import msgspec
import pytest

import localaid
from conftest import kernels_die
from localaid import (
    FROM_WORKER,
    TOOL_FORMATS,
    Accepted,
    Cancel,
    ChatMessage,
    ChatPrompt,
    Delta,
    Detokenize,
    Embed,
    Embedded,
    EngineFailed,
    FrameReader,
    FromWorker,
    FunctionDefinition,
    InputTooLong,
    JsonConstraint,
    Loaded,
    LoadFailed,
    Loading,
    LoadModel,
    LoadOptions,
    Prompt,
    Prompts,
    Rejected,
    Render,
    Rendered,
    Sampling,
    Step,
    Stop,
    Submit,
    TextPrompt,
    Tokenize,
    Tokenized,
    TokenPrompt,
    ToolDefinition,
    Tooling,
    ToWorker,
    encode_frame,
    error_from_wire,
)
from models import place_model

GREEDY = Sampling(temperature=0.0, max_tokens=16)
OPTIONS = LoadOptions(threads=2, ctx_size=1024, parallel=4)
SYSTEM = "You answer with great care. " * 12


class WorkerEnd:
    """The daemon's end of a worker: sends messages, collects what comes."""

    def __init__(self) -> None:
        """Start a worker."""
        ours, theirs = socket.socketpair()
        command = [sys.executable, localaid.__file__, "worker", "--fd", str(theirs.fileno())]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        theirs.close()
        ours.settimeout(120)
        self.socket = ours
        self._reader = FrameReader(FROM_WORKER)
        self._messages: list[FromWorker] = []
        self.deltas: dict[int, list[Delta]] = {}
        self.accepted: dict[int, Accepted] = {}
        self.rejected: dict[int, Rejected] = {}
        self.steps: list[Step] = []

    def send(self, *messages: ToWorker) -> None:
        """Send messages in one write, so that they arrive together."""
        plain = [
            msgspec.structs.replace(one, plain=kernels_die()) if isinstance(one, LoadModel) else one for one in messages
        ]
        self.socket.sendall(b"".join(map(encode_frame, plain)))

    def next(self) -> FromWorker:
        """Return the next message; note what it says of requests."""
        while not self._messages:
            chunk = self.socket.recv(1 << 16)
            if not chunk:
                raise EOFError
            self._messages += self._reader.feed(chunk)
        message = self._messages.pop(0)
        match message:
            case Step():
                self.steps.append(message)
                for delta in message.deltas:
                    self.deltas.setdefault(delta.id, []).append(delta)
                self.accepted |= {accepted.id: accepted for accepted in message.accepted}
            case Rejected():
                self.rejected[message.id] = message
            case _:
                pass
        return message

    def until(self, holds: Callable[[], bool]) -> None:
        """Take messages until something holds."""
        while not holds():
            self.next()

    def finished(self, request: int, n: int = 1) -> bool:
        """Return whether all sequences of a request have ended."""
        return sum(delta.finish is not None for delta in self.deltas.get(request, [])) == n

    def text(self, request: int, index: int = 0) -> str:
        """Return what a sequence has said."""
        return "".join(delta.text for delta in self.deltas[request] if delta.index == index)

    def load(self, path: Path, options: LoadOptions = OPTIONS) -> Loaded:
        """Load a model; return what it turned out to be."""
        self.send(LoadModel(path=str(path), options=options, cache_bytes=1 << 28))
        while isinstance(message := self.next(), Loading):
            assert 0 <= message.progress <= 1
        assert isinstance(message, Loaded)
        return message

    def close(self) -> int:
        """Close the daemon's end; return the exit status."""
        self.socket.close()
        return self.process.wait(30)


@contextlib.contextmanager
def start() -> Iterator[WorkerEnd]:
    """Run a worker; it must be gone after."""
    end = WorkerEnd()
    try:
        yield end
    finally:
        end.socket.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            end.process.wait(10)
        end.process.kill()
        end.process.wait()


@pytest.fixture(scope="module")
def shared(smollm2: Path) -> Iterator[WorkerEnd]:
    """One worker on SmolLM2 for the tests that leave it as it was."""
    with start() as end:
        loaded = end.load(smollm2)
        assert (loaded.ctx_size, loaded.parallel, loaded.vocab_tokens) == (1024, 4, 49152)
        assert loaded.rss_bytes > smollm2.stat().st_size // 2
        yield end


_ids = iter(range(1, 1 << 30))


def ask(end: WorkerEnd, prompt: Prompt, sampling: Sampling = GREEDY, **more: object) -> int:
    """Send one request; return its id."""
    request = next(_ids)
    end.send(Submit(id=request, prompt=prompt, sampling=sampling, **more))  # type: ignore[arg-type]
    return request


def chat(text: str, prompts: Prompts | None = None) -> ChatPrompt:
    """Return a chat of one message."""
    return ChatPrompt(messages=[ChatMessage(role="user", content=text)], prompts=prompts or Prompts())


def test_a_chat_is_answered(shared: WorkerEnd) -> None:
    """Accepted comes with the first delta; the tokens count up; the last delta has the finish."""
    request = ask(shared, chat("Say hi."))
    shared.until(lambda: shared.finished(request))
    deltas = shared.deltas[request]
    assert shared.accepted[request].prompt_tokens > 10
    assert [delta.tokens for delta in deltas] == sorted(delta.tokens for delta in deltas)
    assert deltas[-1].finish in ("stop", "length")
    assert shared.text(request)


def test_requests_that_arrive_together_run_in_one_batch(shared: WorkerEnd) -> None:
    """Eight requests, four places: never more than four run, and they do run together."""
    requests = [next(_ids) for _ in range(8)]
    before = len(shared.steps)
    shared.send(*(Submit(id=r, prompt=TextPrompt(text=f"{r} apples and"), sampling=GREEDY) for r in requests))
    shared.until(lambda: all(map(shared.finished, requests)))
    together = [len(step.deltas) for step in shared.steps[before:]]
    assert max(together) == 4
    assert max(step.running for step in shared.steps[before:]) == 4


def test_the_sequences_of_a_request_share_its_prompt_and_differ(shared: WorkerEnd) -> None:
    """`n`: one prompt, several answers; a seed makes them repeatable."""
    sampling = Sampling(temperature=1.0, top_k=0, seed=5, max_tokens=12)
    texts = []
    for _ in range(2):
        request = ask(shared, TextPrompt(text="Once upon a time there was"), sampling, n=3)
        shared.until(lambda request=request: shared.finished(request, 3))  # type: ignore[misc]
        texts.append([shared.text(request, index) for index in range(3)])
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 3


def test_an_identical_prompt_is_taken_from_the_cache(shared: WorkerEnd) -> None:
    """All of it but the last token, which gives the logits."""
    prompt = TextPrompt(text="The quick brown fox jumps over the lazy dog. " * 8)
    for expected_missing in (None, 1):
        request = ask(shared, prompt)
        shared.until(lambda request=request: shared.finished(request))  # type: ignore[misc]
        accepted = shared.accepted[request]
        if expected_missing:
            assert accepted.prompt_tokens - accepted.cached_tokens == expected_missing


def test_stop_words_end_an_answer_and_are_not_in_it(shared: WorkerEnd) -> None:
    """The text before the stop word is all there is."""
    request = ask(shared, TokenPrompt(tokens=list(range(100, 140))), Sampling(temperature=0.0, max_tokens=40))
    shared.until(lambda: shared.finished(request))
    whole = shared.text(request)
    stop = whole[len(whole) // 2 :][:6]
    request = ask(
        shared, TokenPrompt(tokens=list(range(100, 140))), Sampling(temperature=0.0, max_tokens=40), stop=[stop]
    )
    shared.until(lambda: shared.finished(request))
    assert shared.text(request) == whole[: whole.index(stop)]
    assert shared.deltas[request][-1].finish == "stop"


def test_logprobs_come_with_their_text(shared: WorkerEnd) -> None:
    """One for each token, the chosen one among the likeliest when greedy."""
    request = ask(shared, chat("Count to five."), top_logprobs=3)
    shared.until(lambda: shared.finished(request))
    logprobs = [one for delta in shared.deltas[request] for one in delta.logprobs or []]
    assert len(logprobs) == shared.deltas[request][-1].tokens
    assert all(one.top[0] == (one.token, one.logprob) and len(one.top) == 3 for one in logprobs)


@pytest.mark.parametrize(
    ("prompt", "error", "words"),
    [
        (TextPrompt(text="word " * 3000), "ContextLengthExceeded", ["1024", "3001", "ctx_size"]),
        (TokenPrompt(tokens=[10**6]), "TokenUnknown", ["1000000", "49152"]),
        (TokenPrompt(tokens=[]), "PromptEmpty", ["no tokens"]),
        (chat("x", Prompts(chat_template="{{ raise_exception('not so') }}")), "TemplateRefused", ["not so"]),
    ],
)
def test_what_cannot_be_run_is_rejected_in_words(
    shared: WorkerEnd, prompt: Prompt, error: str, words: list[str]
) -> None:
    """And everything else goes on."""
    request = ask(shared, prompt)
    shared.until(lambda: request in shared.rejected)
    rejected = shared.rejected[request]
    assert rejected.error == error
    sentence = str(error_from_wire(rejected.error, rejected.fields))
    assert all(word in sentence for word in words), sentence
    after = ask(shared, chat("Still there?"))
    shared.until(lambda: shared.finished(after))


WEATHER: dict[str, object] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Oslo", "Paris"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 7},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    ToolDefinition(function=FunctionDefinition(name="get_weather", description="The weather.", parameters=WEATHER)),
    ToolDefinition(function=FunctionDefinition(name="get_time", parameters={"type": "object", "properties": {}})),
]
THOUGHTFUL = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n<think>\n"
)


def with_tools(text: str, tooling: Tooling, prompts: Prompts | None = None) -> ChatPrompt:
    """Return a chat of one message with tools."""
    message = ChatMessage(role="user", content=text)
    return ChatPrompt(messages=[message], tooling=tooling, prompts=prompts or Prompts())


def calls_of(end: WorkerEnd, request: int) -> list[tuple[str, object]]:
    """Return an answer's calls, put together as a client does; each with an id of its own."""
    made: list[list[str]] = []
    for call in (call for delta in end.deltas[request] for call in delta.calls):
        if call.index == len(made):
            assert re.fullmatch("call_[0-9a-f]{24}", call.id)
            made.append([call.name, ""])
        made[call.index][1] += call.arguments
    return [(name, json.loads(arguments)) for name, arguments in made]


@pytest.mark.parametrize("name", [*TOOL_FORMATS, "none"])
def test_required_calls_are_valid_in_every_format(shared: WorkerEnd, name: str) -> None:
    """A model that was never taught to calls a function as its schema wants it, and says nothing else."""
    tooling = Tooling(tools=TOOLS, choice="required", parallel=False)
    sampling = Sampling(temperature=0.0, max_tokens=200)
    request = ask(shared, with_tools("How is Oslo?", tooling, Prompts(tool_format=name)), sampling)
    shared.until(lambda: request in shared.rejected or shared.finished(request))
    assert request not in shared.rejected, shared.rejected[request]
    assert shared.deltas[request][-1].finish == "tool_calls", shared.text(request)
    assert shared.text(request) == ""
    ((function, arguments),) = calls_of(shared, request)
    if function == "get_weather":
        jsonschema.validate(arguments, WEATHER)
    else:
        assert (function, arguments) == ("get_time", {})


def test_a_named_function_is_called(shared: WorkerEnd) -> None:
    """That one, once, in each answer of the request; a seed makes them repeatable."""
    for named in ("get_weather", "get_time"):
        tooling = Tooling(tools=TOOLS, choice="required", function=named)
        sampling = Sampling(temperature=1.0, seed=7, max_tokens=200)
        request = ask(shared, with_tools("What time is it?", tooling), sampling, n=2)
        shared.until(lambda request=request: shared.finished(request, 2))  # type: ignore[misc]
        for index in range(2):
            deltas = [delta for delta in shared.deltas[request] if delta.index == index]
            assert [call.name for delta in deltas for call in delta.calls if call.name] == [named]
            assert deltas[-1].finish == "tool_calls"


def test_no_call_without_a_choice(shared: WorkerEnd) -> None:
    """`none`: the model is told of its tools, and its answer is content, whatever it looks like."""
    lengths = []
    for tooling in (Tooling(), Tooling(tools=TOOLS, choice="none"), Tooling(tools=TOOLS)):
        request = ask(shared, with_tools("Say hi.", tooling))
        shared.until(lambda request=request: shared.finished(request))  # type: ignore[misc]
        lengths.append(shared.accepted[request].prompt_tokens)
        if tooling.choice == "none":
            assert shared.text(request)
            assert all(not delta.calls for delta in shared.deltas[request])
    assert lengths[0] < lengths[1] == lengths[2]


def test_thoughts_are_apart_from_the_answer(shared: WorkerEnd) -> None:
    """Where the prompt opens the reasoning, the answer begins in it; a response format holds behind it."""
    prompts = Prompts(chat_template=THOUGHTFUL)
    request = ask(shared, chat("Say hi.", prompts))
    shared.until(lambda: shared.finished(request))
    assert "".join(delta.reasoning for delta in shared.deltas[request])
    assert shared.text(request) == ""
    off = ask(shared, chat("Say hi.", msgspec.structs.replace(prompts, reasoning_format="none")))
    shared.until(lambda: shared.finished(off))
    assert shared.text(off)
    text = f"{THOUGHTFUL}Hi.\n</think>\n\n"
    closed = ask(
        shared,
        chat("x", Prompts(chat_template=text)),
        Sampling(temperature=0.0, max_tokens=60),
        constraint=JsonConstraint(schema={"enum": ["yes", "no"]}),
    )
    shared.until(lambda: shared.finished(closed))
    assert json.loads(shared.text(closed)) in ("yes", "no")
    assert shared.deltas[closed][-1].finish == "stop"


def test_a_schema_that_nests_too_deeply_is_refused(shared: WorkerEnd) -> None:
    """And the worker goes on."""
    schema: dict[str, object] = {"type": "object"}
    for _ in range(450):
        schema = {"type": "object", "properties": {"a": schema}}
    tools = [ToolDefinition(function=FunctionDefinition(name="deep", parameters=schema))]
    silent = Prompts(chat_template="{{ messages[0].content }}{# tools #}")
    request = ask(shared, with_tools("Hi", Tooling(tools=tools, choice="required"), silent))
    shared.until(lambda: request in shared.rejected)
    rejected = shared.rejected[request]
    assert error_from_wire(rejected.error, rejected.fields).param == "tools"
    after = ask(shared, chat("Still there?"))
    shared.until(lambda: shared.finished(after))


def test_an_answer_that_was_begun_goes_on(shared: WorkerEnd) -> None:
    """The last message is the assistant's: no new turn is opened, and only what is new comes back."""
    messages = [ChatMessage(role="user", content="Count."), ChatMessage(role="assistant", content="one, two, three,")]
    request = ask(shared, ChatPrompt(messages=messages))
    shared.until(lambda: shared.finished(request))
    assert "four" in shared.text(request)


def test_what_is_at_fault_is_named(shared: WorkerEnd) -> None:
    """`messages` for a chat, `prompt` for a completion."""
    for prompt, param in ((chat("word " * 3000), "messages"), (TextPrompt(text="word " * 3000), "prompt")):
        request = ask(shared, prompt)
        shared.until(lambda request=request: request in shared.rejected)  # type: ignore[misc]
        rejected = shared.rejected[request]
        assert error_from_wire(rejected.error, rejected.fields).param == param


def test_a_context_that_is_full_ends_the_answer(shared: WorkerEnd) -> None:
    """`length`, and prompt and answer together are the context."""
    sampling = Sampling(temperature=0.0, ignore_eos=True)
    request = ask(shared, TextPrompt(text="word " * 1000), sampling)
    shared.until(lambda: shared.finished(request))
    last = shared.deltas[request][-1]
    assert last.finish == "length"
    assert shared.accepted[request].prompt_tokens + last.tokens == 1024


def test_a_cancelled_request_leaves_the_batch_at_the_next_step(shared: WorkerEnd) -> None:
    """It says nothing more, and the others go on."""
    endless = Sampling(temperature=0.0, ignore_eos=True)
    cancelled, other = ask(shared, chat("Count."), endless), ask(shared, chat("Sing."), endless)
    shared.until(lambda: cancelled in shared.deltas and other in shared.deltas)
    shared.send(Cancel(id=cancelled))
    shared.until(lambda: shared.steps[-1].running == 1)
    said = len(shared.deltas[cancelled])
    more = len(shared.deltas[other])
    shared.until(lambda: len(shared.deltas[other]) > more + 5)
    assert len(shared.deltas[cancelled]) == said
    shared.send(Cancel(id=other))
    last = ask(shared, chat("Done?"))
    shared.until(lambda: shared.finished(last))


def test_a_broken_file_is_reported_and_the_worker_ends(tmp_path: Path) -> None:
    """`LoadFailed` has llama.cpp's reason."""
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF" + bytes(64))
    with start() as end:
        end.send(LoadModel(path=str(file)))
        while isinstance(message := end.next(), Loading):
            pass
        assert isinstance(message, LoadFailed)
        assert str(file) in message.reason
        assert end.process.wait(30) == 1


def test_a_file_that_is_not_what_was_hashed_is_not_served(tiny_llama: Path, tmp_path: Path) -> None:
    """Whether it changed before the load or during it: nobody gets answers under another file's SHA."""
    file, gone = place_model(tiny_llama, tmp_path, "m.gguf", copy=True), tmp_path / "gone.gguf"
    weights = [localaid.WeightsFile(str(file), localaid.stamp_of(file.stat()).content)]
    assert localaid.find_changed(weights) == ()
    assert localaid.find_changed([*weights, weights[0]._replace(path=str(gone))]) == (str(gone),)
    os.utime(file, (1, 1))
    assert localaid.find_changed(weights) == (str(file),)
    with start() as end:
        end.send(LoadModel(path=str(file), options=LoadOptions(ctx_size=256), weights=weights))
        while isinstance(message := end.next(), Loading):
            pass
        assert isinstance(message, LoadFailed)
        assert "written to since it was hashed" in message.reason
        assert end.process.wait(30) == 1


def test_stop_lets_running_requests_end(tiny_llama: Path) -> None:
    """Then the worker exits with 0."""
    with start() as end:
        end.load(tiny_llama, LoadOptions(threads=1, ctx_size=256))
        request = ask(end, TokenPrompt(tokens=[5, 6, 7]), Sampling(temperature=0.0, max_tokens=50, ignore_eos=True))
        end.until(lambda: request in end.deltas)
        end.send(Stop())
        end.until(lambda: end.finished(request))
        assert end.deltas[request][-1].tokens == 50
        assert end.process.wait(30) == 0


def test_a_worker_ends_when_its_daemon_is_gone(tiny_llama: Path) -> None:
    """Idle or busy."""
    for busy in (False, True):
        with start() as end:
            end.load(tiny_llama, LoadOptions(threads=1, ctx_size=8192))
            if busy:
                request = ask(end, TokenPrompt(tokens=[5, 6, 7]), Sampling(temperature=0.0, ignore_eos=True))
                end.until(lambda request=request: request in end.deltas)  # type: ignore[misc]
            assert end.close() == 0


def test_the_kernel_ends_a_worker_whose_parent_dies(smollm2: Path) -> None:
    """Also in the middle of a load, when nobody looks at the socket."""
    script = f"""
import os, socket, subprocess, sys
sys.path.insert(0, {str(Path(localaid.__file__).parent)!r})
from localaid import LoadModel, encode_frame
ours, theirs = socket.socketpair()
worker = subprocess.Popen([sys.executable, {localaid.__file__!r}, "worker", "--fd", str(theirs.fileno())],
                          pass_fds=[theirs.fileno(), ours.fileno()])
ours.sendall(encode_frame(LoadModel(path={str(smollm2)!r}, plain={kernels_die()})))
ours.recv(1)
print(worker.pid, flush=True)
sys.stdin.read()
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    worker = os.pidfd_open(int(parent.stdout.readline()))
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    assert select.select([worker], [], [], 30)[0]  # a pidfd is readable when its process has gone
    os.close(worker)


# -- tasks with one reply --


def test_tasks_are_answered_in_the_middle_of_an_answer(shared: WorkerEnd) -> None:
    """Tokens and prompts are answered by the intake while the other thread decodes; so are texts to be embedded."""
    sampling = Sampling(temperature=0.0, max_tokens=400, ignore_eos=True)
    running = ask(shared, TextPrompt(text="Once upon a time"), sampling)
    shared.until(lambda: running in shared.accepted)
    first, second, third, fourth = (next(_ids) for _ in range(4))
    prompt = ChatPrompt(messages=[ChatMessage(role="user", content="Hello")])
    shared.send(
        Embed(id=first, inputs=["The river", "the stone " * 90, [1, 2, 3]]),
        Tokenize(id=second, parts=["Hello, world"]),
        Detokenize(id=third, tokens=[1, 19556]),
        Render(id=fourth, prompt=prompt),
    )
    replies: dict[int, FromWorker] = {}
    while len(replies) < 4:
        message = shared.next()
        if isinstance(message, (Embedded, Tokenized, Rendered)):
            replies[message.id] = message
    assert not shared.finished(running)
    embedded, tokenized, text, rendered = (replies[number] for number in (first, second, third, fourth))
    assert isinstance(embedded, Embedded)
    assert [len(vector) for vector in embedded.vectors] == [4 * 576] * 3
    assert isinstance(tokenized, Tokenized)
    assert b"".join(tokenized.pieces) == b"Hello, world"
    assert text == Rendered(id=third, text="<|im_start|>Hello", tokens=2)
    assert isinstance(rendered, Rendered)
    assert "<|im_start|>user\nHello<|im_end|>" in rendered.text
    asked = ask(shared, prompt)
    shared.until(lambda: shared.finished(asked))
    assert shared.accepted[asked].prompt_tokens == rendered.tokens
    shared.send(Cancel(id=running))


def test_task_that_cannot_be_run(shared: WorkerEnd) -> None:
    """The error comes back with its fields; the worker goes on."""
    request = next(_ids)
    shared.send(Embed(id=request, inputs=["fine", "stone " * 2000]))
    shared.until(lambda: request in shared.rejected)
    rejected = shared.rejected[request]
    error = error_from_wire(rejected.error, rejected.fields)
    assert isinstance(error, InputTooLong)
    assert (error.place, error.ctx_size) == (1, 1024)
    assert error.tokens > 1024


def test_cancelled_embedding_ends_between_two_decodes(shared: WorkerEnd) -> None:
    """A long task does not hold up the next one once it is cancelled; it gets no reply."""
    long, short = next(_ids), next(_ids)
    shared.send(Embed(id=long, inputs=["the stone " * 400] * 200))
    shared.send(Cancel(id=long), Embed(id=short, inputs=["a"]))
    while not isinstance(message := shared.next(), Embedded):
        pass
    assert message.id == short


def test_encoder_embeds_and_does_not_write(minilm: Path) -> None:
    """A model without a generating context serves embeddings, and refuses what it cannot do; it stops in order."""
    with start() as end:
        assert end.load(minilm, LoadOptions(threads=2)).ctx_size == 512
        end.send(Submit(id=1, prompt=TextPrompt(text="a")), Embed(id=2, inputs=["a", "b"]), Stop())
        end.until(lambda: 1 in end.rejected)
        rejected = end.rejected[1]
        assert isinstance(error_from_wire(rejected.error, rejected.fields), EngineFailed)
        while not isinstance(message := end.next(), Embedded):
            pass
        assert [len(vector) for vector in message.vectors] == [4 * 384] * 2
        assert end.process.wait(30) == 0
