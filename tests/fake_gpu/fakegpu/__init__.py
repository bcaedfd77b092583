"""A strict fake of an NVIDIA GPU, its driver and the CUDA runtime; `tensorrt` beside it is the library's.

With this folder on PYTHONPATH, a Python process has the GPU (`sitecustomize`); in a process that runs already,
`plugged_in` gives it one for a while. Functions of the CUDA runtime are called on NVIDIA's own binding first, which
refuses arguments of a wrong type before it finds that there is no driver.
"""

from __future__ import annotations

import ctypes
import importlib
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from fakegpu.machine import CudaError, Machine
from fakegpu.memory import BASE, MisuseError
from fakegpu.runtime import Driver, Runtime

DRIVER = "libcuda.so.1"
WRAPPED = "wrapped by fakegpu"
KEPT = ("cudaGetErrorString", "cudaGetErrorName")  # of the real binding, which needs no driver for them

_plugged: list[Machine] = []


def machine() -> Machine:
    """Return the GPU that is plugged in. Raises RuntimeError where there is none."""
    if not _plugged:
        raise RuntimeError("no GPU is plugged in")
    return _plugged[-1]


@contextmanager
def plugged_in(gpu: Machine) -> Generator[Machine]:
    """Give this process a GPU meanwhile."""
    _wrap()
    _plugged.append(gpu)
    try:
        yield gpu
    finally:
        _plugged.remove(gpu)


def _wrap() -> None:
    """Put the fake's functions over the driver's loader and the binding's functions, once in a process."""
    real = importlib.import_module("cuda.bindings.runtime")
    if WRAPPED in vars(real):
        return
    if int(real.cudaGetDeviceCount()[0]) == 0:
        raise RuntimeError("there is a GPU here: the fake would stand before it")
    setattr(real, WRAPPED, True)
    names = [name for name in dir(real) if name.startswith("cuda") and _is_function(getattr(real, name))]
    for name in names:
        if name not in KEPT:
            setattr(real, name, _function(name, getattr(real, name), real))
    init = ctypes.CDLL.__init__

    def load(self: Any, name: str | None, *args: Any, **options: Any) -> None:
        if name != DRIVER or not _plugged:
            return init(self, name, *args, **options)
        driver = Driver(machine())
        for function in dir(driver):
            if function.startswith("cu"):
                setattr(self, function, getattr(driver, function))
        return None

    ctypes.CDLL.__init__ = load  # type: ignore[method-assign]


def _is_function(value: Any) -> bool:
    return type(value).__name__ in ("builtin_function_or_method", "cython_function_or_method")


def _function(name: str, real_function: Callable[..., Any], real: Any) -> Callable[..., Any]:
    status = real.cudaError_t

    @wraps(real_function)
    def call(*args: Any) -> tuple[Any, ...]:
        alive = _plugged[-1].first if _plugged else BASE << 1
        if any(hasattr(each, "__int__") and BASE <= int(each) < alive for each in args):
            return (status.cudaSuccess,)  # memory and streams of a GPU that is gone, by a late finalizer
        found: tuple[Any, ...] = real_function(*args)
        if not _plugged:
            return found
        gpu, empty = machine(), found[1:]
        time.sleep(0)  # the binding lets other threads run
        with gpu.lock:
            function = getattr(Runtime(gpu, real), name, None)
            if function is None:
                raise NotImplementedError(f"the fake GPU has no {name}")
            try:
                value = function(*args)
            except CudaError as error:
                if str(error) != "cudaErrorNotReady" and not name.endswith("LastError"):
                    gpu.errors[threading.get_ident()] = str(error)
                return (getattr(status, str(error)), *empty)
            except MisuseError as error:
                gpu.misuses.append(str(error))
                raise
        if not empty:
            return (status.cudaSuccess,)
        return (status.cudaSuccess, *(value if isinstance(value, tuple) else (value,)))

    return call
