"""Channels of default configs, as the command line makes them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import PROGRAM

pytestmark = pytest.mark.outside


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command."""
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    env = {**os.environ, "LOCALAID_KEY_PASSWORD": "a secret"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


def test_what_is_a_config_can_be_published(tmp_path: Path) -> None:
    """Whatever the case of its suffix, as in the configs folder."""
    assert run("publish", "--new-key", tmp_path / "key").returncode == 0
    (tmp_path / "in").mkdir()
    for name in ("A.YAML", "b.Yml", "c.yaml"):
        (tmp_path / "in" / name).write_text(f"name: {name[0]}\nshas: ['{name[0].lower() * 64}']\n")
    done = run("publish", "--key", tmp_path / "key", "--out", tmp_path / "out", tmp_path / "in")
    assert (done.returncode, done.stderr) == (0, "")
    listed = json.loads((tmp_path / "out" / "index.json").read_text())["files"]
    assert [file["path"] for file in listed] == ["A.YAML", "b.Yml", "c.yaml"]
    (tmp_path / "in" / "A.YAML").write_text("name: a\ntop_q: 1\n")  # it is looked at, too
    wrong = run("publish", "--key", tmp_path / "key", tmp_path / "in")
    assert wrong.returncode == 1
    assert "A.YAML: top_q: unknown key" in wrong.stderr
