"""What a server is set to, checked once and then unchanged."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from mmemb_deploy.errors import OptionError

KEYS_VARIABLE = "MMEMB_API_KEYS"

Bytes = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Settings(BaseModel):
    """Raises pydantic's ValidationError for a value outside its range; `settings_of` says it as an OptionError."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = "127.0.0.1"
    """Address to listen on."""

    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    """Port to listen on; 0 takes a free one."""

    model_names: tuple[str, ...] = ()
    """Names by which requests may call the model, the first of them in replies; none takes the bundle's own."""

    api_keys: tuple[SecretStr, ...] = ()
    """Keys, any of which a request must show; none lets everybody in."""

    open_metrics: bool = False
    """Whether /metrics is answered without a key."""

    max_body_bytes: Bytes = 32 * 2**20
    """Of a request's body, and of all that is fetched for one request."""

    max_media_bytes: Bytes = 20 * 2**20
    """Of one encoded image."""

    max_inputs: Annotated[int, Field(ge=1)] = 2048
    """Inputs of one request."""

    max_waiting_rows: Annotated[int, Field(ge=1)] = 4096
    """Inputs that are accepted and not yet answered; a request that would exceed them is refused."""

    max_wait_seconds: Seconds = 30.0
    """Of prompts that wait, by what runs have cost; a request that would come after more is refused."""

    media_hosts: frozenset[str] = frozenset()
    """Hosts from which images may be fetched by http and https; none refuses every address of the web."""

    media_seconds: Seconds = 10.0
    """For fetching one image, redirects included."""

    header_seconds: Seconds = 10.0
    """For a client to send a request's headers, from when it connected or sent the first of them."""

    body_seconds: Seconds = 30.0
    """For a client to send a request's body."""

    keep_alive_seconds: Annotated[int, Field(ge=1)] = 75
    """Before a connection without a request is closed: above what a proxy in front keeps its own."""

    drain_seconds: Seconds = 30.0
    """For what was accepted to be answered, after the signal to stop."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least severe lines that are logged; each answered request is one of "info"."""

    otel: bool = False
    """Whether each request is an OpenTelemetry span."""


def settings_of(**given: object) -> Settings:
    """Build settings from keyword arguments. Raises OptionError, naming the setting, its value and what is accepted."""
    try:
        return Settings.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise OptionError(f"{'.'.join(map(str, first['loc']))} is {first['input']!r}: {first['msg']}") from error


def read_keys(file: Path | None) -> list[str]:
    """Return the keys of a file, one a line ("#" begins a comment), or else of MMEMB_API_KEYS, separated by commas.

    Raises OptionError where both are given, or where one is given and holds no key.
    """
    variable = os.environ.get(KEYS_VARIABLE)
    if file is not None and variable is not None:
        raise OptionError(f"keys are given by {file} and by {KEYS_VARIABLE}: keep one of them")
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise OptionError(f"api_keys is {file}, which cannot be read: {error.strerror}") from error
        keys = [line.partition("#")[0].strip() for line in lines]
    elif variable is not None:
        keys = [key.strip() for key in variable.split(",")]
    else:
        return []
    if not any(keys):
        raise OptionError(f"{file or KEYS_VARIABLE} holds no key: write at least one, or leave it out")
    return [key for key in keys if key]
