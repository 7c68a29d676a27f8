"""Section 7, OUTPUT: token bytes become text; characters are never torn and stop words never leak."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from localaid import (
    REASONING_FORMATS,
    TOOL_FORMATS,
    FunctionDefinition,
    OutputParser,
    TextStream,
    ToolDefinition,
    Tooling,
)

# Few characters, of one to four bytes, so that stop words overlap each other and the text.
CHARACTERS = "ab<|\né€🙂"
texts = st.text(alphabet=CHARACTERS, max_size=40)
stops = st.lists(st.text(alphabet=CHARACTERS, min_size=1, max_size=5), max_size=5)


@st.composite
def cut_bytes(draw: st.DrawFn) -> list[bytes]:
    """Draw bytes, mostly UTF-8, cut into pieces anywhere: inside of characters too, and into empty pieces."""
    whole = draw(
        st.one_of(
            texts.map(str.encode),
            st.binary(max_size=30),
            st.lists(st.one_of(texts.map(str.encode), st.binary(max_size=3)), max_size=8).map(b"".join),
        )
    )
    cuts = sorted(draw(st.lists(st.integers(0, len(whole)), max_size=12)))
    return [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]


def run(pieces: list[bytes], stop: list[str], *, strip_start: bool = False) -> tuple[list[str], bool]:
    """Return the deltas of a whole sequence and whether a stop word ended it."""
    stream = TextStream(stop, strip_start=strip_start)
    deltas = []
    for piece in pieces:
        text, stopped = stream.push(piece)
        deltas.append(text)
        if stopped:
            break
    deltas.append(stream.finish())
    return deltas, stream.stopped


def expect(whole: bytes, stop: list[str]) -> tuple[str, bool]:
    """Return the same from the whole text: it ends before the stop word that is complete first, there the longest."""
    text = whole.decode("utf-8", "replace")
    for end in range(1, len(text) + 1):
        complete = [len(word) for word in stop if text[:end].endswith(word)]
        if complete:
            return text[: end - max(complete)], True
    return text, False


@given(cut_bytes(), stops)
@example([b"ab", b"<", b"|", b"a"], ["<|b"])
@example([b"\xe2\x82", b"\xac"], ["\u20ac"])
@example([b"a", b"\xf0\x9f"], ["\ufffd"])
@example([b"aab"], ["aab", "ab"])
def test_deltas_equal_the_whole_text(pieces: list[bytes], stop: list[str]) -> None:
    """However bytes are cut into tokens, the deltas together are the text up to the first complete stop word."""
    deltas, stopped = run(pieces, stop)
    assert ("".join(deltas), stopped) == expect(b"".join(pieces), stop)


@given(cut_bytes(), stops)
def test_white_space_at_the_start_can_be_dropped(pieces: list[bytes], stop: list[str]) -> None:
    """With `strip_start` the text is the same but for the white space that it begins with."""
    deltas, stopped = run([b" \n", *pieces], stop, strip_start=True)
    text, expected_stop = expect(b" \n" + b"".join(pieces), stop)
    assert ("".join(deltas), stopped) == (text.lstrip(), expected_stop)


@given(cut_bytes(), stops)
def test_no_more_is_held_back_than_must_be(pieces: list[bytes], stop: list[str]) -> None:
    """After each token, what was not sent yet is a beginning of a stop word, or the first bytes of one character."""
    stream = TextStream(stop)
    sent, seen = "", b""
    for piece in pieces:
        text, stopped = stream.push(piece)
        sent, seen = sent + text, seen + piece
        if stopped:
            return
        whole = seen.decode("utf-8", "replace")
        assert whole.startswith(sent)
        held = whole[len(sent) :]
        torn = held.removesuffix("\ufffd")
        assert any(not rest or any(word.startswith(rest) for word in stop) for rest in (held, torn))


@given(texts, stops, st.lists(texts, max_size=3))
def test_nothing_comes_after_a_stop(text: str, stop: list[str], more: list[str]) -> None:
    """A stopped stream stays stopped and silent, whatever is pushed."""
    word = stop[0] if stop else "ab"
    stream = TextStream([word, *stop])
    assert stream.push((text + word).encode())[1]
    assert [stream.push(each.encode()) for each in more] == [("", True)] * len(more)
    assert stream.finish() == ""


@pytest.mark.parametrize(
    ("pieces", "stop", "deltas"),
    [
        (["Hel", "lo"], [], ["Hel", "lo", ""]),
        (["Hel", "lo"], ["###"], ["Hel", "lo", ""]),
        (["one\n", "User", ": two"], ["\nUser:"], ["one", "", "", ""]),
        (["one\n", "User", " two"], ["\nUser:"], ["one", "", "\nUser two", ""]),
        (["one\n", "User"], ["\nUser:"], ["one", "", "\nUser"]),
        (["<|im", "_end|>rest"], ["<|im_end|>"], ["", "", ""]),
        (["xaaab"], ["aab"], ["xa", ""]),
        (["abcd", "e"], ["abcde", "cd"], ["ab", ""]),
        (["abce"], ["abcd", "ce"], ["ab", ""]),
        (["text"], [""], ["text", ""]),
    ],
)
def test_stop_words(pieces: list[str], stop: list[str], deltas: list[str]) -> None:
    """The text before a stop word is sent, the word and what follows is not; a mere beginning is, when it ends so."""
    assert run([piece.encode() for piece in pieces], stop)[0] == deltas


@given(cut_bytes(), stops)
def test_which_stop_word(pieces: list[bytes], stop: list[str]) -> None:
    """The word that ended a sequence is one of those given, and the text goes on with it; none where none did."""
    stream = TextStream(stop)
    sent = [stream.push(piece)[0] for piece in pieces]
    assert (stream.stop_word is not None) == stream.stopped
    if stream.stop_word is not None:
        assert stream.stop_word in stop
        assert b"".join(pieces).decode(errors="replace").startswith("".join(sent) + stream.stop_word)


def test_torn_characters_wait_and_become_replacement_characters() -> None:
    """Bytes of a character wait for the rest; what cannot become one any more is U+FFFD at once, at the end too."""
    stream = TextStream()
    assert [stream.push(bytes([byte]))[0] for byte in "🙂".encode()] == ["", "", "", "🙂"]
    assert stream.push(b"\xe2\x82") == ("", False)
    assert stream.push(b"a") == ("\ufffda", False)
    assert stream.push(b"\xff") == ("\ufffd", False)
    assert stream.push(b"\xe2\x82") == ("", False)
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


def test_a_long_beginning_of_a_stop_word_is_released_as_it_moves_on() -> None:
    """Of 5,000 equal characters only as many are held as the stop word has."""
    stream = TextStream(["a" * 2000 + "b", "aac"])
    assert stream.push(b"a" * 5000) == ("a" * 3000, False)
    assert stream.push(b"a") == ("a", False)
    assert stream.push(b"b") == ("", True)


@given(places=st.lists(st.integers(0, 90), max_size=20))
def test_parsers_come_behind_the_stream(places: list[int]) -> None:
    """Torn characters and stop words are settled before calls are looked for, wherever the bytes are cut."""
    answer = '<think>Grüße</think>Ich frage. <tool_call>{"name": "f", "arguments": {"ort": "Köln"}}</tool_call>STOP no'
    raw = answer.encode()
    ends = sorted({min(place, len(raw)) for place in places} | {len(raw)})
    stream = TextStream(["STOP"])
    tooling = Tooling(tools=[ToolDefinition(function=FunctionDefinition(name="f"))])
    parser = OutputParser(TOOL_FORMATS["hermes"], REASONING_FORMATS["think"], tooling, new_id=lambda: "id")
    parsed = [parser.push(stream.push(raw[start:end])[0]) for start, end in itertools.pairwise([0, *ends])]
    parsed += [parser.push(stream.finish()), parser.finish()]
    assert "".join(each.reasoning for each in parsed) == "Grüße"
    assert "".join(each.content for each in parsed) == "Ich frage."
    calls = [call for each in parsed for call in each.calls]
    assert [call.name for call in calls if call.name] == ["f"]
    assert "".join(call.arguments for call in calls) == '{"ort": "Köln"}'
