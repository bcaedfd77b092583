"""ONNX Runtime on a GPU: what can be said without one is that nothing falls back to the CPU, and how it is asked."""

import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from mmemb_deploy import BackendError, Embedder, MissingExtraError
from mmemb_deploy.backends import onnxruntime_cuda
from mmemb_deploy.backends.cuda import Cuda, Gpu
from mmemb_deploy.backends.device import Wanted, axis_sizes
from mmemb_deploy.backends.host_device import HostDevice
from mmemb_deploy.backends.onnxruntime_cuda import PROVIDER, OnnxRuntimeCuda, on_device, provider_options
from mmemb_deploy.backends.placement import misplaced
from mmemb_deploy.bundle import abi
from mmemb_deploy.bundle.folder import Bundle

CPU = "CPUExecutionProvider"


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture(scope="module")
def decoder(bundle: Bundle) -> onnxruntime.InferenceSession:
    """The decoder on the CPU, which says where its nodes are."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return onnxruntime.InferenceSession(str(bundle.graph(abi.EMBEDDER)), options, providers=[CPU])


class Machine:
    """A machine with a GPU on which ONNX Runtime opens sessions of the CPU, and says what `providers` says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, providers: list[str]) -> None:
        self.done: list[Any] = []
        real = onnxruntime.InferenceSession

        def opened(path: str, options: Any, **given: Any) -> Any:
            self.done.append((Path(path).stem, given))
            session = real(path, options, providers=[CPU])
            parts = session.get_provider_graph_assignment_info()
            return SimpleNamespace(
                get_providers=lambda: providers,
                get_provider_graph_assignment_info=lambda: parts,
                get_inputs=session.get_inputs,
                get_input_memory_infos=session.get_input_memory_infos,
            )

        def cuda(index: int, *, extra: str) -> SimpleNamespace:
            self.done.append((index, extra))
            return SimpleNamespace(stream=1234)

        monkeypatch.setattr(onnxruntime_cuda, "probe", lambda device: Gpu("NVIDIA H100", "sm90", device))
        monkeypatch.setattr(onnxruntime_cuda, "Cuda", cuda)
        monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: self.done.append("preloaded"))
        monkeypatch.setattr(onnxruntime, "InferenceSession", opened)


def test_cuda_s_libraries_are_loaded_before_the_first_session_which_may_not_fall_back(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch, [CPU])
    with pytest.raises(BackendError, match=r"does not run on NVIDIA H100: pip uninstall .*mmemb-deploy\[gpu\]"):
        OnnxRuntimeCuda(2).load(bundle)
    first, second, (_, given) = machine.done
    assert (first, second) == ((2, "gpu"), "preloaded")
    ((provider, options),) = given["providers"]
    assert (provider, options["device_id"], options["user_compute_stream"]) == (PROVIDER, "2", "1234")
    assert given["enable_fallback"] == 0


def test_float32_means_float32_and_steps_are_whole() -> None:
    assert provider_options(0, 1, whole=True)["use_tf32"] == "0"
    assert [provider_options(0, 1, whole=whole)["enable_cuda_graph"] for whole in (True, False)] == ["1", "0"]


def test_a_graph_that_is_left_on_the_cpu_is_refused_with_its_operators(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    Machine(monkeypatch, [PROVIDER, CPU])
    with pytest.raises(BackendError, match=r"leaves .*Attention.*LayerNormalization.*MatMul.* of .*vision.onnx on the"):
        OnnxRuntimeCuda().load(bundle)


def test_only_the_arithmetic_of_shapes_may_run_elsewhere(decoder: onnxruntime.InferenceSession) -> None:
    parts = decoder.get_provider_graph_assignment_info()
    nodes = [(part.ep_name, node.op_type) for part in parts for node in part.get_nodes()]
    assert misplaced(nodes, CPU) == []
    left = misplaced(nodes, PROVIDER)
    assert {"Attention", "TensorScatter", "MatMul", "RMSNormalization", "Gather"} <= set(left)
    assert {"Shape", "Concat", "Reshape"} <= {operator for _, operator in nodes} - set(left)
    assert misplaced([(CPU, "Concat"), (PROVIDER, "MatMul")], PROVIDER) == []
    assert misplaced([(CPU, "Gemm"), (CPU, "Conv"), (CPU, "Gemm")], PROVIDER) == ["Conv", "Gemm"]


def test_an_input_that_is_read_elsewhere_is_named(bundle: Bundle, decoder: onnxruntime.InferenceSession) -> None:
    facts = bundle.manifest.graphs[abi.EMBEDDER]
    with pytest.raises(BackendError, match=r"reads .*token_ids.*start.* of decoder.onnx outside of cuda memory"):
        on_device(decoder, facts, 0)
    assert on_device(decoder, facts, 0, memory="cpu").facts is facts


def test_what_is_bound_once_reads_its_inputs_anew_in_every_run(bundle: Bundle) -> None:
    facts, host = bundle.manifest.graphs[abi.GATE], HostDevice()
    session = onnxruntime.InferenceSession(str(bundle.graph(abi.GATE)), providers=[CPU])
    shapes = {abi.STATE: (2, bundle.manifest.model.hidden_size)}
    assert axis_sizes(facts, shapes) == {"batch": 2}
    state, score = host.allocate(4 * int(np.prod(shapes[abi.STATE]))), host.allocate(8)
    run = on_device(session, facts, 0, memory="cpu").bind(
        shapes, {abi.STATE: state.address, abi.SCORE: score.address}, again=True
    )
    for seed in range(2):
        states_BD = np.random.default_rng(seed).normal(size=shapes[abi.STATE]).astype(np.float32)
        host.upload(states_BD, state.address)
        run()
        (found,) = host.download([Wanted(score.address, (2,), np.float32)])
        np.testing.assert_array_equal(found, session.run(None, {abi.STATE: states_BD})[0])


def test_what_is_missing_is_answered_with_the_extra_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("onnxruntime", "cuda.bindings.runtime"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, onnxruntime_cuda.__name__)
    with pytest.raises(MissingExtraError, match=r"'onnxruntime'.*pip install 'mmemb-deploy\[gpu\]'"):
        import_module(onnxruntime_cuda.__name__)
    with pytest.raises(MissingExtraError, match=r"'cuda.bindings'.*pip install 'mmemb-deploy\[gpu\]'"):
        Cuda(extra="gpu")


@pytest.mark.no_gpu
def test_without_a_gpu_it_is_refused(tiny_bundle: Path) -> None:
    with pytest.raises(BackendError, match="no NVIDIA driver"):
        Embedder.load(tiny_bundle, backend="onnxruntime-cuda")


def test_a_fused_bundle_is_refused(fused_bundle: Path) -> None:
    with pytest.raises(BackendError, match="--form portable"):
        Embedder.load(fused_bundle, backend="onnxruntime-cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("reasoning", ["never", "always"])
def test_on_a_gpu_it_gives_what_the_cpu_gives(
    tiny_bundle: Path, tiny_embedder: Embedder, mixed_inputs: list[Any], reasoning: str
) -> None:
    on_gpu = Embedder.load(tiny_bundle, backend="onnxruntime-cuda").encode(mixed_inputs, reasoning=reasoning)
    assert (on_gpu * tiny_embedder.encode(mixed_inputs, reasoning=reasoning)).sum(axis=1).min() >= 0.999
