"""Machines: alike GPUs, by name with the figures of their vendor's documents, or with figures that are given."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from mmemb_deploy import devices
from mmemb_deploy.devices import GIB, RESERVE
from mmemb_deploy.errors import OptionError, check_known
from mmemb_training.recipes.settings import check_bounds

UTILISATION = 0.35  # of the peak; assumed, and reached or passed by well-tuned training of dense models


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
    name: Machine(
        name=name,
        tflops=device.tflops["bfloat16"],
        memory_gib=device.memory_gib,
        bandwidth=device.bandwidth,
        source=device.source,
    )
    for name, device in devices.DEVICES.items()
    if "bfloat16" in device.tflops and not device.shared  # training computes in it, with the memory to itself
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
