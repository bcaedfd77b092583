"""Recipe files: TOML over the TOML that it extends, checked into a RunRecipe.

A recipe says only what it changes: `extends = "NAME"` takes the rest from another recipe of this package. Where a
setting is public, and which are ours, is written beside it in base.toml.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from mmemb_deploy.errors import OptionError, check_known
from mmemb_training.recipes.settings import RunRecipe

PACKAGE = "mmemb_training.recipes"  # which holds the recipes
BASE = "base"  # what the packaged recipes extend; not a recipe itself: it names no model
UNKNOWN = "unexpected_keyword_argument"


def recipe_names() -> list[str]:
    """Return the names of the packaged recipes."""
    files = (item.name for item in resources.files(PACKAGE).iterdir())
    names = sorted(name.removesuffix(".toml") for name in files if name.endswith(".toml"))
    return [name for name in names if name != BASE]


def load_recipe(name_or_path: str | Path) -> RunRecipe:
    """Load a packaged recipe by name, or a file that ends in `.toml`.

    Raises OptionError naming the key, its value and its limit, or the nearest known name of an unknown key.
    """
    path = Path(name_or_path)
    if path.suffix == ".toml":
        if not path.is_file():
            raise OptionError(f"recipe {str(path)!r} does not exist")
        label, text = path.stem, path.read_text()
    else:
        label = str(name_or_path)
        check_known("recipe", label, recipe_names())
        text = _packaged(label)
    settings = {"name": label, **_settings(text, str(name_or_path))}
    try:  # as JSON, whose lists are tuples and whose types are otherwise held strictly
        return TypeAdapter(RunRecipe).validate_json(json.dumps(settings, default=str))
    except ValidationError as error:
        first = min(error.errors(), key=lambda one: one["type"] != UNKNOWN)  # a typo explains what is missing
        raise OptionError(f"recipe {str(name_or_path)!r}: {_explain(first)}") from error


def _packaged(name: str) -> str:
    return (resources.files(PACKAGE) / f"{name}.toml").read_text(encoding="utf-8")


def _settings(text: str, label: str) -> dict[str, Any]:
    """Return a recipe's tables over those of what it extends."""
    try:
        own = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise OptionError(f"recipe {label!r} is not TOML: {error}") from error
    base = own.pop("extends", None)
    if "name" in own:
        raise OptionError(f"recipe {label!r}: a recipe is named by its file, remove the key 'name'")
    if base is None:
        return own
    check_known(f"recipe {label!r}: extends", base, [*recipe_names(), BASE])
    return _over(_settings(_packaged(base), base), own)


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return two trees of tables as one; of epochs and steps, the one that `above` sets stands."""
    if {"epochs", "steps"} & above.keys():
        below = {key: value for key, value in below.items() if key not in ("epochs", "steps")}
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _over(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _explain(error: ErrorDetails) -> str:
    """Return what is wrong with a key, its value, and what is accepted."""
    where = ".".join(map(str, error["loc"]))
    if error["type"] == UNKNOWN:
        *sections, key = error["loc"]
        try:
            check_known(f"key '{where}':", str(key), [name for name in _keys(sections) if name != "name"])
        except OptionError as unknown:
            return str(unknown)
    if error["type"] == "missing":
        return f"{where} is not set"
    if error["type"] == "value_error":
        return f"{where}.{error.get('ctx', {})['error']}"
    return f"{where} is {error['input']!r}: {error['msg'][:1].lower()}{error['msg'][1:]}"


def _keys(sections: Sequence[int | str]) -> list[str]:
    """Return the keys of a section, found by walking the annotations."""
    section: Any = RunRecipe
    for name in sections:
        if isinstance(name, str):
            annotation = get_type_hints(section)[name]
            section = next(one for one in (annotation, *get_args(annotation)) if is_dataclass(one))
    return [one.name for one in fields(section)]
