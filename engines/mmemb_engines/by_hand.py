"""A build by NVIDIA's own tools: the graphs as TensorRT is to read them, and the commands that build and time them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mmemb_deploy.backends.tensorrt.options import BuildOptions
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.errors import OptionError
from mmemb_engines.build import slots_of
from mmemb_engines.graph import prepared, write_prepared
from mmemb_engines.profiles import Demand, profiles
from mmemb_engines.tools import trtexec_build, trtexec_run


def write_commands(bundle: Bundle, demand: Demand, options: BuildOptions, folder: Path) -> Iterator[str]:
    """Write a bundle's graphs into a folder; yield what builds each with trtexec, and what times it in every profile.

    Raises OptionError for attention by lengths, which trtexec cannot set, and for a folder on another file system.
    """
    if options.attention != "mask":
        raise OptionError(f"attention is {options.attention!r}: trtexec can only build graphs that mask; leave it out")
    for name, (role, *_) in bundle.manifest.engines.items():
        boxes = profiles(name, bundle.manifest, demand)
        slots = slots_of(bundle.manifest.graphs[role], boxes)
        _, *weights = bundle.graph_files(role)
        graph = write_prepared(bundle.graph(role), prepared(bundle.graph(role), slots, lengths=False), weights, folder)
        engine = graph.with_suffix(".engine")
        flags = options.trtexec() | {"saveEngine": str(engine)}
        if bundle.manifest.graphs[role].compute == "float32":  # which has no kernels of its own
            flags["decomposableAttentions"] = "*"
        yield trtexec_build(graph, boxes, flags)
        for index, box in enumerate(boxes):
            yield trtexec_run(engine, {tensor: usual for tensor, (_, usual, _) in box.items()}, profile=index)
