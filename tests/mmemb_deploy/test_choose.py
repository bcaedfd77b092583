"""`backend="auto"` takes the best that a bundle and a machine really have, says which and why, or refuses."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from mmemb_deploy import BackendError, Embedder, MissingExtraError, OptionError
from mmemb_deploy.backends import choose
from mmemb_deploy.backends.choose import choose_backend
from mmemb_deploy.backends.cuda import Gpu
from mmemb_deploy.bundle import abi
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.cli.main import application

GPU = Gpu("NVIDIA H100 80GB HBM3", "sm90")
Found = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Found:
    """A machine with a GPU, on which these backends are whole and the others lack something."""

    def make(*whole: str) -> None:
        def engines(_: Bundle, library: str, gpu: Gpu) -> None:
            assert gpu == GPU
            if library not in whole:
                raise MissingExtraError(library.replace("-", "_"), library)

        def cuda(_: Bundle) -> None:
            if choose.CUDA not in whole:
                raise BackendError("the installed onnxruntime is for the CPU")

        monkeypatch.setattr(choose, "probe", lambda: GPU)
        monkeypatch.setattr(choose, "_find_engines", engines)
        monkeypatch.setattr(choose, "_check_cuda", cuda)

    return make


@pytest.fixture
def portable(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


def best(bundle: Bundle) -> tuple[str, str]:
    return choose._best(bundle)  # pyright: ignore[reportPrivateUsage]


def test_verified_engines_come_first_then_onnx_runtime_on_the_gpu(machine: Found, portable: Bundle) -> None:
    machine("tensorrt", "tensorrt-rtx", choose.CUDA)
    assert best(portable) == ("tensorrt", "its engines for NVIDIA H100 80GB HBM3 are built and verified")
    machine("tensorrt-rtx", choose.CUDA)
    assert best(portable)[0] == "tensorrt-rtx"
    machine(choose.CUDA)
    assert best(portable) == (choose.CUDA, "ONNX Runtime runs on NVIDIA H100 80GB HBM3, for which no engine is built")


def test_a_gpu_that_nothing_uses_is_said_with_every_reason_and_never_left_for_the_cpu(
    machine: Found, portable: Bundle
) -> None:
    machine()
    reasons = (
        r"tensorrt: .*mmemb-deploy\[tensorrt\].*tensorrt-rtx: .*onnxruntime-cuda: the installed onnxruntime is for"
    )
    with pytest.raises(BackendError, match=rf"NVIDIA H100 80GB HBM3 is here, and nothing runs .*{reasons}"):
        choose_backend("auto", portable, None)
    _, why = choose_backend("onnxruntime", portable, None)
    assert why == "as asked"


def test_graphs_for_the_cpu_run_there_beside_a_gpu(machine: Found, fused_bundle: Path) -> None:
    machine("tensorrt", choose.CUDA)
    assert best(Bundle.open(fused_bundle)) == ("onnxruntime", "its graphs are fused for the CPU")


@pytest.mark.no_gpu
def test_without_a_gpu_the_cpu_is_taken_and_a_load_says_why(tiny_embedder: Embedder) -> None:
    assert tiny_embedder.notes[0].startswith(f"runs on {tiny_embedder.backend}: no GPU here: there is no NVIDIA driver")
    assert tiny_embedder.backend.endswith("CPU")


def test_threads_are_not_promised_to_a_gpu(machine: Found, portable: Bundle) -> None:
    machine(choose.CUDA)
    with pytest.raises(OptionError, match="threads is 2: it bounds threads of the CPU, and onnxruntime-cuda runs on a"):
        choose_backend("auto", portable, 2)


def test_pairs_of_quantised_weights_have_no_kernels_in_onnx_runtime_on_a_gpu(
    portable: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    check: Any = choose._check_cuda  # pyright: ignore[reportPrivateUsage]
    check(portable)
    graphs = {name: graph.model_copy(update={"precision": "int8"}) for name, graph in portable.manifest.graphs.items()}
    with pytest.raises(BackendError, match="do not read the Q/DQ pairs of int8"):
        check(Bundle(portable.folder, portable.manifest.model_copy(update={"graphs": graphs})))


@pytest.mark.no_gpu
def test_engines_are_looked_for_before_they_are_promised(portable: Bundle) -> None:
    find: Any = choose._find_engines  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(MissingExtraError, match=r"mmemb-deploy\[tensorrt\]"):
        find(portable, "tensorrt", GPU)


def test_a_float_type_that_a_cpu_lacks_is_refused_before_anything_is_loaded(portable: Bundle) -> None:
    graph = portable.manifest.graphs[abi.EMBEDDER]
    outputs = tuple(
        each.model_copy(update={"dtype": "bfloat16"}) if each.name.startswith("present.") else each
        for each in graph.outputs
    )
    graphs = portable.manifest.graphs | {abi.EMBEDDER: graph.model_copy(update={"outputs": outputs})}
    half = Bundle(portable.folder, portable.manifest.model_copy(update={"graphs": graphs}))
    with pytest.raises(BackendError, match=r"computes in bfloat16, which .* --form fused"):
        Embedder.of_bundle(half, backend="onnxruntime")


@pytest.mark.parametrize("command", ["embed", "verify", "calibrate"])
def test_every_command_that_runs_a_bundle_takes_a_backend(command: str) -> None:
    commands: Any = typer.main.get_command(application())
    names = {name for option in commands.commands[command].params for name in option.opts}
    assert {"--backend", "--threads", "--digest"} <= names
    assert "backend" in inspect.signature(Embedder.load).parameters
