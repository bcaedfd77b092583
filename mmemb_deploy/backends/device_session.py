"""A graph on a device as a `protocol.Session`: arrays of the host in and out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from mmemb_deploy.backends.device import Device, DeviceEngine, Workspace


class DeviceSession:
    """Uploads, runs and downloads."""

    def __init__(self, device: Device, engine: DeviceEngine) -> None:
        self._device, self._engine = device, engine
        self._workspace = Workspace(device)

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the graph once, on the inputs it declares."""
        facts = self._engine.facts
        with self._device.lock:
            shapes, addresses = self._workspace.upload({tensor.name: inputs[tensor.name] for tensor in facts.inputs})
            outputs = self._workspace.outputs(facts, shapes, without=frozenset())
            self._engine.bind(shapes, addresses | {name: each.address for name, each in outputs.items()})()
            return dict(zip(outputs, self._device.download(list(outputs.values())), strict=True))
