"""CLI: the commands that people and scripts call, as processes."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

import localaid
from conftest import PROGRAM, StartDaemon
from models import place_model

SMOLLM2 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def run(*arguments: object, home: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run localaid with a home of its own."""
    full = {"PATH": os.environ["PATH"], "HOME": str(home), **(env or {})}
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=full)


def test_check_says_what_is_wrong_where_and_what_was_meant(tmp_path: Path) -> None:
    """`file: path.to.key: problem (did you mean …?)`, exit 1."""
    config = tmp_path / "x.yaml"
    config.write_text(
        "models:\n  - name: a\n    checksum: [{sha256: '" + "a" * 64 + "'}]\n    defaults: {top_q: 0.5}\n"
    )
    result = run("check", config, home=tmp_path)
    assert result.returncode == 1
    assert result.stdout.startswith(f"{config}: models.0.defaults.top_q: ")
    assert "(did you mean top_p?)" in result.stdout


def test_check_of_settings_and_of_what_is_not_there(tmp_path: Path) -> None:
    """Settings are known by their name; a missing file is an error."""
    settings = tmp_path / "localaid.yaml"
    settings.write_text("queue_sise: 1\n")
    result = run("check", settings, tmp_path / "none.yaml", home=tmp_path)
    assert result.returncode == 1
    assert f"{settings}: queue_sise: " in result.stdout
    assert f"{tmp_path / 'none.yaml'}: " in result.stdout


def test_check_of_a_file_that_is_no_config_says_so(tmp_path: Path) -> None:
    """It would never be read, so nothing in it can be right."""
    file = tmp_path / "bad.txt"
    file.write_text("top_q: 1\n")
    result = run("check", file, home=tmp_path)
    assert result.returncode == 1
    assert f"{file}: is no config: the name of one ends in .yaml or .yml" in result.stdout


def test_check_of_names_that_are_nearly_right(tmp_path: Path) -> None:
    """Upper case is read; JSON is not, unless as a template, and that is told."""
    (tmp_path / "A.YAML").write_text("name: a\nshas: ['*']\ntop_q: 1\n")
    (tmp_path / "b.json").write_text('{"name": "b"}')
    (tmp_path / "t.json").write_text("{}")
    (tmp_path / "c.Yml").write_text("name: c\nshas: [c.gguf]\ntemplate: {chat: t.json}\n")
    result = run("check", "--configs", tmp_path, home=tmp_path)
    assert f"{tmp_path}/A.YAML: top_q: unknown key" in result.stdout
    assert f"warning: {tmp_path}/b.json: is passed over: a config is called .yaml or .yml" in result.stdout
    assert "t.json" not in result.stdout


def test_offline_explain_and_list_tell_what_is_wrong(tmp_path: Path) -> None:
    """On stderr, beside their answer."""
    (tmp_path / "a.yaml").write_text("name: a\nshas: ['*']\ntop_q: 1\n")
    for command in (("explain", "v1/chat", "a"), ("list",)):
        result = run(*command, "--configs", tmp_path, "--models", tmp_path / "none", home=tmp_path)
        assert f"{tmp_path}/a.yaml: top_q: unknown key, line 3 (did you mean top_p?)" in result.stderr
        assert f"{tmp_path}/none: user " in result.stderr
        assert "finds no such folder" in result.stderr
        assert "top_q" not in result.stdout


def test_check_reads_aliases(tmp_path: Path) -> None:
    """Those that are named, else those of the models folder."""
    models = tmp_path / ".local/share/localaid/models"
    models.mkdir(parents=True)
    file = models / "aliases.json"
    file.write_text('{"a": {"alais": "x"}}')
    for named in ((file,), ()):
        result = run("check", *named, home=tmp_path)
        assert result.returncode == 1
        assert f"{file}: a.alais: unknown key (did you mean alias?)" in result.stdout
    file.write_text('{"a": {"alias": "x"}}')
    result = run("check", file, home=tmp_path)
    assert result.returncode == 0
    assert result.stdout == "1 files, 0 rules: no errors\n"


def test_check_of_nothing_named_says_what_it_read(tmp_path: Path) -> None:
    """A user's own folder, where there is one."""
    configs = tmp_path / ".config" / "localaid" / "configs"
    configs.mkdir(parents=True)
    result = run("check", home=tmp_path)
    assert f"no errors ({configs}, {configs.parent / 'localaid.yaml'})" in result.stdout


def test_check_of_nothing_named_means_the_installed_service(tmp_path: Path) -> None:
    """As systemd tells its folders."""
    (tmp_path / "systemctl").write_text("#!/bin/sh\necho LoadState=loaded\necho ConfigurationDirectory=localaid-none\n")
    (tmp_path / "systemctl").chmod(0o755)
    result = run("check", home=tmp_path, env={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert "/etc/localaid-none/configs" in result.stdout


def test_a_pipe_that_is_closed_is_no_error(tmp_path: Path) -> None:
    """As of `localaid list | head -3`."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, str(PROGRAM), "check", "--configs", str(tmp_path)]
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=200, check=False)
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, "")


def test_check_warns_of_what_can_never_be_reached_and_of_double_claims(tmp_path: Path) -> None:
    """Warnings do not fail it."""
    (tmp_path / "a.yaml").write_text("name: x\nshas: ['*']\n")
    (tmp_path / "b.yaml").write_text("name: x\nshas: ['*']\n")
    result = run("check", "--configs", tmp_path, home=tmp_path)
    assert result.returncode == 0
    assert "warning: " in result.stdout
    assert "comes first for" in result.stdout
    assert "never reached" in result.stdout


def test_the_default_configs_and_the_documented_settings_are_right(tmp_path: Path) -> None:
    """What we ship passes its own check."""
    top = PROGRAM.parent
    result = run("check", top / "default-configs", top / "contrib" / "localaid.yaml", home=tmp_path)
    assert (result.returncode, "no errors" in result.stdout) == (0, True), result.stdout
    assert "warning" not in result.stdout


def test_explain_offline_and_online_agree(daemon: StartDaemon, tiny_llama: Path, tmp_path: Path) -> None:
    """The same rule, file and SHA; exit 1 where nothing fits."""
    served = daemon([tiny_llama], {"x.yaml": "name: x\nshas: ['*']\nmodel_names: ['gpt-*']\ntop_p: 0.5\n"})
    folders = ["--models", served.models, "--configs", served.configs, "--state", served.state]
    listen = served.base_url.removeprefix("http://")
    online = run("explain", "--listen", listen, "--json", "v1/chat", "gpt-4o", home=tmp_path)
    offline = run("explain", *folders, "--json", "v1/chat", "gpt-4o", home=tmp_path)
    told = json.loads(online.stdout)
    assert told == json.loads(offline.stdout)
    assert told["rule"] == "x"
    assert told["fields"]["top_p"]["file"].endswith("x.yaml")
    words = run("explain", "--listen", listen, "v1/chat", "gpt-4o", home=tmp_path)
    assert (words.returncode, "x.yaml" in words.stdout) == (0, True)
    nothing = run("explain", *folders, "v1/chat", "nobody", home=tmp_path)
    assert nothing.returncode == 1
    wrong = run("explain", *folders, "v1/chatt", "x", home=tmp_path)
    assert (wrong.returncode, "v1/chatt" in wrong.stderr) == (1, True)


def test_status_shows_the_daemon_and_says_when_there_is_none(
    daemon: StartDaemon, tiny_llama: Path, tmp_path: Path
) -> None:
    """In words and as JSON."""
    served = daemon([tiny_llama])
    listen = served.base_url.removeprefix("http://")
    assert ": 1 model, " in run("status", "--listen", listen, home=tmp_path).stdout
    assert json.loads(run("status", "--json", "--listen", listen, home=tmp_path).stdout)["models"] == 1
    served.process.stop()
    gone = run("status", "--listen", listen, home=tmp_path)
    assert gone.returncode == 1
    assert "start it" in gone.stderr


def test_hash_prints_what_configs_name(smollm2: Path, tmp_path: Path) -> None:
    """`sha256:…  file`; one missing file does not keep the others from being hashed."""
    result = run("hash", tmp_path / "none", smollm2, home=tmp_path)
    assert result.returncode == 1
    assert result.stdout == f"sha256:{SMOLLM2}  {smollm2}\n"
    assert f"{tmp_path / 'none'}: " in result.stderr


def test_hash_uses_the_daemons_cache(daemon: StartDaemon, tiny_llama: Path, tmp_path: Path) -> None:
    """A digest that the cache has is not computed again: a changed cache shows."""
    served = daemon()
    model = place_model(tiny_llama, served.models, "m.gguf", copy=True)
    from test_daemon import until_names  # noqa: PLC0415 - shared with the daemon's tests

    until_names(served, "m")
    served.process.stop()
    digest = run("hash", model, home=tmp_path).stdout.split()[0]
    cached = run("hash", "--state", served.state, model, home=tmp_path, env={"LOCALAID_TEST": "1"})
    assert cached.stdout.split()[0] == digest
    os.chmod(model, 0)  # noqa: PTH101 - a file that nobody may read
    assert run("hash", "--state", tmp_path / "empty", tmp_path, home=tmp_path).returncode == 1


def test_hash_draws_a_bar_on_a_terminal(smollm2: Path, tmp_path: Path) -> None:
    """On stderr only, so that stdout stays for scripts."""
    ours, theirs = pty.openpty()
    command = [sys.executable, str(PROGRAM), "hash", str(smollm2)]
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=env) as process:
        os.close(theirs)
        assert process.stdout is not None
        out = process.stdout.read()
        drawn = b""
        try:
            while chunk := os.read(ours, 65536):
                drawn += chunk
        except OSError:  # the other end has gone
            pass
        os.close(ours)
    assert out.decode() == f"sha256:{SMOLLM2}  {smollm2}\n"
    assert b"100 %" in drawn


@pytest.mark.parametrize(
    ("base", "where"),
    [
        ("http://127.0.0.1:8080", "curl http://127.0.0.1:8080/v1/chat/completions -H"),
        ("unix:/run/a b.sock", "curl --unix-socket '/run/a b.sock' http://localhost/v1/chat/completions -H"),
    ],
)
def test_the_demo_names_a_command_that_reaches_it(base: str, where: str) -> None:
    """Also over a unix socket."""
    assert localaid.render_curl(base).startswith(where)


def test_the_demo_answers(smollm2: Path, tmp_path: Path) -> None:
    """A real model, a real daemon, a real answer; the curl line and the folders."""
    assert smollm2.exists()
    result = run("demo", "--once", home=tmp_path, env={"XDG_DATA_HOME": str(tmp_path / "data")})
    assert result.returncode == 0, result.stderr
    assert "localaid: ready on http://127.0.0.1:" in result.stderr
    assert "curl http://127.0.0.1:" in result.stdout
    assert str(tmp_path / "data" / "localaid" / "demo") in result.stdout
    question, answer = result.stdout.split("\n\n")[0:2]
    assert question.strip().startswith(">")
    assert len(answer.split()) > 3


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["serve", "--listen", "nowhere"], 2, "HOST:PORT"),
        (["serve", "--settings", "/nonexistent.yaml"], 1, "/nonexistent.yaml"),
        (["serve", "--listen", "unix:/nonexistent/x.sock"], 1, "cannot listen on unix:/nonexistent/x.sock"),
        (["nothing"], 2, "invalid choice"),
        (["--version"], 0, "localaid 0."),
        (["serve", "--help"], 0, "--models"),
    ],
)
def test_a_wrong_command_line_is_told_in_words(arguments: list[str], status: int, words: str, tmp_path: Path) -> None:
    """Never a traceback."""
    result = run(*arguments, home=tmp_path)
    assert result.returncode == status
    assert words in result.stdout + result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("line", "status", "words"),
    [
        ("explain v1/chatt x", 1, "no API path is called v1/chatt (did you mean v1/chat?)"),
        ("pull x --path v1/chatt", 1, "no API path is called v1/chatt (did you mean v1/chat?)"),
        ("check configs > /dev/full", 1, "No space left on device"),
        ("check configs >&-", 1, ""),
        ("demo --once --folder configs/a.yaml/x", 1, "configs/a.yaml"),
    ],
)
def test_what_the_system_refuses_is_told_in_words(line: str, status: int, words: str, tmp_path: Path) -> None:
    """A full disk below the output, a folder that cannot be: never a traceback."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "a.yaml").write_text("name: a\ntop_q: 1\n")
    shell = f'"{sys.executable}" "{PROGRAM}" {line}'
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    result = subprocess.run(
        ["/bin/sh", "-c", shell], capture_output=True, text=True, timeout=200, check=False, env=env, cwd=tmp_path
    )
    assert result.returncode == status
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert "Exception ignored" not in result.stderr


def test_a_pipe_among_the_configs_is_told_of(tmp_path: Path) -> None:
    """Nobody writes into it, and nobody waits for that; nor for one that stands for a template."""
    os.mkfifo(tmp_path / "pipe.yaml")
    os.mkfifo(tmp_path / "pipe.tmpl")
    (tmp_path / "a.yaml").write_text("name: a\nshas: ['*']\ntemplate: {chat: pipe.tmpl}\n")
    result = run("check", tmp_path, home=tmp_path)
    assert result.returncode == 1
    assert f"{tmp_path / 'pipe.yaml'}: not a regular file" in result.stdout
    assert f"{tmp_path / 'a.yaml'}: not a regular file" in result.stdout
