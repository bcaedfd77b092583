"""Ranges are marked where MMEMB_NVTX=1 asks for them, by a fake nvtx that writes down what it hears."""

import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from mmemb_deploy.backends import nvtx
from mmemb_deploy.errors import MissingExtraError, OptionError


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the library heard, in order; the environment is read anew in every test."""
    events: list[str] = []

    @contextmanager
    def annotate(message: str, *, domain: str) -> Generator[None]:
        events.append(f"{domain}: {message} begins")
        try:
            yield
        finally:
            events.append(f"{domain}: {message} ends")

    monkeypatch.setitem(sys.modules, "nvtx", SimpleNamespace(annotate=annotate))
    nvtx.library.cache_clear()
    yield events
    nvtx.library.cache_clear()


def test_ranges_nest_in_the_order_of_the_blocks(heard: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMEMB_NVTX", "1")
    with nvtx.marked("prefill"), nvtx.marked("vision"):
        heard.append("a kernel")
    assert heard == [
        "mmemb: prefill begins",
        "mmemb: vision begins",
        "a kernel",
        "mmemb: vision ends",
        "mmemb: prefill ends",
    ]


@pytest.mark.parametrize("value", [None, "0"])
def test_nothing_is_marked_unless_it_is_asked_for(
    value: str | None, heard: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MMEMB_NVTX", raising=False)
    if value is not None:
        monkeypatch.setenv("MMEMB_NVTX", value)
    with nvtx.marked("prefill"):
        heard.append("a kernel")
    assert heard == ["a kernel"]


@pytest.mark.usefixtures("heard")
def test_a_missinglibrary_and_an_odd_value_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMEMB_NVTX", "1")
    monkeypatch.setitem(sys.modules, "nvtx", None)
    with pytest.raises(MissingExtraError, match=r"mmemb-deploy\[nvtx\]"):
        nvtx.marked("decode")
    monkeypatch.setenv("MMEMB_NVTX", "yes")
    with pytest.raises(OptionError, match="MMEMB_NVTX is 'yes'"):
        nvtx.marked("decode")
