"""Machines: GPUs by name, with the figures of their vendor's data sheets, or with figures that are given.

Peaks are dense: where a data sheet prints a figure with sparsity, half of it. A data sheet's GB of memory count as GiB,
which is how drivers report them within a percent or two; `reserve` covers the difference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mmemb_deploy.errors import OptionError, check_known

UTILISATION = 0.35  # of the peak; assumed, and reached or passed by well-tuned training of dense models
BANDWIDTH_USE = 0.6  # of the memory's bandwidth while decoding; assumed
RESERVE = 0.1  # of memory, for the driver's context, communication buffers and fragments; assumed


@dataclass(frozen=True, kw_only=True)
class Device:
    """One GPU. `tflops` is its dense bf16 tensor peak, `bandwidth` that of its memory in GB/s; None: not known."""

    name: str
    source: str
    tflops: float | None = None
    memory_gib: float | None = None
    bandwidth: float | None = None


DEVICES = {
    device.name: device
    for device in (
        Device(
            name="a100",
            tflops=312,
            memory_gib=80,
            bandwidth=2039,
            source="NVIDIA A100 data sheet, 80GB SXM: BFLOAT16 312 TFLOPS, 2,039 GB/s",
        ),
        Device(
            name="h100",
            tflops=989.5,
            memory_gib=80,
            bandwidth=3350,
            source="NVIDIA H100 data sheet, SXM: BFLOAT16 1,979 TFLOPS with sparsity, 3.35 TB/s",
        ),
        Device(
            name="h200",
            tflops=989.5,
            memory_gib=141,
            bandwidth=4800,
            source="NVIDIA H200 data sheet, SXM: BFLOAT16 1,979 TFLOPS with sparsity, 4.8 TB/s",
        ),
        Device(
            name="l40s",
            tflops=362.05,
            memory_gib=48,
            bandwidth=864,
            source="NVIDIA L40S data sheet: BFLOAT16 362.05 TFLOPS, 864 GB/s",
        ),
        Device(
            name="rtx4090",
            tflops=165.2,
            memory_gib=24,
            bandwidth=1008,
            source="NVIDIA Ada GPU architecture white paper, GeForce RTX 4090: BF16 with FP32 accumulate 165.2 TFLOPS, "
            "1,008 GB/s",
        ),
        Device(
            name="b200",
            tflops=2250,
            memory_gib=180,
            bandwidth=8000,
            source="NVIDIA HGX and DGX B200 data sheets, per GPU: BFLOAT16 4.5 PFLOPS with sparsity, 180 GB, 8 TB/s",
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What there is to train on: alike GPUs, and how well they are assumed to be used."""

    gpus: int
    memory_gib: float  # of each GPU
    device: Device
    utilisation: float = UTILISATION
    bandwidth_use: float = BANDWIDTH_USE
    reserve: float = RESERVE

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise OptionError(f"gpus is {self.gpus}: it must be at least 1")
        for name, value in (("memory_gib", self.memory_gib), ("tflops", self.device.tflops)):
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise OptionError(f"{name} is {value}: it must be positive")
        for name in ("utilisation", "bandwidth_use"):
            if not 0 < getattr(self, name) <= 1:
                raise OptionError(f"{name} is {getattr(self, name)}: it must be above 0 and at most 1")
        if not 0 <= self.reserve < 1:
            raise OptionError(f"reserve is {self.reserve}: it must be at least 0 and below 1")

    @property
    def usable_gib(self) -> float:
        """Memory of each GPU that the plan may fill."""
        return self.memory_gib * (1 - self.reserve)


def machine(
    gpus: int,
    *,
    device: str | None = None,
    memory_gib: float | None = None,
    tflops: float | None = None,
    bandwidth: float | None = None,
    utilisation: float = UTILISATION,
) -> Machine:
    """Return a machine of named GPUs, of given figures, or of a name whose figures are replaced by given ones.

    Raises OptionError for an unknown name, and where neither says how much memory a GPU has.
    """
    if device is not None:
        check_known("device", device, DEVICES)
    known = Device(name="unnamed", source="") if device is None else DEVICES[device]
    memory = known.memory_gib if memory_gib is None else memory_gib
    if memory is None:
        raise OptionError("memory_gib is not given: pass each GPU's memory, or a device to take it from")
    given = [name for name, value in (("tflops", tflops), ("bandwidth", bandwidth)) if value is not None]
    sources = [known.source] if known.source else []
    if given:
        sources.append(f"{' and '.join(given)} as given")
    chosen = Device(
        name=known.name,
        source="; ".join(sources) or "no device named",
        tflops=known.tflops if tflops is None else tflops,
        memory_gib=memory,
        bandwidth=known.bandwidth if bandwidth is None else bandwidth,
    )
    return Machine(gpus=gpus, memory_gib=memory, device=chosen, utilisation=utilisation)
