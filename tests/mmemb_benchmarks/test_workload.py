"""What a benchmark sends is what was asked for: so many tokens, of one kind, at a rate of reasoning."""

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from tokenizers import Tokenizer, normalizers

from mmemb_benchmarks.workload import Maker, Workload, prompt_tokens, threshold_of_rate
from mmemb_deploy import Embedder, OptionError
from mmemb_deploy.evaluation.pairs import encode_queries
from mmemb_deploy.inputs.prompts import PromptEncoder
from mmemb_deploy.inputs.rows import RowEncoder
from mmemb_deploy.routing.router import Route
from mmemb_training.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def nano() -> Embedder:
    return Embedder.load(threads=1)


@pytest.fixture(scope="module")
def traffic(nano: Embedder) -> Workload:
    return Workload.of(nano, queries=24, seed=0)


def maker(nano: Embedder, tokenizer: Tokenizer | None) -> Maker:
    """Make texts for nano, or for nano with another tokenizer."""
    if tokenizer is None:
        return Maker(nano.encoder, nano.manifest)
    prompt = PromptEncoder(tokenizer, nano.encoder.prompt.format)
    return Maker(RowEncoder(prompt, nano.encoder.vision), nano.manifest)


BYTES = train_tokenizer(["a"], 268)  # no merge: a token is a byte
STRIPS = train_tokenizer(["a"], 268)
STRIPS.normalizer = normalizers.Strip()  # spaces at the end of a text are no tokens


@pytest.mark.parametrize("tokenizer", [None, BYTES, STRIPS], ids=["nano", "bytes", "strips"])
@pytest.mark.parametrize("tokens", [1, 7, 40, 256])
def test_a_text_has_as_many_tokens_as_were_asked_for(nano: Embedder, tokenizer: Tokenizer | None, tokens: int) -> None:
    making = maker(nano, tokenizer)
    empty = making.row("a").length - 1
    texts = [making.text(tokens, np.random.default_rng(seed)) for seed in range(8)]
    assert {making.row(text).length - empty for text in texts} == {tokens}
    assert len(set(texts)) == 8 or tokens == 1


def test_a_tokenizer_that_joins_all_letters_is_refused(nano: Embedder) -> None:
    making = maker(nano, BYTES)
    making.encoder.prompt.tokenize = lambda text: [0] * (len(text) // 3 * 3)  # type: ignore[method-assign]
    with pytest.raises(OptionError, match="tokens is 8: no random letters"):
        making.text(8, np.random.default_rng(0))


def test_a_rate_becomes_the_threshold_that_sends_so_many_to_reasoning(nano: Embedder, traffic: Workload) -> None:
    threshold = threshold_of_rate(nano, traffic, 0.5)
    assert threshold is not None
    details = encode_queries(nano, traffic.pairs, threshold=threshold, max_rationale_tokens=1).details
    assert np.mean([detail.route is Route.REASON for detail in details]) == pytest.approx(0.5, abs=0.1)
    assert threshold_of_rate(nano, traffic, None) is None


def test_requests_of_a_file_are_not_judged(nano: Embedder, tmp_path: Path) -> None:
    lines = tmp_path / "requests.jsonl"
    lines.write_text('"a text"\n{"text": "another"}\n')
    traffic = Workload.of(nano, requests=lines, queries=1, seed=0)
    assert [pair.query for pair in traffic.pairs] == ["a text", {"text": "another"}]
    assert not traffic.judged
    with pytest.raises(OptionError, match="--requests and --pairs"):
        Workload.of(nano, requests=lines, pairs=lines, queries=1, seed=0)


def test_requests_of_a_workload_are_of_its_kind(nano: Embedder) -> None:
    traffic = Workload.of(nano, kind="long text", queries=3, seed=0)
    assert [length > 200 for length in prompt_tokens(nano, traffic)] == [True] * 3
    with pytest.raises(OptionError, match="long text"):
        Workload.of(nano, kind="long texts", queries=3, seed=0)


def test_a_video_file_among_the_requests_is_read_as_the_bundle_reads_it(nano: Embedder, tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    with av.open(clip, "w") as container:
        stream: Any = container.add_stream("mpeg4", rate=2)
        stream.width = stream.height = 32
        for shade in (0, 80, 160, 240):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), shade, np.uint8))))
        container.mux(stream.encode())
    row = Maker(nano.encoder, nano.manifest).row({"video": str(clip)})
    (item,) = nano.prepare([{"video": str(clip)}]).items
    assert row.visual_tokens > 0
    assert row.token_ids_S.tolist() == item.row.token_ids_S.tolist()
