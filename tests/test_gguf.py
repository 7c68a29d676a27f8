"""Section GGUF: headers of real files, of files of our own making, and of hostile ones."""

from __future__ import annotations

import functools
import struct
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import gguf
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import localaid
from models import find_gemma, find_smollm2

SMOLLM2 = find_smollm2()

Setup = Callable[[gguf.GGUFWriter], object]


def make_gguf(
    *setups: Setup,
    architecture: str = "llama",
    tensors: Iterable[str] = ("token_embd.weight",),
    endianess: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
) -> bytes:
    """Return a GGUF file with what `setups` write into it and tensors of 64 x 4 numbers in F16."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        writer = gguf.GGUFWriter(path, architecture, endianess=endianess)
        for setup in setups:
            setup(writer)
        for name in tensors:
            writer.add_tensor(name, np.ones((4, 64), dtype=np.float16))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def parse(document: bytes) -> localaid.ModelInfo:
    """Parse a whole file."""
    return localaid.parse_gguf(document, size_bytes=len(document), file="model.gguf")


def reason_of(document: bytes) -> str:
    """Return why a file cannot be served."""
    with pytest.raises(localaid.NotServable) as raised:
        parse(document)
    assert raised.value.file == "model.gguf"
    assert raised.value.reason in str(raised.value)
    return raised.value.reason


def header_of(path: Path) -> bytes:
    """Return as much of a file as its header needs, found as the index does: by asking for more and more."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(4096)
        while True:
            try:
                localaid.parse_gguf(head, size_bytes=size, file=path.name)
            except localaid.HeaderIncomplete as error:
                needed = error.needed_bytes
            else:
                return head
            assert len(head) < needed <= size
            head += file.read(max(needed, 2 * len(head)) - len(head))


def plain_header(keys: bytes = b"", key_count: int = 0, tensors: bytes = b"", tensor_count: int = 0) -> bytes:
    """Return a header of parts that a writer would never write."""
    return b"GGUF" + struct.pack("<IQQ", 3, tensor_count, key_count) + keys + tensors


def text(value: str | bytes, length: int | None = None) -> bytes:
    """Return a string as GGUF has it, perhaps under a wrong length."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def test_smollm2() -> None:
    """A real model's header says what its makers say of it, and is read without the weights."""
    head = header_of(SMOLLM2)
    assert len(head) < SMOLLM2.stat().st_size / 4
    info = localaid.parse_gguf(head, size_bytes=SMOLLM2.stat().st_size, file="smollm2.gguf")
    assert (info.kind, info.architecture, info.quantisation, info.parts) == ("model", "llama", "Q4_1", 1)
    assert (info.context_tokens, info.vocab_tokens, info.block_count) == (8192, 49152, 30)
    assert (info.embedding_length, info.head_count, info.head_count_kv) == (576, 9, 3)
    assert (info.recurrent, info.hybrid, info.encoder_only, info.big_endian) == (False, False, False, False)
    assert info.chat_template
    assert "<|im_start|>" in info.chat_template
    assert 0.9 * SMOLLM2.stat().st_size < info.weights_bytes < SMOLLM2.stat().st_size
    assert localaid.serving_problem(info) is None
    assert localaid.CHAT in localaid.serves(info)


def test_gemma_with_its_large_vocabulary() -> None:
    """A sliding-window model with 262,144 tokens."""
    gemma = find_gemma()
    info = localaid.parse_gguf(header_of(gemma), size_bytes=gemma.stat().st_size, file="gemma")
    assert (info.architecture, info.quantisation, info.sliding_window) == ("gemma3", "Q4_K_M", 512)
    assert info.vocab_tokens == 262_144


def test_everything_that_a_header_may_say() -> None:
    """Names, licence, sampling and shape come from the keys of llama.cpp."""

    def describe(writer: gguf.GGUFWriter) -> None:
        writer.add_name("My Model")
        writer.add_size_label("7B")
        writer.add_license("apache-2.0")
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
        writer.add_context_length(4096)
        writer.add_sliding_window(1024)
        writer.add_key_length(128)
        writer.add_value_length(64)
        writer.add_head_count([8, 16, 8])
        writer.add_head_count_kv([0, 2, 4])
        writer.add_token_list(["a", "bc", ""])
        writer.add_chat_template("{{ messages }}")
        writer.add_float32(gguf.Keys.General.SAMPLING_TEMP, 0.5)
        writer.add_int32(gguf.Keys.General.SAMPLING_TOP_K, 20)
        writer.add_float32(gguf.Keys.General.SAMPLING_TOP_P, 0.75)
        writer.add_float32(gguf.Keys.General.SAMPLING_MIN_P, 0.125)
        writer.add_int32(gguf.Keys.General.SAMPLING_PENALTY_LAST_N, -1)
        writer.add_float32(gguf.Keys.General.SAMPLING_PENALTY_REPEAT, float("nan"))

    info = parse(make_gguf(describe))
    assert (info.name, info.size_label, info.license, info.quantisation) == ("My Model", "7B", "apache-2.0", "F16")
    assert (info.context_tokens, info.sliding_window, info.vocab_tokens) == (4096, 1024, 3)
    assert (info.key_length, info.value_length, info.head_count, info.head_count_kv) == (128, 64, 16, 4)
    assert info.chat_template == "{{ messages }}"
    assert info.sampling == localaid.Sampling(temperature=0.5, top_k=20, top_p=0.75, min_p=0.125, repeat_last_n=-1)
    assert (info.tensors, info.weights_bytes) == (1, 512)


@pytest.mark.parametrize("version", [2, 3])
def test_versions_2_and_3(version: int) -> None:
    """Both versions that llama.cpp reads are read; they differ in the number only."""
    document = bytearray(make_gguf())
    document[4:8] = struct.pack("<I", version)
    assert parse(bytes(document)).architecture == "llama"


@pytest.mark.parametrize("version", [0, 1, 4, 0x7FFF])
def test_other_versions(version: int) -> None:
    """Others are refused by number."""
    assert f"version {version}" in reason_of(b"GGUF" + struct.pack("<I", version) + bytes(64))


def test_byte_order() -> None:
    """A file of the other byte order is read all the same, and listed with the way out."""
    big = parse(make_gguf(lambda writer: writer.add_name("Big"), endianess=gguf.GGUFEndian.BIG))
    assert (big.big_endian, big.name, big.weights_bytes) == (True, "Big", 512)
    assert sys.byteorder == "little"  # else the sides of this test change
    assert "gguf-convert-endian" in str(localaid.serving_problem(big))
    assert localaid.serves(big) == frozenset()


def test_projector_adapter_vocabulary_and_others_are_not_served_alone() -> None:
    """What is no model of its own is recognised as what it is."""
    makers: list[tuple[bytes, str, str]] = [
        (make_gguf(architecture="clip"), "projector", "projector"),
        (make_gguf(lambda w: w.add_type("mmproj")), "projector", "mmproj"),
        (make_gguf(lambda w: w.add_type("adapter")), "adapter", "lora"),
        (make_gguf(lambda w: w.add_token_list(["a"]), tensors=()), "vocab", "no weights"),
        (make_gguf(architecture="dream"), "model", "diffusion"),
    ]
    for document, kind, problem in makers:
        info = parse(document)
        assert info.kind == kind
        assert problem in str(localaid.serving_problem(info))
        assert localaid.serves(info) == frozenset()
    assert "importance matrix" in reason_of(make_gguf(lambda w: w.add_type("imatrix")))


def test_what_models_serve() -> None:
    """Who generates also embeds; who pools or encodes only embeds; a ranking model ranks."""
    pooling = gguf.PoolingType
    assert localaid.serves(parse(make_gguf())) == localaid.GENERATES
    assert localaid.serves(parse(make_gguf(architecture="bert"))) == {localaid.EMBEDDINGS}
    assert localaid.serves(parse(make_gguf(lambda w: w.add_causal_attention(False)))) == {localaid.EMBEDDINGS}  # noqa: FBT003
    last = parse(make_gguf(lambda w: w.add_pooling_type(pooling.LAST), architecture="qwen3"))
    assert last.pooling == "last"
    assert localaid.serves(last) == {localaid.EMBEDDINGS}
    rank = parse(make_gguf(lambda w: w.add_pooling_type(pooling.RANK), architecture="bert"))
    assert rank.pooling == "rank"
    assert localaid.serves(rank) == {localaid.RERANK}
    none = parse(make_gguf(lambda w: w.add_pooling_type(pooling.NONE)))
    assert (none.pooling, localaid.serves(none)) == ("none", localaid.GENERATES)


def test_recurrent_and_hybrid() -> None:
    """What keeps a state instead of, or beside, a KV cache is known by name, or by a key where the name is new."""
    assert parse(make_gguf(architecture="mamba")).recurrent
    assert parse(make_gguf(architecture="rwkv7")).recurrent
    jamba = parse(make_gguf(architecture="jamba"))
    new = parse(make_gguf(lambda w: w.add_ssm_state_size(16), architecture="brand-new"))
    assert [(info.recurrent, info.hybrid) for info in (jamba, new)] == [(False, True)] * 2


def test_quantisation_follows_the_tensors_where_the_header_lies() -> None:
    """general.file_type names the mix; where no tensor is of its kind, most of the bytes do."""
    q4 = parse(make_gguf(lambda w: w.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)))
    guessed = parse(make_gguf(lambda w: w.add_file_type(1024 + gguf.LlamaFileType.MOSTLY_F16)))
    silent = parse(make_gguf())
    assert [info.quantisation for info in (q4, guessed, silent)] == ["F16"] * 3
    split = parse(
        make_gguf(
            lambda w: w.add_file_type(gguf.LlamaFileType.MOSTLY_IQ3_M),
            lambda w: w.add_uint16("split.count", 2),
            tensors=(),
        )
    )
    assert split.quantisation == "IQ3_M"


def test_tables_agree_with_the_gguf_package() -> None:
    """Sizes of blocks and names of types are ggml's own."""
    for kind, (block, block_bytes) in gguf.GGML_QUANT_SIZES.items():
        if kind == gguf.GGMLQuantizationType.Q8_1:
            continue  # never in files; this version of the package has its size wrong
        assert localaid._TENSOR_TYPES[kind.value] == (kind.name, block, block_bytes)
    for file_type in gguf.LlamaFileType:
        if file_type != gguf.LlamaFileType.GUESSED:
            assert localaid._FILE_TYPES[file_type.value] == file_type.name.removeprefix("ALL_").removeprefix("MOSTLY_")


def test_split_files() -> None:
    """Parts say which they are; their names have one form."""
    document = make_gguf(
        lambda w: w.add_uint16("split.no", 1),
        lambda w: w.add_uint16("split.count", 3),
        lambda w: w.add_int32("split.tensors.count", 9),
    )
    info = parse(document)
    assert (info.part, info.parts, info.tensors, info.tensors_total) == (1, 3, 1, 9)
    name = localaid.parse_split_name("a-b-00002-of-00003.gguf")
    assert name == localaid.SplitName("a-b", 2, 3)
    assert name.part(3) == "a-b-00003-of-00003.gguf"
    for other in ("a.gguf", "a-00004-of-00003.gguf", "a-00000-of-00003.gguf", "a-00001-of-00001.gguf", "a-1-of-3.gguf"):
        assert localaid.parse_split_name(other) is None


def test_a_file_cut_short_anywhere_is_refused() -> None:
    """Whether the cut is in the header or in the weights, and without reading the weights."""
    document = make_gguf(lambda w: w.add_token_list(["a", "bc"]), tensors=("a", "b"))
    for size in range(4, len(document)):
        assert "cut short" in reason_of(document[:size])
    assert "copy or download it again" in reason_of(document[:-1])
    head = header_of(SMOLLM2)
    with pytest.raises(localaid.NotServable, match="cut short"):
        localaid.parse_gguf(head, size_bytes=SMOLLM2.stat().st_size - 1, file="smollm2.gguf")
    assert parse(document + b"more") == parse(document)  # what follows the weights does no harm


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (b"", "empty"),
        (b"GG", "cut short"),
        (b"lmgg" + bytes(100), "ggml file of before August 2023"),
        (b"fmgg" + bytes(100), "ggmf"),
        (b"tjgg" + bytes(100), "ggjt"),
        (b"algg" + bytes(100), "LoRA"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"PK\x03\x04" + bytes(100), "zip"),
        (b"<!DOCTYPE html><html>", "web page"),
        (struct.pack("<Q", 99) + b'{"__metadata__":{}}', "safetensors"),
        (b"# A readme, in plain text, longer than the shortest header.\n", "not a GGUF file"),
        (bytes(100), "not a GGUF file"),
    ],
)
def test_files_that_are_not_gguf(head: bytes, reason: str) -> None:
    """Each is told by what it is."""
    assert reason in reason_of(head)


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        (plain_header(key_count=2**60), "damaged"),
        (plain_header(tensor_count=2**40), "damaged"),
        (plain_header(text("k", 2**63), 1), "cut short or damaged"),
        (plain_header(text("k") + struct.pack("<I", 13), 1) + bytes(9), "type 13"),
        (plain_header(text("k") + struct.pack("<IIQ", 9, 8, 2**60), 1), "cut short or damaged"),
        (plain_header(text("k") + struct.pack("<IIQ", 9, 8, 2) + text("", 2**64 - 9) + bytes(9), 1), "damaged"),
        (plain_header(text("k") + struct.pack("<IIQ", 9, 4, 2**62), 1), "cut short or damaged"),
        (plain_header(text("k") + struct.pack("<IIQ", 9, 9, 1), 1), "array of type 9"),
        (plain_header(2 * (text("k") + struct.pack("<IB", 0, 1)), 2), "twice"),
        (plain_header(b"", 0, text("t") + struct.pack("<IIQ", 0, 4, 0), 1), "type 4"),
        (plain_header(b"", 0, text("t") + struct.pack("<IQ", 5, 1) + bytes(64), 1), "5 dimensions"),
        (plain_header(b"", 0, text("t") + struct.pack("<IQIQ", 1, 33, 2, 0), 1), "rows of 33"),
        (plain_header(b"", 0, text("t") + struct.pack("<IQIQ", 1, 32, 0, 2**63), 1), "cut short"),
        (plain_header(b"", 0, text("t") + struct.pack("<I4QIQ", 4, *[2**63] * 4, 0, 0), 1), "cut short"),
        (
            make_gguf(lambda w: w.add_custom_alignment(32)).replace(
                struct.pack("<II", 4, 32), struct.pack("<II", 4, 33), 1
            ),
            "33",
        ),
    ],
)
def test_hostile_headers(document: bytes, reason: str) -> None:
    """A length or number without sense is found before anything is made of it."""
    assert reason in reason_of(document)


def test_a_header_without_end_is_refused_even_if_the_file_is_that_long() -> None:
    """A sparse file costs nothing to its maker, so its size alone is no reason to read on."""
    document = plain_header(text("k") + struct.pack("<IIQ", 9, 8, 2**36), 1)
    with pytest.raises(localaid.NotServable, match="longer than 128 MiB"):
        localaid.parse_gguf(document, size_bytes=2**40, file="sparse.gguf")


def test_tensor_types_of_a_newer_llama_cpp_are_left_to_it() -> None:
    """A type beyond those known now is no reason to refuse a model that the installed llama.cpp may load."""
    info = parse(plain_header(b"", 0, text("t") + struct.pack("<IQIQ", 1, 32, 99, 0), 1) + bytes(64))
    assert info.quantisation == "type 99"


@functools.cache
def small_headers() -> list[bytes]:
    """Headers to be damaged: each kind of value occurs."""
    every = [
        lambda w: w.add_token_list([f"token {n}" for n in range(40)]),
        lambda w: w.add_token_scores([0.5] * 40),
        lambda w: w.add_chat_template("{{ x }}"),
        lambda w: w.add_head_count([1, 2, 3]),
        lambda w: w.add_uint16("split.count", 2),
        lambda w: w.add_uint8("a", 1),
        lambda w: w.add_int64("b", -1),
        lambda w: w.add_float64("c", 0.5),
        lambda w: w.add_bool("d", True),  # noqa: FBT003
    ]
    return [
        make_gguf(*every, tensors=("a", "b")),
        make_gguf(*every, endianess=gguf.GGUFEndian.BIG),
        header_of(SMOLLM2)[:2000],
    ]


def check_outcome(head: bytes, size_bytes: int) -> None:
    """Hold an outcome against the contract: an info that can be kept in the cache, or one of two errors."""
    try:
        info = localaid.parse_gguf(head, size_bytes=size_bytes, file="f")
    except localaid.NotServable:
        return
    except localaid.HeaderIncomplete as error:
        needed = error.needed_bytes
    else:
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(info), type=localaid.ModelInfo) == info
        assert localaid.serves(info) == frozenset() or localaid.serving_problem(info) is None
        assert info.weights_bytes <= size_bytes
        return
    assert len(head) < needed <= size_bytes


@settings(max_examples=500)
@given(
    which=st.integers(0, 2),
    edits=st.lists(st.tuples(st.integers(0, 3000), st.binary(min_size=1, max_size=12)), max_size=4),
    cut=st.integers(0, 4000),
    more=st.integers(0, 2**45),
)
def test_damaged_headers(which: int, edits: list[tuple[int, bytes]], cut: int, more: int) -> None:
    """Real headers, overwritten, cut, in files of any size: nothing but an info or the two errors."""
    head = bytearray(small_headers()[which])
    for at, patch in edits:
        if at < len(head):
            head[at : at + len(patch)] = patch
    check_outcome(bytes(head[: cut or None]), len(head) + more)


@given(head=st.binary(max_size=200), more=st.integers(0, 100))
def test_random_bytes(head: bytes, more: int) -> None:
    """Random bytes, with and without the magic."""
    check_outcome(head, len(head) + more)
    check_outcome(b"GGUF\x03\0\0\0" + head, 8 + len(head) + more)
