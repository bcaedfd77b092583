"""Keeps ONNX Runtime from contacting its vendor, and skips the GPU tests where there is no GPU."""

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before the first import of onnxruntime, by whichever test that is

import ctypes

import pytest


def cuda_works() -> bool:
    """Ask the driver itself: torch may be absent or a CPU build, and ONNX Runtime lists CUDA where there is none."""
    try:
        status: int = ctypes.CDLL("libcuda.so.1").cuInit(0)
    except OSError:
        return False
    return status == 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items and not cuda_works():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU with a working driver"))
