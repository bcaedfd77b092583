"""Which engine runs a bundle: the one that is named, or the best that this bundle and this machine really have."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Final

from mmemb_deploy.backends.cuda import Gpu, probe
from mmemb_deploy.backends.placement import check_kernels
from mmemb_deploy.backends.protocol import Backend
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.errors import BackendError, MissingExtraError, OptionError, check_known

CPU: Final = "onnxruntime"
CUDA: Final = "onnxruntime-cuda"
TENSORRTS: Final = ("tensorrt", "tensorrt-rtx")
BACKENDS: Final = ("auto", CPU, CUDA, *TENSORRTS)


def choose_backend(name: str, bundle: Bundle, threads: int | None, device: int = 0) -> tuple[Backend, str]:
    """Return the backend of that name, or the one that "auto" takes for a bundle, and why.

    "auto" takes verified TensorRT engines for the GPU of index `device`, else ONNX Runtime on that GPU, and the CPU
    where there is no GPU or the bundle's graphs are the CPU's. Raises OptionError for an unknown name, threads beside a
    GPU or the index of no GPU, BackendError where nothing here runs the bundle or where a GPU would lie idle,
    MissingExtraError.
    """
    check_known("backend", name, BACKENDS)
    name, why = _best(bundle, device) if name == "auto" else (name, "as asked")
    if name == CPU:
        from mmemb_deploy.backends.onnxruntime import OnnxRuntime

        if device != 0:
            raise OptionError(f"device is {device}: it is the index of a GPU, and {name} runs on the CPU ({why})")
        return OnnxRuntime(threads), why
    if threads is not None:
        raise OptionError(f"threads is {threads}: it bounds threads of the CPU, and {name} runs on a GPU")
    if name == CUDA:
        from mmemb_deploy.backends.onnxruntime_cuda import OnnxRuntimeCuda

        return OnnxRuntimeCuda(device), why
    from mmemb_deploy.backends.tensorrt.backend import TensorRT

    return TensorRT(name, device), why


def _best(bundle: Bundle, device: int) -> tuple[str, str]:
    """Return the best backend's name and why; raise BackendError rather than run on less than there is."""
    if bundle.manifest.fused:
        return CPU, "its graphs are fused for the CPU"
    try:
        gpu = probe(device=device)
    except BackendError as error:
        return CPU, f"no GPU here: {error}"
    missing: dict[str, str] = {}
    for library in TENSORRTS:
        try:
            _find_engines(bundle, library, gpu)
        except BackendError as error:  # a missing package among them
            missing[library] = str(error)
        else:
            return library, f"its engines for {gpu.name} are built and verified"
    try:
        _check_cuda(bundle)
    except BackendError as error:
        missing[CUDA] = str(error)
    else:
        return CUDA, f"ONNX Runtime runs on {gpu.name}, for which no engine is built"
    reasons = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
    raise BackendError(
        f"{gpu.name} is here, and nothing runs {bundle.folder} on it ({reasons}). Mend one of these, or pass backend="
        f"{CPU!r} to run it on the CPU"
    )


def _find_engines(bundle: Bundle, library: str, gpu: Gpu) -> None:
    """Raise BackendError unless verified engines of a library are there for a GPU."""
    from mmemb_deploy.backends.tensorrt.api import load_library
    from mmemb_deploy.backends.tensorrt.backend import engines_for
    from mmemb_deploy.backends.tensorrt.files import verified_set

    verified_set(bundle, engines_for(load_library(library), gpu))


def _check_cuda(bundle: Bundle) -> None:
    """Raise BackendError unless ONNX Runtime has CUDA and kernels for the bundle's graphs."""
    if bundle.manifest.engines_of is not None:
        raise BackendError("the bundle holds TensorRT engines without their graphs")
    if find_spec("onnxruntime") is None:
        raise MissingExtraError("onnxruntime", "gpu")
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise BackendError(
            "the installed onnxruntime is for the CPU: pip uninstall onnxruntime onnxruntime-gpu, then pip install "
            "'mmemb-deploy[gpu]'"
        )
    check_kernels(bundle)
