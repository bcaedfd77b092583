"""The fake GPU is as strict as it says: every rule that it holds others to is broken here once."""

import ctypes
import inspect
import json
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

pytestmark = pytest.mark.no_gpu

LISTS = Path(__file__).parents[1] / "mmemb_engines"
PlugIn = Callable[..., AbstractContextManager[Any]]
BOUNDS = (1,), (2,), (8,)


class Cuda:
    """The CUDA runtime, by calls that return values and errors."""

    def __init__(self) -> None:
        self.runtime: Any = import_module("cuda.bindings.runtime")
        self.stream = int(self("cudaStreamCreate"))
        kinds = self.runtime.cudaMemcpyKind
        self.up, self.down = kinds.cudaMemcpyHostToDevice, kinds.cudaMemcpyDeviceToHost

    def __call__(self, function: str, *arguments: Any) -> Any:
        status, *values = getattr(self.runtime, function)(*arguments)
        if int(status):
            raise OSError(status.name)
        return values[0] if values else None

    def upload(self, array: NDArray[Any]) -> int:
        address = int(self("cudaMallocAsync", array.nbytes, self.stream))
        self("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, self.up, self.stream)
        return address

    def download(self, address: int, like: NDArray[Any]) -> NDArray[Any]:
        found = np.empty_like(like)
        self("cudaMemcpyAsync", found.ctypes.data, address, found.nbytes, self.down, self.stream)
        return found

    def wait(self) -> None:
        self("cudaStreamSynchronize", self.stream)

    def begin(self) -> None:
        mode = self.runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self("cudaStreamBeginCapture", self.stream, mode)

    def end(self) -> Any:
        graph = self("cudaStreamEndCapture", self.stream)
        return self("cudaGraphInstantiate", graph, 0)


@pytest.fixture
def cuda(gpu: Any) -> Cuda:
    assert gpu.misuses == []
    return Cuda()


@pytest.fixture
def caught(gpu: Any) -> Iterator[Any]:
    """The exception that the fake raises; a test that waits for it broke a rule on purpose."""
    yield import_module("fakegpu").MisuseError
    assert gpu.misuses
    gpu.misuses.clear()


class Context:
    """An engine of y = x + 1, x being (n,) float32 of 1 to 8, and a context with its input and output in place."""

    def __init__(
        self, cuda: Cuda, *, cache: bool = False, strategy: str = "STATIC", flags: tuple[str, ...] = ()
    ) -> None:
        self.cuda, self.said = cuda, list[str]()
        self.trt: Any = import_module("tensorrt")
        said = self.said

        def log(_: Any, severity: int, text: str) -> None:
            assert severity in (self.trt.ILogger.ERROR, self.trt.ILogger.INTERNAL_ERROR)
            said.append(text)

        self.log = type("Log", (self.trt.ILogger,), {"log": log})()
        self.engine = self.trt.Runtime(self.log).deserialize_cuda_engine(self.plan(cache, flags))
        self.context = self.engine.create_execution_context(self.trt.ExecutionContextAllocationStrategy[strategy])

    def plan(self, cache: bool = False, flags: tuple[str, ...] = ()) -> Any:
        builder = self.trt.Builder(self.log)
        network = builder.create_network(1 << int(self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = self.trt.OnnxParser(network, self.log)
        assert parser.parse(scattering() if cache else adding())
        config, profile = builder.create_builder_config(), builder.create_optimization_profile()
        profile.set_shape("new" if cache else "x", *([(1, 1, 2, 4)] * 3 if cache else BOUNDS))
        config.add_optimization_profile(profile)
        for flag in flags:
            config.set_flag(self.trt.BuilderFlag[flag])
        return builder.build_serialized_network(network, config)

    def bind(self, size: int = 3) -> tuple[int, int]:
        """Set the shape, and addresses of an input of 0, 1, 2 and so on, and of an output."""
        values = np.arange(size, dtype=np.float32)
        addresses = self.cuda.upload(values), int(self.cuda("cudaMallocAsync", values.nbytes, self.cuda.stream))
        self.cuda.wait()
        assert self.context.set_input_shape("x", (size,))
        for name, address in zip("xy", addresses, strict=True):
            assert self.context.set_tensor_address(name, address)
        return addresses

    def run(self) -> bool:
        return bool(self.context.execute_async_v3(self.cuda.stream))


def model(
    nodes: list[Any], inputs: dict[str, Any], outputs: dict[str, Any], opset: int, weights: Sequence[float] = (1,)
) -> bytes:
    infos = [
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in side.items()]
        for side in (inputs, outputs)
    ]
    weight = helper.make_tensor("one", TensorProto.FLOAT, [len(weights)], weights)
    graph = helper.make_graph(nodes, "small", infos[0], infos[1], [weight])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return bytes(made.SerializeToString())


def adding(*weights: float) -> bytes:
    node = helper.make_node("Add", ["x", "one"], ["y"])
    return model([node], {"x": (TensorProto.FLOAT, ["n"])}, {"y": (TensorProto.FLOAT, ["n"])}, 23, weights or (1,))


def scattering() -> bytes:
    node = helper.make_node("TensorScatter", ["past", "new", "start"], ["present"], axis=-2)
    inputs = {
        "past": (TensorProto.FLOAT, [1, 1, 8, 4]),
        "new": (TensorProto.FLOAT, [1, 1, 2, 4]),
        "start": (TensorProto.INT64, [1]),
    }
    return model([node], inputs, {"present": (TensorProto.FLOAT, [1, 1, 8, 4])}, 24)


@pytest.fixture
def context(cuda: Cuda) -> Context:
    return Context(cuda)


def test_work_runs_when_the_host_waits_and_not_before(cuda: Cuda, context: Context) -> None:
    _, out = context.bind()
    assert context.run()
    found = cuda.download(out, np.empty(3, np.float32))
    assert np.isnan(found).all()
    cuda.wait()
    assert found.tolist() == [1, 2, 3]


def test_an_upload_needs_its_array_until_it_has_run(cuda: Cuda, caught: Any) -> None:
    cuda.upload(np.arange(9))
    with pytest.raises(caught, match="the host's array was freed before the copy ran"):
        cuda.wait()


def test_an_upload_needs_its_array_unchanged_until_it_has_run(cuda: Cuda, caught: Any) -> None:
    array = np.arange(9)
    cuda.upload(array)
    array[3] = 7
    with pytest.raises(caught, match="the host's bytes were changed before the copy ran"):
        cuda.wait()


def test_an_event_says_when_page_locked_memory_may_be_used_again(cuda: Cuda) -> None:
    address = int(cuda("cudaHostAlloc", 64, 0))
    array = np.frombuffer(memoryview((ctypes.c_uint8 * 64).from_address(address)).cast("B"), np.int64)
    array[:], event = 5, cuda("cudaEventCreate")
    there = cuda.upload(array)
    cuda("cudaEventRecord", event, cuda.stream)
    with pytest.raises(OSError, match="cudaErrorNotReady"):
        cuda("cudaEventQuery", event)
    cuda("cudaEventSynchronize", event)
    array[:] = 6
    found = cuda.download(there, array)
    cuda.wait()
    assert found.tolist() == [5] * 8


def test_memory_is_used_inside_of_what_was_allocated(cuda: Cuda, caught: Any) -> None:
    address = int(cuda("cudaMallocAsync", 16, cuda.stream))
    for wrong, why in ((address + 8, "goes 8 bytes beyond an allocation of 16"), (address + 4096, "no memory of the")):
        with pytest.raises(caught, match=why):
            cuda("cudaMemsetAsync", wrong, 0, 16, cuda.stream)


def test_memory_is_not_used_after_it_was_freed(cuda: Cuda, caught: Any) -> None:
    address = int(cuda("cudaMallocAsync", 16, cuda.stream))
    cuda("cudaFreeAsync", address, cuda.stream)
    with pytest.raises(caught, match="uses memory that was freed"):
        cuda("cudaMemsetAsync", address, 0, 16, cuda.stream)


def test_what_nobody_wrote_is_not_read(cuda: Cuda, context: Context, caught: Any) -> None:
    context.bind()
    context.context.set_tensor_address("x", int(cuda("cudaMallocAsync", 12, cuda.stream)))
    assert context.run()
    with pytest.raises(caught, match="a run of small: x reads float32 where nothing was written"):
        cuda.wait()


def test_what_was_written_as_one_type_is_not_read_as_another(cuda: Cuda, context: Context, caught: Any) -> None:
    context.bind()
    numbers = np.arange(3, dtype=np.int32)
    context.context.set_tensor_address("x", cuda.upload(numbers))
    assert context.run()
    with pytest.raises(caught, match="x reads float32 where int32 was written"):
        cuda.wait()


def test_an_output_needs_room(cuda: Cuda, context: Context, caught: Any) -> None:
    context.bind()
    context.context.set_tensor_address("y", int(cuda("cudaMallocAsync", 8, cuda.stream)))
    with pytest.raises(caught, match="y goes 4 bytes beyond an allocation of 8"):
        context.run()


def test_an_output_does_not_lie_on_an_input(context: Context, caught: Any) -> None:
    source, _ = context.bind()
    context.context.set_tensor_address("y", source)
    with pytest.raises(caught, match="y overlaps x"):
        context.run()


def test_a_host_pointer_is_no_device_memory(context: Context, caught: Any) -> None:
    context.bind()
    array = np.zeros(256, np.float32)
    context.context.set_tensor_address("x", -(-array.ctypes.data // 256) * 256)
    with pytest.raises(caught, match="is no memory of the device"):
        context.run()


def test_memory_runs_out(gpu: Any, cuda: Cuda) -> None:
    with pytest.raises(OSError, match="cudaErrorMemoryAllocation"):
        cuda("cudaMallocAsync", gpu.memory.total + 1, cuda.stream)


def test_a_shape_beyond_the_profile_is_refused(context: Context) -> None:
    for size, bound in ((9, "maximum dimension in profile is 8"), (0, "minimum dimension in profile is 1")):
        assert not context.context.set_input_shape("x", (size,))
        assert bound in context.said[-1]


def test_shapes_and_addresses_come_before_a_run(context: Context) -> None:
    assert not context.run()
    assert "shapes are not set: x" in context.said[-1]
    assert context.context.set_input_shape("x", (3,))
    assert not context.run()
    assert "addresses are not set: x, y" in context.said[-1]


def test_another_profile_needs_its_shapes_again(cuda: Cuda, context: Context) -> None:
    context.bind()
    assert context.context.set_optimization_profile_async(0, cuda.stream)
    assert not context.run()
    assert "shapes are not set: x" in context.said[-1]


def test_a_run_sees_an_earlier_error_that_nobody_cleared(cuda: Cuda, context: Context) -> None:
    context.bind()
    with pytest.raises(OSError, match="cudaErrorInvalidDevice"):
        cuda("cudaSetDevice", 5)
    assert not context.run()
    assert "cudaErrorInvalidDevice, which was there before" in context.said[-1]
    with pytest.raises(OSError, match="cudaErrorInvalidDevice"):
        cuda("cudaGetLastError")
    assert context.run()


def test_a_recording_runs_when_it_is_launched(gpu: Any, cuda: Cuda, context: Context) -> None:
    source, out = context.bind()
    assert context.run()
    cuda.begin()
    assert context.run()
    graph = cuda.end()
    other = np.full(3, 9, np.float32)
    cuda("cudaMemcpyAsync", source, other.ctypes.data, 12, cuda.up, cuda.stream)
    cuda("cudaGraphLaunch", graph, cuda.stream)
    found = cuda.download(out, other)
    cuda.wait()
    assert found.tolist() == [10, 10, 10]
    assert (gpu.counts["captures"], gpu.counts["launches"], gpu.counts["runs"]) == (1, 1, 2)


def test_the_first_run_of_new_shapes_is_not_recorded(cuda: Cuda, context: Context) -> None:
    context.bind()
    cuda.begin()
    assert not context.run()
    assert "the first run after shapes changed cannot be captured" in context.said[-1]
    with pytest.raises(OSError, match="cudaErrorStreamCaptureInvalidated"):
        cuda.end()


@pytest.mark.parametrize(
    "call", ["cudaMallocAsync", "cudaMalloc", "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaMemcpyAsync"]
)
def test_nothing_is_allocated_awaited_or_copied_from_pageable_memory_while_recording(call: str, cuda: Cuda) -> None:
    array = np.arange(4)
    address = int(cuda("cudaMallocAsync", array.nbytes, cuda.stream))
    arguments = {
        "cudaMallocAsync": (16, cuda.stream),
        "cudaMalloc": (16,),
        "cudaStreamSynchronize": (cuda.stream,),
        "cudaDeviceSynchronize": (),
        "cudaMemcpyAsync": (address, array.ctypes.data, array.nbytes, cuda.up, cuda.stream),
    }
    cuda.begin()
    with pytest.raises(OSError, match="cudaErrorStreamCaptureUnsupported"):
        cuda(call, *arguments[call])
    with pytest.raises(OSError, match="cudaErrorStreamCaptureInvalidated"):
        cuda.end()


def test_a_recording_holds_for_its_contexts_state_alone(cuda: Cuda, context: Context, caught: Any) -> None:
    context.bind()
    assert context.run()
    cuda.begin()
    assert context.run()
    graph = cuda.end()
    context.bind(size=4)
    with pytest.raises(caught, match="was recorded before its context changed"):
        cuda("cudaGraphLaunch", graph, cuda.stream)


def test_a_context_is_one_threads_from_its_first_shape_to_its_run(context: Context, caught: Any) -> None:
    context.bind()
    seen: list[BaseException] = []

    def interfere() -> None:
        try:
            context.context.set_input_shape("x", (2,))
        except caught as error:
            seen.append(error)

    for ready in (False, True):
        thread = threading.Thread(target=interfere)
        thread.start()
        thread.join()
        assert bool(seen) is not ready
        seen.clear()
        if not ready:
            assert context.run()


def test_a_context_without_memory_of_its_own_is_given_enough(cuda: Cuda, caught: Any) -> None:
    context = Context(cuda, strategy="USER_MANAGED")
    context.bind()
    needed = context.engine.device_memory_size_v2
    with pytest.raises(caught, match=f"needs {needed} bytes of device memory, and was given None"):
        context.run()
    context.context.set_device_memory(int(cuda("cudaMallocAsync", needed, cuda.stream)), needed)
    assert context.run()
    cuda.wait()


def test_a_cache_is_written_in_place_and_nowhere_else(gpu: Any, cuda: Cuda) -> None:
    context = Context(cuda, cache=True)
    assert context.engine.get_aliased_input_tensor("present") == "past"
    arrays = {
        "past": np.zeros((1, 1, 8, 4), np.float32),
        "new": np.ones((1, 1, 2, 4), np.float32),
        "start": np.array([3]),
    }
    addresses = {name: cuda.upload(array) for name, array in arrays.items()}
    for name, address in addresses.items():
        context.context.set_tensor_address(name, address)
    context.context.set_tensor_address("present", cuda.upload(arrays["past"]))
    assert not context.run()
    assert "present is written in place: its address must be that of past" in context.said[-1]
    context.context.set_tensor_address("present", addresses["past"])
    assert context.run()
    found = cuda.download(addresses["past"], arrays["past"])
    cuda.wait()
    assert np.flatnonzero(found.any(axis=(0, 1, 3))).tolist() == [3, 4]
    assert gpu.counts["cache_bytes"] == arrays["new"].nbytes


def test_what_is_counted_can_be_told_apart(gpu: Any, cuda: Cuda) -> None:
    array = np.arange(4)
    with gpu.label("one") as counts:
        cuda.upload(array)
        cuda.wait()
    cuda.upload(array)
    cuda.wait()
    assert counts == {
        "allocations": 1,
        "allocated_bytes": 32,
        "h2d_pageable_copies": 1,
        "h2d_pageable_bytes": 32,
        "synchronisations": 1,
    }
    assert gpu.counts == {name: 2 * count for name, count in counts.items()}


def test_a_network_that_tensorrt_does_not_read_is_refused(context: Context) -> None:
    nodes = {
        "MatMulNBits": helper.make_node("MatMulNBits", ["x"], ["y"], domain="com.microsoft"),
        "TensorScatter": helper.make_node("TensorScatter", ["x", "x"], ["y"]),
    }
    inputs = {"x": (TensorProto.FLOAT, [1, 1, "slots", 4])}
    for operator, node in nodes.items():
        network = context.trt.Builder(context.log).create_network(
            1 << int(context.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        )
        parser = context.trt.OnnxParser(network, context.log)
        assert not parser.parse(model([node], inputs, {"y": inputs["x"]}, 24))
        assert parser.get_error(0).node_operator() == operator


@pytest.fixture
def stripped(cuda: Cuda) -> Context:
    """The engine without its one weight, and a place for input and output."""
    context = Context(cuda, flags=("STRIP_PLAN",))
    context.bind()
    return context


def refitters(context: Context) -> tuple[Any, Any]:
    refitter = context.trt.Refitter(context.engine, context.log)
    return refitter, context.trt.OnnxParserRefitter(refitter, context.log)


def result(context: Context) -> list[float]:
    assert context.run()
    found = context.cuda.download(context.context.get_tensor_address("y"), np.empty(3, np.float32))
    context.cuda.wait()
    return [float(each) for each in found]


def test_a_stripped_engine_is_filled_by_its_graph_with_all_that_it_lacks(stripped: Context, context: Context) -> None:
    one = np.float32(1).tobytes()
    assert (one in context.plan(), one in context.plan(flags=("STRIP_PLAN",))) == (True, False)
    refitter, parser = refitters(stripped)
    assert refitter.get_all_weights() == refitter.get_missing_weights() == ["one"]
    assert not refitter.refit_cuda_engine()
    assert "1 weights are missing: one" in stripped.said[-1]
    assert parser.refit_from_bytes(adding())
    assert refitter.get_missing_weights() == []
    assert refitter.refit_cuda_engine()
    assert result(stripped) == [1, 2, 3]


def test_a_stripped_engine_that_was_not_filled_does_not_run(stripped: Context, caught: Any) -> None:
    with pytest.raises(caught, match="a run of small, which was never filled with 1 weights"):
        stripped.run()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (scattering().replace(b"one", b"two"), "Only successfully refitted 0 weights out of 1"),
        (adding(1, 1), "Failed to set named weights: one"),
        (b"no graph", "Failed to import"),
    ],
    ids=["another name", "another shape", "no graph"],
)
def test_a_graph_without_the_weights_fills_nothing(content: bytes, why: str, stripped: Context, tmp_path: Path) -> None:
    refitter, parser = refitters(stripped)
    assert not parser.refit_from_bytes(content)
    assert why in stripped.said[-1]
    (tmp_path / "graph.onnx").write_bytes(content)
    assert not parser.refit_from_file(str(tmp_path / "graph.onnx"))
    assert not parser.refit_from_file(str(tmp_path / "missing.onnx"))
    assert not refitter.refit_cuda_engine()


def test_other_weights_are_for_engines_that_are_built_for_others(cuda: Cuda, stripped: Context, caught: Any) -> None:
    for context in (Context(cuda, flags=("REFIT",)), Context(cuda, flags=("REFIT", "STRIP_PLAN"))):
        context.bind()
        refitter, parser = refitters(context)
        assert parser.refit_from_bytes(adding(5))
        assert refitter.refit_cuda_engine()
        assert result(context) == [5, 6, 7]
    refitter, parser = refitters(stripped)
    assert parser.refit_from_bytes(adding(5))
    with pytest.raises(caught, match="a refit of small by another one than it was built with"):
        refitter.refit_cuda_engine()


def test_an_engine_that_was_not_built_to_be_filled_is_not(context: Context) -> None:
    with pytest.raises(TypeError, match="nullptr"):
        refitters(context)
    assert "not built with a flag for refitting" in context.said[-1]


def test_an_engine_is_not_filled_while_it_runs(cuda: Cuda, caught: Any) -> None:
    context = Context(cuda, flags=("REFIT",))
    context.bind()
    refitter, parser = refitters(context)
    assert context.run()
    assert parser.refit_from_bytes(adding())
    with pytest.raises(caught, match="1 runs are still queued"):
        refitter.refit_cuda_engine()
    cuda.wait()
    assert refitter.refit_cuda_engine()


def test_weights_are_read_from_a_graph_that_is_still_there(stripped: Context, caught: Any) -> None:
    refitter, parser = refitters(stripped)
    assert parser.refit_from_bytes(adding())
    del parser
    with pytest.raises(caught, match="weights that went with their OnnxParserRefitter"):
        refitter.refit_cuda_engine()


def test_a_plan_is_of_one_release_unless_it_brings_code_that_it_is_let_to_run(plug_in: PlugIn) -> None:
    def loaded(version: str, plan: bytes, *, trusted: bool) -> str | None:
        """Load a plan; return why it was refused."""
        with plug_in(version=version):
            context = Context(Cuda())
            runtime = context.trt.Runtime(context.log)
            runtime.engine_host_code_allowed = trusted
            return None if runtime.deserialize_cuda_engine(plan) is not None else context.said[-1]

    plans = {}
    for version in ("10.16.1", "10.17.0"):
        with plug_in(version=version):
            context = Context(Cuda())
            plans[version] = context.plan(), context.plan(flags=("VERSION_COMPATIBLE",))
    plain, lasting = plans["10.16.1"]
    assert loaded("10.16.1", plain, trusted=False) is None
    for version in plans:
        assert "engine_host_code_allowed is not set" in str(loaded(version, lasting, trusted=False))
        assert loaded(version, lasting, trusted=True) is None
    other = {("10.17.0", plain), *(("10.16.1", plan) for plan in plans["10.17.0"])}
    assert all("the plan is of TensorRT" in str(loaded(version, plan, trusted=True)) for version, plan in other)


def test_an_attention_has_a_mask_or_a_causal_kind_and_lengths_in_int32(plug_in: PlugIn) -> None:
    heads = TensorProto.FLOAT, [2, 1, 4, 8]
    inputs = {**dict.fromkeys("qkv", heads), "mask": (TensorProto.FLOAT, [4, 4]), "long": (TensorProto.INT64, [2])}

    def refusal(masks: list[str], counts: str | None) -> str:
        node = helper.make_node("Attention", [*"qkv", *masks], ["y"], name="attention")
        with plug_in(version="11.4.0"):
            context = Context(Cuda())
            trt, builder = context.trt, context.trt.Builder(context.log)
            network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
            assert trt.OnnxParser(network, context.log).parse(model([node], inputs, {"y": heads}, 24))
            layer = network.get_layer(0)
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True
            layer.attention.causal_kind = trt.CausalMaskKind.LOWER_RIGHT
            if counts is not None:
                long = network.get_input(4)
                short = network.add_cast(long, trt.DataType.INT32).get_output(0)
                layer.attention.key_value_lengths = {"INT64": long, "INT32": short}[counts]
            built = builder.build_serialized_network(network, builder.create_builder_config())
            return "" if built is not None else context.said[-1]

    assert refusal([], "INT32") == refusal([], None) == ""
    assert "key_value_lengths must be of INT32, not of INT64" in refusal([], "INT64")
    assert "a mask and a causal kind cannot be set together" in refusal(["mask"], "INT32")


@pytest.fixture
def pair(plug_in: PlugIn) -> Iterator[Any]:
    """Two fake GPUs, used wrongly."""
    with plug_in(devices=2) as gpus:
        yield gpus
        gpus.misuses.clear()


def test_what_a_thread_makes_is_of_the_device_that_is_current_in_it(pair: Any) -> None:
    cuda = Cuda()
    assert (cuda("cudaGetDeviceCount"), cuda("cudaGetDevice")) == (2, 0)
    cuda("cudaSetDevice", 1)
    Cuda()("cudaMalloc", 64)
    assert [memory.used for memory in pair.memories] == [0, 64]
    others: list[int] = []
    thread = threading.Thread(target=lambda: others.append(cuda("cudaGetDevice")))
    thread.start()
    thread.join()
    assert (others, cuda("cudaGetDevice")) == ([0], 1)
    with pytest.raises(OSError, match="cudaErrorInvalidDevice"):
        cuda("cudaSetDevice", 2)


def test_work_for_a_device_that_is_not_current_is_refused(pair: Any) -> None:
    cuda = Cuda()
    address, event = int(cuda("cudaMallocAsync", 32, cuda.stream)), cuda("cudaEventCreate")
    cuda("cudaSetDevice", 1)
    there = Cuda()
    calls = {
        "cudaMemsetAsync": (address, 0, 4, cuda.stream),
        "cudaMallocAsync": (4, cuda.stream),
        "cudaEventRecord": (event, there.stream),  # of two devices
    }
    for call, arguments in calls.items():
        with pytest.raises(OSError, match="cudaErrorInvalidResourceHandle"):
            cuda(call, *arguments)
    with pytest.raises(import_module("fakegpu").MisuseError, match="a memset on device 1 uses memory of device 0"):
        there("cudaMemsetAsync", address, 0, 4, there.stream)
    cuda("cudaFreeAsync", address, cuda.stream)
    cuda.wait()
    assert pair.memories[0].used == 0


@pytest.mark.usefixtures("pair")
def test_an_engine_runs_on_the_device_that_it_was_loaded_on() -> None:
    caught = import_module("fakegpu").MisuseError
    context = Context(Cuda(), flags=("REFIT",))
    context.bind()
    refitter, _ = refitters(context)
    Cuda()("cudaSetDevice", 1)
    there = Cuda()
    assert not context.run()
    assert "cudaErrorInvalidResourceHandle" in context.said[-1]
    for call in (
        lambda: context.context.execute_async_v3(there.stream),
        context.engine.create_execution_context,
        refitter.refit_cuda_engine,
    ):
        with pytest.raises(caught, match="of small, which is on device 0, on device 1"):
            call()
    other = Context(there)
    other.bind()
    other.context.set_tensor_address("x", context.context.get_tensor_address("x"))
    with pytest.raises(caught, match="a run of small: x on device 1 uses memory of device 0"):
        other.run()


def offered(trt: Any) -> Iterator[tuple[str, str]]:
    """Yield every class of the fake with every name that it has."""
    for name, value in vars(trt).items():
        if isinstance(value, type):
            for kind in value.__mro__:
                if kind.__module__.split(".")[0] == "tensorrt":
                    yield from ((name, member) for member in vars(kind) if not member.startswith("_"))
            yield name, ""


@pytest.mark.parametrize("version", ["10.16.1", "11.4.0"])
def test_it_offers_nothing_that_tensorrt_does_not(version: str, plug_in: PlugIn) -> None:
    real: dict[str, list[str]] = json.loads((LISTS / f"api_tensorrt_{version}.json").read_text())
    with plug_in(version=version):
        found = set(offered(import_module("tensorrt")))
    assert len(found) > 60
    assert [(kind, name) for kind, name in found if kind not in real or (name and name not in real[kind])] == []


def parameters(text: str) -> list[str]:
    """Return the names of a signature's parameters, as a docstring begins with it."""
    inside = text.split("\n")[0].partition("(")[2].rpartition(")")[0]
    inside = re.sub(r"\[.*?\]", "", inside)
    names = [re.split(r"[:=]", part)[0].split()[-1] for part in inside.split(",") if part.strip()]
    return [name for name in names if name != "self"]


def test_functions_of_cuda_take_what_the_real_ones_take(cuda: Cuda) -> None:
    fake = import_module("fakegpu.runtime").Runtime
    functions = {name: each for name, each in vars(fake).items() if name.startswith("cuda")}
    assert len(functions) > 40
    for name, function in functions.items():
        ours = [each for each in inspect.signature(function).parameters if each != "self"]
        assert ours == parameters(getattr(cuda.runtime, name).__doc__), name


def test_methods_of_tensorrt_take_what_those_of_tensorrt_for_rtx_take(context: Context) -> None:
    rtx = pytest.importorskip("tensorrt_rtx", reason="needs TensorRT for RTX: pip install 'mmemb-deploy[rtx]'")
    checked = 0
    for kind, name in set(offered(context.trt)):
        real, ours = getattr(getattr(rtx, kind), name, None), getattr(getattr(context.trt, kind), name, None)
        if inspect.isfunction(ours) and real is not None and "Overloaded" not in (real.__doc__ or "Overloaded"):
            assert list(inspect.signature(ours).parameters)[1:] == parameters(real.__doc__), (kind, name)
            checked += 1
    assert checked > 25


def test_arguments_of_a_wrong_type_are_refused_by_the_binding_itself(cuda: Cuda) -> None:
    with pytest.raises(TypeError):
        cuda("cudaMemsetAsync", "an address", 0, 4, cuda.stream)
