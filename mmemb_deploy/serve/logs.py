"""Logs as lines of JSON on standard error. They say of a request how it went, and nothing that it said."""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime
from typing import Any

import orjson

FIELDS = "fields"  # of a record: more for its line, by `extra={FIELDS: {...}}`


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message, a record's fields, and its traceback."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


def log_json(level: str) -> None:
    """Send what this process logs to standard error as JSON, from `level` on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for talkative in ("httpx", "httpcore"):  # they log the addresses of images, which are a request's content
        logging.getLogger(talkative).setLevel(logging.WARNING)
