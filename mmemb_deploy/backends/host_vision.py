"""A vision graph whose features are in host memory.

Axes as in `protocol`; M visual tokens of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmemb_deploy.backends.protocol import Session
from mmemb_deploy.bundle import abi
from mmemb_deploy.bundle.manifest import Manifest
from mmemb_deploy.inputs.preprocess import Floats, Pixels, VisionTables


@dataclass(frozen=True)
class HostFeatures:
    """What the vision graph makes of one image: tokens (M, D) and DeepStack levels (L, M, D)."""

    tokens_MD: Floats
    deepstack_LMD: Floats

    @property
    def nbytes(self) -> int:
        """Bytes of both arrays."""
        return self.tokens_MD.nbytes + self.deepstack_LMD.nbytes


class HostVision:
    """A `protocol.Vision` over a session."""

    def __init__(self, session: Session, manifest: Manifest) -> None:
        self._session = session
        self._model, self._max_patches = manifest.model, manifest.batch.patches

    def most_images(self, frames: int, patches: int) -> int:
        """Return how many images of so many patches a run takes, at least 1."""
        del frames
        return max(1, self._max_patches // patches)

    def run(self, pixels_NFPrc: Pixels, tables: VisionTables) -> list[HostFeatures]:
        """Return the features of each image. Raises BackendError if the engine fails."""
        outputs = self._session.run({abi.PIXELS: pixels_NFPrc, **tables.inputs()})
        tokens_NMD = outputs[abi.VISUAL_TOKENS]
        deepstack_LNMD = outputs.get(abi.DEEPSTACK, np.zeros((0, *tokens_NMD.shape), np.float32))
        return [
            HostFeatures(tokens_NMD[image].copy(), deepstack_LNMD[:, image].copy()) for image in range(len(tokens_NMD))
        ]

    def join(self, features: Sequence[HostFeatures]) -> dict[str, Floats]:
        """Return the visual tokens (V, D) and DeepStack levels (L, V, D) of images in order, after a row of zeros."""
        first_1D = np.zeros((1, self._model.hidden_size), np.float32)
        first_L1D = np.zeros((self._model.deepstack_levels, *first_1D.shape), np.float32)
        return {
            abi.VISUAL_TOKENS: np.concatenate([first_1D, *(image.tokens_MD for image in features)]),
            abi.DEEPSTACK: np.concatenate([first_L1D, *(image.deepstack_LMD for image in features)], axis=1),
        }
