"""Which rule and file answer, seen from HTTP and the command line."""

from __future__ import annotations

import json
import shutil
import urllib.request
from pathlib import Path

import pytest

import localaid
from conftest import PROGRAM
from models import place_model
from processes import LocalaidProcess

pytestmark = pytest.mark.outside


def test_a_users_rule_hides_nothing_that_it_does_not_serve(tiny_llama: Path, tmp_path: Path) -> None:
    """A shipped rule has a chat model embed, the user's of the same name and SHA says `keep_alive` only: both hold."""
    digest = localaid.hash_file(str(tiny_llama))["sha256"]
    program = tmp_path / "program" / "localaid.py"
    (program.parent / "default-configs").mkdir(parents=True)
    shutil.copyfile(PROGRAM, program)
    shipped = f"name: both\nshas: ['{digest}']\npaths: [v1/embeddings, v1/chat]\nctx_size: 512\n"
    (program.parent / "default-configs" / "both.yaml").write_text(shipped)
    for name in ("models", "configs", "state"):
        (tmp_path / name).mkdir()
    place_model(tiny_llama, tmp_path / "models")
    (tmp_path / "configs" / "mine.yaml").write_text(f"name: both\nshas: ['{digest}']\nkeep_alive: 1h\nctx_size: 256\n")
    folders = [f"--{name}={tmp_path / name}" for name in ("models", "configs", "state")]
    process = LocalaidProcess(program, ["serve", *folders, "--listen", "127.0.0.1:0"])
    try:
        process.wait_ready()
        for path, layer in (("v1/chat", "user"), ("v1/embeddings", "shipped")):
            with urllib.request.urlopen(f"{process.base_url}/localaid/explain?path={path}&name=both") as answer:  # noqa: S310
                told = json.loads(answer.read())
            assert (told["layer"], told["sha256"]) == (layer, digest), told
        body = json.dumps({"model": "both", "input": "hi"}).encode()
        request = urllib.request.Request(f"{process.base_url}/v1/embeddings", body)  # noqa: S310
        with urllib.request.urlopen(request) as answer:  # noqa: S310
            assert len(json.loads(answer.read())["data"][0]["embedding"]) == 64
    finally:
        assert process.stop() == 0
