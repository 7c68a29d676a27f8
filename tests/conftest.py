"""What several test files share: model files, and localaid as a real process."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec
import pytest
from hypothesis import HealthCheck, settings

import localaid
from models import (
    find_gemma,
    find_minilm,
    find_smollm2,
    place_model,
    write_small_smollm2,
    write_tiny_llama,
    write_tiny_mamba,
    write_tiny_reranker,
)
from processes import LocalaidProcess

PROGRAM = Path(localaid.__file__)

# Two runs of the same source try the same examples, however slow the machine is.  To look further:
# `pytest --hypothesis-profile=search`.
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("search", settings.get_profile("same"), derandomize=False, max_examples=2000)
settings.load_profile("same")


@functools.cache
def kernels_die() -> bool:
    """Return whether llama.cpp's fast kernels end a process here; a daemon finds that out by itself."""
    return localaid.find_kernel_fault() is not None


@pytest.fixture(scope="session", autouse=True)
def safe_kernels() -> Iterator[None]:
    """Engines of the tests' own process are without kernels that would end it."""
    with pytest.MonkeyPatch.context() as patch:
        if kernels_die():
            load_model = localaid.Engine._load_model

            def load_plain(engine: localaid.Engine, load: localaid.LoadModel, report: Callable[[float], None]) -> int:
                return load_model(engine, msgspec.structs.replace(load, plain=True), report)

            patch.setattr(localaid.Engine, "_load_model", load_plain)
        yield


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct: a real llama model that follows instructions a little, 98 MB."""
    return find_smollm2()


@pytest.fixture(scope="session")
def gemma() -> Path:
    """gemma-3-270m: a real sliding-window model, 253 MB."""
    return find_gemma()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a llama model with random weights that loads in milliseconds."""
    return write_tiny_llama(tmp_path_factory.mktemp("tiny-llama") / "tiny-llama.gguf")


@pytest.fixture(scope="session")
def small_smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model with SmolLM2's vocabulary, template and a context of 65,536, and tiny random weights."""
    return write_small_smollm2(tmp_path_factory.mktemp("small-smollm2") / "small-smollm2.gguf")


@pytest.fixture(scope="session")
def tiny_mamba(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a recurrent model with random weights that loads in milliseconds."""
    return write_tiny_mamba(tmp_path_factory.mktemp("tiny-mamba") / "tiny-mamba.gguf")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2: a real embedding model, 46 MB."""
    return find_minilm()


@pytest.fixture(scope="session")
def tiny_reranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a reranker with random weights that loads in milliseconds."""
    return write_tiny_reranker(tmp_path_factory.mktemp("tiny-reranker") / "tiny-reranker.gguf")


@dataclass
class Daemon:
    """A running `localaid serve` and its folders."""

    process: LocalaidProcess
    models: Path
    configs: Path
    state: Path
    settings: Path

    @property
    def folder(self) -> Path:
        """Return the folder that holds its folders; `daemon(folder=...)` starts one on them again."""
        return self.models.parent

    def write_config(self, name: str, text: str) -> None:
        """Write a config as an editor does: complete, by one rename."""
        partial = self.folder / f".{name}.partial"
        partial.write_text(text)
        partial.rename(self.configs / name)

    @property
    def base_url(self) -> str:
        """Return where it answers, "http://127.0.0.1:PORT" or "unix:PATH"."""
        return self.process.base_url

    @property
    def pid(self) -> int:
        """Return the daemon's process id."""
        return self.process.pid

    @property
    def log(self) -> str:
        """Return what it wrote to stderr so far."""
        return self.process.log


class StartDaemon(Protocol):
    """What the fixture `daemon` gives: each call starts one more, and all are stopped at the end of the test."""

    def __call__(
        self,
        models: Iterable[Path] | Mapping[str, Path] = (),
        configs: Mapping[str, str] | None = None,
        *,
        settings: Mapping[str, object] | None = None,
        listen: str = "127.0.0.1:0",
        env: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> Daemon:
        """Start localaid and wait until it is ready.

        `models` are symlinked into its models folder under their own names or those given, `configs` are file names and
        their YAML, `settings` become its localaid.yaml; `folder` (of an earlier one, stopped since) starts it on the
        same folders again.
        """


@pytest.fixture
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartDaemon]:
    """Start localaid processes; see `StartDaemon`."""
    yield from _serve(tmp_path_factory)


@pytest.fixture(scope="session")
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """Return the one daemon of all tests that only ask: real and tiny models, 2,048 tokens of context.

    Its names: smollm2-135m-instruct, all-minilm-l6-v2, small-smollm2, tiny-llama, tiny-reranker.  A test may add
    configs and models under names of its own; it takes them away again.
    """
    names = ("smollm2", "minilm", "small_smollm2", "tiny_llama", "tiny_reranker")
    models = [request.getfixturevalue(name) for name in names]
    for start in _serve(tmp_path_factory):
        yield start(models, settings={"load": {"ctx_size": 2048, "parallel": 4}})


def _serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartDaemon]:
    """Give what starts daemons, then stop them all."""
    started: list[LocalaidProcess] = []

    def start(
        models: Iterable[Path] | Mapping[str, Path] = (),
        configs: Mapping[str, str] | None = None,
        *,
        settings: Mapping[str, object] | None = None,
        listen: str = "127.0.0.1:0",
        env: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> Daemon:
        top = folder or tmp_path_factory.mktemp("localaid")
        named = models if isinstance(models, Mapping) else {model.name: model for model in models}
        for part in ("models", "configs", "state"):
            (top / part).mkdir(exist_ok=True)
        for name, model in named.items():
            place_model(model, top / "models", name)
        for name, text in (configs or {}).items():
            (top / "configs" / name).write_text(text)
        (top / "localaid.yaml").write_bytes(msgspec.yaml.encode(settings or {}))
        arguments = ["serve", "--models", str(top / "models"), "--configs", str(top / "configs")]
        arguments += ["--state", str(top / "state"), "--listen", listen, "--settings", str(top / "localaid.yaml")]
        process = LocalaidProcess(PROGRAM, arguments, env)
        started.append(process)
        process.wait_ready()
        return Daemon(process, top / "models", top / "configs", top / "state", top / "localaid.yaml")

    yield start
    _stop_all(started)


def _stop_all(started: Iterable[LocalaidProcess]) -> None:
    """Stop every daemon that the test left running; one that does not stop cleanly fails the test."""
    failed: list[str] = []
    for process in started:
        running = process.process.poll() is None
        try:
            if (code := process.stop()) != 0 and running:
                failed.append(f"exit code {code} after SIGTERM:\n{process.log}")
        except Exception as error:  # noqa: BLE001  # the others must be stopped too
            failed.append(str(error))
    if failed:
        pytest.fail("\n\n".join(failed))
