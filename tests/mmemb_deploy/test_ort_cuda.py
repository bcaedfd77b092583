"""ONNX Runtime on a GPU: what can be said without one is that nothing falls back to the CPU."""

from pathlib import Path
from typing import Any

import pytest

from mmemb_deploy import BackendError, Embedder
from mmemb_deploy.backends.onnxruntime_cuda import resolved


def test_an_axis_may_be_a_sum() -> None:
    assert resolved(("batch", 3, "new + past", 16), {"batch": 2, "new": 1, "past": 9}) == (2, 3, 10, 16)


@pytest.mark.skipif(Path("/proc/driver/nvidia").exists(), reason="there is a driver")
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
