"""The facade: load a bundle, embed any mix of inputs, routing each by its gate score."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from logging import INFO, WARNING, getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

import numpy as np
from numpy.typing import NDArray

from mmemb_deploy.backends.choose import choose_backend
from mmemb_deploy.backends.protocol import Engine, PromptGraphs
from mmemb_deploy.bundle.folder import NANO, Bundle
from mmemb_deploy.bundle.manifest import TOKENIZER, Manifest
from mmemb_deploy.errors import InputError, MissingExtraError, OptionError, SchemaError, check_known
from mmemb_deploy.inputs.parse import parse
from mmemb_deploy.inputs.preprocess import Floats
from mmemb_deploy.inputs.prompts import PAD, PATH_MARKERS, PromptEncoder
from mmemb_deploy.inputs.rows import Row, RowEncoder
from mmemb_deploy.options import EncodeOptions, Options
from mmemb_deploy.progress import counting
from mmemb_deploy.results import Detail, EncodeResult, Timings
from mmemb_deploy.routing.fast_path import FastPath
from mmemb_deploy.routing.generation import Generator
from mmemb_deploy.routing.items import Item
from mmemb_deploy.routing.jobs import Call, Job, Pace
from mmemb_deploy.routing.lane import PrefillLane
from mmemb_deploy.routing.paths import Paths
from mmemb_deploy.routing.router import MODES, Policy, Route
from mmemb_deploy.routing.scheduler import Scheduler
from mmemb_deploy.routing.vision import FeatureCache, VisionEncoder

if TYPE_CHECKING:
    from mmemb_deploy.reasoners.remote import RemoteReasoner

LOGGER = getLogger("mmemb_deploy")


@dataclass(frozen=True)
class Prepared:
    """Inputs on their way through `Embedder.prepare` and `run`: how many, those that can be embedded, the others."""

    inputs: int
    items: list[Item]
    failures: list[InputError]
    options: Options
    policy: Policy


class Embedder:
    """Embeds text, images, videos and documents with one bundle.

    Example:
        embedder = Embedder.load()
        vectors = embedder.encode(["three plus four", {"image": "photo.png", "text": "what is the sum?"}])
    """

    def __init__(
        self,
        manifest: Manifest,
        encoder: RowEncoder,
        engine: Engine,
        reasoner: RemoteReasoner | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        """Assemble an embedder from its parts; `load` does it for bundles."""
        self.manifest = manifest
        self.backend = engine.name
        self.reasoner = reasoner
        self.notes = tuple(notes)
        self.encoder = encoder
        cache = FeatureCache[Any](manifest.batch.vision_bytes)

        def fast_path(graphs: Engine | PromptGraphs) -> FastPath:
            vision = VisionEncoder(graphs.vision, manifest.vision, cache)
            return FastPath(vision, graphs.decoder, engine.gate, encoder.prompt.ids[PAD])

        generator = Generator(engine.decoder, encoder.prompt)
        if reasoner is not None and manifest.gate is None:
            raise OptionError(f"reasoner is {reasoner.name}: this bundle does not reason, so pass none")
        self._remote = None if reasoner is None else reasoner.writer(encoder, generator, manifest.limits)
        self.paths = Paths(
            fast_path(engine),
            generator,
            manifest.batch,
            manifest.cache_token_bytes,
            writer=self._remote,
            lane=None if engine.beside is None else PrefillLane(fast_path(engine.beside)),
        )

    @classmethod
    def load(
        cls,
        bundle: str | Path | None = None,
        *,
        backend: str = "auto",
        threads: int | None = None,
        device: int = 0,
        reasoner: RemoteReasoner | None = None,
        digest: str | None = None,
    ) -> Embedder:
        """Load a bundle from a folder, or the embedded nano bundle.

        `backend` is "onnxruntime" (the CPU), "onnxruntime-cuda", "tensorrt" or "tensorrt-rtx", which load what `mmemb
        build` made, or "auto": the best of them that this bundle and this machine have. `notes` of the embedder says
        which that was and why, and what of the bundle's certificate may not hold here.
        `threads` bounds the threads of one operator on the CPU, None takes every core that the process may use.
        `device` is the index of the GPU, counted from 0 among those that the process sees.
        `reasoner` writes the rationales in place of the bundle's own generator, which then follows them.
        `digest` is what `mmemb inspect` printed of the bundle: any other bundle is refused.
        Raises BundleError and its kin for a bundle that fails a check, BackendError where the backend cannot run.
        """
        opened = Bundle.open(NANO if bundle is None else Path(bundle), digest)
        return cls.of_bundle(opened, backend=backend, threads=threads, device=device, reasoner=reasoner)

    @classmethod
    def of_bundle(
        cls,
        bundle: Bundle,
        *,
        backend: str = "auto",
        threads: int | None = None,
        device: int = 0,
        reasoner: RemoteReasoner | None = None,
    ) -> Embedder:
        """Load the graphs of a bundle that is open."""
        encoder = row_encoder(bundle)
        chosen, why = choose_backend(backend, bundle, threads, device)
        engine = chosen.load(bundle)
        slower = [(WARNING, note) for note in engine.notes]
        notes = [(INFO, f"runs on {engine.name}: {why}"), *slower, *bundle.notes()]
        for level, note in notes:
            LOGGER.log(level, note)
        return cls(bundle.manifest, encoder, engine, reasoner, [note for _, note in notes])

    @property
    def dim(self) -> int:
        """Size of the embeddings."""
        return self.manifest.model.hidden_size

    @property
    def reasons(self) -> bool:
        """Whether the bundle has a gate and a reasoning path."""
        return self.manifest.gate is not None

    def encode(self, inputs: Sequence[Any], **options: Unpack[EncodeOptions]) -> NDArray[Any]:
        """Embed inputs as queries: float32 (inputs, dim), L2-normalised, in their order.

        An input is a str (always text), a PIL image, an array, or a dict with any of "text", "image", "images",
        "video", "document"; see `mmemb_deploy.inputs.parse`. `options` are those of `mmemb_deploy.options.Options`.
        How little a result depends on the other inputs of the call is in the bundle's certificate (`BatchParity`).
        Every input is checked, decoded and resized before anything runs, so the call holds at most `max_pixels` bytes
        x 3 of each image at a time.

        Raises InputError, naming its index, for an input that cannot be processed; OptionError for an option;
        BackendError, naming an index too, where a reasoner fails and is not to be replaced by the direct embedding.
        `encode_detailed` also says which way each input went, and can return errors instead. (`return_details=True` and
        `errors="return"` return here what it returns; they are deprecated.)
        """
        if moved := {"return_details", "errors"} & options.keys():
            formerly: NDArray[Any] = self._formerly(moved, inputs, dict(options))
            return formerly
        return self.encode_detailed(inputs, **options).embeddings

    encode_query = encode

    def encode_document(self, inputs: Sequence[Any], **options: Unpack[EncodeOptions]) -> NDArray[Any]:
        """Embed what is searched: `encode` with the bundle's document instruction, on the fast path unless asked."""
        return self.encode(inputs, **(self.document_options | options))

    @property
    def document_options(self) -> EncodeOptions:
        """Options by which `encode` and `encode_detailed` embed what is searched."""
        return {"instruction": self.manifest.prompt.document_instruction, "reasoning": "never"}

    def encode_detailed(
        self, inputs: Sequence[Any], *, errors: Literal["raise", "return"] = "raise", **options: Unpack[EncodeOptions]
    ) -> EncodeResult:
        """Embed inputs as `encode` does, and say of each which way it went and what it thought.

        With `errors="return"`, an input that cannot be processed gets a row of NaN and its InputError in the result,
        and the others are embedded.
        """
        return self.run(self.prepare(inputs, errors=errors, **options))

    def prepare(
        self, inputs: Sequence[Any], *, errors: Literal["raise", "return"] = "raise", **options: Unpack[EncodeOptions]
    ) -> Prepared:
        """Do the part of `encode_detailed` that needs no engine: check, decode, resize and tokenise.

        What it returns goes to `run`; other threads can prepare the next inputs while an engine runs these. An
        InputError among the inputs stands for one that could not be read.
        """
        settings = Options.of(dict(options))
        check_known("errors", errors, ("raise", "return"))
        self._check(inputs, settings)
        policy = self._policy(settings)
        items, failures = self._prepare(inputs, settings, keep_going=errors == "return")
        return Prepared(len(inputs), items, failures, settings, policy)

    def run(self, prepared: Prepared) -> EncodeResult:
        """Embed what `prepare` returned, once."""
        scheduler = self.scheduler(prepared.options)
        with counting(len(prepared.items), shown=prepared.options.show_progress_bar) as done:
            jobs = self.jobs(prepared)
            for job in jobs:
                job.scored = lambda _: done(1)
            scheduler.submit(jobs)
            while scheduler.advance():
                pass
        return self.result(prepared)

    def scheduler(self, options: Options) -> Scheduler:
        """Return what runs the jobs of calls with these options."""
        pace = Pace(prompts=options.batch_size, rationales=options.batch_size)
        return Scheduler(self.paths, pace, time.perf_counter)

    def jobs(self, prepared: Prepared) -> list[Job]:
        """Return what a scheduler runs of what `prepare` returned.

        Raises OptionError where its rate would hold more KV caches than the bundle's limits allow.
        """
        policy, settings = prepared.policy, prepared.options
        limit = self.manifest.model.max_rationale_tokens
        if settings.max_rationale_tokens is not None:
            limit = min(limit, settings.max_rationale_tokens)
        call = Call(policy.quota(len(prepared.items)))
        if call.quota is not None:
            self._check_quota(prepared.items, call.quota)
        return [Job(item, policy, limit, call) for item in prepared.items]

    def result(self, prepared: Prepared) -> EncodeResult:
        """Return the embeddings and details of what a scheduler has run."""
        embeddings = np.full((prepared.inputs, self.dim), np.nan, np.float32)
        details: list[Detail | None] = [None] * prepared.inputs
        for item in prepared.items:
            embeddings[item.index] = item.embedding_D
            details[item.index] = self._detail(item)
        return EncodeResult(_finish(embeddings, prepared.options), details, prepared.failures)

    def _formerly(self, moved: set[str], inputs: Sequence[Any], options: dict[str, Any]) -> Any:
        """Answer a call of `encode` in its former form."""
        warnings.warn(
            f"encode(..., {', '.join(sorted(moved))}) is deprecated: call encode_detailed",
            DeprecationWarning,
            stacklevel=3,
        )
        details, errors = options.pop("return_details", False), options.pop("errors", "raise")
        result = self.encode_detailed(inputs, errors=errors, **options)
        return result if details or errors == "return" else result.embeddings

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
        keep = self.reasons and options.reasoning != "never"
        chat_of = None if self._remote is None or options.reasoning == "never" else self._remote.chats()
        for index, (content, rationale) in enumerate(zip(inputs, rationales, strict=True)):
            began = time.perf_counter()
            try:
                if isinstance(content, InputError):
                    raise content
                request = parse(content, self.manifest.limits, self.encoder.vision)
                row = self.encoder.row(request, instruction)
                given = self.encoder.prompt.tokenize(rationale) if isinstance(rationale, str) else rationale
                self._check_length(row, given or [], keep=keep or given is not None)
                chat = chat_of(content, request, instruction) if chat_of is not None and given is None else None
            except InputError as error:
                if not keep_going:
                    raise error.at(index) from error
                failures.append(error.at(index))
            else:
                given = None if given is None else list(given)
                items.append(Item(index, row, time.perf_counter() - began, given, chat, request.pages))
        return items, failures

    def _check_length(self, row: Row, given: Sequence[int], *, keep: bool) -> None:
        rationale = max(self.manifest.model.max_rationale_tokens, len(given))
        limit = self.manifest.batch.row_tokens - rationale - PATH_MARKERS
        if row.length > limit:
            raise InputError(
                f"it becomes {row.length} tokens ({row.visual_tokens} of them visual), above the limit of {limit} "
                f"beside a rationale of {rationale}: shorten the text, or pass fewer or smaller images"
            )
        if not self.paths.fast_path.fits(1, row.length, after=rationale + PATH_MARKERS if keep else None):
            raise InputError(
                f"it becomes {row.length} tokens, which the engines do not take"
                f"{f' beside a rationale of {rationale}' if keep else ''}: pass less, or build engines for more with "
                "`mmemb build --tokens`"
            )

    def _check_quota(self, items: Sequence[Item], quota: int) -> None:
        longest = max((item.row.length for item in items), default=0)
        needed, limit = quota * longest * self.paths.token_bytes, self.paths.limits.cache_bytes
        if needed > limit:
            raise OptionError(
                f"reasoning_rate would hold {needed / 2**20:.0f} MiB of KV caches for {quota} inputs, above the "
                f"bundle's {limit / 2**20:.0f} MiB: pass fewer inputs, or a threshold"
            )

    def _detail(self, item: Item) -> Detail:
        reasoned = item.reasoned
        return Detail(
            route=Route.FAST if reasoned is None else Route.REASON,
            gate_score=item.score,
            threshold=item.threshold,
            rationale=None if reasoned is None else self.encoder.prompt.decode(reasoned.token_ids),
            rationale_ids=() if reasoned is None else tuple(reasoned.token_ids),
            rationale_source=item.source,
            truncated=reasoned is not None and reasoned.truncated,
            fallback=item.fallback,
            degraded_by=item.degraded_by,
            prompt_tokens=item.row.length,
            visual_tokens=item.row.visual_tokens,
            timings=Timings(item.preprocess, item.fast_path, item.generation, item.queued, item.held),
            pages=item.pages,
        )


def row_encoder(bundle: Bundle) -> RowEncoder:
    """Return what turns a bundle's inputs into rows.

    Raises MissingExtraError where tokenizers is not installed, SchemaError where the manifest's markers are not the
    tokenizer's.
    """
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError as error:
        raise MissingExtraError("tokenizers", "cpu") from error
    prompt = PromptEncoder(Tokenizer.from_file(str(bundle.folder / TOKENIZER)), bundle.manifest.prompt)
    for marker, token in prompt.ids.items():
        if bundle.manifest.markers.get(marker) != token:
            raise SchemaError(
                f"{bundle.folder}: markers.{marker} is {bundle.manifest.markers.get(marker)}, and the tokenizer's is "
                f"{token}; copy the bundle again, or export it again"
            )
    return RowEncoder(prompt, bundle.manifest.vision)


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
