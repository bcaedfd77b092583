"""Stand in for CUDA's libraries where there is no GPU: enough for onnxruntime-gpu to open graphs, and to say what it
would run where. Memory is the host's, kernels do nothing. It takes gcc, nm, and the packages of the extra `gpu`.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path

OWN = {  # functions that must do more than to succeed; `void **` and the like as CUDA declares them
    "cudaGetDeviceCount": "(int *n) { *n = 1; return 0; }",
    "cudaGetDevice": "(int *d) { *d = 0; return 0; }",
    "cudaGetDeviceProperties": """(struct cudaDeviceProp *p) {
        memset(p, 0, sizeof *p); strcpy(p->name, "none"); p->totalGlobalMem = 64ul << 30; p->major = 9;
        p->multiProcessorCount = 132; p->maxThreadsPerBlock = 1024; p->warpSize = 32; p->sharedMemPerBlock = 49152;
        p->sharedMemPerBlockOptin = 232448; p->maxThreadsPerMultiProcessor = 2048; return 0; }""",
    "cudaMemGetInfo": "(size_t *f, size_t *t) { *f = *t = 64ul << 30; return 0; }",
    "cudaDriverGetVersion": "(int *v) { *v = 13000; return 0; }",
    "cudaRuntimeGetVersion": "(int *v) { *v = 13000; return 0; }",
    "cudaMemcpy": "(void *d, void *s, size_t n) { memmove(d, s, n); return 0; }",
    "cudaMemset": "(void *d, int v, size_t n) { memset(d, v, n); return 0; }",
    "cudaFree": "(void *p) { free(p); return 0; }",
    "cudaGetErrorString": '(int e) { return (long)"stub"; }',
    "cudaGetErrorName": '(int e) { return (long)"stub"; }',
    "__cudaRegisterFatBinary": "(void *p) { return (long)malloc(8); }",
}
OWN["cudaMemcpyAsync"], OWN["cudaMemsetAsync"] = OWN["cudaMemcpy"], OWN["cudaMemset"]
OWN["cudaFreeHost"] = OWN["cudaFree"]
MADE = "(void **p, size_t n) { return posix_memalign(p, 256, n + 1) ? 2 : 0; }"
OWN.update(dict.fromkeys(("cudaMalloc", "cudaMallocHost", "cudaHostAlloc"), MADE))
HANDLE = "(void **p) { *p = calloc(1, 256); return 0; }"
OWN.update(dict.fromkeys(("cudaStreamCreate", "cudaStreamCreateWithFlags", "cudaEventCreate"), HANDLE))
OWN.update(dict.fromkeys(("cudaEventCreateWithFlags", "cudaMemPoolCreate"), HANDLE))
OWN.update(dict.fromkeys(("cublasCreate_v2", "cublasLtCreate"), HANDLE))
WORDS = (  # of CUDA's header, which come with its compiler
    "__device_builtin__",
    "CUDARTAPI",
    "__host__",
    "__device__",
    "__builtin_align__(n) __attribute__((aligned(n)))",
    "__align__(n) __attribute__((aligned(n)))",
)
LIBRARIES = ("libcuda.so.1", "libcudart.so.13", "libcublasLt.so.13", "libcublas.so.13", "libcurand.so.10")


def load() -> None:
    """Put the stand-ins into this process, before onnxruntime looks for CUDA."""
    provider = _package("onnxruntime") / "capi" / "libonnxruntime_providers_cuda.so"
    listed = subprocess.run(["nm", "-D", "-u", str(provider)], capture_output=True, text=True, check=True)
    symbols = [line.split()[-1] for line in listed.stdout.splitlines()]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "crt").mkdir()
        (folder / "crt/host_defines.h").write_text("".join(f"#define {word}\n" for word in WORDS))
        for library in LIBRARIES:
            wanted = [symbol.split("@")[0] for symbol in symbols if symbol.endswith(f"@{library}")]
            if library == "libcuda.so.1":  # whose symbols have no version
                wanted = [symbol for symbol in symbols if symbol.startswith("cu") and "@" not in symbol]
            ctypes.CDLL(str(_built(folder, library, wanted)), mode=ctypes.RTLD_GLOBAL)


def _built(folder: Path, library: str, functions: list[str]) -> Path:
    lines = ["#define _GNU_SOURCE", "#include <stdlib.h>", "#include <string.h>", '#include "driver_types.h"']
    lines += [f"long {name}{OWN.get(name, '(void) { return 0; }')}" for name in functions]
    (folder / "stub.c").write_text("\n".join(lines))
    (folder / "stub.map").write_text(f"{library} {{ global: *; }};")
    includes = [f"-I{folder}", f"-I{_package('nvidia') / 'cu13/include'}"]
    named = f"-Wl,-soname,{library},--version-script={folder / 'stub.map'}"
    target = folder / library
    subprocess.run(
        ["gcc", "-w", "-shared", "-fPIC", *includes, named, "-o", str(target), str(folder / "stub.c")], check=True
    )
    return target


def _package(name: str) -> Path:
    found = find_spec(name)
    assert found is not None, f"{name} is not installed"
    assert found.submodule_search_locations
    return Path(next(iter(found.submodule_search_locations)))
