"""The exceptions a caller can meet, as one tree.

MmembError
├── InputError          an input to `encode` cannot be processed (also a ValueError)
├── OptionError         an argument that is not an input is wrong (also a ValueError)
├── BundleError         a bundle cannot be used
│   ├── IntegrityError    a file is missing, differs from its hash, or points outside the bundle
│   ├── SchemaError       the manifest is malformed, or newer than this version reads
│   └── CertificateError  the parity certificate misses its bound
├── BackendError        a backend cannot run here (also a RuntimeError)
│   └── MissingExtraError  an optional dependency is not installed (also an ImportError)
└── ServingError        a request is not served, though nothing is wrong with it
    ├── OverloadError     there is no room for it now
    └── DeadlineError     its deadline passed before there was anything to answer
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any


class MmembError(Exception):
    """Base of every error this package raises on purpose."""

    def __reduce__(self) -> tuple[Callable[..., MmembError], tuple[Any, ...]]:
        """Let other processes have it whole, whatever its class is made of."""
        return _again, (type(self), self.args, self.__dict__)


def _again(kind: type[MmembError], arguments: tuple[Any, ...], attributes: dict[str, Any]) -> MmembError:
    error = kind.__new__(kind, *arguments)
    error.__dict__.update(attributes)
    return error


class InputError(MmembError, ValueError):
    """An input cannot be processed; `index` is its row in the call, `None` outside of a batch."""

    def __init__(self, message: str, *, index: int | None = None) -> None:
        super().__init__(message if index is None else f"input {index}: {message}")
        self.message = message
        self.index = index

    def at(self, index: int) -> InputError:
        """Return the same error, placed at a row of the call."""
        return InputError(self.message, index=index)


class OptionError(MmembError, ValueError):
    """An argument other than an input has a value that cannot be used."""


class BundleError(MmembError):
    """A bundle cannot be used."""


class IntegrityError(BundleError):
    """A bundle's file is missing, was changed, or points outside the bundle."""


class SchemaError(BundleError):
    """A manifest is malformed, or newer than this version reads."""


class CertificateError(BundleError):
    """A bundle's parity certificate misses its bound."""


class BackendError(MmembError, RuntimeError):
    """A backend cannot run on this machine as asked."""


class MissingExtraError(BackendError, ImportError):
    """An optional dependency is missing; the message names the pip command that brings it."""

    def __init__(self, module: str, extra: str) -> None:
        super().__init__(
            f"this needs the package {module!r}, which is not installed: pip install 'mmemb-deploy[{extra}]'"
        )


class ServingError(MmembError):
    """A request is not served, though nothing is wrong with it."""


class OverloadError(ServingError):
    """There is no room for a request now; `reason` is the limit it met, `retry_after` the seconds until it may fit."""

    def __init__(self, message: str, *, reason: str, retry_after: float) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after = retry_after


class DeadlineError(ServingError):
    """A request's deadline passed before there was anything to answer."""


def check_known(kind: str, name: str, known: Iterable[str]) -> None:
    """Raise OptionError, naming the nearest known name, unless `name` is known."""
    known = list(known)
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise OptionError(f"{kind} {name!r} is not known: choose from {', '.join(known)}{hint}")
