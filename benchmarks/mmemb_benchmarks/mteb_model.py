"""Any bundle as a model of mteb 2 (github.com/embeddings-benchmark/mteb): `mteb.evaluate(MtebModel(embedder), task)`.

It fulfils mteb's `EncoderProtocol`. Queries, and the inputs of tasks that have no two sides, are embedded with the
task's prompt as instruction, or the bundle's where the task has none; documents are embedded as such, so they never
reason. Where a query has an instruction of its own, mteb has already put it into the query's text.

Axes: N inputs of a call, D embedding size.
"""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack, cast

import numpy as np
from numpy.typing import NDArray

from mmemb_benchmarks.results import BundleFacts
from mmemb_deploy.embedder import Embedder
from mmemb_deploy.errors import MissingExtraError, OptionError, check_known
from mmemb_deploy.inputs.preprocess import Floats
from mmemb_deploy.options import EncodeOptions
from mmemb_deploy.progress import counting
from mmemb_deploy.routing.router import MODES, Route

if TYPE_CHECKING:
    from mteb import TaskMetadata
    from mteb.models import ModelMeta
    from mteb.types import BatchedInput, EncodeKwargs, PromptType
    from torch.utils.data import DataLoader

PRECISIONS = ("float32", "int8")  # those whose cosine is that of the vectors as they are
FRAMES = 8  # of a video, evenly spread, as MMEB-V2's authors take them


@dataclass
class Usage:
    """What a task cost: its queries, how many of them reasoned, the tokens of their rationales, and blank inputs."""

    queries: int = 0
    reasoned: int = 0
    rationale_tokens: int = 0
    blank: int = 0

    @property
    def reasoning_rate(self) -> float:
        """Share of the queries that reasoned."""
        return self.reasoned / max(self.queries, 1)


class MtebModel:
    """An embedder as mteb sees it; `usage` tells by (task, subset, split) how often queries reasoned.

    Example:
        model = MtebModel(Embedder.load("bundle"))
        mteb.evaluate(model, mteb.get_tasks(["NanoNQRetrieval"]))
        print(model.usage)
    """

    def __init__(self, embedder: Embedder, reasoning: str = "auto", *, frames: int = FRAMES) -> None:
        """Wrap an embedder; `reasoning` is that of `encode`, for queries. Raises MissingExtraError without mteb."""
        check_known("reasoning", reasoning, MODES)
        self.embedder = embedder
        self.reasoning = reasoning
        self.frames = frames
        self.usage: dict[tuple[str, str, str], Usage] = {}
        self.mteb_model_meta = self._meta()

    def encode(
        self,
        inputs: DataLoader[BatchedInput],
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Unpack[EncodeKwargs],
    ) -> NDArray[Any]:
        """Embed batches of columns "text", "image" and "video": (N, D), in their order.

        An input that is blank, which corpora do contain, becomes zeros: its cosine with everything is 0. Raises
        OptionError for a batch with none of the columns, InputError for an input that cannot be processed.
        """
        check_known("precision", kwargs.get("precision", "float32"), PRECISIONS)
        is_document = prompt_type is not None and prompt_type.value == "document"
        options: EncodeOptions = {
            "batch_size": kwargs.get("batch_size", 32),
            "precision": kwargs.get("precision", "float32"),
        }
        if (instruction := _instruction(task_metadata, is_document=is_document)) is not None:
            options["instruction"] = instruction
        if not is_document:
            options["reasoning"] = self.reasoning
        options = self.embedder.document_options | options if is_document else options
        usage = self.usage.setdefault((task_metadata.name, hf_subset, hf_split), Usage())
        pieces: list[NDArray[Any]] = []
        with counting(len(cast("Sized", inputs.dataset)), shown=kwargs.get("show_progress_bar", False)) as done:
            for batch in inputs:
                contents = _contents(cast("dict[str, Any]", batch), self.frames)
                full = [index for index, content in enumerate(contents) if content]
                result = self.embedder.encode_detailed([contents[index] for index in full], **options)
                embeddings_ND = np.zeros((len(contents), self.embedder.dim), result.embeddings.dtype)
                embeddings_ND[full] = result.embeddings
                pieces.append(embeddings_ND)
                details = [detail for detail in result.details if detail is not None]
                usage.queries += 0 if is_document else len(contents)
                usage.reasoned += sum(detail.route is Route.REASON for detail in details)
                usage.rationale_tokens += sum(detail.rationale_tokens for detail in details)
                usage.blank += len(contents) - len(full)
                done(len(contents))
        return np.concatenate(pieces)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Floats:
        """Return the cosine of all with all, float32 (N, N)."""
        return self.embedder.similarity(np.atleast_2d(embeddings1), np.atleast_2d(embeddings2))

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Floats:
        """Return the cosine of each with its partner, float32 (N,)."""
        pairs = zip(np.atleast_2d(embeddings1), np.atleast_2d(embeddings2), strict=True)
        return np.array([self.embedder.similarity(one[None], other[None])[0, 0] for one, other in pairs], np.float32)

    def _meta(self) -> ModelMeta:
        """Describe the bundle; the revision is a hash of its files, so that mteb's cache tells bundles apart."""
        try:
            from mteb.models.model_meta import ModelMeta, ScoringFunction
        except ModuleNotFoundError as error:
            raise MissingExtraError("mteb", "eval") from error
        manifest = self.embedder.manifest
        return ModelMeta.create_empty(
            {
                "name": f"mmemb-deploy/{manifest.model.name}",
                "revision": BundleFacts.of(self.embedder).hash[:12],
                "embed_dim": manifest.model.hidden_size,
                "framework": ["ONNX"],
                "modalities": ["text", "image", "video"],
                "similarity_fn_name": ScoringFunction.COSINE,
                "use_instructions": True,
                "experiment_kwargs": {"reasoning": self.reasoning, "frames": self.frames},
            }
        )


def _instruction(task: TaskMetadata, *, is_document: bool) -> str | None:
    """Return the task's prompt for a side: one string is for queries, a dict has "query" and "document"."""
    prompt = task.prompt
    if prompt is None or isinstance(prompt, str):
        return None if is_document else prompt
    return cast("dict[str, str]", prompt).get("document" if is_document else "query")


def _contents(batch: dict[str, Any], frames: int) -> list[dict[str, Any]]:
    """Turn columns into inputs of `encode`; an input of which every column is blank or None is empty."""
    columns = [column for column in ("text", "image", "video") if column in batch]
    if not columns:
        raise OptionError(f"a batch has the columns {', '.join(batch)}: none of text, image and video, which are read")
    contents: list[dict[str, Any]] = []
    for values in zip(*(batch[column] for column in columns), strict=True):
        content: dict[str, Any] = {}
        for column, value in zip(columns, values, strict=True):
            if value is None or (column == "text" and not value.strip()):
                continue
            content |= _video(value, frames) if column == "video" else {column: value}
        contents.append(content)
    return contents


def _video(decoder: Any, count: int) -> dict[str, Any]:
    """Read evenly spread frames, with their times, from a torchcodec VideoDecoder."""
    total: int = decoder.metadata.num_frames
    indices = np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist()
    batch = decoder.get_frames_at(indices)
    return {"video": batch.data.permute(0, 2, 3, 1).numpy(), "timestamps": batch.pts_seconds.tolist()}
