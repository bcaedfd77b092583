"""Machines: alike GPUs, by name with the figures of their vendor's data sheets, or with figures that are given.

Peaks are dense: where a data sheet prints a figure with sparsity, half of it. A data sheet's GB of memory count as GiB,
which is how drivers report them within a percent or two; RESERVE covers the difference.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from mmemb_deploy.errors import OptionError, check_known
from mmemb_training.recipes.settings import check_bounds

GIB = 2**30
UTILISATION = 0.35  # of the peak; assumed, and reached or passed by well-tuned training of dense models
BANDWIDTH_USE = 0.6  # of the memory's bandwidth while decoding; assumed
RESERVE = 0.1  # of memory, for the driver's context, communication buffers and fragments; assumed


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What there is to train on. `tflops` is each GPU's dense bf16 tensor peak, `bandwidth` its memory's in GB/s."""

    name: str
    source: str
    memory_gib: float  # of each GPU
    tflops: float | None = None  # None: not known
    bandwidth: float | None = None
    gpus: int = 1
    utilisation: float = UTILISATION

    def __post_init__(self) -> None:
        check_bounds(self, "gpus", least=1)
        check_bounds(self, "memory_gib", "tflops", "bandwidth", above=0)
        check_bounds(self, "utilisation", above=0, most=1)

    @property
    def usable_bytes(self) -> float:
        """Memory of each GPU that a run may fill."""
        return self.memory_gib * (1 - RESERVE) * GIB

    def hours(self, flops: float) -> float | None:
        """Return the hours of dense arithmetic on all GPUs; None where the peak is not known."""
        if self.tflops is None:
            return None
        return flops / (self.gpus * self.tflops * 1e12 * self.utilisation) / 3600


DEVICES = {
    name: Machine(name=name, tflops=tflops, memory_gib=memory, bandwidth=bandwidth, source=source)
    for name, tflops, memory, bandwidth, source in (
        ("a100", 312, 80, 2039, "NVIDIA A100 data sheet, 80GB SXM: BFLOAT16 312 TFLOPS, 2,039 GB/s"),
        ("h100", 989.5, 80, 3350, "NVIDIA H100 data sheet, SXM: BFLOAT16 1,979 TFLOPS with sparsity, 3.35 TB/s"),
        ("h200", 989.5, 141, 4800, "NVIDIA H200 data sheet, SXM: BFLOAT16 1,979 TFLOPS with sparsity, 4.8 TB/s"),
        ("l40s", 362.05, 48, 864, "NVIDIA L40S data sheet: BFLOAT16 362.05 TFLOPS, 864 GB/s"),
        (
            "rtx4090",
            165.2,
            24,
            1008,
            "NVIDIA Ada GPU architecture white paper, GeForce RTX 4090: BF16 with FP32 accumulate 165.2 TFLOPS, "
            "1,008 GB/s",
        ),
        (
            "b200",
            2250,
            180,
            8000,
            "NVIDIA HGX and DGX B200 data sheets, per GPU: BFLOAT16 4.5 PFLOPS with sparsity, 180 GB, 8 TB/s",
        ),
    )
}


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
    elif memory_gib is None:
        raise OptionError("memory_gib is not given: pass each GPU's memory, or a device to take it from")
    known = Machine(name="unnamed", source="", memory_gib=1) if device is None else DEVICES[device]
    given = {"memory_gib": memory_gib, "tflops": tflops, "bandwidth": bandwidth}
    changed: Any = {name: value for name, value in given.items() if value is not None}
    sources = [known.source, *(f"{name} as given" for name in changed)]
    source = "; ".join(filter(None, sources))
    return replace(known, gpus=gpus, utilisation=utilisation, source=source, **changed)
