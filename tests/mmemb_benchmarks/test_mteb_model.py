"""mteb runs a bundle as one of its models, offline, and scores what the embedder itself returns."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from types import SimpleNamespace
from typing import Any, cast

import mteb
import numpy as np
import pytest
import torch
from mteb.abstasks import AbsTaskRetrieval
from mteb.models import EncoderProtocol
from mteb.types import PromptType
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader

from mmemb_benchmarks.mteb_model import MtebModel, Usage
from mmemb_deploy import Embedder
from mmemb_deploy.errors import MissingExtraError, OptionError
from mmemb_deploy.evaluation.digitchain import DigitChain, Example

Dataset: Any = import_module("datasets").Dataset  # which ships no types
PROMPTS = {"query": "Name what is shown.", "document": "A name."}
MakeTask = Callable[..., Any]


@pytest.fixture(scope="module")
def nano() -> Embedder:
    return Embedder.load()


@pytest.fixture
def make_task() -> MakeTask:
    """Make a retrieval task that lies in memory; the n-th query wants the n-th document."""

    def make(queries: Sequence[Mapping[str, Any]], corpus: Sequence[Mapping[str, Any]], **facts: Any) -> Any:
        class InMemory(AbsTaskRetrieval):
            metadata = metadata_of(**facts)

            def load_data(self, num_proc: int | None = None, *, timer: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
                self.dataset = {
                    "default": {
                        "test": {
                            "queries": Dataset.from_list([{"id": f"q{n}", **query} for n, query in enumerate(queries)]),
                            "corpus": Dataset.from_list(
                                [{"id": f"d{n}", **document} for n, document in enumerate(corpus)]
                            ),
                            "relevant_docs": {f"q{n}": {f"d{n}": 1} for n in range(len(queries))},
                            "top_ranked": None,
                        }
                    }
                }
                self.data_loaded = True

        return InMemory()

    return make


def metadata_of(**facts: Any) -> Any:
    common: dict[str, Any] = {
        "name": "InMemory",
        "description": "In memory.",
        "type": "Retrieval",
        "category": "t2t",
        "dataset": {"path": "in/memory", "revision": "1"},
        "eval_langs": ["eng-Latn"],
        "main_score": "ndcg_at_10",
    }
    return mteb.TaskMetadata(**(common | facts))


def evaluate(model: Any, task: Any) -> float:
    result = mteb.evaluate(model, task, cache=None, co2_tracker=False, show_progress_bar=False)
    return result.task_results[0].get_score()


def ndcg(queries_QD: NDArray[Any], documents_CD: NDArray[Any]) -> float:
    """NDCG@10 where the n-th document answers the n-th query, from cosines."""
    similarity_QC = queries_QD @ documents_CD.T
    ranks_Q = (similarity_QC > similarity_QC.diagonal()[:, None]).sum(axis=1)
    return sum(1 / math.log2(rank + 2) for rank in ranks_Q if rank < 10) / len(ranks_Q)


def chains(count: int) -> list[Example]:
    return list(DigitChain("calibration", 3).examples("text", count))


def test_a_text_task_scores_what_the_embeddings_say(nano: Embedder, make_task: MakeTask) -> None:
    queries = ["three plus four", "two x five", "nine minus one", "six"]
    corpus = ["seven", "zero", "eight", "six", "five", "one"]
    task = make_task([{"text": text} for text in queries], [{"text": text} for text in corpus])
    model = MtebModel(nano, "always")
    queries_QD = nano.encode_query(queries, reasoning="always")
    assert evaluate(model, task) == pytest.approx(ndcg(queries_QD, nano.encode_document(corpus)), abs=1e-4)
    usage = model.usage["InMemory", "default", "test"]
    assert (usage.queries, usage.reasoning_rate, usage.blank) == (4, 1.0, 0)
    assert usage.rationale_tokens > 4
    assert evaluate(MtebModel(nano, "never"), task) == pytest.approx(
        ndcg(nano.encode_query(queries, reasoning="never"), nano.encode_document(corpus)), abs=1e-4
    )


def test_an_image_task_scores_what_the_embeddings_say_under_the_tasks_prompts(
    nano: Embedder, make_task: MakeTask
) -> None:
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(5)]
    names = ["a zero", "a one", "a two", "a three", "a four"]
    task = make_task(
        [{"image": picture} for picture in pictures],
        [{"text": name} for name in names],
        category="i2t",
        modalities=["image", "text"],
        prompt=PROMPTS,
    )
    queries_QD = nano.encode_query([{"image": picture} for picture in pictures], instruction=PROMPTS["query"])
    documents_CD = nano.encode_document(names, instruction=PROMPTS["document"])
    assert evaluate(MtebModel(nano), task) == pytest.approx(ndcg(queries_QD, documents_CD), abs=1e-4)


def embed(model: MtebModel, rows: list[dict[str, Any]], prompt_type: str | None = "query", **facts: Any) -> Any:
    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        return {column: [row[column] for row in batch] for column in batch[0]}

    loader: Any = DataLoader(cast("Any", rows), batch_size=2, collate_fn=collate)
    side = None if prompt_type is None else PromptType(prompt_type)
    return model.encode(
        loader, task_metadata=metadata_of(**facts), hf_split="test", hf_subset="default", prompt_type=side, batch_size=2
    )


@pytest.mark.parametrize(
    ("prompt", "side", "instruction"),
    [
        (None, "query", "Find the result."),
        ("Task.", "query", "Task."),
        ("Task.", None, "Task."),
        (PROMPTS, "query", PROMPTS["query"]),
        ({"document": "A name."}, "query", "Find the result."),
        (None, "document", ""),
        ("Task.", "document", ""),
        (PROMPTS, "document", PROMPTS["document"]),
    ],
)
def test_each_side_is_embedded_for_its_prompt(nano: Embedder, prompt: Any, side: str | None, instruction: str) -> None:
    texts = ["one", "two", "three"]
    embeddings = embed(MtebModel(nano, "never"), [{"text": text} for text in texts], side, prompt=prompt)
    expected = nano.encode(texts, instruction=instruction, reasoning="never")
    np.testing.assert_allclose(embeddings, expected, atol=1e-5)


def test_documents_never_reason_and_queries_are_counted_across_calls(nano: Embedder) -> None:
    rows = [{"text": example.content["text"]} for example in chains(6)]
    model = MtebModel(nano, "always")
    embed(model, rows, "document")
    assert model.usage["InMemory", "default", "test"] == Usage()
    embed(model, rows)
    embed(model, rows, None)
    assert model.usage["InMemory", "default", "test"].queries == 12
    assert model.usage["InMemory", "default", "test"].reasoning_rate == 1.0
    automatic = MtebModel(nano)
    embed(automatic, rows)
    result = nano.encode_detailed([row["text"] for row in rows])
    reasoned = [detail is not None and detail.rationale is not None for detail in result.details]
    assert automatic.usage["InMemory", "default", "test"].reasoning_rate == np.mean(reasoned)


def test_texts_and_images_of_a_row_are_one_input_and_blank_rows_are_zeros(nano: Embedder) -> None:
    picture = Image.new("RGB", (8, 8), "gray")
    pairs = [("what is it?", picture), (" ", None), ("", picture)]
    rows = [{"text": text, "image": image} for text, image in pairs]
    model = MtebModel(nano, "never")
    embeddings = embed(model, rows)
    expected = nano.encode([{"text": "what is it?", "image": picture}, {"image": picture}], reasoning="never")
    np.testing.assert_allclose(embeddings[[0, 2]], expected, atol=1e-5)
    assert not embeddings[1].any()
    assert model.usage["InMemory", "default", "test"].blank == 1
    np.testing.assert_allclose(model.similarity(embeddings, embeddings)[1], 0)


def test_a_video_is_read_as_evenly_spread_frames_at_their_times(nano: Embedder) -> None:
    frames = torch.randint(0, 256, (9, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    class Decoder:  # what torchcodec's VideoDecoder offers
        metadata = SimpleNamespace(num_frames=9)

        def get_frames_at(self, places: list[int]) -> Any:
            return SimpleNamespace(data=frames[places], pts_seconds=torch.tensor(places) / 4)

    model = MtebModel(nano, "never", frames=3)
    array = frames[[0, 4, 8]].permute(0, 2, 3, 1).numpy()
    expected = nano.encode([{"video": array, "timestamps": [0.0, 1.0, 2.0], "text": "x"}], reasoning="never")
    np.testing.assert_allclose(embed(model, [{"video": Decoder(), "text": "x"}]), expected, atol=1e-5)


def test_similarity_is_the_cosine(nano: Embedder) -> None:
    model = MtebModel(nano)
    left, right = torch.tensor([[3.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 2.0], [5.0, 5.0]])
    np.testing.assert_allclose(model.similarity(left, right), [[0, 0.5**0.5], [0.5**0.5, 1]], atol=1e-6)
    np.testing.assert_allclose(model.similarity_pairwise(left, right), [0, 1], atol=1e-6)


def test_the_model_is_described_so_that_no_two_settings_share_cached_results(nano: Embedder) -> None:
    model = MtebModel(nano)
    assert isinstance(model, EncoderProtocol)
    meta = model.mteb_model_meta
    assert meta.name == "mmemb-deploy/nano"
    assert meta.embed_dim == nano.dim
    assert type(meta).model_validate(meta.model_dump()) == meta
    assert meta.experiment_name != MtebModel(nano, "never").mteb_model_meta.experiment_name


def test_what_cannot_be_scored_is_refused(nano: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="reasoning 'sometimes' is not known"):
        MtebModel(nano, "sometimes")
    model = MtebModel(nano)
    with pytest.raises(OptionError, match="none of text, image and video"):
        embed(model, [{"audio": 1}])
    loader: Any = DataLoader(cast("Any", [{"text": "one"}]))
    with pytest.raises(OptionError, match="precision 'ubinary' is not known: choose from float32, int8"):
        model.encode(loader, task_metadata=metadata_of(), hf_split="test", hf_subset="default", precision="ubinary")
    monkeypatch.setitem(sys.modules, "mteb.models.model_meta", None)
    with pytest.raises(MissingExtraError, match=r"mmemb-deploy\[eval\]"):
        MtebModel(nano)
