"""The adapter uses only names that TensorRT 10.16 and 11.4 both have, held against lists read from their bindings.

Neither library can be installed by CI. The adapter calls a variable after the class of what it holds, which is how its
attributes are looked up here; TensorRT for RTX has names of its own, used on variables that begin with `rtx`, and what
only newer releases have is used on variables that begin with `newer`.
"""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ADAPTER = [ROOT / "mmemb_deploy" / "backends" / "tensorrt" / name for name in ("api.py", "network.py", "engine.py")]
TENSORRT = ("tensorrt_10.16.1", "tensorrt_11.4.0")
RTX = "tensorrt_rtx_1.7.1"
LIBRARIES = ("trt", "rtx", "newer")
CLASSES = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "problem": "ParserError",
    "config": "IBuilderConfig",
    "rtx_config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "timing": "ITimingCache",
    "layer": "ILayer",
    "tensor": "ITensor",
    "attention": "IAttention",
    "newer_attention": "IAttention",
    "cast": "ICastLayer",
    "inspector": "EngineInspector",
    "refitter": "Refitter",
    "parser_refitter": "OnnxParserRefitter",
    "rtx_run": "IRuntimeConfig",
    "rtx_shared": "IRuntimeConfig",
    "rtx_kernels": "IRuntimeCache",
    "rtx_context": "IExecutionContext",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
}
ATTENTION = {"attention"}  # of a layer, after it was cast to IAttentionInputLayer
OURS = {
    *("library", "watcher", "self", "interrupted", "errors", "name", "shapes", "addresses"),
    *("options", "flags", "facts", "arena", "bundle", "engines", "stored", "WINDOW", "nvtx"),
}
STANDARD = {"graph", "path", "target", "math", "os"}  # paths, a string and modules

Use = tuple[str, str, str]  # the variable, the class or enumeration, its member


def api(name: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = json.loads((Path(__file__).parent / f"api_{name}.json").read_text())
    return found


def uses(tree: ast.AST) -> Iterator[Use]:
    """Yield every class and member that is used on a variable which holds something of the library."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        match node.value:
            case ast.Attribute(value=ast.Name(id=str(library)), attr=str(kind)) if library in LIBRARIES:
                yield library, kind, node.attr
            case ast.Name(id=str(variable)) if variable in LIBRARIES:
                yield variable, node.attr, ""
            case ast.Name(id=str(variable)) if variable in CLASSES:
                kind = "IAttentionInputLayer" if variable == "layer" and node.attr in ATTENTION else CLASSES[variable]
                yield variable, kind, node.attr
            case _:
                pass


def missing(tree: ast.AST, library: str, kind_of_variable: str = "") -> list[str]:
    """Return the names that a library lacks, of those used on variables of a kind: "rtx", "newer", or any other."""
    names = api(library)
    return [
        f"{kind}.{member}"
        for variable, kind, member in uses(tree)
        if next((each for each in ("rtx", "newer") if variable.startswith(each)), "") == kind_of_variable
        and not member.startswith("__")
        and not (kind.startswith("__") and not member)
        and (kind not in names or (member and member not in names[kind]))
    ]


@pytest.fixture(scope="module")
def adapter() -> ast.AST:
    return ast.Module([ast.parse(path.read_text(encoding="utf-8")) for path in ADAPTER], [])  # type: ignore[misc]


@pytest.mark.parametrize("library", TENSORRT)
def test_both_versions_of_tensorrt_have_every_name(adapter: ast.AST, library: str) -> None:
    assert missing(adapter, library) == []


def test_what_only_newer_releases_have_is_there_in_both_libraries(adapter: ast.AST) -> None:
    lacking = {
        "CausalMaskKind.",
        "CausalMaskKind.LOWER_RIGHT",
        "IAttention.causal_kind",
        "IAttention.key_value_lengths",
    }
    assert set(missing(adapter, TENSORRT[0], "newer")) == lacking
    assert missing(adapter, TENSORRT[1], "newer") == []
    assert missing(adapter, RTX, "newer") == []


def test_tensorrt_for_rtx_has_every_name_of_its_own(adapter: ast.AST) -> None:
    assert missing(adapter, RTX, "rtx") == []


def test_the_names_are_found_at_all(adapter: ast.AST) -> None:
    found = set(uses(adapter))
    assert ("trt", "NetworkDefinitionCreationFlag", "STRONGLY_TYPED") in found
    assert ("builder", "Builder", "build_serialized_network") in found
    assert ("context", "IExecutionContext", "execute_async_v3") in found
    assert ("layer", "IAttentionInputLayer", "attention") in found
    assert ("rtx_config", "IBuilderConfig", "set_compute_capability") in found
    assert {variable for variable, _, _ in found} == {*LIBRARIES, *CLASSES}


@pytest.mark.parametrize(
    ("name", "lacking"),
    [
        ("trt.BuilderFlag.FP16", "tensorrt_11.4.0"),
        ("network.add_attention_v2", "tensorrt_10.16.1"),
        ("parser.supports_model", "tensorrt_11.4.0"),
        ("layer.precision", "tensorrt_11.4.0"),
        ("trt.IStreamReader", "tensorrt_11.4.0"),
    ],
)
def test_a_name_that_one_version_lacks_is_caught(name: str, lacking: str) -> None:
    tree = ast.parse(name)
    assert missing(tree, lacking)
    (other,) = set(TENSORRT) - {lacking}
    assert missing(tree, other) == []


def test_nothing_of_a_library_hides_behind_another_variable(adapter: ast.AST) -> None:
    """Every name that an attribute is read from is the library's, or known to be ours."""
    roots = {
        node.value.id
        for node in ast.walk(adapter)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    assert roots - set(LIBRARIES) - set(CLASSES) - OURS - STANDARD == set()


def test_no_other_module_names_a_library() -> None:
    packages = [ROOT / "mmemb_deploy", *(ROOT / each for each in ("training", "export", "engines", "benchmarks"))]
    importing = {
        path.relative_to(ROOT).as_posix()
        for package in packages
        for path in package.rglob("*.py")
        if "import tensorrt" in path.read_text(encoding="utf-8") or "import_module(module)" in path.read_text()
    }
    assert importing == {ADAPTER[0].relative_to(ROOT).as_posix()}
