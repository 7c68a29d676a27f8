"""Environments for clients that cannot live beside the tests' own libraries, made once into the tests' cache folder."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from models import cache_folder

INSTALL_S = 900
RUN_S = 240


def find_python(*requirements: str) -> Path:
    """Return the python of a virtual environment with these packages; makes it where it is not there yet."""
    return _make("py", requirements, _install_python) / "bin" / "python"


def find_node_modules(*packages: str) -> Path:
    """Return a folder whose node_modules has these packages; skips the test where there is no npm."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("node and npm are not installed: the Node.js client is not tested")
    return _make("node", packages, _install_node)


def run_client(command: list[str | Path], base_url: str, folder: Path, **env: str) -> str:
    """Run a client against a daemon and return what it printed; its own assertions fail the test."""
    known = {key: value for key, value in os.environ.items() if not key.startswith(("OPENAI_", "ANTHROPIC_", "PYTHON"))}
    done = subprocess.run(
        command,
        env={**known, "BASE_URL": base_url, "HOME": str(folder), **env},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=RUN_S,
        check=False,
    )
    if done.returncode:
        pytest.fail(
            f"{' '.join(map(str, command))}: exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
        )
    return done.stdout


def _make(kind: str, packages: tuple[str, ...], install: Callable[[Path, tuple[str, ...]], list[list[str]]]) -> Path:
    """Return the folder of an environment; only a complete one has its mark, and one process at a time makes it."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    name = f"{kind}-{hashlib.sha256(repr((version, packages)).encode()).hexdigest()[:12]}"
    folder = cache_folder() / "clients" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            for command in install(folder, packages):
                done = subprocess.run(
                    command, cwd=folder, capture_output=True, text=True, timeout=INSTALL_S, check=False
                )
                if done.returncode:
                    pytest.fail(f"{' '.join(command)}: {done.stdout[-1000:]} {done.stderr[-3000:]}")
            (folder / "complete").touch()
    return folder


def _install_python(folder: Path, packages: tuple[str, ...]) -> list[list[str]]:
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    return [[sys.executable, "-m", "venv", str(folder)], [*pip, *packages]]


def _install_node(_: Path, packages: tuple[str, ...]) -> list[list[str]]:
    return [["npm", "install", "--no-audit", "--no-fund", "--loglevel=error", *packages]]
