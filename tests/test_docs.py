"""The documentation is run, block by block, and what it says of the code is looked up in the code."""

import ast
import contextlib
import dataclasses
import importlib
import io
import json
import re
import shlex
import subprocess
import sys
import tomllib
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from sybil import Document, Example, Lexeme, Region
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown.lexers import DirectiveInHTMLCommentLexer, RawFencedCodeBlockLexer
from typer.main import get_command

import mmemb_deploy
from mmemb_benchmarks.report.tables import tables
from mmemb_deploy import Embedder, errors
from mmemb_deploy.bundle.manifest import Manifest
from mmemb_deploy.cli.main import application, main

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "pages"
PAGES = {path.relative_to(FOLDER).as_posix(): path for path in sorted(FOLDER.rglob("*.md"))}
README = ROOT / "README.md"
SERVER = "http://localhost:8000/v1"  # what pages call the server that an Endpoint stands for
OURS = "http://localhost:8080"  # where they find `mmemb serve`

FENCE = re.compile(r"(?P<info>[^\n]*)\n")
INFO = re.compile(r'(?P<language>\w+)(?: title="(?P<title>[\w./-]+)")?')
MARKED = {"not run": ("python", "bash"), "figures vary": ("text",)}
COMMENTS = re.compile(r"<!--.*?-->", re.DOTALL)
FIGURES = re.compile(r"\b[0-9a-f]{32,}\b|\d[\d.,]*")
CPU = re.compile(r"\b(x86_64|aarch64|arm64)(\s+(avx|amx|asimd|i8mm|bf16|sve)\w*)*")  # as a certificate names it
RULED = re.compile(r"[\s\u2500-\u257f]+")  # blanks, and the lines of tables, whose length follows the figures
CODE = re.compile(r"`((?:mmemb_deploy|training|export|engines|benchmarks|tests|examples|docs)/[\w/.-]*)(?::([\w.]+))?`")


class Blocks:
    """Runs the blocks of one page, in its order, in the working directory.

    python                   is executed, in one namespace for the page
    bash                     is run line by line, `mmemb` by the application in this process
    text                     where it follows one of those, is what that printed on standard output
    any with title="NAME"    is written to the file NAME; json and toml are at least read
    <!-- not run: WHY -->    the block that follows is only compiled, and its `mmemb` lines are only parsed
    <!-- figures vary: WHY --> the numbers and the widths of the text that follows are not compared
    """

    def __init__(self, server: str, ours: str = OURS, *, runs_commands: bool = True) -> None:
        """`server` and `ours` are the addresses of what stands for SERVER and OURS.

        Without `runs_commands`, all bash is only parsed.
        """
        self._addresses = {SERVER: server, OURS: ours}
        self._command = run if runs_commands else parse
        self._python = PythonEvaluator()
        self._mark: str | None = None
        self._printed: str | None = None
        self._end = 0  # of what printed it

    def run(self, page: Path) -> None:
        """Run a page; raises SybilFailure, or what a block raised."""
        for example in Document.parse(str(page), self._regions).examples():
            example.evaluate()
        assert self._mark is None, f"{page} ends with a mark and no block after it"

    def _regions(self, document: Document) -> Iterator[Region]:
        for region in RawFencedCodeBlockLexer(FENCE)(document):
            region.parsed, region.evaluator = region.lexemes["source"], self._block
            yield region
        for region in DirectiveInHTMLCommentLexer("|".join(MARKED), ".*?")(document):
            region.evaluator = self._remember
            yield region

    def _remember(self, example: Example) -> str | None:
        if self._mark is not None:
            return f"two marks, and no block after {self._mark!r}"
        if not example.region.lexemes["arguments"].strip():
            return "a mark says why"
        self._mark = example.region.lexemes["directive"]
        return None

    def _block(self, example: Example) -> str | None:
        info = INFO.fullmatch(example.region.lexemes["info"].strip())
        if info is None:
            return f"a block says its language, as ```python, and at most a title: {example.region.lexemes['info']}"
        language, title = info["language"], info["title"]
        mark, self._mark = self._mark, None
        if mark is not None and language not in MARKED[mark]:
            return f"a {language} block cannot be marked {mark!r}"
        if title is not None:
            Path(title).write_text(example.parsed)
        match language:
            case "python" if mark is None:
                self._run_python(example)
            case "python":
                compile(example.parsed, example.path, "exec")
            case "bash":
                return self._run_bash(example, self._command if mark is None else parse)
            case "text":
                return self._compare(example, exactly=mark is None)
            case "json":
                for line in example.parsed.splitlines() if (title or "").endswith(".jsonl") else [example.parsed]:
                    json.loads(line)
            case "toml":
                tomllib.loads(example.parsed)
            case _:
                return f"blocks in {language} are not known here"
        return None

    def _run_python(self, example: Example) -> None:
        source: Lexeme = example.parsed
        example.parsed = Lexeme(self._there(source), source.offset, source.line_offset)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            self._python(example)
        self._remember_printed(example, printed)

    def _run_bash(self, example: Example, run: Callable[[str], int]) -> str | None:
        lines = self._there(example.parsed).replace("\\\n", " ").splitlines()
        with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(io.StringIO()) as said:
            for line in lines:
                if shlex.split(line, comments=True) and (status := run(line)) != 0:
                    return f"{line}\nexited with {status}: {said.getvalue()}"
        self._remember_printed(example, printed)
        return None

    def _remember_printed(self, example: Example, printed: io.StringIO) -> None:
        said = printed.getvalue()
        for name, address in self._addresses.items():
            said = said.replace(address, name)
        self._printed, self._end = said, example.end

    def _there(self, source: str) -> str:
        for name, address in self._addresses.items():
            source = source.replace(name, address)
        return source

    def _compare(self, example: Example, *, exactly: bool) -> str | None:
        between = COMMENTS.sub("", example.document.text[self._end : example.start])
        if self._printed is None or between.strip():
            return None if exactly else "figures vary, and nothing printed them"
        shown, printed = (
            "\n".join(line.rstrip() for line in text.strip().splitlines()) for text in (example.parsed, self._printed)
        )
        same = shown == printed if exactly else without_figures(shown) == without_figures(printed)
        return None if same else f"the page shows\n{shown}\nand printed was\n{printed}"


def without_figures(text: str) -> str:
    return RULED.sub(" ", FIGURES.sub("#", CPU.sub("a CPU", text)))


def run(line: str) -> int:
    """Run a line of a shell; return its exit code."""
    command, *words = shlex.split(line, comments=True)
    if command == "mmemb":
        return exit_code(main, words)
    done = subprocess.run(["bash", "-c", line], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    print(done.stdout, end="")
    print(done.stderr, end="", file=sys.stderr)
    return done.returncode


def parse(line: str) -> int:
    """Find a line's command of `mmemb` and read its arguments, but do nothing; return the exit code."""
    command, *words = shlex.split(line, comments=True)
    if command != "mmemb":
        return 0
    group: Any = get_command(application())
    silence(group)
    return exit_code(group.main, words)


def silence(command: Any) -> None:
    if not hasattr(command, "commands"):
        command.callback = lambda **_: None
    for child in getattr(command, "commands", {}).values():
        silence(child)


def exit_code(command: Callable[[list[str]], Any], words: list[str]) -> int:
    try:
        command(words)
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@pytest.fixture(scope="module")
def nano() -> Embedder:
    return Embedder.load()


@pytest.fixture
def server(nano: Embedder, endpoint: Any) -> Any:
    """The address of a server that writes the rationales that the embedded bundle writes."""

    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        (detail,) = nano.encode_detailed([endpoint.asked(body)], reasoning="always").details
        assert detail is not None
        answer: tuple[int, Any] = endpoint.answer(body, {"content": detail.rationale})
        return answer

    endpoint.reply = reply
    return endpoint.url


@pytest.fixture(scope="module")
def ours(serve: Any) -> Iterator[str]:
    """The address of `mmemb serve`."""
    with serve() as running:
        yield running.url


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and a terminal of 100 columns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


@pytest.mark.usefixtures("scratch")
@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run_and_print_what_it_shows(page: str, server: str, ours: str) -> None:
    Blocks(server, ours).run(PAGES[page])


@pytest.mark.usefixtures("scratch")
def test_the_readme_s_python_runs_and_its_commands_are_known(server: str) -> None:
    Blocks(server, runs_commands=False).run(README)


WORKS = "```python\nprint(1 + 1)\n```\n\n```text\n2\n```\n"


def test_a_page_that_works_passes(scratch: Path) -> None:
    page = scratch / "page.md"
    page.write_text(
        f"{WORKS}"
        '```json title="one.jsonl"\n"seven"\n```\n'
        "```bash\nmmemb embed one.jsonl out.npz  # with a comment\nls *.npz\n```\n\n"
        "<!-- figures vary: speed -->\n```text\nout.npz: 1 rows, 0 failed, 0 reasoned with 0 tokens, "
        "0 fell back to the direct embedding, 123.4 rows/s\nout.npz\n```\n"
        "<!-- not run: it needs a checkpoint -->\n```bash\npip install nothing\nmmemb export a b --form fused \\\n"
        "    --precision int8\n```\n"
    )
    Blocks(SERVER).run(page)
    assert (scratch / "out.npz").is_file()


@pytest.mark.parametrize(
    ("page", "complaint"),
    [
        (WORKS.replace("1 + 1", "1 + 2"), "the page shows\n2\nand printed was\n3"),
        ("```python\n1 / 0\n```\n", "division by zero"),
        ("<!-- not run: no -->\n```python\n1 +\n```\n", "invalid syntax"),
        ("```bash\nmmemb inspect absent\n```\n", "mmemb inspect absent\nexited with 2"),
        ("```bash\nfalse\n```\n", "false\nexited with 1"),
        ("<!-- not run: no -->\n```bash\nmmemb export a b --shape fused\n```\n", "No such option: --shape"),
        ("<!-- not run: no -->\n```bash\nmmemb bench nonsense\n```\n", "No such command 'nonsense'"),
        ("<!-- not run: no -->\n```bash\nmmemb export a\n```\n", "Missing argument 'bundle'"),
        ("<!-- not run: no -->\n```text\n1\n```\n", "cannot be marked 'not run'"),
        ("<!-- not run: -->\n```bash\nls\n```\n", "a mark says why"),
        ("<!-- not run: no -->\n", "no block after it"),
        ("```\nls\n```\n", "a block says its language"),
        ("```perl\nls\n```\n", "blocks in perl are not known"),
        ('```json\n{"a": }\n```\n', "Expecting value"),
        ("<!-- figures vary: no -->\n```text\n1\n```\n", "nothing printed them"),
        ("```python\nprint('a 1')\n```\n<!-- figures vary: no -->\n```text\nb 1\n```\n", "the page shows"),
    ],
)
def test_a_block_that_is_wrong_fails(page: str, complaint: str, scratch: Path) -> None:
    (scratch / "page.md").write_text(page)
    with pytest.raises(Exception, match=re.escape(complaint)):
        Blocks(SERVER).run(scratch / "page.md")


def mentions() -> list[tuple[str, str, str]]:
    """Every file of the code that a page names, and what it names in it: (page, file, name)."""
    return [(page, *found) for page, path in PAGES.items() for found in CODE.findall(path.read_text(encoding="utf-8"))]


def defined(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
    """Yield the functions, classes and methods of a module, as "Class.method"."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield prefix + node.name
            if isinstance(node, ast.ClassDef):
                yield from defined(node.body, f"{node.name}.")


@pytest.mark.parametrize(("page", "file", "name"), sorted(set(mentions())))
def test_a_file_or_function_that_a_page_names_is_there(page: str, file: str, name: str) -> None:
    path = ROOT / file
    assert path.exists(), f"{page} names {file}"
    if name:
        assert name in set(defined(ast.parse(path.read_text(encoding="utf-8")).body)), f"{page} names {name} in {file}"


def test_tables_are_those_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    module = importlib.import_module("tables")
    stale = [path.name for path in [README, *PAGES.values()] if module.filled(path.read_text()) != path.read_text()]
    assert stale == [], "run `make tables`"
    shown = re.findall(r"^<!-- table (.+) -->$", PAGES["results.md"].read_text(), flags=re.MULTILINE)
    assert sorted(shown) == sorted(tables(ROOT / "benchmarks" / "results"))
    assert "<!-- table headline -->" in README.read_text()


def test_the_trips_of_data_are_looked_up() -> None:
    assert sum(bool(name) for page, _, name in mentions() if page == "internals/data-trips.md") > 30


def shown_by_reference(page: str) -> set[str]:
    """Return the classes and functions that a page takes from the code."""
    return set(re.findall(r"^::: [\w.]*?(\w+)$", PAGES[f"reference/{page}.md"].read_text(), flags=re.MULTILINE))


def kinds(error: type[Exception]) -> Iterator[type[Exception]]:
    yield error
    for kind in error.__subclasses__():
        yield from kinds(kind)


def test_every_public_name_is_in_the_reference() -> None:
    assert set(mmemb_deploy.__all__) <= shown_by_reference("python") | shown_by_reference("errors")


def test_every_error_is_explained() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", PAGES["reference/errors.md"].read_text(), flags=re.MULTILINE)
    own = {kind.__name__ for kind in kinds(errors.MmembError) if kind.__module__ == errors.__name__}
    assert sorted(rows) == sorted(own) == sorted(shown_by_reference("errors"))


def parts(model: Any) -> Iterator[Any]:
    """Yield a model and all models and dataclasses that its fields hold."""
    yield model
    for annotation in typing.get_type_hints(model).values():
        for held in [annotation, *typing.get_args(annotation)]:
            if isinstance(held, type) and (issubclass(held, BaseModel) or dataclasses.is_dataclass(held)):
                yield from parts(held)


def test_every_part_of_the_manifest_is_in_the_reference() -> None:
    assert {part.__name__ for part in parts(Manifest)} == shown_by_reference("manifest")
