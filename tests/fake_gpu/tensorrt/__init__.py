"""A strict fake of TensorRT for a GPU that is not there (see `fakegpu`); engines are run by ONNX Runtime on the CPU.

It offers only what the real library of its version has, and refuses what the real one's documentation forbids. Of what
a build may ask for it knows stripped and refitted weights, version-compatible plans, and from 11.4 on attention by
lengths. FAKE_TENSORRT names its version.
"""

from tensorrt.api import API, VERSION
from tensorrt.build import (
    Builder,
    BuilderFlag,
    DataType,
    HardwareCompatibilityLevel,
    IAttention,
    IAttentionInputLayer,
    IBuilderConfig,
    ICastLayer,
    IHostMemory,
    ILayer,
    INetworkDefinition,
    IOptimizationProfile,
    IProgressMonitor,
    ITensor,
    ITimingCache,
    LayerType,
    MemoryPoolType,
    NetworkDefinitionCreationFlag,
    OnnxParser,
    ParserError,
    ProfilingVerbosity,
)
from tensorrt.log import ILogger, Logger
from tensorrt.refit import OnnxParserRefitter, Refitter
from tensorrt.run import (
    EngineInspector,
    ExecutionContextAllocationStrategy,
    ICudaEngine,
    IExecutionContext,
    LayerInformationFormat,
    Runtime,
    TensorIOMode,
)

if "CausalMaskKind" in API:
    from tensorrt.build import CausalMaskKind as CausalMaskKind

__version__ = VERSION

__all__ = [
    "Builder",
    "BuilderFlag",
    "DataType",
    "EngineInspector",
    "ExecutionContextAllocationStrategy",
    "HardwareCompatibilityLevel",
    "IAttention",
    "IAttentionInputLayer",
    "IBuilderConfig",
    "ICastLayer",
    "ICudaEngine",
    "IExecutionContext",
    "IHostMemory",
    "ILayer",
    "ILogger",
    "INetworkDefinition",
    "IOptimizationProfile",
    "IProgressMonitor",
    "ITensor",
    "ITimingCache",
    "LayerInformationFormat",
    "LayerType",
    "Logger",
    "MemoryPoolType",
    "NetworkDefinitionCreationFlag",
    "OnnxParser",
    "OnnxParserRefitter",
    "ParserError",
    "ProfilingVerbosity",
    "Refitter",
    "Runtime",
    "TensorIOMode",
    "__version__",
]
