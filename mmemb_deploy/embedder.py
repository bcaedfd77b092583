"""The facade: load a bundle, embed any mix of inputs, routing each by its gate score."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from mmemb_deploy.backends.choose import choose_backend
from mmemb_deploy.backends.protocol import Engine
from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.bundle.manifest import TOKENIZER, Manifest
from mmemb_deploy.errors import InputError, MissingExtraError, OptionError, check_known
from mmemb_deploy.inputs.parse import parse
from mmemb_deploy.inputs.preprocess import Floats
from mmemb_deploy.inputs.prompts import PAD, PATH_MARKERS, PromptEncoder
from mmemb_deploy.inputs.rows import Row, RowEncoder
from mmemb_deploy.options import EncodeOptions, Options
from mmemb_deploy.progress import counting
from mmemb_deploy.results import Detail, EncodeResult, Timings
from mmemb_deploy.routing.fast_path import FastPath
from mmemb_deploy.routing.generation import Generator
from mmemb_deploy.routing.pipeline import Item, Pipeline
from mmemb_deploy.routing.router import MODES, Policy, Route
from mmemb_deploy.routing.vision import VisionEncoder

if TYPE_CHECKING:
    from mmemb_deploy.reasoners.remote import RemoteReasoner


class Embedder:
    """Embeds text, images, videos and documents with one bundle.

    Example:
        embedder = Embedder.load()
        vectors = embedder.encode(["three plus four", {"image": "photo.png", "text": "what is the sum?"}])
    """

    def __init__(
        self, manifest: Manifest, encoder: RowEncoder, engine: Engine, reasoner: RemoteReasoner | None = None
    ) -> None:
        """Assemble an embedder from its parts; `load` does it for bundles."""
        self.manifest = manifest
        self.backend = engine.name
        self.reasoner = reasoner
        model, markers = manifest.model, manifest.markers
        self.encoder = encoder
        vision = VisionEncoder(
            engine.vision,
            manifest.vision,
            hidden_size=model.hidden_size,
            levels=model.deepstack_levels,
            max_patches=manifest.batch.patches,
            cache_bytes=manifest.batch.vision_bytes,
        )
        fast_path = FastPath(vision, engine.decoder, engine.gate, markers[PAD])
        if reasoner is not None and manifest.gate is None:
            raise OptionError(f"reasoner is {reasoner.name}: this bundle does not reason, so pass none")
        self._remote = None if reasoner is None else reasoner.generator(encoder.prompt, manifest.limits)
        self.pipeline = Pipeline(
            fast_path, Generator(engine.decoder, encoder.prompt), model, manifest.batch, self._remote
        )

    @classmethod
    def load(
        cls,
        bundle: str | Path | None = None,
        *,
        backend: str = "auto",
        threads: int | None = None,
        reasoner: RemoteReasoner | None = None,
    ) -> Embedder:
        """Load a bundle from a folder, or the embedded nano bundle.

        `backend` is "auto", "onnxruntime", "onnxruntime-cuda", "tensorrt" or "tensorrt-rtx"; the last two load what
        `mmemb build` made, and only "auto" and "onnxruntime" run on the CPU.
        `threads` bounds the threads of one operator on the CPU, None takes all cores.
        `reasoner` writes the rationales in place of the bundle's own generator, which then follows them.
        Raises BundleError and its kin for a bundle that fails a check, BackendError where the backend cannot run.
        """
        opened = Bundle.nano() if bundle is None else Bundle.open(Path(bundle))
        return cls.of_bundle(opened, backend=backend, threads=threads, reasoner=reasoner)

    @classmethod
    def of_bundle(
        cls,
        bundle: Bundle,
        *,
        backend: str = "auto",
        threads: int | None = None,
        reasoner: RemoteReasoner | None = None,
    ) -> Embedder:
        """Load the graphs of a bundle that is open."""
        encoder = row_encoder(bundle)
        return cls(bundle.manifest, encoder, choose_backend(backend, threads).load(bundle), reasoner)

    @property
    def dim(self) -> int:
        """Size of the embeddings."""
        return self.manifest.model.hidden_size

    @property
    def reasons(self) -> bool:
        """Whether the bundle has a gate and a reasoning path."""
        return self.manifest.gate is not None

    @overload
    def encode(
        self,
        inputs: Sequence[Any],
        *,
        return_details: Literal[True],
        errors: str = ...,
        **options: Unpack[EncodeOptions],
    ) -> EncodeResult: ...

    @overload
    def encode(
        self, inputs: Sequence[Any], *, errors: Literal["return"], **options: Unpack[EncodeOptions]
    ) -> EncodeResult: ...

    @overload
    def encode(
        self, inputs: Sequence[Any], *, errors: Literal["raise"] = ..., **options: Unpack[EncodeOptions]
    ) -> NDArray[Any]: ...

    def encode(
        self,
        inputs: Sequence[Any],
        *,
        return_details: bool = False,
        errors: str = "raise",
        **options: Unpack[EncodeOptions],
    ) -> NDArray[Any] | EncodeResult:
        """Embed inputs as queries: float32 (inputs, dim), L2-normalised, in their order.

        An input is a str (always text), a PIL image, an array, or a dict with any of "text", "image", "images",
        "video"; see `mmemb_deploy.inputs.parse`. `options` are those of `mmemb_deploy.options.Options`. A result
        does not depend on the other inputs of the call. Every input is checked, decoded and resized before anything
        runs, so the call holds at most `max_pixels` bytes x 3 of each image at a time.

        With `return_details` or `errors="return"` an EncodeResult is returned. Raises InputError, naming its index, for
        an input that cannot be processed, unless `errors="return"`; OptionError for an option; BackendError, naming an
        index too, where a reasoner fails and is not to be replaced by the direct embedding.
        """
        settings = Options.of(dict(options))
        check_known("errors", errors, ("raise", "return"))
        self._check(inputs, settings)
        policy = self._policy(settings)
        items, failures = self._prepare(inputs, settings, keep_going=errors == "return")
        limit = self.manifest.model.max_rationale_tokens
        if settings.max_rationale_tokens is not None:
            limit = min(limit, settings.max_rationale_tokens)
        with counting(len(items), shown=settings.show_progress_bar) as done:
            self.pipeline.run(items, policy, batch_size=settings.batch_size, max_rationale_tokens=limit, done=done)
        embeddings = np.full((len(inputs), self.dim), np.nan, np.float32)
        details: list[Detail | None] = [None] * len(inputs)
        for item in items:
            embeddings[item.index] = item.embedding_D
            details[item.index] = self._detail(item)
        finished = _finish(embeddings, settings)
        if return_details or errors == "return":
            return EncodeResult(finished, details, failures)
        return finished

    encode_query = encode

    @overload
    def encode_document(
        self,
        inputs: Sequence[Any],
        *,
        return_details: Literal[True],
        errors: str = ...,
        **options: Unpack[EncodeOptions],
    ) -> EncodeResult: ...

    @overload
    def encode_document(
        self, inputs: Sequence[Any], *, errors: Literal["return"], **options: Unpack[EncodeOptions]
    ) -> EncodeResult: ...

    @overload
    def encode_document(
        self, inputs: Sequence[Any], *, errors: Literal["raise"] = ..., **options: Unpack[EncodeOptions]
    ) -> NDArray[Any]: ...

    def encode_document(self, inputs: Sequence[Any], **options: Any) -> NDArray[Any] | EncodeResult:
        """Embed what is searched: `encode` with the bundle's document instruction, on the fast path unless asked."""
        defaults: dict[str, Any] = {"instruction": self.manifest.prompt.document_instruction, "reasoning": "never"}
        result: NDArray[Any] | EncodeResult = self.encode(inputs, **(defaults | options))
        return result

    @staticmethod
    def similarity(queries: NDArray[Any], documents: NDArray[Any]) -> Floats:
        """Return the cosine of every query with every document, float32 (queries, documents)."""
        left, right = (_normalised(np.asarray(side, np.float32)) for side in (queries, documents))
        return left @ right.T

    def _check(self, inputs: Any, options: Options) -> None:
        if isinstance(inputs, (str, bytes)) or not isinstance(inputs, Sequence):
            raise OptionError(f"inputs is a {type(inputs).__name__}: pass a list, [input], even for a single input")
        if options.rationales is not None and len(options.rationales) != len(inputs):
            raise OptionError(
                f"rationales has {len(options.rationales)} entries for {len(inputs)} inputs: pass one each"
            )
        if self.reasoner is not None and options.max_rationale_tokens == 0:
            raise OptionError("max_rationale_tokens is 0: a reasoner writes at least 1; pass reasoning='never' instead")
        if options.truncate_dim is not None and options.truncate_dim not in self.manifest.model.dims:
            known = ", ".join(map(str, self.manifest.model.dims))
            raise OptionError(f"truncate_dim is {options.truncate_dim}: this bundle was trained for {known}")

    def _policy(self, options: Options) -> Policy:
        gate = self.manifest.gate
        if gate is not None:
            threshold = gate.threshold if options.threshold is None else options.threshold
            return Policy(options.reasoning, threshold, options.reasoning_rate)
        refused = {
            "reasoning": "always" if options.reasoning == "always" else None,
            "threshold": options.threshold,
            "reasoning_rate": options.reasoning_rate,
            "rationales": options.rationales,
        }
        for name, value in refused.items():
            if value is not None:
                raise OptionError(
                    f"{name} is {value!r}: {self.manifest.model.name} embeds without reasoning; leave {name} out, or "
                    "load a bundle of an MMEmb-R1 checkpoint"
                )
        check_known("reasoning", options.reasoning, MODES)
        return Policy("never")

    def _prepare(
        self, inputs: Sequence[Any], options: Options, *, keep_going: bool
    ) -> tuple[list[Item], list[InputError]]:
        items: list[Item] = []
        failures: list[InputError] = []
        instruction = options.instruction
        if instruction is None:
            instruction = self.manifest.prompt.query_instruction
        rationales = options.rationales or [None] * len(inputs)
        for index, (content, rationale) in enumerate(zip(inputs, rationales, strict=True)):
            began = time.perf_counter()
            try:
                request = parse(content, self.manifest.limits)
                row = self.encoder.row(request, instruction)
                given = None if rationale is None else self.encoder.prompt.tokenize(rationale)
                self._check_length(row, given or [])
                chat = None
                if self._remote is not None and given is None and options.reasoning != "never":
                    chat = self._remote.chat(content, request, instruction)
            except InputError as error:
                if not keep_going:
                    raise error.at(index) from error
                failures.append(error.at(index))
            else:
                items.append(Item(index, row, time.perf_counter() - began, given, chat))
        return items, failures

    def _check_length(self, row: Row, given: Sequence[int]) -> None:
        rationale = max(self.manifest.model.max_rationale_tokens, len(given))
        limit = self.manifest.batch.row_tokens - rationale - PATH_MARKERS
        if row.length > limit:
            raise InputError(
                f"it becomes {row.length} tokens ({row.visual_tokens} of them visual), above the limit of {limit} "
                f"beside a rationale of {rationale}: shorten the text, or pass fewer or smaller images"
            )

    def _detail(self, item: Item) -> Detail:
        reasoned = item.reasoned
        source = "caller" if item.given is not None else "bundle" if self.reasoner is None else self.reasoner.name
        return Detail(
            route=Route.FAST if reasoned is None else Route.REASON,
            gate_score=item.score,
            rationale=None if reasoned is None else self.encoder.prompt.decode(reasoned.token_ids),
            rationale_ids=() if reasoned is None else tuple(reasoned.token_ids),
            rationale_source=None if reasoned is None else source,
            truncated=reasoned is not None and reasoned.truncated,
            fallback=item.fallback,
            timings=Timings(item.preprocess, item.fast_path, item.generation),
        )


def row_encoder(bundle: Bundle) -> RowEncoder:
    """Return what turns a bundle's inputs into rows. Raises MissingExtraError where tokenizers is not installed."""
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError as error:
        raise MissingExtraError("tokenizers", "cpu") from error
    tokenizer = Tokenizer.from_file(str(bundle.folder / TOKENIZER))
    return RowEncoder(PromptEncoder(tokenizer, bundle.manifest.prompt), bundle.manifest.vision)


def _finish(embeddings: Floats, options: Options) -> NDArray[Any]:
    """Truncate and quantise; see `Options.truncate_dim` and `Options.precision`."""
    if options.truncate_dim is not None:
        embeddings = _normalised(embeddings[:, : options.truncate_dim])
    if options.precision == "float32":
        return embeddings
    known = np.nan_to_num(embeddings, nan=0.0)
    if options.precision == "int8":
        return np.rint(known * 127).astype(np.int8)
    return np.packbits(known > 0, axis=1)


def _normalised(rows: Floats) -> Floats:
    normalised: Floats = rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), np.finfo(np.float32).tiny)
    return normalised
