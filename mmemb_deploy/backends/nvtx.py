"""Ranges that Nsight Systems draws beside the GPU's kernels, where the environment asks for them: MMEMB_NVTX=1."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module
from typing import Any, Final

from mmemb_deploy.errors import MissingExtraError, OptionError

VARIABLE: Final = "MMEMB_NVTX"
DOMAIN: Final = "mmemb"  # the row that the ranges lie in


def marked(name: str) -> AbstractContextManager[Any]:
    """Return a block that is drawn as a range of this name, or one that does nothing where nobody asked.

    Raises OptionError for a value of MMEMB_NVTX that is neither 0 nor 1, MissingExtraError where 1 finds no nvtx.
    """
    nvtx = library()
    return nullcontext() if nvtx is None else nvtx.annotate(name, domain=DOMAIN)


@cache
def library() -> Any | None:
    """Return the package nvtx, None where ranges are off; the environment is read once."""
    value = os.environ.get(VARIABLE, "0")
    if value not in ("0", "1"):
        raise OptionError(f"{VARIABLE} is {value!r}: set it to 1 to mark ranges, to 0 to mark none")
    if value == "0":
        return None
    try:
        return import_module("nvtx")
    except ModuleNotFoundError as error:
        raise MissingExtraError("nvtx", "nvtx") from error
