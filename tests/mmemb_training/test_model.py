"""Our forward pass over shared grids and indexed visual tokens equals transformers' own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmemb_deploy.inputs.parse import parse
from mmemb_deploy.inputs.prompts import PAD
from mmemb_deploy.inputs.rows import collate
from mmemb_export.reference import Reference
from mmemb_training.batches import encode_batch
from mmemb_training.checkpoint import load_checkpoint
from mmemb_training.model import decoder_forward

CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "two levels": ({}, {}),
    "no level, nothing merged": ({"num_key_value_heads": 1}, {"spatial_merge_size": 1, "deepstack_visual_indexes": []}),
    "late level, merged by 3": (
        {"num_attention_heads": 3, "tie_word_embeddings": True},
        {"spatial_merge_size": 3, "patch_size": 3, "num_heads": 4, "deepstack_visual_indexes": [1]},
    ),
}


@pytest.mark.parametrize("config", CONFIGS)
def test_a_padded_batch_of_all_modalities_equals_transformers(
    tmp_path: Path, make_checkpoint: Any, mixed_inputs: list[Any], config: str
) -> None:
    checkpoint = load_checkpoint(make_checkpoint(tmp_path, *CONFIGS[config]))
    reference = Reference(checkpoint)
    requests = [parse(content) for content in mixed_inputs]
    rows = [checkpoint.rows.row(request, "Find the result.") for request in requests]
    path = checkpoint.rows.prompt.path(checkpoint.rows.prompt.tokenize("a tiny corpus"))
    batch = collate([row.extended(path) for row in rows], checkpoint.rows.prompt.ids[PAD])
    with torch.no_grad():
        hidden_BTD, _ = encode_batch(checkpoint.model, batch, checkpoint.vision)
    for place, (request, row) in enumerate(zip(requests, rows, strict=True)):
        expected = reference.run(request, row, path[1:-2])
        for token, vector_D in ((row.length - 1, expected.direct_D), (batch.last_B[place], expected.reasoned_D)):
            ours_D = torch.nn.functional.normalize(hidden_BTD[place, token], dim=-1).numpy()
            np.testing.assert_allclose(ours_D, vector_D, atol=2e-6)


def test_continuing_from_a_cache_equals_one_pass(tiny_checkpoint: Path) -> None:
    model = load_checkpoint(tiny_checkpoint).model.model.language_model
    ids = torch.arange(20).view(2, 10)
    positions, mask = torch.arange(10).expand(3, 2, -1), torch.ones(2, 10, dtype=torch.long)
    with torch.no_grad():
        whole, cache = decoder_forward(model, ids, positions, mask)
        _, past = decoder_forward(model, ids[:, :6], positions[..., :6], mask[:, :6])
        rest, grown = decoder_forward(model, ids[:, 6:], positions[..., 6:], mask, past=past)
    torch.testing.assert_close(rest, whole[:, 6:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grown, cache, atol=1e-5, rtol=1e-5)
