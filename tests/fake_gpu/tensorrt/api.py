"""Keeps the fake `tensorrt` to what the real one offers, by lists of classes and members read from the binding."""

from __future__ import annotations

import enum
import json
import os
from pathlib import Path
from typing import Any, TypeVar

VERSION = os.environ.get("FAKE_TENSORRT", "10.16.1")
LISTS = Path(__file__).parents[2] / "mmemb_engines"


def release(version: str) -> tuple[int, ...]:
    """Return a version's numbers, which compare as releases do."""
    return tuple(map(int, version.split(".")))


def _members() -> dict[str, list[str]]:
    """Return the list of this version, or that of the last one before it that there is."""
    known = {release(path.stem.rpartition("_")[2]): path for path in LISTS.glob("api_tensorrt_[0-9]*.json")}
    nearest = max(each for each in known if each <= release(VERSION))
    members: dict[str, list[str]] = json.loads(known[nearest].read_text())
    return members


API = _members()

T = TypeVar("T", bound=type)


class Strict:
    """An object of the binding: it takes no attribute that its class does not have."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and not hasattr(type(self), name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        super().__setattr__(name, value)


def listed(cls: T) -> T:
    """Refuse a class that offers what the real one of this version does not."""
    lacking = [name for name in vars(cls) if not name.startswith("_") and name not in API[cls.__name__]]
    if lacking:
        raise TypeError(f"TensorRT {VERSION} has no {cls.__name__}.{' or '.join(lacking)}")
    return cls


def enumeration(name: str) -> Any:
    """Return an enumeration with exactly the members of the real one; their values are not the real ones."""
    members = [member for member in API[name] if not member.startswith("_")]
    return enum.IntEnum(name, {member: index for index, member in enumerate(members)})
