"""Frameworks get the vectors that the embedder makes, of queries and of documents, and of pictures."""

import asyncio
import builtins
import io
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmemb_deploy import Embedder, InputError, MissingExtraError, OptionError

ADAPTERS = {
    "langchain": "langchain_core",
    "llama_index": "llama_index",
    "sentence_transformers": "sentence_transformers",
}


@pytest.fixture(scope="module")
def nano() -> Embedder:
    return Embedder.load()


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8)).save(path)
    return str(path)


def adapter(name: str) -> Any:
    return import_module(f"mmemb_deploy.adapters.{name}")


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_framework_that_is_missing_is_named_with_its_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(module: str, *arguments: Any, **options: Any) -> Any:
        if module.partition(".")[0] == ADAPTERS[name]:
            raise ModuleNotFoundError(name=module)
        return real(module, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    monkeypatch.delitem(sys.modules, f"mmemb_deploy.adapters.{name}", raising=False)
    with pytest.raises(MissingExtraError, match=rf"pip install 'mmemb-deploy\[{name.replace('_', '-')}\]'"):
        adapter(name)


def test_langchain_embeds_queries_documents_and_pictures(nano: Embedder, picture: str) -> None:
    embeddings = adapter("langchain").MmembEmbeddings(nano)
    assert isinstance(embeddings, import_module("langchain_core.embeddings").Embeddings)
    assert embeddings.embed_query("three plus four") == nano.encode(["three plus four"])[0].tolist()
    assert embeddings.embed_documents(["seven", "eight"]) == nano.encode_document(["seven", "eight"]).tolist()
    assert embeddings.embed_image([picture]) == nano.encode_document([{"image": picture}]).tolist()
    assert asyncio.run(embeddings.aembed_query("seven")) == embeddings.embed_query("seven")


def test_langchain_s_store_finds_what_is_asked(nano: Embedder) -> None:
    stores = import_module("langchain_core.vectorstores")
    store = stores.InMemoryVectorStore(adapter("langchain").MmembEmbeddings(nano))
    store.add_texts(["six", "seven", "eight"])
    (found,) = store.similarity_search("three plus four", k=1)
    assert found.page_content == "seven"


def test_options_reach_the_side_they_are_for(nano: Embedder) -> None:
    options: Any = {"query": {"reasoning": "never", "truncate_dim": 64}, "document": {"truncate_dim": 64}}
    asked = nano.encode(["three plus four"], reasoning="never", truncate_dim=64)[0].tolist()
    searched = nano.encode_document(["seven"], truncate_dim=64)[0].tolist()
    embeddings = adapter("langchain").MmembEmbeddings(nano, **options)
    assert (embeddings.embed_query("three plus four"), embeddings.embed_documents(["seven"])) == (asked, [searched])
    embedding = adapter("llama_index").MmembEmbedding(nano, **options)
    assert embedding.get_query_embedding("three plus four") == asked
    assert embedding.get_text_embedding("seven") == searched


def test_llama_index_embeds_queries_texts_and_pictures(nano: Embedder, picture: str) -> None:
    embedding = adapter("llama_index").MmembEmbedding(nano, embed_batch_size=2)
    assert isinstance(embedding, import_module("llama_index.core.embeddings").MultiModalEmbedding)
    assert (embedding.model_name, embedding.embed_batch_size) == ("nano", 2)
    assert embedding.get_query_embedding("three plus four") == nano.encode(["three plus four"])[0].tolist()
    texts = ["seven", "eight", "nine"]
    assert np.allclose(embedding.get_text_embedding_batch(texts), nano.encode_document(texts), atol=1e-5)
    (of_picture,) = nano.encode_document([{"image": picture}]).tolist()
    assert embedding.get_image_embedding(picture) == of_picture
    assert embedding.get_image_embedding(io.BytesIO(Path(picture).read_bytes())) == of_picture
    assert asyncio.run(embedding.aget_image_embedding(picture)) == of_picture
    assert asyncio.run(embedding.aget_query_embedding("seven")) == embedding.get_query_embedding("seven")


@pytest.fixture(scope="module")
def model(nano: Embedder) -> Any:
    return import_module("sentence_transformers").SentenceTransformer(
        modules=[adapter("sentence_transformers").BundleModule(nano)], device="cpu"
    )


@pytest.mark.slow
def test_sentence_transformers_embeds_what_the_embedder_embeds(model: Any, nano: Embedder, picture: str) -> None:
    drawn = Image.open(picture)
    together = {"text": "a", "image": picture}
    found = model.encode(["three plus four", drawn, together, picture], batch_size=4)
    right = nano.encode(["three plus four", drawn, together, {"image": picture}])
    assert (found.shape, found.dtype) == ((4, 128), np.float32)
    assert np.allclose(found, right, atol=1e-5)
    assert model.get_embedding_dimension() == 128


@pytest.mark.slow
def test_sentence_transformers_tells_queries_from_documents(model: Any, nano: Embedder) -> None:
    assert np.allclose(model.encode_query(["three plus four"]), nano.encode(["three plus four"]), atol=1e-5)
    documents = model.encode_document(["seven", "eight"])
    assert np.allclose(documents, nano.encode_document(["seven", "eight"]), atol=1e-5)
    assert not np.allclose(documents[0], model.encode_query("seven"), atol=1e-3)
    asked = nano.encode(["seven"], instruction="Which digit?")
    assert np.allclose(model.encode(["seven"], prompt="Which digit?"), asked, atol=1e-5)


@pytest.mark.slow
def test_sentence_transformers_refuses_what_a_bundle_does_not_take(model: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="input 0: an input of type list is not accepted"):
        model.encode([{"role": "user", "content": "seven"}])
    with pytest.raises(OptionError, match="saved by copying its folder"):
        model.save(str(tmp_path / "saved"))
