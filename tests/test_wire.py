"""WIRE: frames survive any cut of the stream, and nonsense is told from them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localaid import (
    FRAME_LIMIT_BYTES,
    FROM_WORKER,
    TO_WORKER,
    Accepted,
    BrokenFrame,
    Cancel,
    ChatMessage,
    ChatPrompt,
    Delta,
    FrameReader,
    FromWorker,
    LoadModel,
    Rejected,
    Sampling,
    Step,
    Stop,
    Submit,
    TokenLogprob,
    TokenPrompt,
    ToWorker,
    encode_frame,
)

TO: list[ToWorker] = [
    LoadModel(path="/models/a.gguf", lora_paths=[("/models/l.gguf", 0.5)]),
    Submit(id=1, prompt=ChatPrompt(messages=[ChatMessage(role="user", content="Grüße")]), stop=["\n"], n=3),
    Submit(id=2, prompt=TokenPrompt(tokens=[1, 2, 3]), sampling=Sampling(temperature=0.5, logit_bias={5: -1.0})),
    Cancel(id=1),
    Stop(),
]
FROM: list[FromWorker] = [
    Step([Delta(1, 0, "text", 3, "stop", [TokenLogprob(b"\xff", -0.5, [(b"a", -1.0)])])], [Accepted(1, 10, 4)], 2, 1),
    Rejected(id=7, error="PromptEmpty", fields={}),
]


@given(st.lists(st.sampled_from(TO)), st.lists(st.integers(1, 40)))
def test_messages_survive_any_cut(messages: list[ToWorker], cuts: list[int]) -> None:
    """However the bytes arrive, the same messages come out, in order."""
    stream = b"".join(encode_frame(message) for message in messages)
    reader, found, at = FrameReader(TO_WORKER), [], 0
    for cut in [*cuts, len(stream)]:
        found += reader.feed(stream[at : at + cut])
        at += cut
    assert found == messages


def test_both_directions_have_their_own_messages() -> None:
    """What a worker sends is read back; what only the daemon sends is refused there."""
    reader = FrameReader(FROM_WORKER)
    assert reader.feed(b"".join(encode_frame(message) for message in FROM)) == FROM
    with pytest.raises(BrokenFrame):
        reader.feed(encode_frame(Stop()))


def test_a_length_beyond_reason_is_refused_before_it_is_waited_for() -> None:
    """Four bytes of nonsense must not make the reader collect gigabytes."""
    with pytest.raises(BrokenFrame, match=str(FRAME_LIMIT_BYTES + 1)):
        FrameReader(FROM_WORKER).feed((FRAME_LIMIT_BYTES + 1).to_bytes(4, "big"))
