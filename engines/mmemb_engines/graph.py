"""A portable graph as TensorRT is to read it: with a fixed number of slots, and attention that its parsers understand.

TensorRT's parsers drop `nonpad_kv_seqlen` of Attention-24 without a word, and take `is_causal` for a mask from the
first slot on: what comes out builds, and computes something else. So either the graph masks, which is standard ONNX and
every release understands, or whoever parses sets the lengths afterwards (`mmemb_deploy.backends.tensorrt.network`).

The number of slots must be fixed for TensorRT, and is that of the longest row there may be. Attention would look at all
of them, so one more input, `abi.WINDOW`, says at how many it does: those that any row of the batch has filled.

Axes: B rows, T new tokens, R slots of a row, S slots of the window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmemb_deploy.backends.tensorrt.files import WINDOW
from mmemb_deploy.bundle import abi
from mmemb_deploy.errors import BackendError, MissingExtraError, OptionError
from mmemb_deploy.files import write_whole

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

SLOTS = "slots"  # the axis of the cache, as the manifest names it
ATTENTION_INPUTS = 7  # with lengths, which come last; the mask is the fourth
PREFIX = "slots."  # of the names of what is added
MASK = f"{PREFIX}mask"


@dataclass(frozen=True)
class PreparedGraph:
    """A graph without its weights, which it names beside the original.

    `lengths` is the tensor (B,) that says how many slots of a row hold tokens, where no mask took its place.
    """

    model: bytes
    lengths: str | None


def prepared(path: Path, slots: int | None, *, lengths: bool) -> PreparedGraph:
    """Return a graph with so many slots in a row of its cache; unless `lengths`, attention to them is by a mask.

    All layers share one mask, bool (B, 1, T, S): a token sees the slots of its row up to its own. Raises BackendError
    for attention that is told lengths and is not causal, or by several tensors, MissingExtraError without onnx.
    A graph without a cache, whose `slots` are None, is returned as it is.
    """
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise MissingExtraError("onnx", "tensorrt") from error
    model = onnx.load(str(path), load_external_data=False)
    graph = model.graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param == SLOTS and slots is not None:
                axis.dim_value = slots
    counted = [node for node in graph.node if _counted(node)]
    names = {node.input[ATTENTION_INPUTS - 1] for node in counted}
    if len(names) > 1 or not all(_is_causal(node) for node in counted):
        raise BackendError(
            f"{path} has attention over slots that is not causal, or whose lengths come from {len(names)} tensors: "
            "export the bundle again"
        )
    if not counted or slots is None:
        return PreparedGraph(model.SerializeToString(), None)
    (ends,) = names
    nodes = list(_rewritten(graph, ends, lengths=lengths))
    del graph.node[:]
    graph.node.extend(nodes)
    return PreparedGraph(model.SerializeToString(), ends if lengths else None)


def _counted(node: NodeProto) -> bool:
    """Return whether a node is an attention that is told how many keys there are."""
    return node.op_type == "Attention" and len(node.input) == ATTENTION_INPUTS and bool(node.input[-1])


def _is_causal(node: NodeProto) -> bool:
    return any(attribute.name == "is_causal" and attribute.i for attribute in node.attribute)


def _rewritten(graph: GraphProto, ends: str, *, lengths: bool) -> Iterator[NodeProto]:
    """Yield a graph's nodes with attention that looks at a window, and unless `lengths` through a mask."""
    from onnx import TensorProto
    from onnx.helper import make_node, make_tensor_value_info
    from onnx.numpy_helper import from_array

    graph.input.append(make_tensor_value_info(WINDOW.name, TensorProto.INT64, WINDOW.shape))
    for what, value in {"zero": [0], "first": [1], "third": [2], "around": [1, 3], "one": 1}.items():
        graph.initializer.append(from_array(np.array(value, np.int64), PREFIX + what))
    before: Iterator[NodeProto] | None = _shared(ends, lengths=lengths)
    for node in graph.node:
        if _counted(node):
            yield from before or ()
            before = None
            for place in (1, 2):
                looked_at = f"{node.input[place]}.{abi.WINDOW}"
                bounds = [PREFIX + each for each in ("zero", "size", "third")]
                yield make_node("Slice", [node.input[place], *bounds], [looked_at])
                node.input[place] = looked_at
            if not lengths:
                del node.input[3:]
                node.input.append(MASK)
                kept = [attribute for attribute in node.attribute if attribute.name != "is_causal"]
                del node.attribute[:]
                node.attribute.extend(kept)
        yield node


def _shared(ends: str, *, lengths: bool) -> Iterator[NodeProto]:
    """Yield what computes, for all layers, the window's size, and the mask: slot < end - T + 1 + step."""
    from onnx.helper import make_node

    def node(operator: str, inputs: Sequence[str], output: str) -> NodeProto:
        return make_node(operator, list(inputs), [PREFIX + output])

    yield node("Shape", [abi.WINDOW], "size")
    if not lengths:
        yield make_node("Shape", [abi.TOKEN_IDS], [PREFIX + "new"], start=-1)
        yield node("Sub", [ends, PREFIX + "new"], "past_B")
        yield node("Squeeze", [PREFIX + "new"], "new_scalar")
        yield node("Add", [PREFIX + "new_scalar", PREFIX + "one"], "end")
        yield node("Range", [PREFIX + "one", PREFIX + "end", PREFIX + "one"], "steps_T")  # 1 to T
        yield node("Unsqueeze", [PREFIX + "past_B", PREFIX + "first"], "past_B1")
        yield node("Add", [PREFIX + "past_B1", PREFIX + "steps_T"], "seen_BT")
        yield node("Unsqueeze", [PREFIX + "seen_BT", PREFIX + "around"], "seen_B1T1")
        yield make_node("Less", [abi.WINDOW, PREFIX + "seen_B1T1"], [MASK])


def write_prepared(path: Path, graph: PreparedGraph, weights: Sequence[str], folder: Path) -> Path:
    """Write a prepared graph for other tools to read; the weight files beside the original become the same files there.

    Raises OptionError for a folder on another file system.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in weights:
        (folder / file).unlink(missing_ok=True)
        try:
            (folder / file).hardlink_to(path.parent / file)
        except OSError as error:
            raise OptionError(f"{folder} cannot share {path.parent / file}: choose a folder beside it") from error
    target = folder / path.name
    write_whole(target, graph.model)
    return target
