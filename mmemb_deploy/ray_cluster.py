"""The Ray cluster that jobs and servers run on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from logging import WARNING, getLogger

from mmemb_deploy.backends.choose import CPU
from mmemb_deploy.bundle.manifest import Manifest
from mmemb_deploy.errors import BackendError, MissingExtraError


def connect() -> None:
    """Join the cluster that RAY_ADDRESS names, or start one on this machine for the life of the process.

    Where Ray is connected already, nothing is done. Its usage statistics are off unless RAY_USAGE_STATS_ENABLED says
    otherwise. Raises MissingExtraError without Ray.
    """
    if find_spec("ray") is None:
        raise MissingExtraError("ray", "ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    getLogger("ray.data").setLevel(WARNING)
    if not ray.is_initialized():
        ray.init(logging_level=WARNING, log_to_driver=False, include_dashboard=False)


def takes_gpus(backend: str, manifest: Manifest) -> bool:
    """Return whether whoever runs a bundle takes a GPU. Raises BackendError where it must and the cluster has none."""
    import ray

    there: Mapping[str, float] = ray.cluster_resources()
    gpus = there.get("GPU", 0) >= 1
    if backend not in ("auto", CPU) and not gpus:
        raise BackendError(f"backend is {backend}, and the Ray cluster has no GPU: it has {dict(there)}")
    return gpus and backend != CPU and not manifest.fused
