"""An embedder as LangChain's `Embeddings`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmemb_deploy.embedder import Embedder
from mmemb_deploy.errors import MissingExtraError
from mmemb_deploy.options import EncodeOptions

try:
    from langchain_core.embeddings import Embeddings
except ModuleNotFoundError as error:
    raise MissingExtraError("langchain_core", "langchain") from error


class MmembEmbeddings(Embeddings):
    """Embeds queries by `Embedder.encode` and documents by `encode_document`.

    `query` and `document` are options of theirs. Besides texts, all methods take whatever else an input may be.
    """

    def __init__(
        self, embedder: Embedder, *, query: EncodeOptions | None = None, document: EncodeOptions | None = None
    ) -> None:
        self.embedder = embedder
        self.query: EncodeOptions = query or {}
        self.document: EncodeOptions = document or {}

    def embed_query(self, text: Any) -> list[float]:
        """Embed what is asked. Raises InputError."""
        vector: list[float] = self.embedder.encode([text], **self.query)[0].tolist()
        return vector

    def embed_documents(self, texts: Sequence[Any]) -> list[list[float]]:
        """Embed what is searched. Raises InputError, naming the document's index."""
        vectors: list[list[float]] = self.embedder.encode_document(texts, **self.document).tolist()
        return vectors

    def embed_image(self, uris: Sequence[str]) -> list[list[float]]:
        """Embed pictures that are searched, by their paths, as vector stores call it that take pictures."""
        return self.embed_documents([{"image": uri} for uri in uris])
