"""A portable graph as TensorRT is to read it: with a fixed number of slots, and attention that its parsers understand.

TensorRT's parsers drop `nonpad_kv_seqlen` of Attention-24 without a word, and take `is_causal` for a mask from the
first slot on: what comes out builds, and computes something else. So either the graph masks, which is standard ONNX and
every release understands, or whoever parses sets the lengths afterwards (`mmemb_deploy.backends.tensorrt.network`).

Axes: B rows, T new tokens, R slots of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmemb_deploy.errors import BackendError, MissingExtraError, OptionError
from mmemb_deploy.files import write_whole

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

SLOTS = "slots"  # the axis of the cache, as the manifest names it
ATTENTION_INPUTS = 7  # with lengths, which come last; the mask is the fourth
PREFIX = "slots."  # of the names of what is added


@dataclass(frozen=True)
class Prepared:
    """A graph without its weights, which it names beside the original.

    `lengths` is the tensor (B,) that says how many slots of a row hold tokens, where no mask took its place.
    """

    model: bytes
    lengths: str | None


def prepared(path: Path, slots: int | None, *, lengths: bool) -> Prepared:
    """Return a graph with so many slots in a row of its cache; unless `lengths`, attention to them is by a mask.

    All layers share one mask, bool (B, 1, T, R): a token sees the slots of its row up to its own. Raises BackendError
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
    if lengths or not counted or slots is None:
        return Prepared(model.SerializeToString(), names.pop() if names else None)
    _mask(graph, counted, names.pop(), slots)
    return Prepared(model.SerializeToString(), None)


def _counted(node: NodeProto) -> bool:
    """Return whether a node is an attention that is told how many keys there are."""
    return node.op_type == "Attention" and len(node.input) == ATTENTION_INPUTS and bool(node.input[-1])


def _is_causal(node: NodeProto) -> bool:
    return any(attribute.name == "is_causal" and attribute.i for attribute in node.attribute)


def _mask(graph: GraphProto, counted: list[NodeProto], lengths: str, slots: int) -> None:
    """Put one mask in the place of every attention's lengths and causality."""
    queries, mask = counted[0].input[0], f"{PREFIX}mask"
    nodes = list(graph.node)
    at = next(index for index, node in enumerate(nodes) if _counted(node))
    for node in counted:
        del node.input[3:]
        node.input.append(mask)
        kept = [attribute for attribute in node.attribute if attribute.name != "is_causal"]
        del node.attribute[:]
        node.attribute.extend(kept)
    nodes[at:at] = _mask_nodes(graph, queries, lengths, mask, slots)
    del graph.node[:]
    graph.node.extend(nodes)


def _mask_nodes(graph: GraphProto, queries: str, lengths: str, mask: str, slots: int) -> Iterator[NodeProto]:
    """Yield what computes: slot < lengths - T + 1 + step, for the T steps of the new tokens."""
    from onnx.helper import make_node
    from onnx.numpy_helper import from_array

    def name(what: str) -> str:
        return PREFIX + what

    constants = {"one": np.array(1), "first": np.array([1]), "around": np.array([1, 3]), "all": np.arange(slots)}
    for what, value in constants.items():
        graph.initializer.append(from_array(value.astype(np.int64), name(what)))
    yield make_node("Shape", [queries], [name("new")], start=-2, end=-1)
    yield make_node("Sub", [lengths, name("new")], [name("past")])  # (B,)
    yield make_node("Squeeze", [name("new")], [name("new_scalar")])
    yield make_node("Add", [name("new_scalar"), name("one")], [name("end")])
    yield make_node("Range", [name("one"), name("end"), name("one")], [name("steps")])  # 1 to T
    yield make_node("Unsqueeze", [name("past"), name("first")], [name("past_B1")])
    yield make_node("Add", [name("past_B1"), name("steps")], [name("seen_BT")])
    yield make_node("Unsqueeze", [name("seen_BT"), name("around")], [name("seen_B1T1")])
    yield make_node("Less", [name("all"), name("seen_B1T1")], [mask])


def write_prepared(path: Path, graph: Prepared, weights: Sequence[str], folder: Path) -> Path:
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
