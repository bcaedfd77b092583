"""The facade: load a bundle, embed any mix of inputs, routing each by its gate score."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from mmemb_deploy import abi
from mmemb_deploy.backends.session import choose_backend
from mmemb_deploy.bundle import TOKENIZER, Bundle
from mmemb_deploy.cache import KVCache
from mmemb_deploy.errors import InputError, MissingExtraError, OptionError, check_known
from mmemb_deploy.fast_path import FastPath
from mmemb_deploy.generation import Generator, Reasoned
from mmemb_deploy.inputs import parse
from mmemb_deploy.options import EncodeOptions, Options
from mmemb_deploy.preprocess import Floats
from mmemb_deploy.prompts import PAD, PromptEncoder
from mmemb_deploy.router import Policy, Route, highest
from mmemb_deploy.rows import Row, RowEncoder

PATH_MARKERS = 3  # `<think>`, `</think>` and `<|gen_emb|>` around a rationale


@dataclass(frozen=True)
class Timings:
    """Seconds: an input's own preprocessing, then what its batches took; an input on the fast route generates none."""

    preprocess: float
    fast_path: float
    generation: float

    @property
    def total(self) -> float:
        """Seconds of all stages."""
        return self.preprocess + self.fast_path + self.generation


@dataclass(frozen=True)
class Detail:
    """How one input was embedded."""

    route: Route
    gate_score: float  # probability, by the model's own next-token choice, that reasoning pays
    rationale: str | None
    rationale_ids: tuple[int, ...]  # without the markers around them
    truncated: bool  # the token limit closed the rationale
    timings: Timings

    @property
    def rationale_tokens(self) -> int:
        """Tokens of the rationale, without the markers around it."""
        return len(self.rationale_ids)


@dataclass(frozen=True)
class EncodeResult:
    """Embeddings in the order of the inputs; where errors are returned, a failed row is NaN (0 if not a float)."""

    embeddings: NDArray[Any]
    details: list[Detail | None]  # None for a failed row
    errors: list[InputError]


@dataclass
class _Prepared:
    """An input on its way: its row, then what the fast path found, then what reasoning wrote."""

    index: int
    row: Row
    preprocess: float
    score: float = 0.0
    fast_path: float = 0.0
    generation: float = 0.0
    reasoned: Reasoned | None = None


class Embedder:
    """Embeds text, images, videos and documents with one bundle.

    embedder = Embedder.load()
    vectors = embedder.encode(["three plus four", {"image": "photo.png", "text": "what is the sum?"}])
    """

    def __init__(self, bundle: Bundle, *, backend: str = "auto", threads: int | None = None) -> None:
        try:
            from tokenizers import Tokenizer
        except ModuleNotFoundError as error:
            raise MissingExtraError("tokenizers", "cpu") from error
        engine = choose_backend(backend, threads)
        self.manifest = bundle.manifest
        self.backend = engine.name
        model, markers = self.manifest.model, self.manifest.markers
        tokenizer = Tokenizer.from_file(str(bundle.folder / TOKENIZER))
        self._encoder = RowEncoder(PromptEncoder(tokenizer, self.manifest.prompt), self.manifest.vision)
        self._fast = FastPath(
            *(engine.open(bundle.graph(name)) for name in (abi.VISION, abi.EMBEDDER, abi.GATE)),
            spec=self.manifest.vision,
            hidden_size=model.hidden_size,
            layers=model.layers,
            deepstack_levels=model.deepstack_levels,
            pad_id=markers[PAD],
            max_patches=self.manifest.batch.patches,
        )
        self._generator = Generator(engine.open(bundle.graph(abi.GENERATOR)), layers=model.layers, markers=markers)

    @classmethod
    def load(cls, bundle: str | Path | None = None, *, backend: str = "auto", threads: int | None = None) -> Embedder:
        """Load a bundle from a folder, or the embedded nano bundle.

        `backend` is "auto" or "onnxruntime"; `threads` bounds the threads of one operator, None takes all cores.
        Raises BundleError and its kin for a bundle that fails a check, BackendError where the backend cannot run.
        """
        opened = Bundle.nano() if bundle is None else Bundle.open(Path(bundle))
        return cls(opened, backend=backend, threads=threads)

    @property
    def dim(self) -> int:
        """Size of the embeddings."""
        return self.manifest.model.hidden_size

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
        "video"; see `mmemb_deploy.inputs`. `options` are those of `mmemb_deploy.options.Options`. A result does not
        depend on the other inputs of the call. Every input is checked, decoded and resized before anything runs, so
        the call holds at most `max_pixels` bytes x 3 of each image at a time.

        With `return_details` or `errors="return"` an EncodeResult is returned. Raises InputError, naming its index, for
        an input that cannot be processed, unless `errors="return"`; OptionError for an option.
        """
        settings = Options.of(dict(options))
        check_known("errors", errors, ("raise", "return"))
        self._check(inputs, settings)
        policy = Policy(
            settings.reasoning,
            self.manifest.gate.threshold if settings.threshold is None else settings.threshold,
            settings.reasoning_rate,
        )
        prepared, failures = self._prepare(inputs, settings, keep_going=errors == "return")
        embeddings = np.full((len(inputs), self.dim), np.nan, np.float32)
        self._run(prepared, policy, settings, embeddings)
        details: list[Detail | None] = [None] * len(inputs)
        for item in prepared:
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
        if options.truncate_dim is not None and options.truncate_dim not in self.manifest.model.dims:
            known = ", ".join(map(str, self.manifest.model.dims))
            raise OptionError(f"truncate_dim is {options.truncate_dim}: this bundle was trained for {known}")

    def _prepare(
        self, inputs: Sequence[Any], options: Options, *, keep_going: bool
    ) -> tuple[list[_Prepared], list[InputError]]:
        prepared: list[_Prepared] = []
        failures: list[InputError] = []
        instruction = options.instruction
        if instruction is None:
            instruction = self.manifest.prompt.query_instruction
        for index, item in enumerate(inputs):
            began = time.perf_counter()
            try:
                row = self._encoder.row(parse(item, self.manifest.limits), instruction)
                self._check_length(row)
            except InputError as error:
                if not keep_going:
                    raise error.at(index) from error
                failures.append(error.at(index))
            else:
                prepared.append(_Prepared(index, row, time.perf_counter() - began))
        return prepared, failures

    def _check_length(self, row: Row) -> None:
        limit = self.manifest.batch.row_tokens - self.manifest.model.max_rationale_tokens - PATH_MARKERS
        if row.length > limit:
            raise InputError(
                f"it becomes {row.length} tokens ({row.visual_tokens} of them visual), above the limit of {limit}: "
                "shorten the text, or pass fewer or smaller images"
            )

    def _run(self, prepared: list[_Prepared], policy: Policy, options: Options, embeddings: Floats) -> None:
        """Fill `embeddings`, and what the prepared inputs record of their way."""
        quota = policy.quota(len(prepared))
        if quota is not None:
            self._check_quota(prepared, quota)
        waiting: dict[int, tuple[_Prepared, KVCache]] = {}
        with _Progress(len(prepared), options.show_progress_bar) as progress:
            for batch in self._batches(prepared, options.batch_size):
                began = time.perf_counter()
                result = self._fast.run([item.row for item in batch])
                for place, item in enumerate(batch):
                    item.fast_path = time.perf_counter() - began
                    item.score = float(result.scores_B[place])
                    embeddings[item.index] = result.embeddings_BD[place]
                    if _given(item, options) is not None or quota is not None or policy.wants(item.score):
                        waiting[item.index] = item, result.cache.take([place])
                if quota is not None:
                    chosen = highest(
                        ((index, item.score) for index, (item, _) in waiting.items() if _given(item, options) is None),
                        quota,
                    )
                    waiting = {
                        index: pair
                        for index, pair in waiting.items()
                        if index in chosen or _given(pair[0], options) is not None
                    }
                elif len(waiting) >= options.batch_size:
                    self._reason(list(waiting.values()), options, embeddings)
                    waiting = {}
                progress.advance(len(batch))
            queue = list(waiting.values())
            for start in range(0, len(queue), options.batch_size):
                self._reason(queue[start : start + options.batch_size], options, embeddings)

    def _check_quota(self, prepared: list[_Prepared], quota: int) -> None:
        model = self.manifest.model
        longest = max((item.row.length for item in prepared), default=0)
        needed = quota * longest * model.layers * 2 * model.kv_heads * model.head_dim * 4
        if needed > self.manifest.batch.cache_bytes:
            raise OptionError(
                f"reasoning_rate would hold {needed / 2**20:.0f} MiB of KV caches for {quota} inputs, above "
                f"the bundle's {self.manifest.batch.cache_bytes / 2**20:.0f} MiB: pass fewer inputs, or a threshold"
            )

    def _batches(self, prepared: list[_Prepared], batch_size: int) -> Iterator[list[_Prepared]]:
        """Yield batches of similar length, whose padded size stays within the bundle's limit."""
        batch: list[_Prepared] = []
        for item in sorted(prepared, key=lambda item: item.row.length):
            full = len(batch) == batch_size or (len(batch) + 1) * item.row.length > self.manifest.batch.tokens
            if batch and full:
                yield batch
                batch = []
            batch.append(item)
        if batch:
            yield batch

    def _reason(self, waiting: list[tuple[_Prepared, KVCache]], options: Options, embeddings: Floats) -> None:
        """Continue from the caches of some inputs: along given rationales, or the model's own."""
        limit = self.manifest.model.max_rationale_tokens
        if options.max_rationale_tokens is not None:
            limit = min(limit, options.max_rationale_tokens)
        follow = [pair for pair in waiting if _given(pair[0], options) is not None]
        write = [pair for pair in waiting if _given(pair[0], options) is None]
        for group in (follow, write):
            if not group:
                continue
            began = time.perf_counter()
            cache = KVCache.stack([cache for _, cache in group])
            if group is follow:
                words = [self._encoder.prompt.words(_given(item, options) or "") for item, _ in group]
                reasoned = self._generator.follow(cache, words)
            else:
                reasoned = self._generator.generate(cache, limit)
            for (item, _), result in zip(group, reasoned, strict=True):
                item.generation = time.perf_counter() - began
                item.reasoned = result
                embeddings[item.index] = result.embedding_D

    def _detail(self, item: _Prepared) -> Detail:
        reasoned = item.reasoned
        return Detail(
            route=Route.FAST if reasoned is None else Route.REASON,
            gate_score=item.score,
            rationale=None if reasoned is None else self._encoder.prompt.decode(reasoned.token_ids),
            rationale_ids=() if reasoned is None else tuple(reasoned.token_ids),
            truncated=reasoned is not None and reasoned.truncated,
            timings=Timings(item.preprocess, item.fast_path, item.generation),
        )


def _given(item: _Prepared, options: Options) -> str | None:
    return None if options.rationales is None else options.rationales[item.index]


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


class _Progress:
    """A rich progress bar on standard error, or nothing."""

    def __init__(self, total: int, shown: bool) -> None:
        self._bar: Any = None
        self._total = total
        if shown:
            from rich.console import Console
            from rich.progress import Progress

            self._bar = Progress(console=Console(stderr=True))

    def __enter__(self) -> _Progress:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("embedding", total=self._total)
        return self

    def advance(self, rows: int) -> None:
        """Count `rows` more inputs as past the fast path."""
        if self._bar is not None:
            self._bar.advance(self._task, rows)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
