"""Backward passes over batches larger than memory, with the gradients of the whole batch (GradCache, arXiv 2101.06983).

A contrastive loss needs every embedding of a batch at once, but only their gradients flow back into the model. So: read
the batch in chunks without a graph; take the loss's gradients with respect to what was read; read each chunk again with
a graph, and send its gradients through it. That is the chain rule, not an approximation. The loss may use anything that
the encoder returns, so the next-token terms take the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from mmemb_deploy.inputs.rows import Row
from mmemb_training.encoder import Continuation, Reading

Terms = dict[str, Tensor]
Loss = Callable[[Sequence[Reading]], tuple[Tensor, Terms]]


@dataclass(frozen=True)
class Chunk:
    """What the encoder reads at once."""

    rows: Sequence[Row]
    paths: Sequence[Continuation]


def backward(
    encoder: Any, chunks: Sequence[Chunk], loss_of: Loss, accelerator: Accelerator, *, cached: bool
) -> tuple[Tensor, Terms]:
    """Accumulate the gradients of `loss_of(readings of all chunks)`; return the loss and its terms, detached.

    `cached` reads every chunk twice and holds one chunk's activations at a time; otherwise each is read once, and all
    are held. Both give the same gradients. Over several processes the parts of the loss are added up, and DDP and FSDP
    average: hence the factor.
    """
    scale = accelerator.num_processes
    if not cached:
        loss, terms = loss_of([encoder(chunk.rows, chunk.paths) for chunk in chunks])
        accelerator.backward(loss * scale)
        return loss.detach(), terms
    seeds, leaves = [], []
    for chunk in chunks:
        seeds.append(_random_state())
        with torch.no_grad():
            leaves.append(Reading(*(value.requires_grad_() for value in encoder(chunk.rows, chunk.paths))))
    loss, terms = loss_of(leaves)
    flat = [leaf for reading in leaves for leaf in reading]
    gradients = torch.autograd.grad(loss * scale, flat, allow_unused=True, materialize_grads=True)
    for index, chunk in enumerate(chunks):
        last = index == len(chunks) - 1
        with nullcontext() if last else accelerator.no_sync(encoder), _drawing_again(seeds[index]):
            reading = encoder(chunk.rows, chunk.paths)
            first = index * len(Reading._fields)
            surrogate = [
                (value * gradient).sum()
                for value, gradient in zip(reading, gradients[first : first + len(reading)], strict=True)
            ]
            accelerator.backward(torch.stack(surrogate).sum())
    return loss.detach(), terms


def _random_state() -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None


@contextmanager
def _drawing_again(state: tuple[Tensor, Tensor | None]) -> Generator[None]:
    """Draw the random numbers (dropout) of an earlier moment again, then go on as if nothing had been drawn."""
    on_cpu, on_gpu = state
    with torch.random.fork_rng(devices=[] if on_gpu is None else [torch.cuda.current_device()]):
        torch.set_rng_state(on_cpu)
        if on_gpu is not None:
            torch.cuda.set_rng_state(on_gpu)
        yield
