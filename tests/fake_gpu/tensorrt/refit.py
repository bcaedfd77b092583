"""Weights that an engine gets after it was built: what a stripped plan lacks, and the two classes that fill it."""

# What the classes share is private, since the real ones show nothing of it.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import hashlib
import weakref
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
from onnx import TensorProto, numpy_helper
from onnx.checker import ValidationError

from fakegpu.graphs import Graph, read_model
from tensorrt.api import Strict, listed
from tensorrt.log import ILogger, report

if TYPE_CHECKING:
    from tensorrt.run import ICudaEngine

REFITTABLE = ("REFIT", "REFIT_IDENTICAL", "REFIT_INDIVIDUAL")  # flags of an engine that takes weights
INDICES = (TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL)  # of shapes and axes: the builder folds them
UNREADABLE = OSError, ValueError, ValidationError, import_module("google.protobuf.message").DecodeError  # graphs
VALUES = ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data")


def strip(model: onnx.ModelProto) -> dict[str, str]:
    """Take a graph's weights out of it; return their names and hashes."""
    hashes: dict[str, str] = {}
    for weight in _weights(model):
        hashes[weight.name] = _hash(weight)
        for field in VALUES:
            weight.ClearField(field)
    return hashes


def _weights(model: onnx.ModelProto) -> list[TensorProto]:
    return [each for each in model.graph.initializer if each.data_type not in INDICES]


def _hash(weight: TensorProto) -> str:
    return hashlib.sha256(numpy_helper.to_array(weight).tobytes()).hexdigest()


@listed
class Refitter(Strict):
    """Fills an engine that was built to be filled, with all that it lacks at once."""

    def __init__(self, engine: ICudaEngine, logger: ILogger) -> None:
        if not engine.refittable:
            report(logger, "createInferRefitter: the engine was not built with a flag for refitting")
            raise TypeError("Refitter.__init__(): factory function returned nullptr")
        self._engine, self._logger = engine, logger
        self._given: dict[str, TensorProto] = {}
        self._owner: weakref.ref[Any] | None = None  # holds what was given

    def get_all_weights(self) -> list[str]:
        return [each.name for each in _weights(self._engine._graph.model)]

    def get_missing_weights(self) -> list[str]:
        return sorted(self._engine._lacking - self._given.keys())

    def refit_cuda_engine(self) -> bool:
        engine = self._engine
        engine._check_device("a refit")
        if engine._queued:
            engine._gpu.misuse(f"a refit of {engine._name}, of which {engine._queued} runs are still queued")
        if self._owner is not None and self._owner() is None:
            engine._gpu.misuse(f"a refit of {engine._name} from weights that went with their OnnxParserRefitter")
        if missing := self.get_missing_weights():
            report(self._logger, f"IRefitter::refitCudaEngine: {len(missing)} weights are missing: {missing[0]}")
            return False
        model = onnx.ModelProto()
        model.CopyFrom(engine._graph.model)
        for weight in _weights(model):
            if (given := self._given.get(weight.name)) is not None:
                if engine._identical and engine._built_with.get(weight.name, _hash(given)) != _hash(given):
                    engine._gpu.misuse(f"a refit of {engine._name} by another {weight.name} than it was built with")
                weight.CopyFrom(given)
        engine._graph, engine._lacking = Graph.of(model.SerializeToString()), set()
        return True


@listed
class OnnxParserRefitter(Strict):
    """Reads the weights of an ONNX graph for a refitter: all that the engine takes, or it says that it failed."""

    def __init__(self, refitter: Any, logger: ILogger) -> None:
        if not isinstance(refitter, Refitter):
            raise TypeError("OnnxParserRefitter.__init__(): incompatible constructor arguments")
        self._refitter, self._logger = refitter, logger

    def refit_from_file(self, model: Any) -> bool:
        if not isinstance(model, str):
            raise TypeError("refit_from_file(): incompatible function arguments")
        return self._refit(Path(model), None)

    def refit_from_bytes(self, model: Any, path: str | None = None) -> bool:
        return self._refit(bytes(model), None if path is None else Path(path).parent)

    def _refit(self, source: bytes | Path, folder: Path | None) -> bool:
        refitter, wanted = self._refitter, {each.name: each for each in _weights(self._refitter._engine._graph.model)}
        try:
            found = {each.name: (each, _hash(each)) for each in _weights(read_model(source, folder))}
        except UNREADABLE as error:
            report(self._logger, f"Failed to import the ONNX model: {error}")
            return False
        refitter._owner = weakref.ref(self)
        for name, weight in wanted.items():
            if name not in found:
                continue
            given, _ = found[name]
            if (given.data_type, list(given.dims)) != (weight.data_type, list(weight.dims)):
                report(self._logger, f"Failed to set named weights: {name}")
                return False
            refitter._given[name] = given
        if lacking := wanted.keys() - found.keys():
            done = len(wanted) - len(lacking)
            report(self._logger, f"Only successfully refitted {done} weights out of {len(wanted)}")
        return not lacking
