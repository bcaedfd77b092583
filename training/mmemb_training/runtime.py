"""A checkpoint behind the project's own runtime: `Embedder` over torch modules instead of exported graphs.

Training evaluates, mines and writes rollouts with it, so that what it measures is what the exported bundle will do.
Arrays pass through host memory between the parts: exact everywhere, fast on a CPU; on a GPU, rollouts of real sizes
belong on an inference server (`mmemb_training.control.rollouts`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import mmemb_deploy
from mmemb_deploy.backends.host_vision import HostVision
from mmemb_deploy.backends.kv_cache.host import HostDecoder
from mmemb_deploy.backends.protocol import Engine
from mmemb_deploy.bundle import abi
from mmemb_deploy.bundle.manifest import SCHEMA_VERSION, BatchLimits, GateFacts, Manifest, ModelFacts
from mmemb_deploy.embedder import Embedder
from mmemb_deploy.inputs.limits import Limits
from mmemb_training.checkpoint import Checkpoint
from mmemb_training.parts import Part, parts

MAX_ROW_TOKENS = 8192  # or as many as the model has positions for
MAX_BATCH_TOKENS = 32768
MAX_BATCH_PATCHES = 32768
MAX_CACHE_BYTES = 4 * 2**30
UNCALIBRATED = GateFacts(threshold=0.5, calibration="none", curve=())


class TorchSession:
    """One part of a model as a `mmemb_deploy.backends.protocol.Session`."""

    def __init__(self, part: Part) -> None:
        self._part = part

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the part once, without gradients."""
        weight = self._part.weight
        given = (torch.from_numpy(np.require(inputs[name], requirements=["C", "W"])) for name in self._part.inputs)
        values = [value.to(weight if value.is_floating_point() else weight.device) for value in given]
        split = len(values) - self._part.listed
        with torch.inference_mode():
            outputs = self._part(*values[:split], *([values[split:]] if self._part.listed else []))
        return {name: value.float().numpy(force=True) for name, value in zip(self._part.outputs, outputs, strict=True)}


def torch_embedder(checkpoint: Checkpoint, gate: GateFacts = UNCALIBRATED) -> Embedder:
    """Return an Embedder that runs a checkpoint's weights as they are now; later training shows, except in its gate.

    No image's features are remembered, since the weights change.
    """
    found = parts(checkpoint.model, checkpoint.vision, checkpoint.rows.prompt.ids)
    graphs = {name: TorchSession(part) for name, part in found.items()}
    facts = manifest(checkpoint, "checkpoint")
    batch = facts.batch.model_copy(update={"vision_bytes": 0})
    facts = facts.model_copy(update={"gate": gate if facts.prompt.reasons else None, "batch": batch})
    decoder = HostDecoder(graphs[abi.EMBEDDER], graphs.get(abi.GENERATOR), facts.model.layers)
    vision = HostVision(graphs[abi.VISION], facts)
    dtype = str(checkpoint.model.dtype).removeprefix("torch.")
    engine = Engine(f"torch {torch.__version__}, {dtype}", vision, decoder, graphs.get(abi.GATE))
    return Embedder(facts, checkpoint.rows, engine)


def manifest(checkpoint: Checkpoint, name: str, batch_tokens: int = MAX_BATCH_TOKENS) -> Manifest:
    """Return the manifest of a checkpoint's bundle before its graphs, files and certificate exist."""
    text = checkpoint.model.config.text_config
    return Manifest(
        schema_version=SCHEMA_VERSION,
        written_by=mmemb_deploy.__version__,
        model=ModelFacts(
            name=name,
            hidden_size=text.hidden_size,
            layers=text.num_hidden_layers,
            kv_heads=text.num_key_value_heads,
            head_dim=text.head_dim,
            vocabulary_size=text.vocab_size,
            deepstack_levels=len(checkpoint.model.config.vision_config.deepstack_visual_indexes),
            max_rationale_tokens=checkpoint.facts.max_rationale_tokens,
            dims=checkpoint.facts.dims,
        ),
        vision=checkpoint.vision,
        prompt=checkpoint.facts.prompt,
        markers=checkpoint.rows.prompt.ids,
        limits=Limits(),
        batch=BatchLimits(
            row_tokens=min(MAX_ROW_TOKENS, text.max_position_embeddings),
            tokens=batch_tokens,
            patches=MAX_BATCH_PATCHES,
            cache_bytes=MAX_CACHE_BYTES,
        ),
        gate=UNCALIBRATED if checkpoint.facts.prompt.reasons else None,
        graphs={},
        files={},
        certificate=None,
        provenance=checkpoint.facts.provenance,
    )
