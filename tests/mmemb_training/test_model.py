"""Our forward pass over shared grids and indexed visual tokens equals transformers' own, and is pooled in one place."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmemb_deploy.inputs.parse import parse
from mmemb_deploy.inputs.prompts import PAD
from mmemb_deploy.inputs.rows import collate
from mmemb_export.reference import Reference
from mmemb_training.checkpoint import load_checkpoint
from mmemb_training.model import decoder_forward
from mmemb_training.prefill import prefill

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
        hidden_BTD, _ = prefill(checkpoint.model, batch, checkpoint.vision)
    for index, (request, row) in enumerate(zip(requests, rows, strict=True)):
        expected = reference.run(request, row, path[1:-2])
        for token, vector_D in ((row.length - 1, expected.direct_D), (batch.last_B[index], expected.reasoned_D)):
            ours_D = torch.nn.functional.normalize(hidden_BTD[index, token], dim=-1).numpy()
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


def test_the_states_of_last_tokens_are_those_of_the_whole(tiny_checkpoint: Path) -> None:
    model = load_checkpoint(tiny_checkpoint).model.model.language_model
    ids, last_B = torch.arange(20).view(2, 10), torch.tensor([9, 4])
    positions, mask = torch.arange(10).expand(3, 2, -1), torch.ones(2, 10, dtype=torch.long)
    shown: dict[str, Any] = {
        "visual_tokens_VD": torch.randn(4, model.config.hidden_size),
        "visual_index_BS": torch.arange(20).view(2, 10) % 4,  # so that a last token shows an image, too
        "deepstack_LVD": torch.randn(len(model.layers), 4, model.config.hidden_size),  # and after the last layer
    }
    with torch.no_grad():
        whole, cache = decoder_forward(model, ids, positions, mask, **shown)
        alone, grown = decoder_forward(model, ids, positions, mask, **shown, last_B=last_B)
    torch.testing.assert_close(alone, whole[torch.arange(2), last_B], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grown, cache, atol=0, rtol=0)


ROOT = Path(__file__).parents[2]
PACKAGES = ("mmemb_deploy", "training/mmemb_training", "export/mmemb_export", "engines/mmemb_engines")  # not the peers


def pooled_states(source: str) -> Iterator[str]:
    """Yield the expressions that pick one token's state out of each row."""

    def is_states(node: ast.expr) -> bool:
        return isinstance(node, ast.Name) and node.id.startswith("hidden_") and len(node.id.rpartition("_")[2]) > 2

    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Attribute(value=states, attr="gather" | "take_along_dim" | "index_select")):
                found = is_states(states)
            case ast.Call(func=ast.Attribute(attr="take_along_axis" | "gather" | "take_along_dim"), args=[states, *_]):
                found = is_states(states)
            case ast.Subscript(slice=ast.Tuple(elts=[ast.Call(func=ast.Attribute(attr="arange")), *_])):
                found = True
            case ast.Subscript(value=states, slice=ast.Tuple(elts=[_, index, *_])):
                found = is_states(states) and not isinstance(index, ast.Slice)
            case _:
                found = False
        if found:
            yield ast.unparse(node)


@pytest.mark.parametrize(
    "source",
    [
        "hidden_BSD.gather(1, last_B1D).squeeze(1)",
        "hidden_BSD[torch.arange(rows), last_B]",
        "states[np.arange(rows), lengths - 1]",
        "hidden_RTD[:, -1]",
        "np.take_along_axis(hidden_BSD, last_B1D, axis=1)",
    ],
)
def test_pooling_is_recognised(source: str) -> None:
    assert len(list(pooled_states(source))) == 1


def test_the_last_token_is_pooled_in_one_place() -> None:
    found = {
        path.relative_to(ROOT).as_posix(): list(pooled_states(path.read_text(encoding="utf-8")))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
    }
    assert {name: pooled for name, pooled in found.items() if pooled} == {
        "training/mmemb_training/model.py": ["hidden_BSD.gather(1, last_B1D)"]
    }
