"""ONNX graphs to plans: the parser, the network as far as one may look at it, and the builder."""

# What the classes share is private, since the real ones show nothing of it.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper, shape_inference

from fakegpu import machine
from fakegpu.graphs import Graph, read_model
from tensorrt.api import API, VERSION, Strict, enumeration, listed
from tensorrt.log import ILogger, report
from tensorrt.refit import REFITTABLE, strip

MAGIC = b"FAKE"
MASK, LENGTHS = 3, 6  # which inputs of Attention mask, and say how many keys and values of a row there are
BuilderFlag = enumeration("BuilderFlag")
CausalMaskKind: Any = enumeration("CausalMaskKind") if "CausalMaskKind" in API else None
DataType = enumeration("DataType")
HardwareCompatibilityLevel = enumeration("HardwareCompatibilityLevel")
LayerType = enumeration("LayerType")
MemoryPoolType = enumeration("MemoryPoolType")
NetworkDefinitionCreationFlag = enumeration("NetworkDefinitionCreationFlag")
ProfilingVerbosity = enumeration("ProfilingVerbosity")
TYPES: dict[int, str] = {
    TensorProto.FLOAT: "FLOAT",
    TensorProto.FLOAT16: "HALF",
    TensorProto.BFLOAT16: "BF16",
    TensorProto.INT8: "INT8",
    TensorProto.UINT8: "UINT8",
    TensorProto.INT32: "INT32",
    TensorProto.INT64: "INT64",
    TensorProto.BOOL: "BOOL",
    TensorProto.FLOAT8E4M3FN: "FP8",
    TensorProto.INT4: "INT4",
}
Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def type_of(elem_type: int) -> Any:
    """Return TensorRT's name of an ONNX type."""
    return DataType[TYPES[elem_type]]


@listed
class ITensor(Strict):
    """A tensor of a network."""

    def __init__(self, name: str, elem_type: int, shape: tuple[int, ...]) -> None:
        self._name, self._elem_type, self._shape = name, elem_type, shape

    @property
    def name(self) -> str:
        return self._name

    @property
    def dtype(self) -> Any:
        return type_of(self._elem_type)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape


@listed
class ILayer(Strict):
    """A node."""

    def __init__(self, node: onnx.NodeProto, types: dict[str, int], attention: IAttention) -> None:
        self._node, self._types, self._attention = node, types, attention

    @property
    def name(self) -> str:
        return self._node.name

    @property
    def type(self) -> Any:
        return LayerType.ATTENTION_INPUT if self._node.op_type == "Attention" else LayerType.IDENTITY

    def get_input(self, index: int) -> ITensor | None:
        names = self._node.input
        if index >= len(names) or not names[index]:
            return None
        return ITensor(names[index], self._types[names[index]], ())

    @property
    def num_outputs(self) -> int:
        return len(self._node.output)

    def get_output(self, index: int) -> ITensor | None:
        names = self._node.output
        return ITensor(names[index], self._types.get(names[index], 0), ()) if index < len(names) else None


@listed
class ICastLayer(ILayer):
    """A change of type."""


@listed
class IAttention(Strict):
    """An attention: whether the builder may write it out where no kernel fits, and of newer releases who sees what."""

    decomposable: bool = False
    if CausalMaskKind is not None:
        causal_kind: Any = CausalMaskKind.NONE
        key_value_lengths: ITensor | None = None

    def __init__(self, node: onnx.NodeProto) -> None:
        self.decomposable = False
        if CausalMaskKind is not None and any(each.name == "is_causal" and each.i for each in node.attribute):
            self.causal_kind = CausalMaskKind.UPPER_LEFT


@listed
class IAttentionInputLayer(ILayer):
    """What an ILayer of that type becomes when its class is set."""

    @property
    def attention(self) -> IAttention:
        return self._attention

    @property
    def type(self) -> Any:
        return LayerType.ATTENTION_INPUT


@listed
class INetworkDefinition(Strict):
    """A parsed graph."""

    def __init__(self) -> None:
        self._model, self._name = onnx.ModelProto(), ""
        self._types: dict[str, int] = {}
        self._attentions: list[IAttention] = []

    def _fill(self, model: onnx.ModelProto, name: str) -> None:
        known = shape_inference.infer_shapes(model).graph
        infos = (*known.value_info, *known.input, *known.output)
        self._types = {info.name: info.type.tensor_type.elem_type for info in infos}
        self._types |= {weight.name: weight.data_type for weight in known.initializer}
        self._model, self._attentions = model, [IAttention(node) for node in model.graph.node]
        self._name = name

    @property
    def name(self) -> str:
        """The name of the graph's file, since exporters call all graphs the same."""
        return self._name

    @property
    def num_layers(self) -> int:
        return len(self._model.graph.node)

    def get_layer(self, index: int) -> ILayer | None:
        if index >= self.num_layers:
            return None
        return ILayer(self._model.graph.node[index], self._types, self._attentions[index])

    def add_cast(self, input: ITensor, to_type: Any) -> ICastLayer:  # noqa: A002 - the library's name
        kind = next(kind for kind, name in TYPES.items() if name == DataType(to_type).name)
        node = helper.make_node("Cast", [input.name], [f"{input.name}.{self.num_layers}"], to=kind)
        self._model.graph.node.append(node)
        self._types[node.output[0]] = kind
        self._attentions.append(IAttention(node))
        return ICastLayer(node, self._types, self._attentions[-1])

    def _written(self) -> onnx.ModelProto:
        """Return the graph with what was set of its attention in it, as ONNX says that."""
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        if CausalMaskKind is not None:
            for node, attention in zip(self._model.graph.node, self._attentions, strict=True):
                if node.op_type == "Attention":
                    _mask_by_lengths(model.graph, node.name, attention)
        return model

    @property
    def num_inputs(self) -> int:
        return len(self._model.graph.input)

    def get_input(self, index: int) -> ITensor | None:
        if index >= self.num_inputs:
            return None
        info = self._model.graph.input[index]
        dims = info.type.tensor_type.shape.dim
        return ITensor(info.name, self._types[info.name], tuple(each.dim_value or -1 for each in dims))


def _mask_by_lengths(graph: onnx.GraphProto, name: str, attention: IAttention) -> None:
    """Let an attention see what its causal kind and lengths say.

    In the lower right corner the last query sees all keys: with lengths those of its row, as the code under test relies
    on. No GPU has shown it.
    """
    kind, lengths = attention.causal_kind, attention.key_value_lengths
    if kind is not CausalMaskKind.LOWER_RIGHT:
        if lengths is not None:
            raise NotImplementedError(f"the fake has no lengths beside the causal kind {kind.name}")
        return
    (node,) = (each for each in graph.node if each.name == name)
    counts = f"{name}.lengths"
    if lengths is not None:
        graph.node.append(helper.make_node("Cast", [lengths.name], [counts], to=TensorProto.INT64))
    else:
        rows, keys = f"{name}.rows", f"{name}.keys"
        graph.node.append(helper.make_node("Shape", [node.input[0]], [rows], start=0, end=1))
        graph.node.append(helper.make_node("Shape", [node.input[1]], [keys], start=2, end=3))
        graph.node.append(helper.make_node("Expand", [keys, rows], [counts]))
    node.input.extend([""] * (LENGTHS - len(node.input)) + [counts])
    kept = [attribute for attribute in node.attribute if attribute.name != "is_causal"]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute("is_causal", 1)])


@listed
class ParserError(Strict):
    """Why a graph was refused."""

    def __init__(self, operator: str, description: str) -> None:
        self._operator, self._description = operator, description

    def node_operator(self) -> str:
        return self._operator

    def desc(self) -> str:
        return self._description


@listed
class OnnxParser(Strict):
    """Reads standard ONNX; what TensorRT is known to refuse is refused."""

    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network, self._logger = network, logger
        self._errors: list[ParserError] = []

    def parse_from_file(self, model: Any) -> bool:
        if not isinstance(model, str):
            raise TypeError("parse_from_file(): incompatible function arguments")
        return self._read(read_model(Path(model)), Path(model))

    def parse(self, model: Any, path: str | None = None) -> bool:
        file = None if path is None else Path(path)
        return self._read(read_model(bytes(model), None if file is None else file.parent), file)

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]

    def _read(self, model: onnx.ModelProto, file: Path | None) -> bool:
        self._errors = [ParserError(node.op_type, problem) for node, problem in _problems(model)]
        for error in self._errors:
            report(self._logger, f"{error.node_operator()}: {error.desc()}")
        for node in model.graph.node:
            if node.op_type == "Attention" and len(node.input) > LENGTHS:
                del node.input[LENGTHS:]  # as TensorRT's parsers do, without a word
        if not self._errors:
            self._network._fill(model, model.graph.name if file is None else file.stem)
        return not self._errors


def _problems(model: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, str]]:
    sizes = {info.name: [each.dim_value for each in info.type.tensor_type.shape.dim] for info in model.graph.input}
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx"):
            yield node, f"no importer for the domain {node.domain}"
        elif node.op_type == "Attention" and len(node.output) > 1:
            yield node, "outputs beside the first are not supported"
        elif node.op_type == "TensorScatter" and not sizes.get(node.input[0], [0, 0, 1, 0])[-2]:
            yield node, "the length of the cache must be static"


@listed
class IOptimizationProfile(Strict):
    """Bounds of every input."""

    def __init__(self) -> None:
        self._shapes: dict[str, Shapes] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:  # noqa: A002 - the library's names
        shapes = tuple(min), tuple(opt), tuple(max)
        if len({len(shape) for shape in shapes}) != 1:
            raise ValueError(f"shapes of {input} have several ranks: {shapes}")
        self._shapes[input] = shapes

    def get_shape(self, input: str) -> list[tuple[int, ...]]:  # noqa: A002
        return list(self._shapes.get(input, ()))


@listed
class ITimingCache(Strict):
    """What was learned of kernels, of one device."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def serialize(self) -> bytes:
        return self._content


class IProgressMonitor:
    """To be derived from."""

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        raise NotImplementedError

    def step_complete(self, phase_name: str, step: int) -> bool:
        raise NotImplementedError

    def phase_finish(self, phase_name: str) -> None:
        raise NotImplementedError


@listed
class IBuilderConfig(Strict):
    """Options of a build."""

    progress_monitor: IProgressMonitor | None = None
    builder_optimization_level: int = 3
    profiling_verbosity: Any = ProfilingVerbosity.LAYER_NAMES_ONLY
    hardware_compatibility_level: Any = HardwareCompatibilityLevel.NONE
    max_aux_streams: int = 0

    def __init__(self) -> None:
        self._flags = {BuilderFlag.TF32}
        self._profiles: list[IOptimizationProfile] = []
        self._timing: ITimingCache | None = None
        self._limits: dict[Any, int] = {}

    def set_flag(self, flag: Any) -> None:
        self._flags.add(BuilderFlag(flag))

    def clear_flag(self, flag: Any) -> None:
        self._flags.discard(BuilderFlag(flag))

    def get_flag(self, flag: Any) -> bool:
        return flag in self._flags

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self._limits[MemoryPoolType(pool)] = pool_size

    def get_memory_pool_limit(self, pool: Any) -> int:
        return self._limits.get(pool, machine().memory.total)

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        for low, middle, high in profile._shapes.values():
            if any(not 0 <= small <= usual <= large for small, usual, large in zip(low, middle, high, strict=True)):
                return -1
        self._profiles.append(profile)
        return len(self._profiles) - 1

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._profiles)

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
        return ITimingCache(bytes(serialized_timing_cache) or f"timings of {machine().name}".encode())

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        if not ignore_mismatch and cache._content != f"timings of {machine().name}".encode():
            return False
        self._timing = cache
        return True


class IHostMemory(bytes):
    """A plan."""

    @property
    def nbytes(self) -> int:
        return len(self)


@listed
class Builder(Strict):
    """Builds plans on the GPU that is plugged in."""

    def __init__(self, logger: Any) -> None:
        if not isinstance(logger, ILogger):
            raise TypeError("Builder.__init__(): incompatible constructor arguments")
        machine()
        self._logger = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        if not flags & 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED:
            raise NotImplementedError("the fake builds strongly typed networks alone")
        return INetworkDefinition()

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory | None:
        monitor, gpu = config.progress_monitor, machine()
        steps = ["Parsing", "Timing", "Serialising"]
        if monitor is not None:
            monitor.phase_start("Building engine", None, len(steps))
            gone_on = all(monitor.step_complete("Building engine", step) for step in range(len(steps)))
            monitor.phase_finish("Building engine")
            if not gone_on:
                return None
        problem = "the build failed" if gpu.fails("build") else next(_refusals(network, config), None)
        if problem is not None:
            report(self._logger, f"IBuilder::buildSerializedNetwork: {problem}")
            return None
        model, flags = network._written(), config._flags
        size = model.ByteSize()
        stripped = strip(model) if BuilderFlag.STRIP_PLAN in flags else {}
        header = json.dumps(
            {
                "version": VERSION,
                "compatible": BuilderFlag.VERSION_COMPATIBLE in flags,
                "device": gpu.name,
                "size": size,
                "refittable": bool(stripped) or not flags.isdisjoint(BuilderFlag[name] for name in REFITTABLE),
                "identical": BuilderFlag.REFIT not in flags,
                "stripped": stripped,
                "name": network.name,
                "verbosity": config.profiling_verbosity.name,
                "profiles": [profile._shapes for profile in config._profiles],
            }
        ).encode()
        content = model.SerializeToString()
        return IHostMemory(MAGIC + len(header).to_bytes(4, "little") + header + content)


def _refusals(network: INetworkDefinition, config: IBuilderConfig) -> Iterator[str]:
    graph = Graph(network._model.SerializeToString())
    for index, profile in enumerate(config._profiles or [IOptimizationProfile()]):
        if unknown := profile._shapes.keys() - graph.inputs.keys():
            yield f"profile {index} has shapes of {sorted(unknown)}, which the network does not read"
        for name, tensor in graph.inputs.items():
            shapes = profile._shapes.get(name)
            if shapes is None:
                if any(not isinstance(dim, int) for dim in tensor.dims):
                    yield f"profile {index} has no shapes of the dynamic input {name}"
                continue
            fixed = [dim if isinstance(dim, int) else None for dim in tensor.dims]
            if any(len(shape) != len(fixed) for shape in shapes) or any(
                dim is not None and size != dim for shape in shapes for size, dim in zip(shape, fixed, strict=True)
            ):
                yield f"profile {index} has shapes {shapes} of {name}, which is {tensor.dims}"
    for index, node in enumerate(network._model.graph.node):
        if node.op_type == "Attention" and CausalMaskKind is not None:
            yield from _contradictions(node, network._attentions[index])
        if node.op_type == "Attention" and not network._attentions[index].decomposable:
            if network._types[node.input[0]] == TensorProto.FLOAT:
                yield f"{node.name}: no kernel for an attention in float32 that is not decomposable"
            if machine().fails("attention"):
                yield f"{node.name}: no kernel for an attention of this head size that is not decomposable"


def _contradictions(node: onnx.NodeProto, attention: IAttention) -> Iterator[str]:
    lengths = attention.key_value_lengths
    if attention.causal_kind is not CausalMaskKind.NONE and len(node.input) > MASK and node.input[MASK]:
        yield f"{node.name}: a mask and a causal kind cannot be set together"
    if lengths is not None and lengths.dtype != DataType.INT32:
        yield f"{node.name}: key_value_lengths must be of INT32, not of {lengths.dtype.name}"


def read_plan(plan: bytes) -> tuple[dict[str, Any], bytes] | None:
    """Return a plan's header and graph, or None where it is none."""
    if plan[:4] != MAGIC:
        return None
    end = 8 + int.from_bytes(plan[4:8], "little")
    header: dict[str, Any] = json.loads(plan[8:end])
    return header, plan[end:]
