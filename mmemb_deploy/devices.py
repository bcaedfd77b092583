"""NVIDIA GPUs by name, with the figures that their vendor publishes: what plans of training and of deployment stand on.

Peaks are dense and accumulate in float32: where a document prints a figure with sparsity, half of it. float32 is that
of the CUDA cores, since engines are built without TF32. A document's GB of memory count as GiB, which is how drivers
report them within a percent or two; RESERVE covers the difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mmemb_deploy.errors import check_known

GIB = 2**30
RESERVE = 0.1  # share of memory, for the driver's context, the libraries' own buffers and fragments; assumed
SYSTEM_GIB = 1.5  # where CPU and GPU share their memory: for the operating system, Python and the libraries; assumed
BANDWIDTH_USE = 0.6  # share of its bandwidth that decoding reaches; assumed
SINCE = {"bfloat16": (8, 0), "int4": (8, 0), "fp8": (8, 9)}
"""The compute capability from which on TensorRT takes a precision: support matrices of TensorRT for RTX and, for int4
weights, of NVIDIA Model Optimizer."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """One GPU. `tflops` holds its peaks by the precision that is multiplied; one that is missing is not known."""

    name: str
    source: str  # title of the document that publishes the figures, and what it prints
    capability: tuple[int, int]
    memory_gib: float
    bandwidth: float  # of its memory, in GB/s
    tflops: Mapping[str, float]
    shared: bool = False  # its memory with the CPU

    @property
    def target(self) -> str:
        """Return the compute capability as libraries spell it, such as "sm89"."""
        return f"sm{self.capability[0]}{self.capability[1]}"

    @property
    def usable_bytes(self) -> float:
        """Return the memory that may be filled."""
        return (self.memory_gib * (1 - RESERVE) - (SYSTEM_GIB if self.shared else 0)) * GIB

    def takes(self, precision: str) -> bool:
        """Return whether weights or activations can be in a precision."""
        return self.capability >= SINCE.get(precision, (0, 0))


def _tensor(float32: float, half: float, int8: float | None = None, fp8: float | None = None) -> dict[str, float]:
    """Return peaks; both half precisions have one rate in all tensor cores that have both."""
    peaks = {"float32": float32, "float16": half, "bfloat16": half, "int8": int8, "fp8": fp8}
    return {name: peak for name, peak in peaks.items() if peak is not None}


_ORIN = (
    "rates of a tensor core as in NVIDIA's Deep-Learning-Accelerator-SW README, Jetson AGX Orin 64GB: 171 sparse INT8 "
    "TOPS of its GPU alone, at 1.3 GHz; half of them in half precision"
)

DEVICES = {
    device.name: device
    for device in (
        Device(
            name="jetson-orin-nano",
            source="Jetson Orin Nano Super Developer Kit data sheet, 8GB: 67 sparse INT8 TOPS, 102 GB/s, 1,024 cores, "
            f"1,020 MHz; {_ORIN}",
            capability=(8, 7),
            memory_gib=8,
            bandwidth=102,
            tflops=_tensor(2.1, 16.75, 33.5),
            shared=True,
        ),
        Device(
            name="jetson-orin-nx",
            source="NVIDIA Jetson Orin NX Series Modules Data Sheet, 16GB, without super mode: 1,024 cores, 918 MHz, "
            f"102.4 GB/s; {_ORIN}",
            capability=(8, 7),
            memory_gib=16,
            bandwidth=102.4,
            tflops=_tensor(1.9, 15, 30),
            shared=True,
        ),
        Device(
            name="jetson-agx-orin",
            source=f"NVIDIA Jetson AGX Orin Series Technical Brief, 64GB: FP32 5.3 TFLOPS, 204.8 GB/s; {_ORIN}",
            capability=(8, 7),
            memory_gib=64,
            bandwidth=204.8,
            tflops=_tensor(5.3, 42.7, 85.5),
            shared=True,
        ),
        Device(
            name="jetson-thor",
            source="NVIDIA Jetson Thor Series Modules Data Sheet, T5000: 1,035 sparse FP8 TFLOPS, 128 GB, 273 GB/s, "
            "2,560 cores at 1.575 GHz; half precision at half the rate of FP8, as in Blackwell's data sheets",
            capability=(11, 0),
            memory_gib=128,
            bandwidth=273,
            tflops=_tensor(8.1, 258.75, fp8=517.5),
            shared=True,
        ),
        Device(
            name="rtx-4060",
            source="GeForce RTX 4060 specifications: FP32 15.1 TFLOPS, 242 sparse INT8 TOPS, 272 GB/s; the others in "
            "the ratios of NVIDIA Ada GPU Architecture",
            capability=(8, 9),
            memory_gib=8,
            bandwidth=272,
            tflops=_tensor(15.1, 30.2, 121, 60.5),
        ),
        Device(
            name="rtx-4090",
            source="NVIDIA Ada GPU Architecture, GeForce RTX 4090: FP32 82.6, BF16 165.2 and FP8 330.3 TFLOPS with "
            "FP32 accumulate, INT8 660.6 TOPS, 1,008 GB/s",
            capability=(8, 9),
            memory_gib=24,
            bandwidth=1008,
            tflops=_tensor(82.6, 165.2, 660.6, 330.3),
        ),
        Device(
            name="rtx-5090",
            source="NVIDIA RTX Blackwell GPU Architecture, GeForce RTX 5090: FP32 104.8, BF16 209.5 and FP8 419 TFLOPS "
            "with FP32 accumulate, INT8 838 TOPS, 1,792 GB/s",
            capability=(12, 0),
            memory_gib=32,
            bandwidth=1792,
            tflops=_tensor(104.8, 209.5, 838, 419),
        ),
        Device(
            name="l4",
            source="NVIDIA L4 Tensor Core GPU data sheet: FP32 30.3, BFLOAT16 242 and FP8 485 TFLOPS with sparsity, "
            "INT8 485 TOPS with sparsity, 300 GB/s",
            capability=(8, 9),
            memory_gib=24,
            bandwidth=300,
            tflops=_tensor(30.3, 121, 242.5, 242.5),
        ),
        Device(
            name="l40s",
            source="NVIDIA L40S data sheet: FP32 91.6, BFLOAT16 362.05 and FP8 733 TFLOPS, INT8 733 TOPS, 864 GB/s",
            capability=(8, 9),
            memory_gib=48,
            bandwidth=864,
            tflops=_tensor(91.6, 362.05, 733, 733),
        ),
        Device(
            name="a10",
            source="NVIDIA A10 Tensor Core GPU data sheet: FP32 31.2 and BFLOAT16 125 TFLOPS, INT8 250 TOPS, 600 GB/s",
            capability=(8, 6),
            memory_gib=24,
            bandwidth=600,
            tflops=_tensor(31.2, 125, 250),
        ),
        Device(
            name="t4",
            source="NVIDIA Turing GPU Architecture, Tesla T4: FP32 8.1 and FP16 65 TFLOPS, INT8 130 TOPS, 320 GB/s",
            capability=(7, 5),
            memory_gib=16,
            bandwidth=320,
            tflops={"float32": 8.1, "float16": 65, "int8": 130},
        ),
        Device(
            name="a100-40",
            source="NVIDIA A100 data sheet, 40GB: FP32 19.5 and BFLOAT16 312 TFLOPS, INT8 624 TOPS, 1,555 GB/s",
            capability=(8, 0),
            memory_gib=40,
            bandwidth=1555,
            tflops=_tensor(19.5, 312, 624),
        ),
        Device(
            name="a100-80",
            source="NVIDIA A100 data sheet, 80GB SXM: FP32 19.5 and BFLOAT16 312 TFLOPS, INT8 624 TOPS, 2,039 GB/s",
            capability=(8, 0),
            memory_gib=80,
            bandwidth=2039,
            tflops=_tensor(19.5, 312, 624),
        ),
        Device(
            name="h100",
            source="NVIDIA H100 data sheet, SXM: FP32 67, BFLOAT16 1,979 and FP8 3,958 TFLOPS with sparsity, INT8 "
            "3,958 TOPS with sparsity, 3.35 TB/s",
            capability=(9, 0),
            memory_gib=80,
            bandwidth=3350,
            tflops=_tensor(67, 989.5, 1979, 1979),
        ),
        Device(
            name="h200",
            source="NVIDIA H200 data sheet, SXM: FP32 67, BFLOAT16 1,979 and FP8 3,958 TFLOPS with sparsity, INT8 "
            "3,958 TOPS with sparsity, 4.8 TB/s",
            capability=(9, 0),
            memory_gib=141,
            bandwidth=4800,
            tflops=_tensor(67, 989.5, 1979, 1979),
        ),
        Device(
            name="b200",
            source="NVIDIA GB200 NVL72 and HGX B200 data sheet, per GPU of HGX B200: FP32 75 TFLOPS, BF16 4.5 and FP8 "
            "9 PFLOPS with sparsity, INT8 9 POPS with sparsity, 180 GB, 7.7 TB/s",
            capability=(10, 0),
            memory_gib=180,
            bandwidth=7700,
            tflops=_tensor(75, 2250, 4500, 4500),
        ),
    )
}


def find_device(name: str) -> Device:
    """Return a device of the table; raises OptionError, naming the nearest, for any other name."""
    check_known("device", name, DEVICES)
    return DEVICES[name]
