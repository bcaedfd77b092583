"""`backend="auto"` takes the best that a bundle and a machine really have, says which and why, or refuses."""

import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import typer

from mmemb_deploy import BackendError, Embedder, MissingExtraError, OptionError
from mmemb_deploy.backends import choose, onnxruntime_cuda
from mmemb_deploy.backends import onnxruntime as cpu
from mmemb_deploy.backends.choose import choose_backend
from mmemb_deploy.backends.cuda import Gpu
from mmemb_deploy.backends.tensorrt import backend
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.cli.main import application

GPU = Gpu("NVIDIA H100 80GB HBM3", "sm90")
Found = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Found:
    """A machine with a GPU, on which these backends are whole and the others lack something."""

    def make(*whole: str) -> None:
        def engines(_: Bundle, library: str, gpu: Gpu) -> None:
            assert gpu.name == GPU.name
            if library not in whole:
                raise MissingExtraError(library.replace("-", "_"), library)

        def cuda(_: Bundle) -> None:
            if choose.CUDA not in whole:
                raise BackendError("the installed onnxruntime is for the CPU")

        monkeypatch.setattr(choose, "probe", lambda device: Gpu(GPU.name, GPU.target, device))
        monkeypatch.setattr(choose, "_find_engines", engines)
        monkeypatch.setattr(choose, "_check_cuda", cuda)

    return make


@pytest.fixture
def portable(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


def best(bundle: Bundle) -> tuple[str, str]:
    return choose._best(bundle, 0)  # pyright: ignore[reportPrivateUsage]


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


def test_quantised_weights_beside_bfloat16_have_no_kernels_in_onnx_runtime_on_a_gpu(
    portable: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    check: Any = choose._check_cuda  # pyright: ignore[reportPrivateUsage]
    check(portable)

    def quantised(compute: str) -> Bundle:
        update = {"precision": "int8", "compute": compute}
        graphs = {name: graph.model_copy(update=update) for name, graph in portable.manifest.graphs.items()}
        return Bundle(portable.folder, portable.manifest.model_copy(update={"graphs": graphs}))

    check(quantised("float16"))
    with pytest.raises(BackendError, match="int8 weights with bfloat16 scales"):
        check(quantised("bfloat16"))


def test_a_missing_or_wrong_onnx_runtime_is_answered_with_the_extra_for_gpus(
    portable: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    check: Any = choose._check_cuda  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(BackendError, match=r"uninstall onnxruntime onnxruntime-gpu, then .*mmemb-deploy\[gpu\]"):
        check(portable)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"'onnxruntime'.*mmemb-deploy\[gpu\]"):
        check(portable)


def test_every_backend_of_a_gpu_is_given_its_index(portable: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[Any, ...]] = []
    for module, name in ((onnxruntime_cuda, "OnnxRuntimeCuda"), (backend, "TensorRT")):
        monkeypatch.setattr(module, name, lambda *arguments: given.append(arguments))
    for name in (choose.CUDA, *choose.TENSORRTS):
        choose_backend(name, portable, None, 3)
    assert given == [(3,), ("tensorrt", 3), ("tensorrt-rtx", 3)]


def test_an_index_of_a_gpu_is_refused_on_the_cpu(portable: Bundle) -> None:
    with pytest.raises(OptionError, match=r"device is 1: it is the index of a GPU, and onnxruntime runs on the CPU"):
        Embedder.of_bundle(portable, backend="onnxruntime", device=1)


@pytest.mark.no_gpu
def test_auto_does_not_run_on_the_cpu_what_was_to_run_on_a_gpu(portable: Bundle) -> None:
    with pytest.raises(OptionError, match=r"device is 1: .* runs on the CPU \(no GPU here: there is no NVIDIA driver"):
        choose_backend("auto", portable, None, 1)


@pytest.mark.no_gpu
def test_engines_are_looked_for_before_they_are_promised(portable: Bundle) -> None:
    find: Any = choose._find_engines  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(MissingExtraError, match=r"mmemb-deploy\[tensorrt\]"):
        find(portable, "tensorrt", GPU)


def test_a_float_type_that_a_cpu_lacks_is_refused_before_anything_is_loaded(portable: Bundle) -> None:
    graphs = {
        name: graph.model_copy(update={"compute": "bfloat16"}) for name, graph in portable.manifest.graphs.items()
    }
    half = Bundle(portable.folder, portable.manifest.model_copy(update={"graphs": graphs}))
    with pytest.raises(BackendError, match=r"computes in bfloat16, which .* --form fused"):
        Embedder.of_bundle(half, backend="onnxruntime")


def options(group: Any) -> Iterator[tuple[str, set[str]]]:
    """Yield the name and the options of every command."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from options(command)
        else:
            yield name, {option for each in command.params for option in each.opts}


def test_every_command_that_runs_a_bundle_takes_a_backend_and_a_device() -> None:
    taken = dict(options(typer.main.get_command(application())))
    assert all({"--backend", "--threads", "--digest"} <= taken[name] for name in ("embed", "verify", "calibrate"))
    assert [name for name, known in taken.items() if "--backend" in known and "--device" not in known] == []
    assert {"backend", "device"} <= inspect.signature(Embedder.load).parameters.keys()


def test_prompts_run_beside_steps_where_graphs_are_small_and_there_are_threads_to_share(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Bundle.open(tiny_bundle)
    assert cpu.OnnxRuntime(2).load(opened).beside is not None
    assert cpu.OnnxRuntime(1).load(opened).beside is None
    monkeypatch.setattr(cpu, "LARGE", (tiny_bundle / "decoder.onnx.data").stat().st_size)
    assert cpu.OnnxRuntime(2).load(opened).beside is None


def test_a_graph_is_large_by_the_weights_that_it_names_whatever_their_file_is_called(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Bundle.open(tiny_bundle)
    assert not (tiny_bundle / "direct.onnx.data").exists()
    monkeypatch.setattr(cpu, "LARGE", (tiny_bundle / "decoder.onnx.data").stat().st_size)
    waits = {name: cpu._spin(opened, name) for name in opened.manifest.graphs}  # pyright: ignore[reportPrivateUsage]
    assert waits["direct"] == waits["embedder"] == waits["generator"] == cpu.LONG_SPIN
    assert waits["gate"] == cpu.SPIN
