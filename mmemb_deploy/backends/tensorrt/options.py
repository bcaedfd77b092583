"""What a user may ask of an engine's build beside its shapes; all of it is part of the engine's key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, get_args

from mmemb_deploy.errors import OptionError, check_known

Hardware = Literal["exact", "capability", "ampere+"]
Profiling = Literal["none", "names", "detailed"]
Attention = Literal["mask", "lengths"]

LEVELS: Final = range(6)


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Options of a build. Raises OptionError, naming the option, for a value that no library takes."""

    workspace: int | None = None
    """Most MiB of scratch memory that a layer may use; None is all that the GPU has."""

    optimization_level: int | None = None
    """From 0, which builds fastest, to 5, which searches longest; None is the library's own."""

    hardware: Hardware = "exact"
    """What runs the engine: this GPU's model, every GPU of its compute capability, or every GPU from Ampere on."""

    version_compatible: bool = False
    """Whether later releases of the library's major version load the engine too."""

    refit: bool = False
    """Whether the engine's weights can be exchanged."""

    strip: bool = False
    """Whether the engine leaves its weights out, and takes them from the bundle's when it is loaded."""

    profiling: Profiling = "detailed"
    """What the engine tells of its layers: nothing, their names, or all that the inspector can print."""

    attention: Attention = "mask"
    """How attention over the cache's slots is told which are filled: by a mask in the graph, or by a row's length.

    "lengths" is for libraries whose attention takes them (TensorRT 11, TensorRT for RTX from 1.7 on). Which is faster,
    and whether a release masks by lengths rightly, was not seen on a GPU: the check of the engine decides.
    """

    def __post_init__(self) -> None:
        if self.workspace is not None and self.workspace < 1:
            raise OptionError(f"workspace is {self.workspace}: pass MiB, at least 1")
        if self.optimization_level is not None and self.optimization_level not in LEVELS:
            raise OptionError(f"optimization level is {self.optimization_level}: it goes from 0 to {LEVELS[-1]}")
        check_known("hardware", self.hardware, get_args(Hardware))
        check_known("profiling", self.profiling, get_args(Profiling))
        check_known("attention", self.attention, get_args(Attention))

    def trtexec(self) -> dict[str, str | int | bool]:
        """Return trtexec's flags for what is asked, without their dashes."""
        verbosities = {"none": "none", "names": "layer_names_only", "detailed": "detailed"}
        levels = {"exact": None, "capability": "sameComputeCapability", "ampere+": "ampere+"}
        flags = {
            "memPoolSize": None if self.workspace is None else f"workspace:{self.workspace}",
            "builderOptimizationLevel": self.optimization_level,
            "hardwareCompatibilityLevel": levels[self.hardware],
            "versionCompatible": self.version_compatible,
            "refit": self.refit,
            "stripWeights": self.strip,
            "profilingVerbosity": verbosities[self.profiling],
        }
        return {name: value for name, value in flags.items() if value is not None and value is not False}
