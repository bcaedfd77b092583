"""What a GPU has used, by NVIDIA's management library (NVML)."""

from __future__ import annotations

from typing import Any

from mmemb_deploy.errors import BackendError, MissingExtraError


class EnergyMeter:
    """The first GPU that NVML shows.

    Raises MissingExtraError without `pynvml`, BackendError where NVML or the GPU has no counter of energy.
    """

    def __init__(self) -> None:
        try:
            import pynvml  # pyright: ignore[reportMissingImports]
        except ModuleNotFoundError as error:
            raise MissingExtraError("pynvml", "gpu") from error
        self._nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
            self._gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
            self.joules()
        except pynvml.NVMLError as error:
            raise BackendError(f"NVML does not count this GPU's energy ({error}): pass --no-energy") from error

    def joules(self) -> float:
        """Return the joules that the GPU has used since its driver was loaded."""
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._gpu)) / 1000
