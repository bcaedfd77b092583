"""The facade on a tiny random model: what it computes, in which order, and how it refuses."""

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mmemb_deploy import Embedder, InputError, OptionError
from mmemb_deploy.backends.protocol import Decoder, Extended, Prefilled
from mmemb_deploy.inputs.parse import parse
from mmemb_deploy.inputs.preprocess import Ints, Pixels, VisionTables
from mmemb_deploy.inputs.rows import Batch
from mmemb_deploy.routing.vision import FeatureCache
from mmemb_export.reference import Reference
from mmemb_training.checkpoint import load_checkpoint

PATH_TOKENS = 3  # `<think>`, `</think>` and `<|gen_emb|>`


class CountingDecoder:
    """Counts the tokens that enter a decoder, padding left out."""

    def __init__(self, decoder: Decoder[Any]) -> None:
        self._decoder = decoder
        self.prefilled = 0
        self.extended = 0
        self.padded: list[int] = []  # tokens of each batch of prompts, padding included
        self.prompts: list[int] = []  # rows of each batch of prompts
        self.rows: list[int] = []  # rows of each batch of new tokens

    most_rows = 64

    def fits(self, rows: int, tokens: int, *, after: int | None) -> bool:
        return self._decoder.fits(rows, tokens, after=after)

    def prefill(self, batch: Batch, visual: Any, *, keep: bool = True) -> Prefilled[Any]:
        self.prefilled += int(batch.mask_BT.sum())
        self.padded.append(batch.mask_BT.size)
        self.prompts.append(len(batch.mask_BT))
        return self._decoder.prefill(batch, visual, keep=keep)

    def stack(self, caches: Sequence[Any], capacity: int) -> AbstractContextManager[Any]:
        return self._decoder.stack(caches, capacity)

    def extend(self, cache: Any, token_ids_BT: Ints, lengths_B: Ints, embedded: Sequence[int]) -> Extended[Any]:
        self.extended += int(lengths_B.sum())
        self.rows.append(len(lengths_B))
        return self._decoder.extend(cache, token_ids_BT, lengths_B, embedded)


def counted(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> CountingDecoder:
    """Count what both paths feed the decoder, where there is no lane."""
    monkeypatch.setattr(embedder, "paths", replace(embedder.paths, lane=None))
    fast_path, generator = embedder.paths.fast_path, embedder.paths.generator
    counter = CountingDecoder(fast_path._decoder)  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(fast_path, "_decoder", counter)
    monkeypatch.setattr(generator, "_decoder", counter)
    return counter


def cosines(left: NDArray[Any], right: NDArray[Any]) -> NDArray[Any]:
    products: NDArray[Any] = (left.astype(np.float64) * right).sum(axis=1)
    return products


def test_embeddings_are_float32_normalised_and_in_order(tiny_embedder: Embedder, mixed_inputs: list[Any]) -> None:
    vectors = tiny_embedder.encode(mixed_inputs)
    assert vectors.shape == (len(mixed_inputs), tiny_embedder.dim)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    backwards = tiny_embedder.encode(mixed_inputs[::-1])[::-1]
    assert cosines(vectors, backwards).min() >= 0.99999


@pytest.mark.parametrize("reasoning", ["never", "always"])
def test_a_row_alone_equals_the_row_in_any_batch(
    tiny_embedder: Embedder, mixed_inputs: list[Any], reasoning: str
) -> None:
    alone = np.concatenate([tiny_embedder.encode([item], reasoning=reasoning) for item in mixed_inputs])
    for batch_size in (2, 3, 32):
        together = tiny_embedder.encode(mixed_inputs, reasoning=reasoning, batch_size=batch_size)
        assert cosines(alone, together).min() >= 0.99999


def test_threads_that_share_an_embedder_get_what_one_gets(tiny_embedder: Embedder, mixed_inputs: list[Any]) -> None:
    rates = (0.0, 0.5, 1.0, 0.5)
    expected = [tiny_embedder.encode(mixed_inputs, reasoning_rate=rate) for rate in rates]
    with ThreadPoolExecutor(4) as threads:
        found = threads.map(lambda rate: tiny_embedder.encode(mixed_inputs, reasoning_rate=rate, batch_size=3), rates)
        for one, shared in zip(expected, found, strict=True):
            assert cosines(one, shared).min() >= 0.99999


def test_a_forked_process_has_a_lane_of_its_own(tiny_bundle: Path) -> None:
    code = f"""
import multiprocessing
from mmemb_deploy import Embedder
embedder = Embedder.load({str(tiny_bundle)!r}, threads=2)
def encode(text):
    return embedder.encode([text] * 4, reasoning="never")
mine = encode("three")
with multiprocessing.get_context("fork").Pool(1) as pool:
    theirs = pool.apply_async(encode, ["three"]).get(timeout=60)
print(abs(mine - theirs).max() < 1e-6)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "True\n"


def test_batches_stay_within_the_memory_limits_and_give_the_same(
    tiny_embedder: Embedder, mixed_inputs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [*mixed_inputs, {"images": [np.full((16, 16), shade, np.uint8) for shade in range(0, 250, 50)]}]
    whole = tiny_embedder.encode(inputs, reasoning="never")
    counter = counted(tiny_embedder, monkeypatch)
    encoder = tiny_embedder.paths.fast_path.vision
    vision = encoder._vision  # pyright: ignore[reportPrivateUsage]
    patches: list[int] = []
    run = vision.run

    def counting(pixels_NFPrc: Pixels, tables: VisionTables) -> Any:
        patches.append(pixels_NFPrc.shape[0] * pixels_NFPrc.shape[2])
        return run(pixels_NFPrc, tables)

    limits = tiny_embedder.manifest.batch.model_copy(update={"tokens": 300})
    monkeypatch.setattr(tiny_embedder, "paths", replace(tiny_embedder.paths, limits=limits))
    monkeypatch.setattr(vision, "run", counting)
    monkeypatch.setattr(vision, "_max_patches", 40)
    monkeypatch.setattr(encoder, "cache", FeatureCache(0))
    split = tiny_embedder.encode(inputs, reasoning="never")
    assert max(counter.padded) <= 300
    assert max(counter.prompts) > 1
    assert max(patches) <= 40
    assert cosines(whole, split).min() >= 0.99999


def test_the_reasoned_embedding_equals_one_full_forward_pass(
    tiny_embedder: Embedder, tiny_checkpoint: Path, mixed_inputs: list[Any]
) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint)
    reference = Reference(checkpoint)
    result = tiny_embedder.encode_detailed(mixed_inputs, reasoning="always")
    for content, detail, embedding_D in zip(mixed_inputs, result.details, result.embeddings, strict=True):
        assert detail is not None
        request = parse(content)
        row = checkpoint.rows.row(request, checkpoint.instruction(None))
        expected = reference.run(request, row, detail.rationale_ids)
        assert expected.reasoned_D @ embedding_D >= 0.9999
        assert list(detail.rationale_ids) == expected.greedy[: len(detail.rationale_ids)]


def test_no_token_is_prefilled_twice(
    tiny_embedder: Embedder, mixed_inputs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = counted(tiny_embedder, monkeypatch)
    encoder = tiny_embedder.encoder
    prompt_tokens = sum(encoder.row(parse(item), "Find the result.").length for item in mixed_inputs)
    result = tiny_embedder.encode_detailed(mixed_inputs, reasoning="always")
    written = sum(detail.rationale_tokens for detail in result.details if detail is not None)
    assert counter.prefilled == prompt_tokens
    assert counter.extended == written + PATH_TOKENS * len(mixed_inputs)


def test_finished_rows_leave_the_batch(tiny_embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = counted(tiny_embedder, monkeypatch)
    lengths = {"short": 1, "longer": 4}
    extend = counter.extend
    end = tiny_embedder.manifest.markers["</think>"]

    def scripted(cache: Any, token_ids_BT: Ints, lengths_B: Ints, embedded: Sequence[int]) -> Extended[Any]:
        """Make the first row close its rationale after one word, and the second after four."""
        step = extend(cache, token_ids_BT, lengths_B, embedded)
        counts = list(lengths.values())[-len(lengths_B) :]
        return replace(step, next_token_B=np.array([end if len(counter.rows) > count else 5 for count in counts]))

    monkeypatch.setattr(counter, "extend", scripted)
    result = tiny_embedder.encode_detailed(list(lengths), reasoning="always", batch_size=2)
    assert [detail.rationale_tokens for detail in result.details if detail] == [1, 4]
    assert counter.rows == [2, 2, 2, 2, 1, 1, 1]


def test_a_given_rationale_gives_what_the_same_generated_one_gave(
    tiny_embedder: Embedder, mixed_inputs: list[Any]
) -> None:
    encoder = tiny_embedder.encoder
    written = tiny_embedder.encode_detailed(mixed_inputs, reasoning="always")
    rationales = [detail.rationale for detail in written.details if detail]
    round_trips = [
        detail is not None and encoder.prompt.tokenize(detail.rationale or "") == list(detail.rationale_ids)
        for detail in written.details
    ]
    assert any(round_trips)
    followed = tiny_embedder.encode(mixed_inputs, reasoning="never", rationales=rationales)
    assert cosines(followed, written.embeddings)[round_trips].min() >= 0.99999


def test_routes_follow_the_mode_and_the_threshold(tiny_embedder: Embedder, mixed_inputs: list[Any]) -> None:
    def routes(**options: Any) -> list[str]:
        details = tiny_embedder.encode_detailed(mixed_inputs, **options).details
        return [detail.route for detail in details if detail]

    scores = [
        detail.gate_score for detail in tiny_embedder.encode_detailed(mixed_inputs, reasoning="never").details if detail
    ]
    middle = sorted(scores)[3]
    assert set(routes(reasoning="never")) == {"fast"}
    assert set(routes(reasoning="always")) == {"reason"}
    assert routes(threshold=middle) == ["reason" if score >= middle else "fast" for score in scores]


def test_a_reasoning_rate_gives_exactly_that_share_to_the_highest_scores(
    tiny_embedder: Embedder, mixed_inputs: list[Any]
) -> None:
    details = tiny_embedder.encode_detailed(mixed_inputs, reasoning_rate=0.45, batch_size=2).details
    ranked = sorted((detail for detail in details if detail), key=lambda detail: -detail.gate_score)
    assert [detail.route for detail in ranked] == ["reason"] * 3 + ["fast"] * 4


def test_a_rate_whose_caches_exceed_the_limit_is_refused_before_anything_runs(
    tiny_embedder: Embedder, mixed_inputs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = counted(tiny_embedder, monkeypatch)
    limits = tiny_embedder.manifest.batch.model_copy(update={"cache_bytes": 1000})
    monkeypatch.setattr(tiny_embedder, "paths", replace(tiny_embedder.paths, limits=limits))
    with pytest.raises(OptionError, match="pass fewer inputs, or a threshold"):
        tiny_embedder.encode(mixed_inputs, reasoning_rate=1.0)
    assert counter.prompts == []


def test_more_rows_reason_together_than_prompts_run_together() -> None:
    numbers = "one", "two", "three", "four"
    texts = [f"{number} plus {other}" for number in numbers for other in ("five", "six", "seven")]
    embedder = Embedder.load()
    paths = embedder.paths
    limits = embedder.manifest.batch.model_copy(update={"tokens": 1})  # one prompt at a time
    embedder.paths = replace(paths, limits=limits)
    found = embedder.encode(texts, reasoning="always")
    embedder.paths = paths
    assert (found * embedder.encode(texts, reasoning="always")).sum(axis=1).min() >= 0.99999


def test_a_given_rationale_is_followed_beside_the_rate(tiny_embedder: Embedder, mixed_inputs: list[Any]) -> None:
    rationales = [None, "a", *[None] * 5]
    details = tiny_embedder.encode_detailed(mixed_inputs, rationales=rationales, reasoning_rate=0.3).details
    others = sorted((detail for detail in (details[0], *details[2:]) if detail), key=lambda detail: -detail.gate_score)
    assert details[1] is not None
    assert (details[1].route, details[1].rationale) == ("reason", "a")
    assert [detail.route for detail in others] == ["reason"] * 2 + ["fast"] * 4


def test_a_call_cannot_raise_the_bundle_s_token_limit(tiny_embedder: Embedder, mixed_inputs: list[Any]) -> None:
    limit = tiny_embedder.manifest.model.max_rationale_tokens
    options: dict[str, Any] = {"reasoning": "always", "max_rationale_tokens": 4 * limit}
    details = tiny_embedder.encode_detailed(mixed_inputs, **options).details
    assert max(detail.rationale_tokens for detail in details if detail) == limit


def test_the_token_limit_closes_a_rationale_and_says_so(tiny_embedder: Embedder) -> None:
    (natural,) = tiny_embedder.encode_detailed(["a text"], reasoning="always").details
    assert natural is not None
    limit = natural.rationale_tokens - 1
    result = tiny_embedder.encode_detailed(["a text"], reasoning="always", max_rationale_tokens=limit)
    (detail,) = result.details
    assert detail is not None
    assert (detail.rationale_ids, detail.truncated) == (natural.rationale_ids[:limit], True)
    np.testing.assert_allclose(np.linalg.norm(result.embeddings), 1, atol=1e-6)


def test_sizes_and_precisions_follow_their_definition(tiny_embedder: Embedder, mixed_inputs: list[Any]) -> None:
    full = tiny_embedder.encode(mixed_inputs)
    half = tiny_embedder.encode(mixed_inputs, truncate_dim=24)
    np.testing.assert_allclose(half, full[:, :24] / np.linalg.norm(full[:, :24], axis=1, keepdims=True), atol=1e-6)
    np.testing.assert_array_equal(tiny_embedder.encode(mixed_inputs, precision="int8"), np.rint(full * 127))
    bits = np.unpackbits(tiny_embedder.encode(mixed_inputs, precision="ubinary"), axis=1)
    np.testing.assert_array_equal(bits.astype(bool), full > 0)


def test_documents_take_the_fast_path_without_an_instruction(tiny_embedder: Embedder) -> None:
    result = tiny_embedder.encode_detailed(["seven"], **tiny_embedder.document_options)
    assert [detail.route for detail in result.details if detail] == ["fast"]
    same = tiny_embedder.encode(["seven"], instruction="", reasoning="never")
    np.testing.assert_array_equal(result.embeddings, same)
    assert cosines(same, tiny_embedder.encode_query(["seven"], reasoning="never")).max() < 0.9999


def test_similarity_is_the_cosine(tiny_embedder: Embedder) -> None:
    queries, documents = np.array([[3.0, 4.0]]), np.array([[1.0, 0.0], [6.0, 8.0]])
    np.testing.assert_allclose(tiny_embedder.similarity(queries, documents), [[0.6, 1.0]], atol=1e-6)


def test_a_bad_row_is_named_before_anything_runs(
    tiny_embedder: Embedder, mixed_inputs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = counted(tiny_embedder, monkeypatch)
    with pytest.raises(InputError, match="input 7: ") as raised:
        tiny_embedder.encode([*mixed_inputs, {"image": np.zeros((0, 4), np.uint8)}])
    assert raised.value.index == 7
    assert counter.prompts == []


def test_returned_errors_keep_the_good_rows(tiny_embedder: Embedder, mixed_inputs: list[Any]) -> None:
    spoilt = [mixed_inputs[0], "", mixed_inputs[1], {"txet": "typo"}]
    result = tiny_embedder.encode_detailed(spoilt, errors="return")
    assert [error.index for error in result.errors] == [1, 3]
    assert [detail is None for detail in result.details] == [False, True, False, True]
    assert np.isnan(result.embeddings[[1, 3]]).all()
    assert cosines(result.embeddings[[0, 2]], tiny_embedder.encode(mixed_inputs[:2])).min() >= 0.99999
    assert (tiny_embedder.encode_detailed(spoilt, errors="return", precision="int8").embeddings[1] == 0).all()


def test_an_input_above_the_token_limit_is_refused(tiny_embedder: Embedder) -> None:
    with pytest.raises(InputError, match=r"tokens .* above the limit of"):
        tiny_embedder.encode(["many words " * 9000])
    with pytest.raises(InputError, match=r"beside a rationale of \d+"):
        tiny_embedder.encode(["few words"], rationales=["many words " * 9000])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reasoning": "sometimes"}, "choose from auto, never, always"),
        ({"precision": "int9"}, "did you mean 'int8'"),
        ({"treshold": 0.5}, "did you mean 'threshold'"),
        ({"threshold": 1.5}, r"must lie in 0\.\.1"),
        ({"reasoning_rate": -0.1}, r"must lie in 0\.\.1"),
        ({"threshold": 0.5, "reasoning_rate": 0.5}, "pass one of them"),
        ({"reasoning": "never", "reasoning_rate": 0.5}, "only works with reasoning='auto'"),
        ({"truncate_dim": 7}, "was trained for 48, 24"),
        ({"batch_size": 0}, "at least 1"),
        ({"rationales": ["one"]}, "1 entries for 2 inputs"),
        ({"errors": "ignore"}, "choose from raise, return"),
        ({"max_rationale_tokens": -1}, "at least 0"),
    ],
)
def test_a_wrong_option_is_named(tiny_embedder: Embedder, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        tiny_embedder.encode_detailed(["one", "two"], **options)


def test_the_former_way_to_ask_for_details_still_works(tiny_embedder: Embedder) -> None:
    inputs = ["one", "three plus four"]
    expected = tiny_embedder.encode_detailed(inputs, reasoning="always")
    former: Any = tiny_embedder.encode
    with pytest.warns(DeprecationWarning, match=r"return_details\) is deprecated: call encode_detailed"):
        found = former(inputs, reasoning="always", return_details=True)
    np.testing.assert_array_equal(found.embeddings, expected.embeddings)
    rationales = [[detail and detail.rationale_ids for detail in each.details] for each in (found, expected)]
    assert rationales[0] == rationales[1]
    with pytest.warns(DeprecationWarning, match=r"errors\) is deprecated"):
        assert [error.index for error in former(["one", ""], errors="return").errors] == [1]
    with pytest.warns(DeprecationWarning, match=r"errors\) is deprecated"):
        assert former(inputs, errors="raise").shape == (2, tiny_embedder.dim)


def test_a_lone_input_is_refused(tiny_embedder: Embedder) -> None:
    for lone in ("three plus four", {"text": "three"}):
        with pytest.raises(OptionError, match="even for a single input"):
            tiny_embedder.encode(lone)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]


def test_an_empty_call_gives_an_empty_matrix(tiny_embedder: Embedder) -> None:
    assert tiny_embedder.encode([]).shape == (0, tiny_embedder.dim)


def test_an_unknown_backend_and_thread_count_are_refused(tiny_bundle: Path) -> None:
    with pytest.raises(OptionError, match="choose from auto, onnxruntime"):
        Embedder.load(tiny_bundle, backend="onnx")
    with pytest.raises(OptionError, match="threads is 0"):
        Embedder.load(tiny_bundle, threads=0)


def test_the_runtime_loads_neither_torch_nor_transformers_and_silences_telemetry(tiny_bundle: Path) -> None:
    code = f"""
import os, sys
os.environ.pop("ORT_DISABLE_TELEMETRY", None)
import mmemb_deploy
assert os.environ["ORT_DISABLE_TELEMETRY"] == "1" and "onnxruntime" not in sys.modules
mmemb_deploy.Embedder.load({str(tiny_bundle)!r}).encode(["a text"], reasoning="always")
print(sorted({{"torch", "transformers"}} & set(sys.modules)))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to cores")
def test_no_thread_leaves_the_cores_that_the_process_may_use(tiny_bundle: Path) -> None:
    code = f"""
import os
core = min(os.sched_getaffinity(0))
os.sched_setaffinity(0, {{core}})
from mmemb_deploy import Embedder
embedder = Embedder.load({str(tiny_bundle)!r})
assert [os.sched_getaffinity(int(thread)) for thread in os.listdir("/proc/self/task")] == [{{core}}]
"""
    subprocess.run([sys.executable, "-c", code], check=True)
