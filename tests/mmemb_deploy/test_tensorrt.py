"""What the TensorRT backend says where it cannot run, and how it runs where it can.

Most of it is checked without a GPU: the probe of the driver, the engines' listing, the choice of a profile, and what
is recorded as a CUDA graph. The tests marked `gpu` build the embedded bundle and run it.
"""

import ast
import ctypes
import hashlib
import inspect
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmemb_deploy import Embedder
from mmemb_deploy.backends.cuda import DRIVER, Cuda, Gpu, probe
from mmemb_deploy.backends.device import Wanted
from mmemb_deploy.backends.tensorrt.api import Library, load_library
from mmemb_deploy.backends.tensorrt.backend import TensorRT, check_types
from mmemb_deploy.backends.tensorrt.engine import Arena, LoadedEngine, Stored, choose_profile
from mmemb_deploy.backends.tensorrt.files import (
    ENGINES,
    Built,
    EngineSet,
    ProfileShapes,
    find_set,
    graph_hash,
    read_engine,
    write_set,
)
from mmemb_deploy.backends.tensorrt.options import BuildOptions
from mmemb_deploy.bundle import abi
from mmemb_deploy.bundle.certificate import Bounds, Certificate, Parity
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.bundle.manifest import GraphFacts, Manifest
from mmemb_deploy.errors import BackendError, OptionError

CERTIFICATE = Certificate(
    reference="transformers",
    runtime="tensorrt",
    modalities={"text": Parity(inputs=8, min_cosine=1, mean_cosine=1, gate_flips=0)},
    reasoned=None,
    token_agreement=1,
    retrieval_overlap=1,
    bounds=Bounds.of(["float32"], 8),
)


class Driver:
    """A driver whose functions return statuses, and which has an H100, or more; `asked` holds the indices asked for."""

    def __init__(self, gpus: int = 1, **statuses: int) -> None:
        self._gpus, self._statuses = gpus, statuses
        self.asked: list[int] = []

    def __getattr__(self, function: str) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            if function == "cuDeviceGetCount":
                ctypes.cast(arguments[0], ctypes.POINTER(ctypes.c_int))[0] = self._gpus
            elif function == "cuDeviceGet":
                self.asked.append(arguments[1])
            elif function == "cuDeviceGetName":
                arguments[0].value = b"NVIDIA H100 80GB HBM3"
            elif function == "cuDeviceGetAttribute":
                ctypes.cast(arguments[0], ctypes.POINTER(ctypes.c_int))[0] = {75: 9, 76: 0}[arguments[1]]
            return self._statuses.get(function, 0)

        return call


def test_a_gpu_is_named_with_its_compute_capability() -> None:
    assert probe(lambda _: Driver()) == Gpu("NVIDIA H100 80GB HBM3", "sm90")


def test_a_gpu_is_taken_by_its_index() -> None:
    driver = Driver(gpus=2)
    assert probe(lambda _: driver, device=1) == Gpu("NVIDIA H100 80GB HBM3", "sm90", 1)
    assert driver.asked == [1]


@pytest.mark.parametrize(("device", "gpus", "seen"), [(2, 2, "2 GPUs"), (-1, 2, "2 GPUs"), (1, 1, "1 GPU")])
def test_an_index_of_no_gpu_is_refused_with_how_many_there_are(device: int, gpus: int, seen: str) -> None:
    with pytest.raises(OptionError, match=f"device is {device}: this process sees {seen}, counted from 0"):
        probe(lambda _: Driver(gpus=gpus), device=device)


def test_no_driver_is_said_before_anything_is_loaded() -> None:
    def load(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    with pytest.raises(BackendError, match=f"no NVIDIA driver here .{DRIVER}.*use the backend 'onnxruntime'"):
        probe(load)


@pytest.mark.parametrize(("function", "status"), [("cuInit", 100), ("cuDeviceGet", 101)])
def test_a_driver_without_a_gpu_is_told_from_none(function: str, status: int) -> None:
    with pytest.raises(BackendError, match=rf"{function} returned {status}; see whether nvidia-smi works"):
        probe(lambda _: Driver(**{function: status}))


@pytest.mark.no_gpu
@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_a_machine_without_a_gpu_gets_an_error_and_not_a_crash(backend: str) -> None:
    with pytest.raises(BackendError, match="NVIDIA driver"):
        Embedder.load(backend=backend)


@pytest.mark.no_gpu
def test_the_cuda_runtime_says_why_it_does_not_start() -> None:
    pytest.importorskip("cuda.bindings", reason="needs cuda-bindings: pip install 'mmemb-deploy[rtx]'")
    with pytest.raises(BackendError, match=r"cudaSetDevice failed: .*\(CUDA error \d+\)"):
        Cuda()


def test_the_cuda_binding_has_every_function_that_is_called() -> None:
    runtime = pytest.importorskip(
        "cuda.bindings.runtime", reason="needs cuda-bindings: pip install 'mmemb-deploy[rtx]'"
    )
    tree = ast.parse(Path(inspect.getfile(Cuda)).read_text(encoding="utf-8"))
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    functions = {text for text in strings if re.fullmatch("cuda[A-Z][A-Za-z0-9]+", text)}
    enumerations = {
        (node.value.attr, node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute) and node.value.attr != "_runtime"
    }
    assert len(functions) >= 14
    assert [name for name in functions if not hasattr(runtime, name)] == []
    used = {(kind, name) for kind, name in enumerations if kind.startswith("cuda")}
    assert len(used) == 6
    assert [pair for pair in used if not hasattr(getattr(runtime, pair[0]), pair[1])] == []


def test_threads_are_refused_beside_a_gpu() -> None:
    with pytest.raises(OptionError, match="threads is 2: it bounds threads of the CPU"):
        Embedder.load(backend="tensorrt", threads=2)


def test_an_unknown_library_is_refused() -> None:
    with pytest.raises(OptionError, match=r"library 'tensorrt-rx' is not known.*did you mean 'tensorrt-rtx'"):
        Library("tensorrt-rx")


@pytest.fixture
def bundle(tmp_path: Path, tiny_bundle: Path) -> Bundle:
    return Bundle.open(Path(shutil.copytree(tiny_bundle, tmp_path / "bundle")))


def built_for(
    content: bytes, file: str = "decoder-0.engine", graph: str = "", profiles: tuple[ProfileShapes, ...] = ({},)
) -> Built:
    """Return what is listed of an engine of some bytes."""
    return Built(
        key="0" * 64,
        file=file,
        sha256=hashlib.sha256(content).hexdigest(),
        graph=graph,
        precision="float32",
        profiles=profiles,
        options=BuildOptions(),
        decomposed=False,
        seconds=1,
        size=len(content),
    )


@pytest.fixture
def engines(bundle: Bundle) -> EngineSet:
    """Engines that nobody could run, for an H100 and TensorRT 11.4."""
    content = b"an engine"
    built = {
        name: built_for(content, f"{name}-0.engine", graph_hash(bundle, graphs[0]))
        for name, graphs in bundle.manifest.engines.items()
    }
    found = EngineSet(
        library="tensorrt",
        version="11.4.0",
        device="NVIDIA H100 80GB HBM3",
        target="sm90",
        engines=built,
        certificate=CERTIFICATE,
    )
    folder = bundle.folder / ENGINES / found.folder
    folder.mkdir(parents=True)
    for engine in built.values():
        (folder / engine.file).write_bytes(content)
    write_set(bundle, found)
    return found


def test_engines_lie_by_library_device_and_version(engines: EngineSet) -> None:
    assert engines.folder == "tensorrt-nvidia-h100-80gb-hbm3-11.4.0"


def test_engines_of_this_gpu_and_version_are_found_and_read(bundle: Bundle, engines: EngineSet) -> None:
    assert find_set(bundle, engines.model_copy(update={"engines": {}})) == engines
    assert bytes(read_engine(bundle, engines, abi.GATE)) == b"an engine"


def test_a_bundle_with_engines_still_opens(bundle: Bundle, engines: EngineSet) -> None:
    assert engines.engines
    Bundle.open(bundle.folder)


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        ({"device": "NVIDIA L4", "target": "sm89"}, r"NVIDIA L4 \(sm89\) with tensorrt 11.4.0"),
        ({"version": "11.5.0"}, r"NVIDIA H100 80GB HBM3 \(sm90\) with tensorrt 11.5.0"),
        ({"library": "tensorrt-rtx"}, r"NVIDIA H100 80GB HBM3 \(sm90\) with tensorrt-rtx 11.4.0"),
    ],
)
def test_another_gpu_or_version_is_named_beside_what_is_there(
    bundle: Bundle, engines: EngineSet, changed: dict[str, str], wanted: str
) -> None:
    there = r"its engines are for NVIDIA H100 80GB HBM3 \(sm90\) with tensorrt 11.4.0; run: mmemb build"
    with pytest.raises(BackendError, match=f"no engines for {wanted}: {there}"):
        find_set(bundle, engines.model_copy(update=changed))


@pytest.mark.parametrize(
    ("device", "gpu", "runs"),
    [
        ("sm90", ("NVIDIA H200", "sm90"), True),
        ("sm90", ("NVIDIA L4", "sm89"), False),
        ("ampere+", ("NVIDIA L4", "sm89"), True),
        ("ampere+", ("NVIDIA B200", "sm100"), True),
        ("ampere+", ("Tesla T4", "sm75"), False),
    ],
)
def test_engines_for_more_than_one_gpu_are_found_on_all_that_run_them(
    bundle: Bundle, engines: EngineSet, device: str, gpu: tuple[str, str], runs: bool
) -> None:
    shared = moved(bundle, engines, device=device)
    wanted = engines.model_copy(update={"device": gpu[0], "target": gpu[1], "engines": {}})
    if runs:
        assert find_set(bundle, wanted) == shared
    else:
        with pytest.raises(BackendError, match=f"no engines for {gpu[0]}"):
            find_set(bundle, wanted)


def test_engines_for_this_very_gpu_come_first(bundle: Bundle, engines: EngineSet) -> None:
    other = engines.model_copy(update={"device": "ampere+"})
    (bundle.folder / ENGINES / other.folder).mkdir()
    write_set(bundle, other)
    assert find_set(bundle, engines) == engines


@pytest.mark.parametrize(("version", "runs"), [("11.5.2", True), ("11.3.0", False), ("12.0.0", False)])
def test_later_releases_of_a_major_version_run_compatible_engines(
    bundle: Bundle, engines: EngineSet, version: str, runs: bool
) -> None:
    wanted = engines.model_copy(update={"version": version})
    with pytest.raises(BackendError, match="no engines for"):
        find_set(bundle, wanted)
    compatible = BuildOptions(version_compatible=True)
    lasting = {name: each.model_copy(update={"options": compatible}) for name, each in engines.engines.items()}
    write_set(bundle, found := engines.model_copy(update={"engines": lasting}))
    if runs:
        assert find_set(bundle, wanted) == found
    else:
        with pytest.raises(BackendError, match="no engines for"):
            find_set(bundle, wanted)


def moved(bundle: Bundle, engines: EngineSet, device: str) -> EngineSet:
    """Make a set that of another device."""
    folder = bundle.folder / ENGINES
    other = engines.model_copy(update={"device": device})
    (folder / engines.folder).rename(folder / other.folder)
    write_set(bundle, other)
    return other


def test_a_bundle_without_engines_says_how_to_build_them(bundle: Bundle) -> None:
    wanted = EngineSet(library="tensorrt", version="11.4.0", device="NVIDIA L4", target="sm89", engines={})
    with pytest.raises(BackendError, match=r"it has none; run: mmemb build .*bundle --library tensorrt"):
        find_set(bundle, wanted)


def test_engines_of_other_weights_are_not_loaded(bundle: Bundle, engines: EngineSet) -> None:
    files = bundle.manifest.files | {"vision.onnx.data": "0" * 64}
    other = Bundle(bundle.folder, bundle.manifest.model_copy(update={"files": files}))
    with pytest.raises(BackendError, match="the graph vision has changed since its engine was built"):
        find_set(other, engines)


def test_the_hash_of_a_graph_covers_the_weight_files_it_reads_and_no_others(bundle: Bundle) -> None:
    files = bundle.manifest.files | {"decoder.onnx.data": "0" * 64}
    other = Bundle(bundle.folder, bundle.manifest.model_copy(update={"files": files}))
    changed = {name for name in abi.GRAPHS if graph_hash(bundle, name) != graph_hash(other, name)}
    assert changed == {abi.DIRECT, abi.EMBEDDER, abi.GENERATOR}


def test_an_engine_that_is_missing_or_changed_is_not_loaded(bundle: Bundle, engines: EngineSet) -> None:
    path = bundle.folder / ENGINES / engines.folder / engines.engines[abi.GATE].file
    path.write_bytes(b"another engine")
    with pytest.raises(BackendError, match=r"gate-0.engine was changed: run: mmemb build"):
        read_engine(bundle, engines, abi.GATE)
    path.unlink()
    with pytest.raises(BackendError, match=r"gate-0.engine is missing: run: mmemb build"):
        read_engine(bundle, engines, abi.GATE)


def test_a_listing_that_cannot_be_read_is_named(bundle: Bundle, engines: EngineSet) -> None:
    (bundle.folder / ENGINES / engines.folder / "engines.json").write_text('{"library": "tensorrt"}')
    with pytest.raises(BackendError, match=r"engines.json: version: Field required; delete .* and build it again"):
        find_set(bundle, engines)


def test_floats_that_would_be_misread_are_refused_but_a_cache_may_be_half(bundle: Bundle) -> None:
    def with_type(name: str) -> Manifest:
        graph = bundle.manifest.graphs[abi.EMBEDDER]
        outputs = tuple(
            each.model_copy(update={"dtype": "bfloat16"}) if each.name == name else each for each in graph.outputs
        )
        changed = bundle.manifest.graphs | {abi.EMBEDDER: graph.model_copy(update={"outputs": outputs})}
        return bundle.manifest.model_copy(update={"graphs": changed})

    check_types(with_type("present.0.key"))
    with pytest.raises(BackendError, match="the graph embedder holds state as bfloat16, which is not one of float32"):
        check_types(with_type(abi.STATE))


def box(*most: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    return (1,) * len(most), most, most


PROFILES = ({abi.TOKEN_IDS: box(8, 100)}, {abi.TOKEN_IDS: box(2, 400)})
ONE = {abi.TOKEN_IDS: box(1, 100)}


@pytest.mark.parametrize(
    ("shape", "index"), [((8, 100), 0), ((3, 1), 0), ((2, 101), 1), ((1, 400), 1), ((1, 1), 2), ((1, 101), 1)]
)
def test_the_tightest_profile_that_holds_the_shapes_is_used(shape: tuple[int, ...], index: int) -> None:
    assert choose_profile("decoder.onnx", [*PROFILES, ONE], {abi.TOKEN_IDS: shape}) == index


@pytest.mark.parametrize("shape", [(3, 101), (9, 1), (1, 401), (0, 1)])
def test_shapes_beyond_all_profiles_are_named_with_the_bounds(shape: tuple[int, ...]) -> None:
    message = (
        rf"engine of decoder.onnx takes token_ids of at most \(8, 100\) or \(2, 400\), not \({shape[0]}, {shape[1]}\)"
    )
    with pytest.raises(BackendError, match=message):
        choose_profile("decoder.onnx", PROFILES, {abi.TOKEN_IDS: shape})


class Recorder:
    """A library, a stream, an engine, its contexts and its memory, which note what they are asked to do."""

    def __init__(self, free: int = 1 << 30) -> None:
        self.notes: list[str] = []
        self.stream, self.log, self.errors, self._free = 7, None, list[str](), free
        self.trt = self.ExecutionContextAllocationStrategy = self.ProfilingVerbosity = self
        self.USER_MANAGED, self.NONE, self.nvtx_verbosity = 2, 0, 1
        self.address, self.recording, self.name = 4096, False, "tensorrt"

    def Runtime(self, log: Any) -> Any:  # noqa: N802 - the library's own name, as those below
        assert log is self.log
        return self

    def deserialize_cuda_engine(self, plan: bytes) -> Any:
        assert plan == b"plan"
        return self

    def free_bytes(self) -> int:
        return self._free

    def check_memory(self, needed: int, what: str) -> None:
        Cuda.check_memory(self, needed, what)  # type: ignore[arg-type]

    def allocate(self, nbytes: int) -> Any:
        self.notes.append(f"arena of {nbytes}")
        return self

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return 1 << (20 + profile)

    def create_execution_context(self, strategy: int) -> Any:
        assert strategy == self.USER_MANAGED
        self.notes.append("context")
        return self

    def set_device_memory(self, address: int, nbytes: int) -> None:
        self.notes.append(f"memory {address} of {nbytes}")

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.notes.append(f"profile {profile} on {stream}")
        return True

    def set_input_shape(self, name: str, shape: Any) -> bool:
        self.notes.append(f"bind {name} {shape}")
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.notes.append(f"{name} {address}")
        return True

    def execute_async_v3(self, stream: int) -> bool:
        self.notes.append(f"enqueue on {stream}")
        return True


def engine_on(recorder: Recorder) -> LoadedEngine:
    device: Any = recorder
    facts = GraphFacts(
        file="decoder.onnx", precision="float32", form="portable", compute="float32", inputs=(), outputs=()
    )
    built = built_for(b"plan", profiles=PROFILES)
    stored = Stored(facts, built, memoryview(b"plan"), Path("none.kernels"), None, Path("decoder.onnx"))
    return LoadedEngine(device, device, stored, Arena(device))


ARENA = ["context", "memory 4096 of 2097152"]  # of the larger profile


def test_runs_that_come_once_share_their_profiles_context() -> None:
    recorder = Recorder()
    engine = engine_on(recorder)
    for shape in ((2, 1), (3, 1)):
        engine.bind({abi.TOKEN_IDS: shape}, {"at": 5})()
    assert recorder.notes == [
        *["context", "arena of 2097152", "memory 4096 of 2097152", "profile 0 on 7"],
        *["bind token_ids (2, 1)", "at 5", "enqueue on 7", "bind token_ids (3, 1)", "at 5", "enqueue on 7"],
    ]


def test_a_run_that_starts_again_has_a_context_of_its_own_over_the_same_arena() -> None:
    recorder = Recorder()
    engine = engine_on(recorder)
    first = engine.bind({abi.TOKEN_IDS: (2, 1)}, {"at": 5}, again=True)
    engine.bind({abi.TOKEN_IDS: (3, 1)}, {"at": 5})()
    recorder.notes.clear()
    first()
    first()
    assert recorder.notes == ["enqueue on 7"] * 2
    engine.bind({abi.TOKEN_IDS: (2, 1)}, {"at": 6}, again=True)
    assert recorder.notes[2:4] == ARENA


def test_too_little_memory_for_the_arena_is_said_with_both_numbers() -> None:
    engine = engine_on(Recorder(free=3 << 19))
    message = r"the engines' activation arena needs 2 MiB of GPU memory, and 2 MiB are free"
    with pytest.raises(BackendError, match=message):
        engine.bind({abi.TOKEN_IDS: (8, 100)}, {"at": 5})


@pytest.mark.gpu
def test_engines_built_here_agree_with_onnx_runtime(bundle: Bundle, mixed_inputs: list[Any]) -> None:
    """With the tests of `mmemb_engines` for the build itself."""
    pytest.importorskip("tensorrt", reason="needs TensorRT: pip install 'mmemb-deploy[tensorrt]'")
    from mmemb_deploy.evaluation.parity import reference_of
    from mmemb_engines.build import build_engines, device_sets
    from mmemb_engines.profiles import demand_of_limits
    from mmemb_engines.verify import verify_engines
    from mmemb_engines.watch import Silent

    library, devices = device_sets(bundle, "tensorrt", (), BuildOptions())
    assert library is load_library("tensorrt")
    demand = demand_of_limits(bundle.manifest, 8)
    built = build_engines(bundle, library, devices[0], demand, BuildOptions(), lambda _: Silent())
    with pytest.raises(BackendError, match="were never checked on this GPU"):
        TensorRT("tensorrt").load(bundle)
    certificate = verify_engines(bundle, built, reference_of(bundle)).certificate
    assert certificate is not None
    assert all(parity.min_cosine > 0.9999 for parity in certificate.parities.values())
    for reasoning in ("never", "always"):
        ours, theirs = (
            Embedder.of_bundle(bundle, backend=backend).encode(mixed_inputs, reasoning=reasoning, batch_size=8)
            for backend in ("tensorrt", "onnxruntime")
        )
        assert np.allclose(ours, theirs, atol=1e-3)


@pytest.mark.gpu
def test_device_memory_is_given_back() -> None:
    pytest.importorskip("cuda.bindings", reason="needs cuda-bindings")
    probe()
    cuda = Cuda()
    memory = cuda.allocate(1 << 20)
    array = np.arange(1 << 18, dtype=np.int32)
    cuda.upload(array, memory.address)
    assert np.array_equal(cuda.download([Wanted(memory.address, array.shape, array.dtype)])[0], array)
    address = memory.address
    del memory
    assert cuda.allocate(1 << 20).address == address
