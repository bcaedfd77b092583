"""The facade: load a bundle, embed any mix of inputs, routing each by its gate score."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from logging import INFO, WARNING, getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

import numpy as np
from numpy.typing import NDArray

from mmemb_deploy.backends.choose import choose_backend
from mmemb_deploy.backends.protocol import Engine, PromptGraphs
from mmemb_deploy.bundle.folder import NANO, Bundle
from mmemb_deploy.bundle.manifest import Manifest
from mmemb_deploy.errors import InputError, OptionError
from mmemb_deploy.inputs.preprocess import Floats
from mmemb_deploy.inputs.prompts import PAD, PATH_MARKERS
from mmemb_deploy.inputs.rows import Row, RowEncoder
from mmemb_deploy.options import EncodeOptions, Options
from mmemb_deploy.preparer import Prepared, Preparer, normalised, row_encoder
from mmemb_deploy.progress import counting
from mmemb_deploy.results import EncodeResult
from mmemb_deploy.routing.fast_path import FastPath
from mmemb_deploy.routing.generation import Generator
from mmemb_deploy.routing.items import Item
from mmemb_deploy.routing.jobs import Call, Job, Pace
from mmemb_deploy.routing.lane import PrefillLane
from mmemb_deploy.routing.paths import Paths
from mmemb_deploy.routing.scheduler import Scheduler
from mmemb_deploy.routing.vision import FeatureCache, VisionEncoder

if TYPE_CHECKING:
    from mmemb_deploy.reasoners.remote import RemoteReasoner

LOGGER = getLogger("mmemb_deploy")


class Embedder(Preparer):
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
        cache = FeatureCache[Any](manifest.batch.vision_bytes)

        def fast_path(graphs: Engine | PromptGraphs) -> FastPath:
            vision = VisionEncoder(graphs.vision, manifest.vision, cache)
            return FastPath(vision, graphs.decoder, engine.gate, encoder.prompt.ids[PAD])

        generator = Generator(engine.decoder, encoder.prompt)
        if reasoner is not None and manifest.gate is None:
            raise OptionError(f"reasoner is {reasoner.name}: this bundle does not reason, so pass none")
        remote = None if reasoner is None else reasoner.writer(encoder, generator, manifest.limits)
        super().__init__(manifest, encoder, backend=engine.name, chats=None if remote is None else remote.chats)
        self.reasoner = reasoner
        self.notes = tuple(notes)
        self.paths = Paths(
            fast_path(engine),
            generator,
            manifest.batch,
            manifest.cache_token_bytes,
            writer=remote,
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

    def encode_detailed(
        self, inputs: Sequence[Any], *, errors: Literal["raise", "return"] = "raise", **options: Unpack[EncodeOptions]
    ) -> EncodeResult:
        """Embed inputs as `encode` does, and say of each which way it went and what it thought.

        With `errors="return"`, an input that cannot be processed gets a row of NaN and its InputError in the result,
        and the others are embedded.
        """
        return self.run(self.prepare(inputs, errors=errors, **options))

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
        left, right = (normalised(np.asarray(side, np.float32)) for side in (queries, documents))
        return left @ right.T

    def check_fits(self, prepared: Prepared) -> None:
        """Raise InputError for an input that another Preparer let pass, and that the engines do not take."""
        keep = self.reasons and prepared.options.reasoning != "never"
        for item in prepared.items:
            try:
                self._check_fits(item.row, item.given, keep=keep or item.given is not None)
            except InputError as error:
                raise error.at(item.index) from error

    def _check_fits(self, row: Row, given: Sequence[int] | None, *, keep: bool) -> None:
        rationale = self._longest_rationale(given)
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
