"""Which engine runs a bundle."""

from __future__ import annotations

from mmemb_deploy.backends.protocol import Backend
from mmemb_deploy.errors import OptionError, check_known

BACKENDS = ("auto", "onnxruntime", "onnxruntime-cuda", "tensorrt", "tensorrt-rtx")


def choose_backend(name: str, threads: int | None) -> Backend:
    """Return the backend of that name; "auto" is ONNX Runtime on the CPU. Raises OptionError, MissingExtraError."""
    check_known("backend", name, BACKENDS)
    if name in ("auto", "onnxruntime"):
        from mmemb_deploy.backends.onnxruntime import OnnxRuntime

        return OnnxRuntime(threads)
    if threads is not None:
        raise OptionError(f"threads is {threads}: it bounds threads of the CPU, and {name} runs on a GPU")
    if name == "onnxruntime-cuda":
        from mmemb_deploy.backends.onnxruntime_cuda import OnnxRuntimeCuda

        return OnnxRuntimeCuda()
    from mmemb_deploy.backends.tensorrt.engine import TensorRT

    return TensorRT(name)
