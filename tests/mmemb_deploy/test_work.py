"""The work of a graph is what the checkpoint's own sizes say."""

import json
from pathlib import Path
from typing import Any

import pytest

from mmemb_deploy.bundle import abi
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.bundle.work import graph_work


@pytest.fixture
def config(tiny_checkpoint: Path) -> Any:
    return json.loads((tiny_checkpoint / "config.json").read_text())


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


def test_every_linear_weight_of_a_decoder_is_counted_once(bundle: Bundle, config: Any) -> None:
    text = config["text_config"]
    hidden, inner, size = text["hidden_size"], text["intermediate_size"], text["head_dim"]
    heads, kv_heads, layers = text["num_attention_heads"], text["num_key_value_heads"], text["num_hidden_layers"]
    layer = hidden * size * (2 * heads + 2 * kv_heads) + 3 * hidden * inner
    direct, generator = (graph_work(bundle, name) for name in (abi.DIRECT, abi.GENERATOR))
    assert direct.token == generator.token == {"float32": 2 * layer * layers}
    assert direct.row_operations == 0
    assert generator.row == {"float32": 2 * hidden * text["vocab_size"]}
    assert direct.pair == generator.pair == 4 * heads * size * layers
    assert (direct.heads, direct.head_size) == (heads, size)
    table = head = 4 * hidden * text["vocab_size"]
    assert generator.read_bytes - direct.read_bytes == pytest.approx(head, abs=128)  # and a few constants
    assert direct.weight_bytes - direct.read_bytes == pytest.approx(table, abs=128)


def test_mergers_work_for_every_visual_token(bundle: Bundle, config: Any) -> None:
    vision = config["vision_config"]
    hidden, inner, out = vision["hidden_size"], vision["intermediate_size"], vision["out_hidden_size"]
    layers, merged = vision["depth"], hidden * vision["spatial_merge_size"] ** 2
    mergers = 1 + len(vision["deepstack_visual_indexes"])
    work = graph_work(bundle, abi.VISION)
    assert work.token_operations == 2 * layers * (4 * hidden**2 + 2 * hidden * inner)
    assert sum(work.merged.values()) == 2 * mergers * (merged**2 + merged * out)
    assert work.pair == 4 * hidden * layers
    assert work.widest == merged
