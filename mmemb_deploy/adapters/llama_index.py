"""An embedder as LlamaIndex's `MultiModalEmbedding`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from io import BytesIO
from typing import Any

from mmemb_deploy.embedder import Embedder
from mmemb_deploy.errors import MissingExtraError
from mmemb_deploy.options import EncodeOptions

try:
    from llama_index.core.bridge.pydantic import PrivateAttr
    from llama_index.core.embeddings import MultiModalEmbedding
except ModuleNotFoundError as error:
    raise MissingExtraError("llama_index.core", "llama-index") from error


class MmembEmbedding(MultiModalEmbedding):
    """Embeds queries by `Embedder.encode`, texts and pictures, which are searched, by `encode_document`.

    `query` and `document` are options of theirs; all others are LlamaIndex's.
    """

    _embedder: Embedder = PrivateAttr()
    _query: EncodeOptions = PrivateAttr()
    _document: EncodeOptions = PrivateAttr()

    def __init__(
        self,
        embedder: Embedder,
        *,
        query: EncodeOptions | None = None,
        document: EncodeOptions | None = None,
        **settings: Any,
    ) -> None:
        settings.setdefault("model_name", embedder.manifest.model.name)
        super().__init__(**settings)
        self._embedder, self._query, self._document = embedder, query or {}, document or {}

    def _documents(self, inputs: Sequence[Any]) -> list[list[float]]:
        vectors: list[list[float]] = self._embedder.encode_document(inputs, **self._document).tolist()
        return vectors

    def _get_query_embedding(self, query: str) -> list[float]:
        vector: list[float] = self._embedder.encode([query], **self._query)[0].tolist()
        return vector

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._documents([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._documents(texts)

    def _get_image_embedding(self, img_file_path: str | BytesIO) -> list[float]:
        return self._get_image_embeddings([img_file_path])[0]

    def _get_image_embeddings(self, img_file_paths: Sequence[str | BytesIO]) -> list[list[float]]:
        images = [image.getvalue() if isinstance(image, BytesIO) else image for image in img_file_paths]
        return self._documents([{"image": image} for image in images])

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await asyncio.to_thread(self._get_query_embedding, query)

    async def _aget_image_embedding(self, img_file_path: str | BytesIO) -> list[float]:
        return await asyncio.to_thread(self._get_image_embedding, img_file_path)
