"""One pass over a batch of rows: the direct embedding, the gate's score, and the KV cache to reason from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmemb_deploy import abi
from mmemb_deploy.backends.session import Session
from mmemb_deploy.cache import KVCache
from mmemb_deploy.preprocess import Floats, VisionSpec, Visual, patches, vision_tables
from mmemb_deploy.rows import Row, by_grid, collate


@dataclass(frozen=True)
class FastResult:
    """Direct embeddings (B, D), L2-normalised; gate scores (B,) in 0..1; the cache of the B prompts."""

    embeddings_BD: Floats
    scores_B: Floats
    cache: KVCache


class FastPath:
    """Vision, embedder and gate. `max_patches` bounds the patches that enter the vision graph at once."""

    def __init__(
        self,
        vision: Session,
        embedder: Session,
        gate: Session,
        *,
        spec: VisionSpec,
        hidden_size: int,
        layers: int,
        deepstack_levels: int,
        pad_id: int,
        max_patches: int,
    ) -> None:
        self._vision, self._embedder, self._gate = vision, embedder, gate
        self._spec = spec
        self._hidden_size = hidden_size
        self._present = tuple(abi.present_names(layers))
        self._levels = deepstack_levels
        self._pad_id = pad_id
        self._max_patches = max_patches

    def run(self, rows: Sequence[Row]) -> FastResult:
        """Prefill the rows' prompts, up to and including `<|disc_emb|>`."""
        batch = collate(rows, self._pad_id)
        visual_tokens_VD, deepstack_LVD = self._encode(batch.visuals)
        outputs = self._embedder.run(
            {
                abi.TOKEN_IDS: batch.token_ids_BT,
                abi.POSITION_IDS: batch.position_ids_3BT,
                abi.MASK: batch.mask_BT,
                abi.VISUAL_INDEX: batch.visual_index_BT,
                abi.VISUAL_TOKENS: visual_tokens_VD,
                abi.DEEPSTACK: deepstack_LVD,
            }
        )
        return FastResult(
            outputs[abi.EMBEDDING],
            self._gate.run({abi.STATE: outputs[abi.STATE]})[abi.SCORE],
            KVCache(
                tuple(outputs[name] for name in self._present),
                batch.mask_BT,
                np.array([row.next_position for row in rows], np.int64),
            ),
        )

    def _encode(self, visuals: Sequence[Visual]) -> tuple[Floats, Floats]:
        """Return the visual tokens (V, D) and DeepStack levels (L, V, D) of the visuals in order, after a zero row."""
        starts = np.cumsum([1, *(visual.tokens for visual in visuals)])
        tokens_VD = np.zeros((starts[-1], self._hidden_size), np.float32)
        deepstack_LVD = np.zeros((self._levels, *tokens_VD.shape), np.float32)
        for (grid_h, grid_w), places in by_grid(visuals).items():
            tables = vision_tables(grid_h, grid_w, self._spec)
            step = max(1, self._max_patches // (grid_h * grid_w))
            for begin in range(0, len(places), step):
                chunk = places[begin : begin + step]
                outputs = self._vision.run(
                    {
                        abi.PATCHES: np.stack([patches(visuals[place], self._spec) for place in chunk]),
                        abi.INTERPOLATION_INDEX: tables.interpolation_index_P4,
                        abi.INTERPOLATION_WEIGHT: tables.interpolation_weight_P4,
                        abi.ROTARY_COS: tables.rotary_cos_PD,
                        abi.ROTARY_SIN: tables.rotary_sin_PD,
                    }
                )
                for image, place in enumerate(chunk):
                    rows = slice(starts[place], starts[place + 1])
                    tokens_VD[rows] = outputs[abi.VISUAL_TOKENS][image]
                    if self._levels:
                        deepstack_LVD[:, rows] = outputs[abi.DEEPSTACK][:, image]
        return tokens_VD, deepstack_LVD
