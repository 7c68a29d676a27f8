"""localaid.py, and the repo around it, keep the layout of the design; each check is shown to fail on a bad source."""

from __future__ import annotations

import ast
import builtins
import io
import re
import tokenize
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import localaid

REPO = Path(__file__).parent.parent
PROGRAM = Path(localaid.__file__)

Number = tuple[int, str]  # (5, "a") is section 5a: a part of what DESIGN.md has as section 5

SECTIONS: dict[Number, str] = {
    (1, ""): "ERRORS",
    (2, ""): "CONFIG",
    (3, ""): "TABLE",
    (3, "a"): "CATALOG",
    (3, "b"): "CHANNEL",
    (3, "c"): "DIFF",
    (4, ""): "GGUF",
    (5, ""): "API",
    (5, "a"): "VECTORS",
    (5, "b"): "RESPONSES",
    (5, "c"): "ANTHROPIC",
    (5, "d"): "TOOLS",
    (6, ""): "PROMPT",
    (7, ""): "OUTPUT",
    (8, ""): "BATCH",
    (9, ""): "LIFECYCLE",
    (10, ""): "WIRE",
    (10, "a"): "LOG",
    (11, ""): "ENGINE",
    (11, "a"): "CONSTRAIN",
    (11, "b"): "EMBED",
    (12, ""): "WORKER",
    (12, "a"): "FILES",
    (13, ""): "INDEX",
    (14, ""): "FETCH",
    (14, "a"): "PULL",
    (14, "b"): "PUBLISH",
    (15, ""): "SUPERVISOR",
    (15, "a"): "ACCESS",
    (16, ""): "HTTP",
    (16, "a"): "ENCODE",
    (16, "b"): "DIALECTS",
    (16, "c"): "ROUTES",
    (17, ""): "DAEMON",
    (17, "a"): "VIEWS",
    (17, "b"): "DOCTOR",
    (18, ""): "CLI",
}
NOT_YET: set[Number] = set()  # sections of the design that nobody has begun
LAST_PURE = (10, "")
ENGINE = 11

TOP_LEVEL = {"pyproject.toml", "README.md", "localaid.py", "contrib", "default-configs", "tests", "LICENSE"}
MADE_BY_TOOLS = {"__pycache__", "build", "dist"}

# What reaches outside: a pure section uses nothing of it.
IMPURE = {
    *("aiohttp", "asyncio", "concurrent", "fcntl", "http", "inotify_simple", "io", "llama_cpp", "logging"),
    *("multiprocessing", "os", "pathlib", "prometheus_client", "random", "resource", "rich", "sdnotify", "secrets"),
    *("select", "shutil", "signal", "socket", "subprocess", "tempfile", "threading", "time", "urllib"),
}
# Names of those modules that compute only.
PURE_NAMES = {
    *("pathlib.PurePath", "pathlib.PurePosixPath", "http.HTTPStatus", "urllib.parse"),
    *("time.strftime", "time.localtime", "time.gmtime"),  # of a time that is given
}
# (section, what it uses) -> why.
IMPURE_ALL_THE_SAME = {
    ("PROMPT", "time.thread_time"): "a stranger's template is stopped by the processor time that it takes",
}
IMPURE_BUILTINS = {"open", "input", "print", "breakpoint", "exec", "eval"}
CLOCKS = {"now", "today", "utcnow"}  # methods of datetime's classes

FUNCTION_LINES = 60
LONG_FUNCTIONS: dict[str, str] = {}  # qualified name -> why it may be longer

SECTION_LINES = 450
LONG_SECTIONS: dict[str, tuple[int, str]] = {  # section -> (its own limit, why it may be longer)
    "ERRORS": (1250, "one class an error, each with its sentence"),
    "CONFIG": (1540, "three spellings, the kind and limits of every field, and the exact place of every mistake"),
    "TABLE": (900, "the table, and the explanation of what it does"),
    "GGUF": (600, "a reader that takes nothing from a stranger's header on trust"),
    "API": (1150, "structs of every request and answer in OpenAI's shape, a field a line"),
    "RESPONSES": (870, "structs of a large API, a field a line, and the one machine that makes answers and events"),
    "ANTHROPIC": (660, "structs of an API, a field a line, and the one machine that makes answers and events"),
    "TOOLS": (1150, "seventeen formats of calls, seven of reasoning: what to look for, reader, writer, grammar"),
    "PROMPT": (860, "the guards that a stranger's template needs, and every fallback"),
    "BATCH": (750, "the planner and the prefix tree belong together: each step goes through both"),
    "ENGINE": (840, "everything that touches a context of llama.cpp, and the try of its kernels"),
    "CONSTRAIN": (600, "a schema is read for its mistakes, and GBNF, before either can do harm"),
    "WORKER": (640, "the two threads of a model's process share their table"),
    "FETCH": (870, "the folder of sets, the fetch of one with all that can go wrong, and who says when"),
    "PULL": (930, "a download with its mirrors and all their faults, the journal, and the line of those that wait"),
    "INDEX": (1190, "the folder watch, the hash threads, the digest cache and the listing, which share their structs"),
    "SUPERVISOR": (1120, "one owner for each worker from its queue to its process's end"),
    "HTTP": (750, "how a request is resolved, waits, streams, and is told of"),
    "ROUTES": (550, "a row a route, and the handlers of what the daemon tells of itself"),
    "DOCTOR": (530, "a function for each thing that is looked at"),
    "DAEMON": (970, "every step of start, reload and stop, by name"),
    "CLI": (850, "one function a command, and the parser of them all"),
}

BANNER_COMMENT_LINES = 10
LONG_BANNERS = {"ERRORS": "it holds the tree of all errors"}

BANNER = re.compile(r"# == (?P<number>\d+)(?P<part>[a-z]?)\. (?P<name>[A-Z]+): (?P<what>\S.*\S) (?P<rule>=+)")


NO_NUMBER = (-1, "")


class Section(NamedTuple):
    """A part of the file from its banner to the next; HEAD (0) has none."""

    number: Number
    name: str
    banner: str
    first: int  # line, from 1
    last: int


def find_sections(source: str) -> list[Section]:
    """Return the sections in the order of the file."""
    lines = source.splitlines()
    starts = [number for number, line in enumerate(lines, 1) if line.startswith("# ==")]
    sections = [Section((0, ""), "HEAD", "", 1, (starts[0] if starts else len(lines) + 1) - 1)]
    for start, end in zip(starts, [*starts[1:], len(lines) + 1], strict=True):
        found = BANNER.fullmatch(lines[start - 1])
        number, name = ((int(found["number"]), found["part"]), found["name"]) if found else (NO_NUMBER, "?")
        sections.append(Section(number, name, lines[start - 1], start, end - 1))
    return sections


def section_at(sections: list[Section], line: int) -> Section:
    """Return the section that a line is in."""
    return next(section for section in reversed(sections) if section.first <= line)


def _text_of(name: str, source: str) -> str:
    section = next(section for section in find_sections(source) if section.name == name)
    return "\n".join(source.splitlines()[section.first : section.last])


# -- the checks: source -> problems --


def check_banners(source: str) -> Iterator[str]:
    """Every section opens with its banner: fixed grammar, padded to 120 columns, in order, `(pure)` up to WIRE."""
    sections = find_sections(source)[1:]
    for section in sections:
        if section.number == NO_NUMBER:
            yield f"line {section.first}: not a banner: {section.banner}"
            continue
        if len(section.banner) != 120:
            yield f"{section.name}: the banner is {len(section.banner)} columns, not 120"
        if SECTIONS.get(section.number) != section.name:
            number = f"{section.number[0]}{section.number[1]}"
            yield f"section {number} is {SECTIONS.get(section.number)}, not {section.name}"
        if ("(pure" in section.banner) != (section.number <= LAST_PURE):
            yield f"{section.name}: sections up to {LAST_PURE}, and no others, are marked (pure)"
    found = [section.number for section in sections]
    wanted = [number for number in SECTIONS if number not in NOT_YET or number in found]
    if found != wanted:
        yield f"sections {found}, not {wanted}"


def check_banner_comments(source: str) -> Iterator[str]:
    """After a banner come one to ten lines of comment on how the section works and what always holds."""
    lines = source.splitlines()
    for section in find_sections(source)[1:]:
        comment = 0
        for line in lines[section.first : section.last]:
            if not line.startswith("#"):
                break
            comment += line != "#"
        if comment == 0:
            yield f"{section.name}: no comment after the banner"
        if comment > BANNER_COMMENT_LINES and section.name not in LONG_BANNERS:
            yield f"{section.name}: {comment} lines of comment after the banner, {BANNER_COMMENT_LINES} is the limit"


def check_section_lengths(source: str) -> Iterator[str]:
    """No section is too long to be read at once."""
    for section in find_sections(source):
        lines = section.last - section.first + 1
        limit, _ = LONG_SECTIONS.get(section.name, (SECTION_LINES, ""))
        if lines > limit:
            yield f"{section.name}: {lines} lines, {limit} is the limit"


def check_function_lengths(source: str) -> Iterator[str]:
    """No function is longer than 60 lines, but those with a reason."""
    for name, function in _functions(ast.parse(source)):
        lines = (function.end_lineno or 0) - function.lineno + 1
        if lines > FUNCTION_LINES and name not in LONG_FUNCTIONS:
            yield f"{name}: {lines} lines, {FUNCTION_LINES} is the limit"


def check_purity(source: str) -> Iterator[str]:
    """Sections 1-10 use no event loop, socket, clock or file."""
    tree = ast.parse(source)
    sections = find_sections(source)
    origins = _imported(tree)
    for node in ast.walk(tree):
        line = getattr(node, "lineno", None)
        if line is None or not (1, "") <= section_at(sections, line).number <= LAST_PURE:
            continue
        where = f"{section_at(sections, line).name}, line {line}"
        match node:
            case ast.Import() | ast.ImportFrom():
                yield f"{where}: imports belong into HEAD"
            case ast.Attribute(value=ast.Name(id=name), attr=attribute) if name in origins:
                section = section_at(sections, line).name
                allowed = (section, f"{origins[name]}.{attribute}") in IMPURE_ALL_THE_SAME
                if _is_impure(origins[name], attribute) and not allowed:
                    yield f"{where}: {origins[name]}.{attribute} reaches outside"
            case ast.Attribute(value=ast.Name(id=owner) | ast.Attribute(attr=owner), attr=attribute) if (
                attribute in CLOCKS and owner in {"datetime", "date"}
            ):
                yield f"{where}: .{attribute}() is a clock; time comes in as `now`"
            case ast.Name(id=name) if origins.get(name, "") not in {"", "urllib"}:
                module, _, member = origins[name].rpartition(".")
                if module and _is_impure(module, member):
                    yield f"{where}: {origins[name]} reaches outside"
            case ast.Name(id=name, ctx=ast.Load()) if name in IMPURE_BUILTINS:
                yield f"{where}: {name}() reaches outside"
            case _:
                pass


def check_order(source: str) -> Iterator[str]:
    """A name is never used above its section, whether when the file is read or within functions and annotations."""
    tree = ast.parse(source)
    sections = find_sections(source)
    defined = {name: section_at(sections, line) for name, line in _defined(tree)}
    for statement in tree.body:
        for name, line in sorted(_names_used(statement, frozenset())):
            here = section_at(sections, line)
            if name in defined and defined[name].number > here.number:
                yield f"{here.name}, line {line}: {name} is from {defined[name].name}, further down"


def check_engine_imports(source: str) -> Iterator[str]:
    """Only ENGINE imports llama_cpp."""
    sections = find_sections(source)
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                modules = [alias.name for alias in names]
            case ast.ImportFrom(module=str(module)):
                modules = [module]
            case ast.Call(
                func=ast.Name(id="__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                modules = [module]
            case _:
                continue
        section = section_at(sections, node.lineno)
        if any(module.partition(".")[0] == "llama_cpp" for module in modules) and section.number[0] != ENGINE:
            yield f"{section.name}, line {node.lineno}: llama_cpp is imported by ENGINE only"


def check_docstrings(source: str) -> Iterator[str]:
    """Public classes and functions, methods too, have docstrings."""
    tree = ast.parse(source)
    if not ast.get_docstring(tree):
        yield "the file has no docstring"
    for name, node in _definitions(tree):
        is_public = not any(part.startswith("_") for part in name.split("."))
        if is_public and not ast.get_docstring(node):
            yield f"{name} has no docstring"


def check_broad_excepts(source: str) -> Iterator[str]:
    """Whoever catches everything says why, in a comment on the same line."""
    comments = {
        token.start[0]: token.string
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ExceptHandler):
            continue
        caught = {name.id for name in ast.walk(node.type) if isinstance(name, ast.Name)} if node.type else {"Exception"}
        reason = re.sub(r"noqa(: *[A-Z]+\d+(, *[A-Z]+\d+)*)?", "", comments.get(node.lineno, ""))
        if caught & {"Exception", "BaseException"} and not re.search(r"\w{2}", reason):
            yield f"line {node.lineno}: catches everything and does not say why"


def check_main_last(source: str) -> Iterator[str]:
    """`main` is the last definition; after it comes only the call of it."""
    body = ast.parse(source).body
    names = [node.name if isinstance(node, ast.FunctionDef) else type(node).__name__ for node in body[-2:]]
    if names != ["main", "If"] or not isinstance(body[-1], ast.If) or "__main__" not in ast.unparse(body[-1].test):
        yield f"the file ends with {names}, not with main and its call"


def check_exports(source: str) -> Iterator[str]:
    """`__all__` stands in HEAD and names only what the file defines."""
    tree = ast.parse(source)
    sections = find_sections(source)
    found = [node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"]
    if not found or section_at(sections, found[0].lineno).number != (0, ""):
        yield "HEAD has no __all__"
        return
    defined = {name for name, _ in _defined(tree)}
    for name in ast.literal_eval(found[0].value):
        if name not in defined:
            yield f"__all__ names {name}, which is not defined"


def check_dependencies(source: str, pyproject: str) -> Iterator[str]:
    """The script's own metadata (PEP 723) ask for what pyproject.toml asks for."""
    project = tomllib.loads(pyproject)["project"]
    block = re.search(r"(?m)^# /// script\n(?P<toml>(?:#.*\n)+?)# ///$", source)
    if block is None:
        yield "no PEP 723 metadata"
        return
    script = tomllib.loads(re.sub(r"(?m)^# ?", "", block["toml"]))

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[<>=!~\[; ]", requirement)[0].lower().replace("_", "-") for requirement in requirements}

    if script.get("requires-python") != project["requires-python"]:
        yield f"Python {script.get('requires-python')} here, {project['requires-python']} in pyproject.toml"
    for name in sorted(names(script.get("dependencies", [])) ^ names(project["dependencies"])):
        yield f"{name} is asked for by only one of localaid.py and pyproject.toml"


def check_test_command(readme: str, ci: str) -> Iterator[str]:
    """README gives one command that sets up and tests, and .ci/run runs the very same."""
    pattern = re.compile(r"(?m)^ *(python3 -m venv \S+ && .*pytest.*)$")
    commands, run = pattern.findall(readme), pattern.findall(ci)
    if len(commands) != 1:
        yield f"README.md has {len(commands)} test commands, not one"
    if commands != run:
        yield f"README.md says {commands}, .ci/run {run}"


def check_top_level(names: set[str]) -> Iterator[str]:
    """The top level of the repo holds what the design says, and dot-files."""
    for name in sorted(TOP_LEVEL - names):
        yield f"{name} is missing"
    for name in sorted(names - TOP_LEVEL - MADE_BY_TOOLS):
        if not name.startswith(".") and not name.endswith(".egg-info"):
            yield f"{name} does not belong to the top level"


def check_test_files(names: set[str], source: str) -> Iterator[str]:
    """Every section has its test file."""
    for section in find_sections(source)[1:]:
        if f"test_{section.name.lower()}.py" not in names:
            yield f"{section.name} has no tests/test_{section.name.lower()}.py"


# -- what they are made of --

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
Function = ast.FunctionDef | ast.AsyncFunctionDef


def _definitions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, Definition]]:
    """Yield every class, function and method that is not inside a function, with its qualified name."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Definition):
            yield prefix + node.name, node
        if isinstance(node, ast.ClassDef):
            yield from _definitions(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.If | ast.Try | ast.With):
            yield from _definitions(node, prefix)


def _functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, Function]]:
    """Yield every function, those inside of functions too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Function):
            yield prefix + node.name, node
        yield from _functions(node, f"{prefix}{node.name}." if isinstance(node, Definition) else prefix)


def _imported(tree: ast.Module) -> dict[str, str]:
    """Return what each imported name stands for: "time", "concurrent.futures.ThreadPoolExecutor"."""
    origins = {}
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                for alias in names:
                    origins[alias.asname or alias.name.partition(".")[0]] = (
                        alias.name if alias.asname else alias.name.partition(".")[0]
                    )
            case ast.ImportFrom(module=str(module), names=names):
                origins |= {alias.asname or alias.name: f"{module}.{alias.name}" for alias in names}
            case _:
                pass
    return origins


def _is_impure(module: str, member: str) -> bool:
    return module.partition(".")[0] in IMPURE and f"{module}.{member}" not in PURE_NAMES


def _defined(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield the names that the module defines, with their lines, imports left out."""
    todo: list[ast.stmt] = list(tree.body)
    while todo:
        node = todo.pop(0)
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name, node.lineno
            case ast.If() | ast.Try() | ast.With():
                todo += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
            case ast.Assign() | ast.AnnAssign() | ast.AugAssign() | ast.For():
                for name in ast.walk(node):
                    if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store):
                        yield name.id, node.lineno
            case _:
                pass


def _names_used(node: ast.AST, local: frozenset[str]) -> Iterator[tuple[str, int]]:
    """Yield the global names that a piece of code looks up, with their lines."""
    match node:
        case ast.Name(id=name, ctx=ast.Load()):
            if name not in local and not hasattr(builtins, name):
                yield name, node.lineno
            return
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
            local |= _bound_in(node)
        case ast.ClassDef():
            # A class body's names are seen in the body, not by its methods.
            bound = frozenset(name for child in node.body for name in _bound_by(child))
            for child in ast.iter_child_nodes(node):
                yield from _names_used(child, local if isinstance(child, Function) else local | bound)
            return
        case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
            local |= frozenset(name for child in ast.walk(node) for name in _bound_by(child))
        case _:
            pass
    for child in ast.iter_child_nodes(node):
        yield from _names_used(child, local)


def _bound_in(function: Function | ast.Lambda) -> frozenset[str]:
    """Return the names that a function binds: parameters, and whatever its body stores."""
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    bound = {argument.arg for argument in every if argument}
    body = function.body if isinstance(function.body, list) else [function.body]
    todo: list[ast.AST] = list(body)
    while todo:
        node = todo.pop()
        bound |= set(_bound_by(node))
        if not isinstance(node, Definition | ast.Lambda):
            todo += ast.iter_child_nodes(node)
    return frozenset(bound)


def _bound_by(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            yield node.name
        case ast.Name(id=name, ctx=ast.Store()):
            yield name
        case ast.Import(names=names) | ast.ImportFrom(names=names):
            yield from (alias.asname or alias.name.partition(".")[0] for alias in names)
        case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
            yield name
        case ast.MatchMapping(rest=str(name)):
            yield name
        case ast.AnnAssign(target=ast.Name(id=name)) | ast.Assign(targets=[ast.Name(id=name)]):
            yield name
        case _:
            return


# -- the file as it is --

SOURCE_CHECKS: list[Callable[[str], Iterator[str]]] = [
    check_banners,
    check_banner_comments,
    check_section_lengths,
    check_function_lengths,
    check_purity,
    check_order,
    check_engine_imports,
    check_docstrings,
    check_broad_excepts,
    check_main_last,
    check_exports,
]


@pytest.mark.parametrize("check", SOURCE_CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_program(check: Callable[[str], Iterator[str]]) -> None:
    """The program passes every check of its layout."""
    assert "\n".join(check(PROGRAM.read_text())) == ""


def test_dependencies() -> None:
    """localaid.py run as a script, and the package, need the same."""
    assert list(check_dependencies(PROGRAM.read_text(), (REPO / "pyproject.toml").read_text())) == []


def test_test_command() -> None:
    """What README tells a newcomer is what CI does."""
    assert list(check_test_command((REPO / "README.md").read_text(), (REPO / ".ci" / "run").read_text())) == []


def test_top_level() -> None:
    """The repo's top level is as the design has it."""
    assert list(check_top_level({path.name for path in REPO.iterdir()})) == []


def test_test_files() -> None:
    """tests/ mirrors the sections."""
    assert list(check_test_files({path.name for path in (REPO / "tests").iterdir()}, PROGRAM.read_text())) == []


def test_exceptions_are_needed() -> None:
    """An exception from a limit that nobody needs any more is taken out."""
    source = PROGRAM.read_text()
    lengths = {name: (node.end_lineno or 0) - node.lineno + 1 for name, node in _functions(ast.parse(source))}
    assert [name for name in LONG_FUNCTIONS if lengths.get(name, 0) <= FUNCTION_LINES] == []
    sections = {section.name: section.last - section.first + 1 for section in find_sections(source)}
    assert [name for name in LONG_SECTIONS if sections.get(name, 0) <= SECTION_LINES] == []
    assert [(name, used) for name, used in IMPURE_ALL_THE_SAME if used not in _text_of(name, source)] == []


# -- each check can fail --


def banner(number: Number, name: str, *, pure: bool | None = None, columns: int = 120) -> str:
    """Return a section's opening."""
    marked = number <= LAST_PURE if pure is None else pure
    text = f"# == {number[0]}{number[1]}. {name}: what it does{' (pure)' if marked else ''} "
    return text.ljust(columns, "=") + "\n#\n# How it works.\n"


def whole(**bodies: str) -> str:
    """Return a small program with every section, and the given bodies in them."""
    parts = [
        '"""A program."""\n\nimport os\nimport time\nimport asyncio\n\n__all__ = ["main"]\n',
        bodies.get("HEAD", ""),
    ]
    for number, name in SECTIONS.items():
        if number not in NOT_YET:
            parts += [banner(number, name), bodies.get(name, "")]
    end = 'def main() -> int:\n    """Run."""\n    return 0\n\nif __name__ == "__main__":\n    main()\n'
    return "\n".join([*parts, bodies.get("END", end)])


def test_small_program() -> None:
    """The bad sources below are bad for one reason each: without it they pass."""
    for check in SOURCE_CHECKS:
        assert list(check(whole())) == []


GOOD: list[tuple[Callable[[str], Iterator[str]], dict[str, str]]] = [
    (check_purity, {"INDEX": "def read():\n    return open('x'), os.stat('x'), time.time()\n"}),
    (
        check_purity,
        {
            "HEAD": "from pathlib import PurePosixPath\nimport urllib.parse\n",
            "TABLE": "P = PurePosixPath('a'), urllib.parse.quote('a')\n",
        },
    ),
    (check_purity, {"API": "class A:\n    def f(self):\n        return self.now()\n"}),
    (check_purity, {"PROMPT": "def f():\n    return time.thread_time()\n"}),
    (check_order, {"WIRE": "def send(frame: int) -> int:\n    return frame\n", "WORKER": "FRAME = send(1)\n"}),
    (check_order, {"API": "def f(later: int) -> int:\n    return later\n", "CLI": "later = 1\n"}),
    (check_order, {"API": "def f() -> list[int]:\n    return [later for later in (1, 2)]\n", "CLI": "later = 1\n"}),
    (check_order, {"API": "class A:\n    later: int = 1\n    more = later\n", "CLI": "later = 1\n"}),
    (check_engine_imports, {"ENGINE": "def load():\n    import llama_cpp\n"}),
    (check_docstrings, {"API": "def _private():\n    pass\nclass _Hidden:\n    def method(self):\n        pass\n"}),
    (check_broad_excepts, {"API": "try:\n    pass\nexcept ValueError:\n    pass\n"}),
    (
        check_broad_excepts,
        {"API": "try:\n    pass\nexcept Exception:  # noqa: BLE001 - plugins may raise anything\n    pass\n"},
    ),
]


@pytest.mark.parametrize(("check", "bodies"), GOOD)
def test_allowed(check: Callable[[str], Iterator[str]], bodies: dict[str, str]) -> None:
    """What the design allows is not reported."""
    assert list(check(whole(**bodies))) == []


LONG = "\n".join(f"    x{number} = {number}" for number in range(FUNCTION_LINES))
BAD: list[tuple[Callable[[str], Iterator[str]], dict[str, str], str]] = [
    (check_banners, {"GGUF": banner((14, ""), "FETCH")}, "sections \\["),
    (check_banners, {"CLI": "# == something else\n"}, "not a banner"),
    (check_banners, {"CLI": banner((14, ""), "Fetch")}, "not a banner"),
    (check_banners, {"HTTP": banner((99, ""), "MORE")}, "section 99 is None"),
    (check_banners, {"HTTP": banner((14, ""), "FETCH", columns=119)}, "119 columns"),
    (check_banners, {"SUPERVISOR": banner((14, ""), "FETCH", pure=True)}, "marked \\(pure\\)"),
    (check_banners, {"HEAD": banner((1, ""), "ERRORS", pure=False)}, "marked \\(pure\\)"),
    (check_banner_comments, {"CLI": banner((14, ""), "FETCH").splitlines()[0] + "\nX = 1\n"}, "no comment"),
    (check_banner_comments, {"CLI": banner((14, ""), "FETCH") + "# more\n" * 10}, "11 lines of comment"),
    (check_section_lengths, {"WIRE": "X = 1\n" * SECTION_LINES}, "WIRE: 4\\d\\d lines"),
    (check_function_lengths, {"API": f"def long():\n{LONG}\n"}, "long: 61 lines"),
    (
        check_function_lengths,
        {"API": f"class A:\n    def long(self):\n        async def inner():\n{LONG.replace('    ', ' ' * 12)}\n"},
        "A.long.inner: 61",
    ),
    (check_purity, {"API": "import json\n"}, "imports belong"),
    (check_purity, {"ERRORS": "NOW = time.time()\n"}, "time.time"),
    (check_purity, {"BATCH": "async def f():\n    await asyncio.sleep(1)\n"}, "asyncio.sleep"),
    (check_purity, {"WIRE": "def f():\n    return os.getpid()\n"}, "os.getpid"),
    (check_purity, {"WIRE": "def f():\n    return open('x')\n"}, "open\\(\\)"),
    (check_purity, {"HEAD": "from pathlib import Path\n", "WIRE": "def f(p):\n    return Path(p)\n"}, "pathlib.Path"),
    (check_purity, {"HEAD": "from time import time as t\n", "WIRE": "def f():\n    return t()\n"}, "time.time"),
    (check_purity, {"WIRE": "def f():\n    return time.thread_time()\n"}, "time.thread_time"),
    (check_purity, {"HEAD": "import datetime\n", "WIRE": "D = datetime.datetime.now()\n"}, "a clock"),
    (check_order, {"API": "def f():\n    return later\n", "CLI": "later = 1\n"}, "later is from CLI"),
    (check_order, {"API": "def f(x: Later) -> None: ...\n", "CLI": "class Later: ...\n"}, "Later is from CLI"),
    (check_order, {"API": "class A(Later): ...\n", "WIRE": "class Later: ...\n"}, "Later is from WIRE"),
    (
        check_order,
        {"API": "class A:\n    later = 1\n    def f(self):\n        return later\n", "CLI": "later = 1\n"},
        "later is",
    ),
    (check_order, {"API": "X = lambda: later\n", "CLI": "def later(): ...\n"}, "later is from CLI"),
    (check_engine_imports, {"HEAD": "import llama_cpp\n"}, "HEAD, line"),
    (check_engine_imports, {"WORKER": "def f():\n    from llama_cpp import llama_decode\n"}, "WORKER, line"),
    (check_engine_imports, {"CLI": "import importlib\nimportlib.import_module('llama_cpp.x')\n"}, "CLI, line"),
    (check_docstrings, {"API": "def public():\n    pass\n"}, "public has no docstring"),
    (check_docstrings, {"API": 'class A:\n    """A."""\n    def go(self):\n        pass\n'}, "A.go has no docstring"),
    (check_broad_excepts, {"API": "try:\n    pass\nexcept Exception:\n    pass\n"}, "does not say why"),
    (
        check_broad_excepts,
        {"API": "try:\n    pass\nexcept (OSError, BaseException):  # noqa: BLE001\n    pass\n"},
        "does not",
    ),
    (check_broad_excepts, {"API": "try:\n    pass\nexcept:\n    pass\n"}, "does not say why"),
    (check_main_last, {"END": "def main():\n    pass\n"}, "not with main"),
    (
        check_main_last,
        {"END": "def main():\n    pass\ndef more():\n    pass\nif __name__ == '__main__':\n    main()\n"},
        "more",
    ),
    (check_exports, {"HEAD": "__all__ = ['main']\n", "END": "def run():\n    pass\n"}, "main, which is not defined"),
]


@pytest.mark.parametrize(("check", "bodies", "problem"), BAD)
def test_each_check_can_fail(check: Callable[[str], Iterator[str]], bodies: dict[str, str], problem: str) -> None:
    """A small source that breaks one rule is reported for it."""
    problems = "\n".join(check(whole(**bodies)))
    assert re.search(problem, problems), problems or "nothing was reported"


def test_dependencies_can_fail() -> None:
    """A dependency of one side only, another Python and missing metadata are reported."""
    pyproject = '[project]\nrequires-python = ">=3.11"\ndependencies = ["aiohttp>=3.14", "PyYAML>=6"]\n'
    script = '# /// script\n# requires-python = ">=3.11"\n# dependencies = ["aiohttp", "pyyaml"]\n# ///\n'
    assert list(check_dependencies(script, pyproject)) == []
    assert "jinja2" in "".join(check_dependencies(script.replace('"pyyaml"', '"pyyaml", "jinja2"'), pyproject))
    assert "pyyaml" in "".join(check_dependencies(script.replace(', "pyyaml"', ""), pyproject))
    assert "3.12" in "".join(check_dependencies(script.replace("3.11", "3.12"), pyproject))
    assert "no PEP 723" in "".join(check_dependencies("", pyproject))


def test_test_command_can_fail() -> None:
    """A README without the command, with two, or with another one than CI's is reported."""
    command = "python3 -m venv .venv && .venv/bin/pytest"
    assert list(check_test_command(f"    {command}\n", f"set -eu\n{command}\n")) == []
    assert list(check_test_command("", "")) != []
    assert list(check_test_command(f"{command}\n{command}\n", f"{command}\n{command}\n")) != []
    assert list(check_test_command(f"{command}\n", f"{command} -x\n")) != []


def test_top_level_can_fail() -> None:
    """A file too many and one too few are reported; dot-files and what tools leave are not."""
    assert list(check_top_level(TOP_LEVEL | {".git", "__pycache__", "localaid.egg-info"})) == []
    assert list(check_top_level(TOP_LEVEL | {"src"})) == ["src does not belong to the top level"]
    assert list(check_top_level(TOP_LEVEL - {"README.md"})) == ["README.md is missing"]


def test_test_files_can_fail() -> None:
    """A section without tests is reported."""
    names = {f"test_{name.lower()}.py" for name in SECTIONS.values()}
    assert list(check_test_files(names, whole())) == []
    assert list(check_test_files(names - {"test_wire.py"}, whole())) == ["WIRE has no tests/test_wire.py"]
