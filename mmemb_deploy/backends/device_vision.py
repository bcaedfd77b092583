"""A vision graph whose features stay in device memory: pixels go there as bytes, and nothing comes back.

Axes as in `protocol`; M visual tokens of an image.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mmemb_deploy.backends.device import Device, DeviceArray, DeviceEngine, Memory, Plane, Shape, Workspace, aligned
from mmemb_deploy.bundle import abi
from mmemb_deploy.bundle.manifest import Manifest
from mmemb_deploy.inputs.preprocess import Pixels, VisionTables

FLOAT = 4  # bytes of a number
GRIDS = 16  # of those whose tables stay on the device


@dataclass(frozen=True)
class DeviceFeatures:
    """What the vision graph makes of one image: tokens (M, D), and right behind them DeepStack levels (L, M, D)."""

    memory: Memory
    tokens: int

    @property
    def nbytes(self) -> int:
        """Bytes of its memory."""
        return self.memory.nbytes


class DeviceVision:
    """A `protocol.Vision` over an engine that reads and writes addresses."""

    def __init__(self, device: Device, engine: DeviceEngine, manifest: Manifest) -> None:
        model = manifest.model
        self._device, self._engine = device, engine
        self._spec, self._max_patches = manifest.vision, manifest.batch.patches
        self._hidden_size = model.hidden_size
        self._levels = {abi.VISUAL_TOKENS: 1}  # of each output
        if model.deepstack_levels:
            self._levels[abi.DEEPSTACK] = model.deepstack_levels
        self._workspace = Workspace(device)
        self._tables: OrderedDict[VisionTables, dict[str, DeviceArray]] = OrderedDict()
        self._nothing = self._zeros(1)  # what text shows

    def most_images(self, frames: int, patches: int) -> int:
        """Return how many images of so many frames and patches a run takes, at least 1."""
        patch = self._spec.patch_size

        def too_many(images: int) -> bool:
            return not self._engine.takes({abi.PIXELS: (images, frames, patches, patch, 3 * patch)})

        return 1 + bisect_left(range(2, self._max_patches // patches + 1), True, key=too_many)

    def run(self, pixels_NFPrc: Pixels, tables: VisionTables) -> list[DeviceFeatures]:
        """Return the features of each image. Raises BackendError if the engine fails, or takes no such image."""
        images, _, patches = pixels_NFPrc.shape[:3]
        tokens = patches // self._spec.merge_size**2
        nbytes = tokens * self._hidden_size * FLOAT
        with self._device.lock:
            shapes, addresses = self._workspace.upload({abi.PIXELS: pixels_NFPrc, **self._on_device(tables)})
            outputs = {
                name: self._workspace.reserve(name, levels * images * nbytes).address
                for name, levels in self._levels.items()
            }
            self._engine.bind(shapes, addresses | outputs)()
            found = []
            for image in range(images):
                memory = self._device.allocate(aligned(sum(self._levels.values()) * nbytes))
                made = [Plane(address + image * nbytes, images * nbytes) for address in outputs.values()]
                for source, (target, levels) in zip(made, self._parts(memory, nbytes), strict=True):
                    self._device.copy(source, target, nbytes, levels)
                found.append(DeviceFeatures(memory, tokens))
        return found

    def join(self, features: Sequence[DeviceFeatures]) -> dict[str, DeviceArray]:
        """Return the visual tokens (V, D) and DeepStack levels (L, V, D) of images in order, after a row of zeros."""
        if not features:
            return self._nothing
        line = self._hidden_size * FLOAT
        rows = 1 + sum(image.tokens for image in features)
        with self._device.lock:
            joined, row = self._zeros(rows), 1
            for image in features:
                nbytes = image.tokens * line
                for array, (source, levels) in zip(joined.values(), self._parts(image.memory, nbytes), strict=True):
                    self._device.copy(source, Plane(array.memory.address + row * line, rows * line), nbytes, levels)
                row += image.tokens
        return joined

    def _parts(self, memory: Memory, nbytes: int) -> Iterator[tuple[Plane, int]]:
        """Yield where each output begins in the memory of features, whose levels have so many bytes, and its levels."""
        address = memory.address
        for levels in self._levels.values():
            yield Plane(address, nbytes), levels
            address += levels * nbytes

    def _zeros(self, rows: int) -> dict[str, DeviceArray]:
        """Return what so many visual tokens are, all zeros."""
        shapes: dict[str, Shape] = {abi.VISUAL_TOKENS: (rows, self._hidden_size)}
        if abi.DEEPSTACK in self._levels:
            shapes[abi.DEEPSTACK] = self._levels[abi.DEEPSTACK], rows, self._hidden_size
        return {
            name: DeviceArray(self._device.allocate(aligned(math.prod(shape) * FLOAT)), shape)
            for name, shape in shapes.items()
        }

    def _on_device(self, tables: VisionTables) -> dict[str, DeviceArray]:
        """Return the tables of a grid, which are uploaded once, and again if many other grids were."""
        if tables not in self._tables:
            held = {}
            for name, array in tables.inputs().items():
                held[name] = DeviceArray(self._device.allocate(aligned(array.nbytes)), array.shape)
                self._device.upload(array, held[name].memory.address)
            self._tables[tables] = held
            if len(self._tables) > GRIDS:
                self._tables.popitem(last=False)
        self._tables.move_to_end(tables)
        return self._tables[tables]
