"""Rollouts whose rationales a vLLM server writes: the normal way for models of real size.

The decision, the embeddings and all log-probabilities that a loss reads are the trained model's own; the server draws
tokens. It is asked as the local sampler samples, whatever its generation config says: temperature 1 over the whole
vocabulary but the markers, `</think>` excepted. It answers in token ids (vLLM's `return_token_ids`), so that ratios
belong to the tokens that were drawn; text that is tokenised again need not give them. Its prompt must be ours, token by
token, and its log-probabilities must be near ours: both are checked on every answer, since a server with another
checkpoint, template or processor, or with old weights, would spoil a run without a word.

Images and video frames are sent as they are after resizing, and the server is told not to resize. That, and the times
of a video's frames, go beside the messages in fields that are vLLM's own, and that it reads with
--trust-request-mm-kwargs alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image

from mmemb_deploy.errors import BackendError
from mmemb_deploy.inputs.parse import Request, parse
from mmemb_deploy.inputs.prompts import END_THINK, THINK
from mmemb_deploy.inputs.rows import RowEncoder, Shown
from mmemb_deploy.reasoners.chat import ChatClient, Reply
from mmemb_deploy.reasoners.chat import Sample as Choice
from mmemb_deploy.reasoners.remote import policy_messages
from mmemb_training.checkpoint import Checkpoint
from mmemb_training.control.policy import chunks_of, read_alone, server_kl
from mmemb_training.control.rewards import Rollout
from mmemb_training.control.rollouts import Group, decisions
from mmemb_training.encoder import Reading
from mmemb_training.grad_cache import Chunk
from mmemb_training.recipes.settings import ControlRecipe
from mmemb_training.samples import Sample

Floats = np.ndarray[Any, np.dtype[np.float32]]

FORBIDDEN = -100.0  # the least logit bias of OpenAI's interface: a token that is never drawn
MOST_APART = 0.05  # nats a token that the server may find its tokens likelier than we do
TENTHS = 10  # of a second


@dataclass(frozen=True)
class Written:
    """A rationale's token ids, the log-probabilities of all that was drawn, and whether the limit cut it."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    truncated: bool


class ServedRollouts:
    """Draws groups as `rollouts.draw_groups` does, with rationales from `client`'s server."""

    def __init__(
        self, checkpoint: Checkpoint, client: ChatClient, recipe: ControlRecipe, accelerator: Accelerator
    ) -> None:
        self._rows, self._client, self._recipe, self._accelerator = checkpoint.rows, client, recipe, accelerator
        self._limit = checkpoint.facts.max_rationale_tokens

    def draw(
        self, encoder: Any, samples: Sequence[Sample], model: str, seed: Sequence[int]
    ) -> tuple[list[Group], list[Chunk], Reading]:
        """Return rollouts of every question, what `encoder` reads of them, and what it read.

        `model` is what the server calls the policy.
        Raises BackendError, in all processes, for a question without a whole answer and for answers that are not the
        policy's.
        """
        recipe, rng = self._recipe, np.random.default_rng(seed)
        alone = read_alone(encoder, chunks_of(samples, [[] for _ in samples], self._rows, recipe.micro_batch))
        think_Q: Floats = alone.decision_B2.softmax(dim=1)[:, 0].numpy(force=True)
        reasons_QG, forced_QG = decisions(think_Q, recipe.group, rng, recipe.groups)
        asked = replace(self._client, model=model)
        written, error = _written(asked, self._rows, samples, reasons_QG.sum(axis=1), self._limit, rng)
        self._agree(error)
        drafts = list(map(_group, reasons_QG, forced_QG, written))
        chunks = chunks_of(samples, drafts, self._rows, recipe.micro_batch)
        reading = read_alone(encoder, chunks)
        groups = _embedded(drafts, reading)
        apart = server_kl(groups, reading)
        self._agree(
            f"the server's tokens are {apart:.2f} nats likelier to it than to the policy, and {MOST_APART} is most: it "
            f"holds other weights. Serve the checkpoint that stage 3 left, in the precision that is trained in"
            if apart > MOST_APART
            else None
        )
        return groups, chunks, reading

    def _agree(self, error: str | None) -> None:
        """Raise BackendError in all processes where one of them has an error."""
        found: list[str | None] = gather_object([error]) if self._accelerator.num_processes > 1 else [error]
        for one in found:
            if one is not None:
                raise BackendError(one)


def _written(
    client: ChatClient,
    rows: RowEncoder,
    samples: Sequence[Sample],
    counts_Q: Sequence[int],
    limit: int,
    rng: np.random.Generator,
) -> tuple[list[list[Written]], str | None]:
    """Ask for as many rationales of every question as it needs; return them, or what went wrong with one."""
    asked = [place for place, count in enumerate(counts_Q) if count]
    prompts, chats, each = [], [], list[dict[str, Any]]()
    neutral = sampling(rows, limit)
    for place in asked:
        question = samples[place].question
        request = parse(question.content, vision=rows.vision)
        instruction = rows.prompt.format.asked(question.instruction)
        shown = rows.shown(request)
        prompts.append([*rows.row(request, instruction).token_ids_S.tolist(), rows.prompt.ids[THINK]])
        chats.append(partial(_messages, rows, instruction, request, shown))
        own = {"n": int(counts_Q[place]), "seed": int(rng.integers(2**31))}
        each.append(neutral | own | {"extra_body": neutral["extra_body"] | _media(shown)})
    found: list[list[Written]] = [[] for _ in samples]
    for place, prompt, own, reply in zip(asked, prompts, each, client.ask(chats, each=each), strict=True):
        read = _read(reply, prompt, own["n"], rows)
        if isinstance(read, str):
            return [], f"{samples[place].question.key}: no rollouts from {client.model!r} at {client.base_url}: {read}"
        found[place] = read
    return found, None


def sampling(rows: RowEncoder, max_tokens: int) -> dict[str, Any]:
    """Return the parameters of a chat completion that is sampled as `rollouts.sampling` samples, in token ids."""
    ids = rows.prompt.ids
    return {
        "temperature": 1.0,
        "top_p": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "max_tokens": max_tokens,
        "logprobs": True,
        "logit_bias": {str(token): FORBIDDEN for marker, token in ids.items() if marker != END_THINK},
        "extra_body": {  # vLLM's own
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": [ids[END_THINK]],
            "ignore_eos": True,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        },
    }


def _messages(rows: RowEncoder, instruction: str, request: Request, shown: Shown) -> Any:
    images = tuple(Image.fromarray(visual.pixels_THWC[0]) for visual in shown.images)
    frames = [Image.fromarray(frame_HWC) for visual in shown.frames for frame_HWC in visual.pixels_THWC]
    return policy_messages(rows.prompt.format, instruction, replace(request, images=images), frames)


def _media(shown: Shown) -> dict[str, Any]:
    """Return what tells vLLM that images and frames have their size, and when the frames are shown.

    Both frames of a temporal patch have the patch's time, which the layout writes with one decimal.
    """
    sized = {"mm_processor_kwargs": {"do_resize": False}} if shown.images or shown.frames else {}
    if not shown.frames:
        return sized
    tenths = [
        round(float(f"{seconds:.1f}") * TENTHS)
        for seconds, patch in zip(shown.times, shown.frames, strict=True)
        for _ in patch.pixels_THWC
    ]
    total = max(len(tenths), tenths[-1] + 1)
    video = {"num_frames": -1, "fps": TENTHS, "frames_indices": tenths, "total_num_frames": total}
    return sized | {"media_io_kwargs": {"video": video}}


def _read(reply: Reply, prompt: Sequence[int], count: int, rows: RowEncoder) -> list[Written] | str:
    """Return the rationales of an answer, or what is wrong with it."""
    if reply.error is not None:
        return reply.error
    if reply.prompt_token_ids is None:
        return "the answer has no prompt_token_ids: serve with vLLM, which knows return_token_ids"
    if reply.prompt_token_ids != prompt:
        return f"the server read another prompt, {_difference(reply.prompt_token_ids, prompt)}. Serve stage 3's folder"
    if len(reply.choices) != count:
        return f"it has {len(reply.choices)} of {count} samples"
    read = [_read_choice(choice, rows) for choice in reply.choices]
    return next((one for one in read if isinstance(one, str)), None) or [
        one for one in read if isinstance(one, Written)
    ]


def _read_choice(choice: Choice, rows: RowEncoder) -> Written | str:
    end, token_ids = rows.prompt.ids[END_THINK], choice.token_ids or []
    drawn = choice.logprobs.content if choice.logprobs is not None and choice.logprobs.content is not None else []
    if [one.token for one in drawn] != [f"token_id:{token}" for token in token_ids]:
        return f"{len(token_ids)} token_ids come with the log-probabilities of {len(drawn)} or of others"
    stopped = choice.finish_reason == "stop" and token_ids[-1:] == [end]
    if not stopped and choice.finish_reason != "length":
        return f"an answer ended by {choice.finish_reason!r} with token {token_ids[-1:]}, not {END_THINK} or 'length'"
    words = token_ids[:-1] if stopped else token_ids
    if spelt := {*rows.prompt.ids.values()} & {*words}:
        return f"a rationale holds the markers {sorted(spelt)}: the server does not know logit_bias"
    return Written(tuple(words), tuple(one.logprob for one in drawn), truncated=not stopped)


def _difference(theirs: Sequence[int], ours: Sequence[int]) -> str:
    pairs = list(zip(theirs, ours, strict=False))
    place = next((index for index, (one, other) in enumerate(pairs) if one != other), len(pairs))
    return (
        f"of {len(theirs)} tokens where ours has {len(ours)}: from token {place} on "
        f"{list(theirs[place : place + 4])}, not {list(ours[place : place + 4])}"
    )


def _group(reasons_G: Sequence[bool], forced_G: Sequence[bool], written: Sequence[Written]) -> Group:
    """Return a group whose embeddings are not read yet."""
    unread, rest = np.zeros(0, np.float32), iter(written)
    group: Group = []
    for reasons, forced in zip(reasons_G, forced_G, strict=True):
        if reasons:
            one = next(rest)
            group.append(Rollout(one.token_ids, unread, one.truncated, bool(forced), one.logprobs))
        else:
            group.append(Rollout(None, unread, forced=bool(forced)))
    return group


def _embedded(drafts: Sequence[Group], reading: Reading) -> list[Group]:
    """Return the groups with the embeddings that the encoder read, L2-normalised."""
    direct_QD, reasoned_RD = (
        state / np.linalg.norm(state, axis=1, keepdims=True)
        for state in (part.float().numpy(force=True) for part in (reading.direct_BD, reading.reasoned_RD))
    )
    reasoned = iter(reasoned_RD)
    return [
        [replace(one, embedding_D=direct_D if one.token_ids is None else next(reasoned)) for one in group]
        for direct_D, group in zip(direct_QD, drafts, strict=True)
    ]
