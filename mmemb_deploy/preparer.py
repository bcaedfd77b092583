"""What `encode` does without an engine: inputs become rows before it, what it found becomes results after it.

It is the part that a server runs in a process beside the engine's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Unpack

import numpy as np
from numpy.typing import NDArray

from mmemb_deploy.bundle.folder import Bundle
from mmemb_deploy.bundle.manifest import TOKENIZER, Manifest
from mmemb_deploy.errors import InputError, MissingExtraError, OptionError, SchemaError, check_known
from mmemb_deploy.inputs.parse import Request, parse
from mmemb_deploy.inputs.preprocess import Floats
from mmemb_deploy.inputs.prompts import PATH_MARKERS, PromptEncoder
from mmemb_deploy.inputs.rows import Row, RowEncoder
from mmemb_deploy.options import EncodeOptions, Options
from mmemb_deploy.results import Detail, EncodeResult, Timings
from mmemb_deploy.routing.items import Item
from mmemb_deploy.routing.router import MODES, Policy, Route

Chats = Callable[[], Callable[[object, Request, str], Callable[[], Any]]]  # what a reasoner is asked, for each call


@dataclass(frozen=True)
class Prepared:
    """Inputs on their way from `prepare` to `Embedder.run`: how many, those that can be embedded, the others."""

    inputs: int
    items: list[Item]
    failures: list[InputError]
    options: Options
    policy: Policy


class Preparer:
    """Turns a bundle's inputs into rows, and what an engine made of them into results."""

    def __init__(self, manifest: Manifest, encoder: RowEncoder, *, backend: str, chats: Chats | None = None) -> None:
        """`backend` names the engine; `chats` builds what a server that writes the rationales is asked."""
        self.manifest = manifest
        self.encoder = encoder
        self.backend = backend
        self._chats = chats

    @property
    def dim(self) -> int:
        """Size of the embeddings."""
        return self.manifest.model.hidden_size

    @property
    def reasons(self) -> bool:
        """Whether the bundle has a gate and a reasoning path."""
        return self.manifest.gate is not None

    @property
    def document_options(self) -> EncodeOptions:
        """Options by which `encode` and `encode_detailed` embed what is searched."""
        return {"instruction": self.manifest.prompt.document_instruction, "reasoning": "never"}

    def prepare(
        self, inputs: Sequence[Any], *, errors: Literal["raise", "return"] = "raise", **options: Unpack[EncodeOptions]
    ) -> Prepared:
        """Do the part of `encode_detailed` that needs no engine: check, decode, resize and tokenise.

        What it returns goes to `Embedder.run`; other threads, and other processes, can prepare the next inputs while an
        engine runs these. An InputError among the inputs stands for one that could not be read.
        """
        settings = Options.of(dict(options))
        check_known("errors", errors, ("raise", "return"))
        self._check(inputs, settings)
        policy = self._policy(settings)
        items, failures = self._prepare(inputs, settings, keep_going=errors == "return")
        return Prepared(len(inputs), items, failures, settings, policy)

    def result(self, prepared: Prepared) -> EncodeResult:
        """Return the embeddings and details of what a scheduler has run."""
        embeddings = np.full((prepared.inputs, self.dim), np.nan, np.float32)
        details: list[Detail | None] = [None] * prepared.inputs
        for item in prepared.items:
            embeddings[item.index] = item.embedding_D
            details[item.index] = self._detail(item)
        return EncodeResult(_finish(embeddings, prepared.options), details, prepared.failures)

    def _check(self, inputs: Any, options: Options) -> None:
        if isinstance(inputs, (str, bytes)) or not isinstance(inputs, Sequence):
            raise OptionError(f"inputs is a {type(inputs).__name__}: pass a list, [input], even for a single input")
        if options.rationales is not None and len(options.rationales) != len(inputs):
            raise OptionError(
                f"rationales has {len(options.rationales)} entries for {len(inputs)} inputs: pass one each"
            )
        if self._chats is not None and options.max_rationale_tokens == 0:
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
        chat_of = None if self._chats is None or options.reasoning == "never" else self._chats()
        for index, (content, rationale) in enumerate(zip(inputs, rationales, strict=True)):
            began = time.perf_counter()
            try:
                if isinstance(content, InputError):
                    raise content
                request = parse(content, self.manifest.limits, self.encoder.vision)
                row = self.encoder.row(request, instruction)
                given = self.encoder.prompt.tokenize(rationale) if isinstance(rationale, str) else rationale
                self._check_length(row, given)
                self._check_fits(row, given, keep=keep or given is not None)
                chat = chat_of(content, request, instruction) if chat_of is not None and given is None else None
            except InputError as error:
                if not keep_going:
                    raise error.at(index) from error
                failures.append(error.at(index))
            else:
                given = None if given is None else list(given)
                items.append(Item(index, row, time.perf_counter() - began, given, chat, request.pages))
        return items, failures

    def _longest_rationale(self, given: Sequence[int] | None) -> int:
        return max(self.manifest.model.max_rationale_tokens, len(given or ()))

    def _check_fits(self, row: Row, given: Sequence[int] | None, *, keep: bool) -> None:
        """Raise InputError for a row that an engine does not take, where there is one to ask.

        `keep` says whether anything may follow the row.
        """

    def _check_length(self, row: Row, given: Sequence[int] | None) -> None:
        rationale = self._longest_rationale(given)
        limit = self.manifest.batch.row_tokens - rationale - PATH_MARKERS
        if row.length > limit:
            raise InputError(
                f"it becomes {row.length} tokens ({row.visual_tokens} of them visual), above the limit of {limit} "
                f"beside a rationale of {rationale}: shorten the text, or pass fewer or smaller images"
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
        embeddings = normalised(embeddings[:, : options.truncate_dim])
    if options.precision == "float32":
        return embeddings
    known = np.nan_to_num(embeddings, nan=0.0)
    if options.precision == "int8":
        return np.rint(known * 127).astype(np.int8)
    return np.packbits(known > 0, axis=1)


def normalised(rows: Floats) -> Floats:
    """Return rows of L2 norm 1; a row of zeros stays."""
    normalised: Floats = rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), np.finfo(np.float32).tiny)
    return normalised
