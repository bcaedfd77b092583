"""A strict fake of TensorRT for a GPU that is not there (see `fakegpu`); engines are run by ONNX Runtime on the CPU.

It offers only what the real library of its version has, and refuses what the real one's documentation forbids.
"""

from fakegpu import api
from tensorrt.build import (
    Builder,
    BuilderFlag,
    DataType,
    HardwareCompatibilityLevel,
    IAttention,
    IAttentionInputLayer,
    IBuilderConfig,
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
from tensorrt.run import (
    EngineInspector,
    ExecutionContextAllocationStrategy,
    ICudaEngine,
    IExecutionContext,
    LayerInformationFormat,
    Runtime,
    TensorIOMode,
)

__version__ = api.VERSION

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
    "ParserError",
    "ProfilingVerbosity",
    "Runtime",
    "TensorIOMode",
    "__version__",
]
