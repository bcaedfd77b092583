"""Kernels that TensorRT for RTX compiles are kept for the next process, with stand-ins for its objects."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmemb_deploy.backends.tensorrt.api import can_record, runtime_config, save_runtime_cache


class Cache:
    """Holds what it was given, unless another GPU left it."""

    def __init__(self) -> None:
        self.kernels = b""

    def deserialize(self, kernels: bytes) -> bool:
        self.kernels = b"" if kernels.startswith(b"other") else kernels
        return bool(self.kernels)

    def serialize(self) -> bytes:
        return self.kernels


class Config:
    """Of an engine's contexts."""

    def __init__(self) -> None:
        self.cache: Any = None

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> Cache:
        return Cache()

    def set_runtime_cache(self, cache: Cache) -> bool:
        self.cache = cache
        return True

    def get_runtime_cache(self) -> Cache:
        assert isinstance(self.cache, Cache)
        return self.cache


LIBRARY: Any = SimpleNamespace(
    name="tensorrt-rtx",
    trt=SimpleNamespace(
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user"),
        DynamicShapesKernelSpecializationStrategy=SimpleNamespace(EAGER="eager", LAZY="lazy"),
    ),
)
ENGINE = SimpleNamespace(create_runtime_config=Config)


def test_runs_that_are_recorded_share_their_kernels_with_those_that_are_not() -> None:
    once = runtime_config(LIBRARY, ENGINE, b"kernels", eager=False)
    again = runtime_config(LIBRARY, ENGINE, b"", eager=True, shared=once)
    assert (once.dynamic_shapes_kernel_specialization_strategy, once.strategy) == ("lazy", "user")
    assert again.dynamic_shapes_kernel_specialization_strategy == "eager"
    assert again.cache is once.cache
    assert once.cache.kernels == b"kernels"


def test_kernels_are_written_where_there_are_new_ones(tmp_path: Path) -> None:
    path = tmp_path / "decoder.kernels"
    config = runtime_config(LIBRARY, ENGINE, b"other kernels", eager=False)
    assert config.cache.kernels == b""  # another GPU's
    config.cache.kernels = b"kernels"
    save_runtime_cache(config, path)
    assert path.read_bytes() == b"kernels"
    before = path.stat().st_ino
    save_runtime_cache(config, path)
    assert path.stat().st_ino == before
    config.cache.kernels += b", and more"
    save_runtime_cache(config, path)
    assert path.read_bytes() == b"kernels, and more"


def test_nothing_is_written_where_the_engines_may_only_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    config = runtime_config(LIBRARY, ENGINE, b"kernels", eager=False)
    save_runtime_cache(config, tmp_path / "decoder.kernels")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("capturable", [True, False])
def test_only_tensorrt_for_rtx_is_asked_whether_a_run_can_be_recorded(capturable: bool) -> None:
    context = SimpleNamespace(is_stream_capturable=lambda stream: capturable and stream == 7)
    assert can_record(LIBRARY, context, 7) is capturable
    assert can_record(SimpleNamespace(name="tensorrt"), SimpleNamespace(), 7)  # type: ignore[arg-type]
