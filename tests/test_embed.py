"""EMBED: MiniLM's vectors against a forward pass in numpy and against llama-server's; pieces, pooling, fairness."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import time
import unicodedata
import urllib.request
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from localaid import (
    EMBED_SEQUENCES,
    ENCODER_DECODE_TOKENS,
    BadRequest,
    Embed,
    Embedded,
    Embedder,
    EmbedJob,
    Engine,
    EngineFailed,
    InputTooLong,
    LlamaLog,
    LoadModel,
    LoadOptions,
    Ranked,
    Rerank,
    prepare_embed,
    prepare_rerank,
    reply_of,
)
from models import Tensors, english, minilm_folder, read_safetensors, write_tiny_llama

Vector = NDArray[np.float32]

TEXTS = [
    "The cat sits outside",
    "A man is playing guitar",
    "Ünïcödé naïveté, ﬁne—isn't it?",
    "unbelievably hyperparameterized",
    "a",
    english(300, "long"),
    *(english(5 + 3 * number, number) for number in range(20)),
]


# -- a reference that shares nothing with llama.cpp --


class ReferenceBert:
    """all-MiniLM-L6-v2 as sentence-transformers computes it: WordPiece, six post-norm layers, mean, length 1."""

    def __init__(self, folder: Path) -> None:
        """Read the published weights."""
        self.weights: Tensors = read_safetensors(folder / "model.safetensors")
        pieces = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
        self.vocabulary = {piece: number for number, piece in enumerate(pieces)}

    def tokens(self, text: str) -> list[int]:
        """Return BERT's tokens: no case, no accents, punctuation apart, then the longest pieces that fit."""
        plain = unicodedata.normalize("NFD", text.lower())
        spaced = "".join(
            f" {letter} " if unicodedata.category(letter)[0] == "P" or letter in "$+<=>^`|~" else letter
            for letter in plain
            if unicodedata.category(letter) != "Mn"
        )
        pieces = [piece for word in spaced.split() for piece in self._pieces(word)]
        return [self.vocabulary[piece] for piece in ("[CLS]", *pieces, "[SEP]")]

    def _pieces(self, word: str) -> list[str]:
        pieces: list[str] = []
        while word:
            mark = "##" if pieces else ""
            fits = (end for end in range(len(word), 0, -1) if mark + word[:end] in self.vocabulary)
            end = next(fits, None)
            if end is None:
                return ["[UNK]"]
            pieces.append(mark + word[:end])
            word = word[end:]
        return pieces

    def embed(self, text: str) -> Vector:
        """Return the vector of a text."""
        tokens = self.tokens(text)
        table = "embeddings.{}_embeddings.weight"
        rows = self.weights[table.format("word")][tokens] + self.weights[table.format("position")][: len(tokens)]
        rows = self._norm("embeddings.LayerNorm", rows + self.weights[table.format("token_type")][0])
        for layer in range(6):
            rows = self._layer(f"encoder.layer.{layer}", rows)
        mean: Vector = rows.mean(axis=0)
        return mean / np.linalg.norm(mean)

    def _layer(self, name: str, rows: Vector) -> Vector:
        heads = [
            self._dense(f"{name}.attention.self.{part}", rows).reshape(len(rows), 12, 32).transpose(1, 0, 2)
            for part in ("query", "key", "value")
        ]
        scores = heads[0] @ heads[1].transpose(0, 2, 1) / np.sqrt(np.float32(32))
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        seen = (weights / weights.sum(axis=-1, keepdims=True)) @ heads[2]
        seen = seen.transpose(1, 0, 2).reshape(len(rows), 384)
        seen = self._dense(f"{name}.attention.output.dense", seen)
        rows = self._norm(f"{name}.attention.output.LayerNorm", seen + rows)
        wide = self._dense(f"{name}.intermediate.dense", rows)
        wide = wide / 2 * (1 + np.vectorize(math.erf, otypes=[np.float32])(wide / math.sqrt(2)))  # "gelu"
        return self._norm(f"{name}.output.LayerNorm", self._dense(f"{name}.output.dense", wide) + rows)

    def _dense(self, name: str, rows: Vector) -> Vector:
        result: Vector = rows @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]
        return result

    def _norm(self, name: str, rows: Vector) -> Vector:
        centred = rows - rows.mean(axis=-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-12)
        result: Vector = scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]
        return result


# -- engines --


_logs: list[LlamaLog] = []  # llama.cpp has one log for all engines: none may go before the last engine


@contextlib.contextmanager
def load(path: Path, **options: int) -> Iterator[Engine]:
    """Load a model."""
    engine = Engine(LoadModel(path=str(path), options=LoadOptions(threads=2, **options)), lambda _: None)  # type: ignore[arg-type]
    _logs.append(engine.log)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def encoder(minilm: Path) -> Iterator[Engine]:
    """MiniLM, loaded."""
    with load(minilm) as engine:
        yield engine


@pytest.fixture
def embedder(encoder: Engine) -> Iterator[Embedder]:
    """MiniLM's context for vectors, without jobs."""
    with contextlib.closing(Embedder(encoder)) as embedder:
        yield embedder


def run(embedder: Embedder, *jobs: EmbedJob) -> list[int]:
    """Run jobs to their end; return their ids in the order in which they ended."""
    for job in jobs:
        embedder.add(job)
    done = []
    while embedder.busy:
        done += [job.id for job in embedder.step()]
    return done


def embed(
    engine: Engine, inputs: list[str | list[int]], pooling: str | None = None, dimensions: int | None = None
) -> Vector:
    """Return the vectors of inputs, one a row."""
    job = prepare_embed(engine, Embed(id=1, inputs=inputs, pooling=pooling, dimensions=dimensions))
    with contextlib.closing(Embedder(engine)) as embedder:
        assert run(embedder, job) == [1]
    reply = reply_of(engine.native, job)
    assert isinstance(reply, Embedded)
    return np.stack([np.frombuffer(vector, "<f4") for vector in reply.vectors])


def cosines(one: Vector, other: Vector) -> Vector:
    """Return the cosine of each row of one with the same row of the other."""
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    result: Vector = (one * other).sum(axis=1) / lengths
    return result


# -- against the references --


def test_minilm_is_the_reference(encoder: Engine) -> None:
    """Tokens are the same and every vector points where the published weights' own forward pass has it."""
    reference = ReferenceBert(minilm_folder())
    tokens = [encoder.tokenize(text, add_bos=True, parse_special=True) for text in TEXTS]
    assert tokens == [reference.tokens(text) for text in TEXTS]
    ours = embed(encoder, list(TEXTS))
    assert cosines(ours, np.stack([reference.embed(text) for text in TEXTS])).min() > 0.9999
    assert np.abs(np.linalg.norm(ours, axis=1) - 1).max() < 1e-5


def test_minilm_knows_what_is_alike(encoder: Engine) -> None:
    """The model card's example: the sentence about the cat is nearer to the cat than to the guitar."""
    cat, feline, guitar = embed(encoder, ["The cat sits outside", "A feline rests in the yard", "He plays the guitar"])
    assert cat @ feline > cat @ guitar + 0.3


PEER = os.environ.get("LLAMA_CPP_SERVER") or shutil.which("llama-cpp-server")


@contextlib.contextmanager
def run_peer(model: Path, *options: str) -> Iterator[str]:
    """Run llama-server on a model; give its address."""
    if not PEER:
        pytest.skip("llama-server is not installed: name it in LLAMA_CPP_SERVER")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = [PEER, "-m", str(model), "--host", "127.0.0.1", "--port", port, "--", "-t", "2", *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while not _is_healthy(port):
            assert process.poll() is None, "llama-server does not start"
            assert time.monotonic() < deadline, "llama-server is not ready"
            time.sleep(0.05)  # it cannot tell when it is ready
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _is_healthy(port: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def ask_peer(url: str, body: object) -> dict[str, list[dict[str, object]]]:
    """POST JSON."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
        told: dict[str, list[dict[str, object]]] = json.load(answer)
    return told


def test_minilm_is_the_peer(encoder: Engine, minilm: Path) -> None:
    """llama-server gives the same vectors of the same file."""
    with run_peer(minilm, "--embedding") as url:
        data = ask_peer(f"{url}/v1/embeddings", {"input": TEXTS, "model": "x"})["data"]
    theirs = np.array([entry["embedding"] for entry in data], np.float32)
    assert cosines(embed(encoder, list(TEXTS)), theirs).min() > 0.9999


def test_reranker_is_the_peer(tiny_reranker: Path) -> None:
    """llama-server gives the same scores, so query and document are put together in the same way."""
    documents = ["the stone bridge", "a river", english(60, 1)]
    with load(tiny_reranker) as engine:
        ours = rank(engine, "the river", documents)
    with run_peer(tiny_reranker, "--reranking") as url:
        body = {"query": "the river", "documents": documents, "model": "x"}
        results = ask_peer(f"{url}/v1/rerank", body)["results"]
    theirs = {entry["index"]: entry["relevance_score"] for entry in results}
    assert ours == pytest.approx([theirs[place] for place in range(3)], abs=1e-3)


# -- rerankers --


def rank(engine: Engine, query: str, documents: list[str]) -> list[float]:
    """Return the scores of documents."""
    job = prepare_rerank(engine, Rerank(id=1, query=query, documents=documents))
    with contextlib.closing(Embedder(engine)) as embedder:
        run(embedder, job)
    reply = reply_of(engine.native, job)
    assert isinstance(reply, Ranked)
    assert reply.tokens == sum(map(len, job.inputs))
    return reply.scores


def test_reranker_scores_pairs(tiny_reranker: Path) -> None:
    """A score depends on query and document, not on what else is in the decode; the pair is [CLS] q [SEP] d."""
    with load(tiny_reranker) as engine:
        documents = ["the stone", "a river", english(60, 1), ""]
        scores = rank(engine, "river", documents)
        alone = [rank(engine, "river", [document])[0] for document in documents]
        assert scores == pytest.approx(alone, abs=2e-3)
        assert len({round(score, 3) for score in (*scores, *rank(engine, "winter", documents[:1]))}) == 5
        words = [engine.tokenize(text, add_bos=False, parse_special=False) for text in ("river", "stone")]
        job = prepare_rerank(engine, Rerank(id=1, query="river", documents=["stone"]))
        assert job.inputs == [[2, *words[0], 3, *words[1]]]
        with pytest.raises(EngineFailed, match="gives no vectors"):
            prepare_embed(engine, Embed(id=1, inputs=["a"]))


def test_vectors_have_no_scores(encoder: Engine) -> None:
    """A model without a head cannot rank."""
    with pytest.raises(EngineFailed, match="no head"):
        prepare_rerank(encoder, Rerank(id=1, query="a", documents=["b"]))


# -- decodes --


def test_company_does_not_matter(encoder: Engine) -> None:
    """An input has the same vector alone and in a decode with others, in whatever order."""
    together = embed(encoder, list(TEXTS))
    alone = np.concatenate([embed(encoder, [text]) for text in TEXTS])
    assert np.abs(together - alone).max() < 2e-3
    assert np.abs(embed(encoder, list(reversed(TEXTS)))[::-1] - together).max() < 2e-3


def test_decodes_are_bounded(encoder: Engine, embedder: Embedder) -> None:
    """A decode takes ENCODER_DECODE_TOKENS, or one longer input alone; jobs have their turns one input at a time."""
    long = prepare_embed(encoder, Embed(id=1, inputs=[english(20, number) for number in range(40)]))
    short = prepare_embed(encoder, Embed(id=2, inputs=["one text"]))
    embedder.add(long)
    embedder.add(short)
    assert [job.id for job in embedder.step()] == [2]
    started = [long.started]
    while embedder.busy:
        embedder.step()
        started.append(long.started)
    sizes = [sum(map(len, long.inputs[start:end])) for start, end in pairwise(started)]
    assert max(sizes) <= ENCODER_DECODE_TOKENS
    assert min(sizes[:-1]) > ENCODER_DECODE_TOKENS - 2 * max(map(len, long.inputs))
    many = prepare_embed(encoder, Embed(id=3, inputs=[[101, 102]] * (EMBED_SEQUENCES + 1)))
    embedder.add(many)
    assert embedder.step() == []
    assert many.started == EMBED_SEQUENCES


def test_cancel(encoder: Engine, embedder: Embedder) -> None:
    """A cancelled job leaves between two decodes; the others go on."""
    inputs: list[str | list[int]] = [english(100, number) for number in range(8)]
    jobs = [prepare_embed(encoder, Embed(id=number, inputs=inputs)) for number in (1, 2)]
    for job in jobs:
        embedder.add(job)
    embedder.step()
    assert embedder.cancel(1) == [jobs[0]]
    assert embedder.cancel(1) == []
    assert run(embedder) == [2]
    assert jobs[0].left


# -- limits --


def test_too_long_is_refused(encoder: Engine) -> None:
    """The longest input that fits is embedded; one token more is an error with both numbers, never cut."""
    fits = [101, *[2003] * 510, 102]
    assert embed(encoder, [fits]).shape == (1, 384)
    with pytest.raises(InputTooLong) as told:
        prepare_embed(encoder, Embed(id=1, inputs=["a", [*fits, 102]]))
    assert (told.value.param, told.value.place, told.value.tokens, told.value.ctx_size) == ("input", 1, 513, 512)


def test_a_wanted_context_is_no_longer_than_an_encoder_has(minilm: Path) -> None:
    """BERT's positions end; a larger ctx_size, from settings for all models, does not lead beyond them."""
    with load(minilm, ctx_size=4096) as engine:
        assert engine.capacity.ctx_size == 512


@pytest.mark.parametrize(
    ("task", "param"),
    [
        (Embed(id=1, inputs=["a", [5, 99999]]), "input[1]"),
        (Embed(id=1, inputs=[[-1]]), "input[0]"),
        (Embed(id=1, inputs=["a", []]), "input[1]"),
        (Embed(id=1, inputs=["a"], dimensions=385), "dimensions"),
    ],
)
def test_bad_inputs(encoder: Engine, task: Embed, param: str) -> None:
    """What cannot be embedded is named."""
    with pytest.raises(BadRequest) as told:
        prepare_embed(encoder, task)
    assert told.value.param == param


def test_dimensions(encoder: Engine) -> None:
    """A shortened vector is the first numbers of the whole one, of length 1 again."""
    whole, short = embed(encoder, ["some text"]), embed(encoder, ["some text"], dimensions=16)
    assert short.shape == (1, 16)
    assert short[0] == pytest.approx(whole[0, :16] / np.linalg.norm(whole[0, :16]), abs=1e-6)


# -- models that generate --


def test_chat_model_embeds_in_pieces(tmp_path: Path) -> None:
    """A long input of a causal model is fed over several decodes, and gives what it gives in one, however pooled."""
    path = write_tiny_llama(tmp_path / "m.gguf", context_length=1024)
    text: list[str | list[int]] = [english(150, 3), "short"]
    with load(path, batch_size=64) as small, load(path, batch_size=1024) as large:
        assert len(prepare_embed(small, Embed(id=1, inputs=text)).inputs[0]) > 300
        for pooling in ("mean", "cls", "last"):
            pieces, whole = embed(small, text, pooling), embed(large, text, pooling)
            assert cosines(pieces, whole).min() > 0.999, pooling
        assert (embed(small, text) == embed(small, text, "last")).all()
        first = embed(small, text, "cls")
        assert cosines(first, embed(small, text, "last")).max() < 0.9


def test_cancel_in_the_middle_of_an_input(tmp_path: Path) -> None:
    """What was fed of a cancelled input does not show in the next one."""
    path = write_tiny_llama(tmp_path / "m.gguf", context_length=1024)
    with load(path, batch_size=64) as engine, contextlib.closing(Embedder(engine)) as embedder:
        jobs = [prepare_embed(engine, Embed(id=number, inputs=[english(150, number)])) for number in (1, 2)]
        embedder.add(jobs[0])
        embedder.step()
        embedder.add(jobs[1])
        assert embedder.cancel(1) == [jobs[0]]
        assert run(embedder) == [2]
        assert jobs[1].results[0] is not None
        again = embed(engine, [english(150, 2)])
        assert cosines(np.stack([jobs[1].results[0]]), again).min() > 0.9999


def test_recurrent_model_embeds(tiny_mamba: Path) -> None:
    """A state instead of a KV cache: the last token's vector, the same in company."""
    texts: list[str | list[int]] = ["one text", "another, longer text", english(100, 1)]
    with load(tiny_mamba, batch_size=64) as engine:
        together = embed(engine, texts)
        alone = np.concatenate([embed(engine, [text]) for text in texts])
        assert cosines(together, alone).min() > 0.999
