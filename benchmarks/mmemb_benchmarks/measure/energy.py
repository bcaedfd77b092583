"""What a GPU has used, by NVIDIA's management library (NVML)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmemb_deploy.errors import BackendError, MissingExtraError


def gpu_joules(device: int = 0) -> Callable[[], float]:
    """Return what tells the joules that the GPU of an index has used since its driver was loaded.

    NVML counts all GPUs of the machine: where CUDA_VISIBLE_DEVICES hides some, its index may be another GPU's.
    Raises MissingExtraError without `pynvml`, BackendError where NVML or the GPU has no counter of energy.
    """
    try:
        import pynvml  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise MissingExtraError("pynvml", "gpu") from error
    nvml: Any = pynvml

    def joules() -> float:
        return float(nvml.nvmlDeviceGetTotalEnergyConsumption(gpu)) / 1000

    try:
        nvml.nvmlInit()
        gpu = nvml.nvmlDeviceGetHandleByIndex(device)
        joules()
    except nvml.NVMLError as error:
        raise BackendError(f"NVML does not count this GPU's energy ({error}): pass --no-energy") from error
    return joules
