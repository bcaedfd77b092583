"""One pass over a batch of rows: the direct embedding, the gate's score, and the KV cache to reason from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmemb_deploy.backends.protocol import Cache, Decoder, Session
from mmemb_deploy.bundle import abi
from mmemb_deploy.inputs.preprocess import Floats
from mmemb_deploy.inputs.rows import Row, collate
from mmemb_deploy.routing.vision import VisionEncoder


@dataclass(frozen=True)
class FastResult:
    """Direct embeddings (B, D), L2-normalised; gate scores (B,) in 0..1, NaN without a gate; the cache where kept."""

    embeddings_BD: Floats
    scores_B: Floats
    cache: Cache | None


class FastPath:
    """Vision, embedder and gate."""

    def __init__(self, vision: VisionEncoder, decoder: Decoder[Any], gate: Session | None, pad_id: int) -> None:
        self.vision, self._decoder, self._gate = vision, decoder, gate
        self._pad_id = pad_id

    def fits(self, rows: int, tokens: int, *, after: int | None) -> bool:
        """Return whether so many rows of so many tokens run at once, and may be followed by `after` more."""
        return self._decoder.fits(rows, tokens, after=after)

    def run(self, rows: Sequence[Row], *, keep: bool = True) -> FastResult:
        """Prefill the rows' prompts, up to and including `<|disc_emb|>`; without `keep`, nothing can follow them."""
        batch = collate(rows, self._pad_id)
        result = self._decoder.prefill(batch, self.vision.encode(batch.visuals), keep=keep)
        if self._gate is None:
            scores_B = np.full(len(rows), np.nan, np.float32)
        else:
            scores_B = self._gate.run({abi.STATE: result.states_BD})[abi.SCORE]
        return FastResult(result.embeddings_BD, scores_B, result.cache)
