"""An embedder as the one module of a SentenceTransformer: `SentenceTransformer(modules=[BundleModule(embedder)])`.

This is the only file of the runtime that imports torch, which sentence-transformers brings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmemb_deploy.embedder import Embedder
from mmemb_deploy.errors import MissingExtraError, OptionError
from mmemb_deploy.options import EncodeOptions

try:
    import torch
    from sentence_transformers.base.modality import infer_modality
    from sentence_transformers.base.modules import InputModule
except ModuleNotFoundError as error:
    raise MissingExtraError("sentence_transformers", "sentence-transformers") from error


class BundleModule(InputModule):
    """Embeds by `Embedder.encode`, in `encode_document` of the model by that of the embedder.

    A prompt becomes the instruction. `query` and `document` are options of the embedder. An input is a text, a
    picture, a video, or a dict of "text", "image" and "video"; the path of a picture or of a video stands for it there.
    """

    forward_kwargs: set[str] = set()  # noqa: RUF012 - as sentence-transformers declares it

    def __init__(
        self, embedder: Embedder, *, query: EncodeOptions | None = None, document: EncodeOptions | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own has no annotations
        self.embedder = embedder
        self.query: EncodeOptions = query or {}
        self.document: EncodeOptions = document or {}

    @property
    def modalities(self) -> list[Any]:
        """What an input may be; "message" stands for batches of several kinds."""
        return ["text", "image", "video", "message"]

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, *, task: str | None = None, **_: Any
    ) -> dict[str, Any]:
        """Prepare a batch. Raises InputError, naming the input's index in it."""
        options = self.embedder.document_options | self.document if task == "document" else self.query
        if prompt:
            options = options | {"instruction": prompt}
        return {"prepared": self.embedder.prepare([self._input(each) for each in inputs], **options)}

    def _input(self, given: Any) -> Any:
        kind = infer_modality(given, supported_modalities=self.modalities)
        return {kind: given} if kind in ("image", "video") and not isinstance(given, dict) else given

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Embed a batch that was prepared."""
        return {"sentence_embedding": torch.from_numpy(self.embedder.run(features["prepared"]).embeddings)}

    def get_embedding_dimension(self) -> int:
        """Return the size of the embeddings."""
        return self.embedder.dim

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        """Refuse: a bundle is a folder already. Raises OptionError."""
        raise OptionError(f"{output_path}: a bundle is saved by copying its folder")
