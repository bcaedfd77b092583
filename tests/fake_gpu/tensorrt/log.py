"""The logger that every object of TensorRT reports to."""

from __future__ import annotations

import enum
from typing import Any

from tensorrt.api import Strict, listed


class Severity(enum.IntEnum):
    """How bad a message is."""

    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


@listed
class ILogger(Strict):
    """To be derived from."""

    Severity = Severity
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = Severity

    def log(self, severity: Any, msg: str) -> None:
        raise NotImplementedError


@listed
class Logger(ILogger):
    """Prints what is at least as bad as `min_severity`."""

    min_severity: Any = Severity.WARNING

    def __init__(self, min_severity: Any = Severity.WARNING) -> None:
        self.min_severity = min_severity

    def log(self, severity: Any, msg: str) -> None:
        if severity <= self.min_severity:
            print(f"[TRT] {msg}")


def report(logger: ILogger, message: str) -> None:
    """Tell an error."""
    logger.log(Severity.ERROR, message)
