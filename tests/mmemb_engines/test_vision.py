"""A vision graph takes pixels as bytes in every float type, and images and videos in one engine.

This is a check of graphs, without a GPU. It is no run of TensorRT.
"""

from pathlib import Path

import pytest

from mmemb_deploy.backends.tensorrt.api import Library
from mmemb_deploy.backends.tensorrt.network import Network
from mmemb_deploy.backends.tensorrt.options import BuildOptions
from mmemb_deploy.bundle import abi
from mmemb_deploy.bundle.folder import Bundle
from mmemb_engines.profiles import demand_of_limits, profiles
from mmemb_engines.watch import Silent
from mmemb_export.graphs import traceables
from mmemb_export.trace import trace
from mmemb_export.weights import CheckpointWeights, save
from mmemb_training.checkpoint import outline_checkpoint


@pytest.mark.parametrize("floats", ["bfloat16", "float16"])  # float32 is built with its bundle
def test_a_vision_graph_in_half_precision_parses_and_builds(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path, rtx: Library, floats: str
) -> None:
    outline = outline_checkpoint(tiny_checkpoint, dtype=floats)
    graph = next(graph for graph in traceables(outline) if graph.name == abi.VISION)
    path = tmp_path / "vision.onnx"
    save([trace(graph, CheckpointWeights(tiny_checkpoint, outline))], [path], tmp_path / "vision.onnx.data")
    manifest = Bundle.open(tiny_bundle).manifest
    boxes = profiles(abi.VISION, manifest, demand_of_limits(manifest, 1))
    plan = Network(rtx, path).build(boxes, BuildOptions(), target="sm89", timings=b"", watcher=Silent())
    assert plan.content.nbytes > 0


def test_one_profile_takes_images_and_videos(tiny_bundle: Path) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    patch, step = manifest.vision.patch_size, manifest.vision.temporal_patch_size
    for profile in profiles(abi.VISION, manifest, demand_of_limits(manifest, 4)):
        least, usual, most = profile[abi.PIXELS]
        assert [shape[1] for shape in (least, usual, most)] == [1, 1, step]
        assert {shape[3:] for shape in (least, usual, most)} == {(patch, 3 * patch)}
        assert profile[abi.SEGMENT_INDEX] == tuple((shape[2], patch) for shape in (least, usual, most))
