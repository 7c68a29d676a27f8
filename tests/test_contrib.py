"""contrib/ without a box: man page, completions, scripts, proxies' examples, and what the wheel carries of it."""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import socket
import subprocess
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

import localaid
from conftest import StartDaemon

REPO = Path(__file__).parent.parent
CONTRIB = REPO / "contrib"
COMPLETIONS = CONTRIB / "completions"
LIMIT_S = 60.0


def tool(name: str) -> str:
    """Return a program of this machine; skip the test where there is none."""
    found = shutil.which(name, path="/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def run(*command: str) -> str:
    """Return what a command prints; it must not fail."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    """Return the long options of a parser."""
    return {text for action in parser._actions for text in action.option_strings if text.startswith("--")}


def command_line() -> dict[str, set[str]]:
    """Return the commands, each with its options; "" has those before the command."""
    parser = localaid.make_parser()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return {"": options_of(parser), **{name: options_of(one) for name, one in commands.choices.items()}}


# -- the man page and the completions say what there is --


def test_the_man_page_has_every_command_and_option() -> None:
    """And no other."""
    page = (CONTRIB / "localaid.1").read_text()
    there = command_line()
    commands = page[page.index(".Sh COMMANDS") : page.index(".Sh OPTIONS")]
    assert set(re.findall(r"^\.It Cm (\w+)", commands, re.MULTILINE)) == there.keys() - {""}
    assert {f"-{name}" for name in re.findall(r"Fl (-[\w-]+)", page)} == set.union(*there.values())


@pytest.mark.parametrize("name", ["localaid.bash", "_localaid", "localaid.fish"])
def test_completions_have_every_command_and_option(name: str) -> None:
    """And no other."""
    text = (COMPLETIONS / name).read_text()
    there = command_line()
    if name.endswith(".fish"):
        options = {f"--{option}" for option in re.findall(r"^complete .* -l ([\w-]+)", text, re.MULTILINE)}
        commands = set(re.findall(r"__fish_use_subcommand -a (\w+)", text))
    else:
        options = set(re.findall(r"--[a-z][a-z-]+", text))
        found = re.findall(r"^\s+'(\w+):", text, re.MULTILINE) or re.findall(r"''\) options='([^']*)'", text)[0].split()
        commands = {word for word in found if not word.startswith("-")}
    assert commands == there.keys() - {""}
    assert options == set.union(*there.values())


def complete(line: str) -> set[str]:
    """Return what bash offers at the end of a command line."""
    words = line.split(" ")
    quoted = " ".join(map(shlex.quote, words))
    script = f"source {COMPLETIONS}/localaid.bash; COMP_WORDS=({quoted}); "
    script += f'COMP_CWORD={len(words) - 1}; _localaid; printf "%s\\n" "${{COMPREPLY[@]}}"'
    return set(run(tool("bash"), "-c", script).split())


def test_bash_completes_each_commands_own_options() -> None:
    """All of them, and only them."""
    there = command_line()
    for name, options in there.items():
        assert complete(f"localaid {name} --" if name else "localaid --") == options
    assert complete("localaid ") == there[""] | (there.keys() - {""})
    assert complete("localaid sta") == {"status"}
    assert complete("localaid serve --models /us") == {"/usr"}
    assert "v1/chat" in complete("localaid explain v1")


def test_fish_completes_each_commands_own_options() -> None:
    """All of them, and only them."""
    fish = tool("fish")
    for name, options in command_line().items():
        if name:
            script = f"source {COMPLETIONS}/localaid.fish; complete -C 'localaid {name} --'"
            offered = run(fish, "--no-config", "-c", script)
            assert {line.split("\t")[0] for line in offered.splitlines()} == options


@pytest.mark.parametrize(
    "command",
    [
        ["mandoc", "-T", "lint", "-W", "warning", "localaid.1"],
        ["man", "--warnings=w", "-E", "UTF-8", "-P", "true", "-l", "localaid.1"],
        ["zsh", "-n", "completions/_localaid"],
        ["fish", "--no-execute", "completions/localaid.fish"],
        ["bash", "-n", "completions/localaid.bash"],
        ["dash", "-n", "install.sh"],
        ["shellcheck", "install.sh", "completions/localaid.bash"],
    ],
    ids=lambda command: command[0],
)
def test_checkers_have_nothing_to_say(command: list[str]) -> None:
    """Of the man page and the scripts."""
    name, *arguments = command
    paths = [str(CONTRIB / argument) if (CONTRIB / argument).is_file() else argument for argument in arguments]
    said = run(tool(name), *paths)
    assert "warning" not in said.lower(), said


# -- the documented settings --


def documented_settings() -> dict[str, str]:
    """Return the keys of contrib/localaid.yaml, each with what stands behind it; the text of comments is longer."""
    text = (CONTRIB / "localaid.yaml").read_text()
    lines = re.findall(r"^#(\w+):(?: (.*))?$", text, re.MULTILINE)
    assert len(lines) == len({key for key, _ in lines})
    return dict(lines)


def test_every_setting_is_documented() -> None:
    """And no other: what the file has is what the program reads."""
    assert documented_settings().keys() == localaid._SETTINGS_KEYS.keys()
    fields = {key if isinstance(field, dict) else field for key, field in localaid._SETTINGS_KEYS.items()}
    assert fields == set(localaid.Settings.__struct_fields__)


@pytest.mark.parametrize("key", sorted(documented_settings()))
def test_a_documented_line_holds_its_default(key: str) -> None:
    """Without its "#" it is read, and changes nothing; folders, which come from elsewhere, have an example."""
    settings = localaid.parse_settings(f"{key}: {documented_settings()[key]}\n".encode(), file="localaid.yaml")
    changed = localaid.diff_settings(localaid.Settings(), settings)
    assert changed == [] or key in EXAMPLES


EXAMPLES = {"models", "configs", "state"}


# -- packaging --


def test_the_wheel_carries_all_of_contrib() -> None:
    """What is added to contrib/ is shipped."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())
    shipped = project["tool"]["hatch"]["build"]["targets"]["wheel"]["shared-data"]
    files = [file.relative_to(REPO) for file in CONTRIB.rglob("*") if file.is_file()]
    assert [str(file) for file in files if not any(Path(part) in (file, *file.parents) for part in shipped)] == []


def test_the_installer_finds_in_the_wheel_what_it_installs() -> None:
    """Its table names places of the wheel's share/."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())
    shipped = project["tool"]["hatch"]["build"]["targets"]["wheel"]["shared-data"]
    places = set()
    for source, place in shipped.items():
        below = [file for file in (REPO / source).rglob("*") if file.is_file()] or [REPO / source]
        places |= {str(Path(place) / file.relative_to(REPO / source)) for file in below}
    script = (CONTRIB / "install.sh").read_text()
    wanted = re.findall(r'^(?:files=")?([\w./-]+) \$(?:lib|share)/', script, re.MULTILINE)
    assert len(wanted) == 9
    assert {f"share/{name}" for name in wanted} <= places


# -- behind a proxy --


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class Proxy:
    """A proxy that runs, and where it listens."""

    def __init__(self, command: list[str], port: int) -> None:
        """Start it and wait until it listens."""
        self.url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        end = time.monotonic() + LIMIT_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
            except OSError:  # not yet: nothing tells of it
                assert self.process.poll() is None, self.process.communicate()[0].decode()
                assert time.monotonic() < end
            else:
                return

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.communicate()


@pytest.fixture(params=["nginx", "caddy"])
def proxy(request: pytest.FixtureRequest, daemon: StartDaemon, tiny_llama: Path, tmp_path: Path) -> Iterator[Proxy]:
    """Start a proxy, as its example says, before a daemon; without TLS, which needs a name."""
    program = tool(request.param)
    served = daemon([tiny_llama], settings={"load": {"ctx_size": 4096, "threads": 1}})
    port, upstream = free_port(), served.base_url.removeprefix("http://")
    if request.param == "nginx":
        text = (CONTRIB / "nginx.conf").read_text().replace("127.0.0.1:8080", upstream)
        text = text.replace("listen 443 ssl;", f"listen 127.0.0.1:{port};")
        text = re.sub(r"^ *ssl_certificate.*\n", "", text, flags=re.MULTILINE)
        temporary = "".join(f"{kind}_temp_path {tmp_path}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi"))
        temporary += "".join(f"{kind}_temp_path {tmp_path}/{kind};\n" for kind in ("uwsgi", "scgi"))
        whole = f"daemon off; master_process off; pid {tmp_path}/pid; error_log stderr;\nevents {{}}\n"
        whole += f"http {{ access_log off;\n{temporary}{text}}}\n"
        (tmp_path / "nginx.conf").write_text(whole)
        command = [program, "-e", "stderr", "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")]
    else:
        text = (CONTRIB / "Caddyfile").read_text().replace("127.0.0.1:8080", upstream)
        text = "{\n\tadmin off\n}\n" + text.replace("llm.example.org {", f"http://127.0.0.1:{port} {{")
        (tmp_path / "Caddyfile").write_text(text)
        command = [program, "run", "--adapter", "caddyfile", "--config", str(tmp_path / "Caddyfile")]
    one = Proxy(command, port)
    yield one
    one.stop()


async def test_answers_stream_through_a_proxy(proxy: Proxy, tiny_llama: Path) -> None:
    """The first token comes while the answer is still being written, and no part of it is held back or lost."""
    body = {"model": tiny_llama.stem, "prompt": "x", "max_tokens": 1500, "ignore_eos": True, "stream": True}
    async with aiohttp.ClientSession(proxy.url) as http, http.post("/v1/completions", json=body) as answer:
        assert answer.status == 200
        first = await answer.content.readline()
        async with http.get("/localaid/status") as asked:
            status = await asked.json()
        assert [worker["running"] for worker in status["memory"]["workers"]] == [1]  # it is still at it
        assert (first + await answer.read()).endswith(b"data: [DONE]\n\n")
