"""The configs of default-configs/: what they know, and what it costs to load them."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import msgspec
import openai
import pytest

import localaid
from conftest import StartDaemon
from localaid import (
    API_PATHS,
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    MESSAGES,
    RERANK,
    RESPONSES,
    ConfigLayers,
    ConfigSet,
    FileEntry,
    Folders,
    Inventory,
    Rule,
    Source,
    Table,
    auto_rules,
    find_warnings,
    model_not_found,
    plan_listing,
    plan_sources,
    resolve,
)

DEFAULTS = Path(__file__).parent.parent / "default-configs"
GENERATES = frozenset({CHAT, COMPLETIONS, RESPONSES, MESSAGES})
USUAL = "usual-names.yaml"
QWEN3_8B = "376902d50612ecfc5bd8b268f376c04d10ad7e480f99a1483b833f04344a549e"
SMOLLM2 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
QWEN3_RERANKER = "c525a7449243f690a7062e6377d6cf5adbb289354bd4316312367cd20e187ab7"


def load(configs: Path = Path("/nowhere")) -> ConfigLayers:
    """Return the shipped layer and that of a user, as a daemon reads them at its start."""
    folders = Folders(models=(), configs=configs, state=Path("/nowhere"), settings=Path("/nowhere"), shipped=DEFAULTS)
    layers = ConfigLayers(folders)
    files = [*DEFAULTS.glob("*.yaml"), *configs.glob("*.yaml")]
    layers.read(set(map(str, files)))
    return layers


@pytest.fixture(scope="module")
def defaults() -> ConfigSet:
    """The shipped layer."""
    return load().set


@pytest.fixture(scope="module")
def table(defaults: ConfigSet) -> Table:
    """Its table, with no file there."""
    return defaults.merge()[0]


@pytest.fixture(scope="module")
def known(table: Table) -> tuple[Rule, ...]:
    """The rules of known files."""
    return tuple(rule for rule in table.rules if Path(rule.file).name != USUAL)


def sources_of(rules: tuple[Rule, ...]) -> Iterator[Source]:
    """Yield what each rule says of where its files are, parts too."""
    for rule in rules:
        for source in plan_sources(rule):
            yield source
            yield from source.parts


def entry(sha256: str, serves: frozenset[str] = GENERATES, **fields: object) -> FileEntry:
    """Return a file of that content, under a name that tells nothing."""
    values = {"path": f"/models/{sha256[:8]}.gguf", "relative": f"{sha256[:8]}.gguf", "mtime": 1.0, **fields}
    return msgspec.convert({"sha256": sha256, "serves": serves, **values}, FileEntry)


def rule_of(table: Table, name: str) -> Rule:
    """Return the first rule of a name."""
    return table.named[name][0]


# -- what they know --


def test_check_has_nothing_to_say(defaults: ConfigSet) -> None:
    """`localaid check` finds neither an error nor anything to warn of."""
    table, problems = defaults.merge()
    assert problems == ()
    assert find_warnings(table) == ()


def test_how_much_is_known(known: tuple[Rule, ...]) -> None:
    """More than a thousand files; all of them by their SHA-256."""
    shas = {sha for rule in known for sha in rule.shas}
    assert all(sha.startswith("sha256:") for sha in shas)
    assert len(shas) >= 1_250
    assert len(shas | {source.sha for source in sources_of(known)}) >= 1_500


def test_urls(known: tuple[Rule, ...]) -> None:
    """Each is https and ends with the name of a GGUF file; none leads to two contents, and no content to two places."""
    places: dict[str, set[str]] = {}
    contents: dict[str, set[str]] = {}
    for source in sources_of(known):
        (url,) = source.urls
        places.setdefault(source.sha, set()).add(url)
        contents.setdefault(url, set()).add(source.sha)
        assert url.startswith("https://huggingface.co/")
        assert Path(url).suffix == ".gguf"
        assert source.file is None or Path(source.file).suffix == ".gguf"
    assert all(len(urls) == 1 for urls in places.values())
    assert all(len(shas) == 1 for shas in contents.values())
    without = {sha for rule in known for sha in rule.shas if sha not in places}
    assert without == {f"sha256:{SMOLLM2}"}


def test_split_models_are_whole(known: tuple[Rule, ...]) -> None:
    """The first part stands for a split model; the others are with it, in order."""
    firsts = [source for rule in known for source in plan_sources(rule) if "-00001-of-" in source.urls[0]]
    assert firsts
    for source in firsts:
        split = localaid.parse_split_name(Path(source.urls[0]).name)
        assert split is not None
        assert [Path(part.urls[0]).name for part in source.parts] == [split.part(n) for n in range(2, split.parts + 1)]
    assert not any(source.parts for rule in known for source in plan_sources(rule) if source not in firsts)


def test_a_name_means_one_model(table: Table) -> None:
    """Where rules share a name, they stand in one file of configs and mean different files of weights."""
    for name, rules in table.named.items():
        assert len({rule.file for rule in rules}) == 1, name
        shas = Counter(sha for rule in rules for sha in rule.shas)
        assert max(shas.values()) == 1, name
        assert name == name.lower().strip(), name


@pytest.mark.parametrize(
    ("name", "sha256", "fields"),
    [
        ("smollm2", SMOLLM2, {}),
        ("smollm2-135m-instruct", SMOLLM2, {}),
        ("gemma-3-270m", "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818", {}),
        ("qwen3-8b", QWEN3_8B, {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0}),
        ("qwen3-8b-q4_k_m", QWEN3_8B, {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0}),
        (
            "qwen3-4b-instruct-2507",
            "260b5b5b6ad73e44df81a43ea1f5c11c37007b6bac18eb3cd2016e8667c19662",
            {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.0},
        ),
        (
            "gemma-3-4b-it",
            "be49949e48422e4547b00af14179a193d3777eea7fbbd7d6e1b0861304628a01",
            {"temperature": 1.0, "top_p": 0.95, "top_k": 64, "min_p": 0.0},
        ),
        (
            "devstral-small-2507",
            "6d597aa03c2a02bad861d15f282ae530d3b276b52255f37ba200d3c0de7d3aed",
            {"temperature": 0.15},
        ),
        ("qwen3-embedding-0.6b", "06507c7b42688469c4e7298b0a1e16deff06caf291cf0a5b278c308249c3e439", {}),
    ],
)
def test_known_facts(table: Table, name: str, sha256: str, fields: dict[str, float]) -> None:
    """A name leads to that content, with the sampling that the model's maker advises and no other."""
    rule = rule_of(table, name)
    assert rule.shas[0] == f"sha256:{sha256}"
    assert msgspec.to_builtins(rule.sampling) == fields


def test_every_rule_serves_its_file(table: Table, known: tuple[Rule, ...]) -> None:
    """With nothing but one of its files there, each name of a rule leads to it on each path that the rule is for."""
    for rule in known:
        if rule.kind is None:
            serves = frozenset(rule.paths or GENERATES)
            for sha in rule.shas:
                inventory = Inventory([entry(sha.removeprefix("sha256:"), serves)])
                for path in serves:
                    for name in rule.names:
                        found = resolve(table, inventory, path, name)
                        assert found.file is inventory.files[0], (rule.file, name, path)


def test_what_serves_nothing(table: Table, known: tuple[Rule, ...]) -> None:
    """Projectors and drafts are known by what they are; asking for one says so."""
    kinds = Counter(rule.kind for rule in known)
    assert kinds["projector"] >= 100
    assert kinds["draft"] >= 10
    projector = rule_of(table, "qwen3-vl-8b-instruct-mmproj")
    problem = "it is a projector (mmproj)"
    there = Inventory([entry(projector.shas[0].removeprefix("sha256:"), frozenset(), problem=problem)])
    resolution = resolve(table, there, CHAT, projector.name)
    assert resolution.file is None
    assert problem in str(model_not_found(resolution, ()))


def test_embedders_and_rerankers_are_for_that_alone(table: Table) -> None:
    """They are on their paths, and on no other even where their header looks like a chat model's."""
    assert rule_of(table, "embeddinggemma-300m").paths == (EMBEDDINGS,)
    assert rule_of(table, "jina-reranker-v1-tiny-en").paths == (RERANK,)
    here = Inventory([entry(QWEN3_RERANKER)])
    assert resolve(table, here, CHAT, "qwen3-reranker-0.6b").file is None


# -- names that clients have built in --

CHAT_NAMES = ["gpt-4o-mini", "gpt-4o", "gpt-4.1-nano", "gpt-5", "gpt-3.5-turbo", "o1", "o3-mini", "claude-sonnet-4-5"]


@pytest.mark.parametrize("name", [*CHAT_NAMES, "text-embedding-3-small", "text-embedding-ada-002", "rerank-v3.5"])
def test_usual_names(table: Table, name: str) -> None:
    """Each leads to the newest file that is made for it; to none where there is no such file."""
    path = EMBEDDINGS if name.startswith("text-") else RERANK if name.startswith("rerank") else CHAT
    made = {CHAT: GENERATES, EMBEDDINGS: frozenset({EMBEDDINGS}), RERANK: frozenset({RERANK})}
    files = [
        entry(f"{number}" * 64, serves, mtime=float(number), serves_named=frozenset({EMBEDDINGS}) - serves)
        for number, serves in enumerate((*made.values(), *made.values()))
    ]
    fit = [file for file in files if path in file.serves]
    assert resolve(table, Inventory(files), path, name).file == fit[-1]
    assert resolve(table, Inventory(files), path, name, frozenset({fit[0].sha256 or ""})).file == fit[0]
    assert resolve(table, Inventory([file for file in files if file not in fit]), path, name).file is None
    elsewhere = EMBEDDINGS if path == CHAT else CHAT
    assert resolve(table, Inventory(files), elsewhere, name).file is None


def test_usual_names_pass_over_what_is_known_for_something_else(table: Table) -> None:
    """A reranker and a draft that look like chat models do not chat because a client asks for gpt-4o-mini."""
    draft = next(rule for rule in table.rules if rule.kind == "draft").shas[0].removeprefix("sha256:")
    unfit = [entry(QWEN3_RERANKER, mtime=3.0), entry(draft, mtime=2.0)]
    loaded = frozenset({QWEN3_RERANKER, draft})
    assert resolve(table, Inventory(unfit), CHAT, "gpt-4o-mini", loaded).file is None
    found = resolve(table, Inventory([*unfit, entry(SMOLLM2)]), CHAT, "gpt-4o-mini", loaded)
    assert found.file is not None
    assert found.file.sha256 == SMOLLM2


def test_usual_names_give_way(defaults: ConfigSet) -> None:
    """A user's rule, exact or a glob, comes before them, and so does a file that is called so."""
    files = [entry(SMOLLM2), entry("1" * 64, relative="gpt-4o-mini.gguf"), entry("2" * 64, mtime=9.0)]
    inventory, auto = Inventory(files), auto_rules(files)
    for name in ("gpt-4o", "gpt-4*"):
        mine = f"name: mine\nshas: ['sha256:{SMOLLM2}']\nmodel_names: ['{name}']\n".encode()
        table, _ = defaults.put("mine.yaml", "user", mine).merge(auto)
        rule = resolve(table, inventory, CHAT, "gpt-4o").rule
        assert rule is not None
        assert (rule.name, rule.layer) == ("mine", "user")
    found = resolve(table, inventory, CHAT, "gpt-4o-mini").file
    assert found is not None
    assert found.sha256 == "1" * 64


def test_usual_names_are_not_listed(defaults: ConfigSet) -> None:
    """/v1/models shows what is there under its own names."""
    files = [entry("1" * 64), entry("2" * 64, frozenset({EMBEDDINGS}))]
    table, _ = defaults.merge(auto_rules(files))
    assert [one.name for one in plan_listing(table, Inventory(files))] == ["11111111", "22222222"]


# -- a known file under any name --


def test_a_renamed_file_has_what_is_known_of_it(defaults: ConfigSet) -> None:
    """Layer `auto` takes from the defaults all but names; each field tells where it is from."""
    files = [entry(QWEN3_8B, relative="my.gguf", path="/models/my.gguf"), entry(QWEN3_RERANKER, relative="rank.gguf")]
    table, _ = defaults.merge(auto_rules(files))
    inventory = Inventory(files)
    resolution = resolve(table, inventory, CHAT, "my")
    assert resolution.rule is not None
    assert (resolution.rule.layer, resolution.rule.names, resolution.rule.sampling.top_k) == ("auto", ("my",), 20)
    fields = localaid.explain(resolution).fields
    assert (fields["temperature"].layer, Path(fields["temperature"].file).name) == ("shipped", "qwen3.yaml")
    assert (fields["names"].layer, fields["shas"].layer) == ("auto", "auto")
    assert resolve(table, inventory, CHAT, "rank").file is None
    assert {one.name for one in plan_listing(table, inventory)} == {"my", "qwen3-8b", "qwen3-8b-q4_k_m"}


def test_a_users_rule_is_not_adopted() -> None:
    """What a user says of a file for one name is for that name alone."""
    sha = f"sha256:{'1' * 64}"
    pirate = f"name: pirate\nshas: ['{sha}']\nmodel_names: [pirate]\nchat_system: 'Arr. '\n".encode()
    files = [entry("1" * 64, relative="plain.gguf")]
    table, _ = ConfigSet().put("x.yaml", "user", pirate).merge(auto_rules(files))
    rule = resolve(table, Inventory(files), CHAT, "plain").rule
    assert rule is not None
    assert rule.prompts == localaid.Prompts()


# -- a real daemon --


def test_a_client_with_a_built_in_name(daemon: StartDaemon, smollm2: Path) -> None:
    """With one model, no config and the shipped defaults, gpt-4o-mini and a Claude name answer; embeddings do not."""
    served = daemon({"anything.gguf": smollm2}, settings={"load": {"threads": 2, "ctx_size": 1024}})
    with openai.OpenAI(base_url=f"{served.base_url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        for name in ("gpt-4o-mini", "claude-3-5-haiku-latest"):
            answer = client.chat.completions.create(
                model=name, messages=[{"role": "user", "content": "Say hello."}], max_tokens=8, temperature=0
            )
            assert answer.choices[0].message.content
        assert {model.id for model in client.models.list()} == {"anything", "smollm2", "smollm2-135m-instruct"}
        with pytest.raises(openai.NotFoundError):
            client.embeddings.create(model="text-embedding-3-small", input="a cat")


# -- what loading costs --

CALLS_A_FILE = 150  # Python functions entered for each file of weights: that is about 60 ms for all of them


def count_calls(configs: Path) -> tuple[int, Counter[str]]:
    """Return how many Python functions loading enters, and how often each of this program's."""
    calls: Counter[str] = Counter()

    def profile(frame: FrameType, event: str, _argument: object) -> None:
        if event == "call":
            calls[frame.f_code.co_qualname] += 1

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        load(configs).set.merge()
    finally:
        sys.setprofile(before)
    return calls.total(), calls


def test_loading_is_cheap(known: tuple[Rule, ...], tmp_path: Path) -> None:
    """Each config is parsed once, in so many steps for each file of weights; bench.py has the milliseconds."""
    total, calls = count_calls(tmp_path)
    assert calls["parse_config"] == len(list(DEFAULTS.glob("*.yaml")))
    assert total < CALLS_A_FILE * len({source.sha for source in sources_of(known)})


def test_a_change_costs_one_config(tmp_path: Path) -> None:
    """Among many configs one that changes is parsed anew, and no other; the table is what a fresh start makes."""
    for number in range(50):
        text = f"name: c{number}\nshas: ['sha256:{number:064x}']\nmodel_names: ['c{number}-*']\n"
        (tmp_path / f"{number}.yaml").write_text(text)
    layers = load(tmp_path)
    changed = tmp_path / "7.yaml"
    changed.write_text("name: c7\nshas: ['*']\ntop_k: 3\n")
    parsed: list[str] = []

    def profile(frame: FrameType, event: str, _argument: object) -> None:
        if event == "call" and frame.f_code.co_name == "parse_config":
            parsed.append(str(frame.f_locals["file"]))

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        layers.read({str(changed)})
        table, problems = layers.set.merge()
    finally:
        sys.setprofile(before)
    assert parsed == [str(changed)]
    assert problems == ()
    assert table == load(tmp_path).set.merge()[0]
    assert rule_of(table, "c7").sampling.top_k == 3
    assert set(API_PATHS) == set(table.unsuited)
