"""The arrows between the packages: everything stands on mmemb_deploy, and only mmemb_export also imports training."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "mmemb_deploy": ROOT / "mmemb_deploy",
    "mmemb_training": ROOT / "training" / "mmemb_training",
    "mmemb_export": ROOT / "export" / "mmemb_export",
    "mmemb_engines": ROOT / "engines" / "mmemb_engines",
    "mmemb_benchmarks": ROOT / "benchmarks" / "mmemb_benchmarks",
}
MAY_IMPORT = {
    "mmemb_deploy": set[str](),
    "mmemb_training": {"mmemb_deploy"},
    "mmemb_export": {"mmemb_deploy", "mmemb_training"},
    "mmemb_engines": {"mmemb_deploy"},
    "mmemb_benchmarks": {"mmemb_deploy"},
}
TRAINING_ONLY = {"torch", "transformers"}

IMPORT_WITH_NUMPY_ALONE = """
import sys

class NumpyAlone:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in {"mmemb_deploy", "numpy"} | sys.stdlib_module_names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NumpyAlone())
import mmemb_deploy
"""


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Yield the full name of every module that is imported, in functions and by `import_module("...")` too.

    Relative imports are left out: they cannot leave their package.
    """
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=aliases):
                yield from (alias.name for alias in aliases)
            case ast.ImportFrom(module=str(module), level=0):
                yield module
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                yield module
            case _:
                pass


def imports_of(package: str) -> dict[str, set[str]]:
    """Map every top-level module that a package imports to the files that import it."""
    importers: dict[str, set[str]] = {}
    for path in sorted(PACKAGES[package].rglob("*.py")):
        for module in imported_modules(ast.parse(path.read_text(encoding="utf-8"))):
            importers.setdefault(module.partition(".")[0], set()).add(str(path.relative_to(ROOT)))
    return importers


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_its_arrows_allow(package: str) -> None:
    others = set(PACKAGES) - {package}
    forbidden = others - MAY_IMPORT[package]
    assert {module: files for module, files in imports_of(package).items() if module in forbidden} == {}


def loaded_with(tree: ast.Module) -> Iterator[str]:
    """Yield what a module imports while it is loaded: not what functions import, nor what only types need."""
    for statement in tree.body:
        if isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING":
            continue
        if not isinstance(statement, ast.FunctionDef | ast.ClassDef):
            yield from imported_modules(statement)
            if isinstance(statement, ast.ImportFrom):
                yield from (f"{statement.module}.{alias.name}" for alias in statement.names)


def test_modules_import_one_another_in_no_circle() -> None:
    modules = {
        ".".join(path.relative_to(folder.parent).with_suffix("").parts): path
        for folder in PACKAGES.values()
        for path in folder.rglob("*.py")
        if path.name != "__init__.py"
    }
    graph = {name: set(loaded_with(ast.parse(path.read_text(encoding="utf-8")))) for name, path in modules.items()}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle
    assert set(modules) <= set(order)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_is_regular_and_typed(package: str) -> None:
    assert (PACKAGES[package] / "__init__.py").is_file()
    assert (PACKAGES[package] / "py.typed").is_file()


def test_the_runtime_imports_torch_and_transformers_nowhere_but_for_a_framework_that_is_made_of_them() -> None:
    importers = {module: files for module, files in imports_of("mmemb_deploy").items() if module in TRAINING_ONLY}
    assert importers == {"torch": {"mmemb_deploy/adapters/sentence_transformers.py"}}
    own = [
        module
        for path in PACKAGES["mmemb_deploy"].rglob("*.py")
        for module in imported_modules(ast.parse(path.read_text()))
    ]
    assert not [module for module in own if module.startswith("mmemb_deploy.adapters")]


def test_the_runtime_imports_with_numpy_alone() -> None:
    run = subprocess.run(
        [sys.executable, "-c", IMPORT_WITH_NUMPY_ALONE], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def test_every_form_of_import_is_seen() -> None:
    source = """
import a.b, c
from d.e import f
from .inside import g
def late():
    import h
    importlib.import_module("i.j")
    import_module("k")
    __import__("l")
"""
    assert sorted(imported_modules(ast.parse(source))) == ["a.b", "c", "d.e", "h", "i.j", "k", "l"]
