"""A tiny random model, digits to teach it, and the pool that goes with them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mmemb_training.checkpoint import Checkpoint, load_checkpoint
from mmemb_training.joint import Lesson
from mmemb_training.nano.digits import Digits, digit_workers, draw_digits
from mmemb_training.pool.build import Rationale


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Compute with one thread: for such small tensors, more of them mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny(tiny_checkpoint: Path) -> Checkpoint:
    """A fresh copy of the tiny random checkpoint, for tests that change its weights."""
    return load_checkpoint(tiny_checkpoint)


@pytest.fixture(scope="session")
def digits() -> Digits:
    """Samples of all families."""
    return draw_digits("train", 3, 48)


@pytest.fixture(scope="session")
def pool(digits: Digits) -> dict[str, list[Rationale]]:
    """What the four workers write for `digits`."""
    found: dict[str, list[Rationale]] = {}
    for worker in digit_workers(digits):
        questions = [sample.question for sample in digits.samples]
        for question, written in zip(questions, worker.write(questions), strict=True):
            candidates = (Rationale(worker.name, index, text) for index, text in enumerate(written.rationales))
            found.setdefault(question.key, []).extend(candidates)
    return found


@pytest.fixture(scope="session")
def lessons(digits: Digits, pool: dict[str, list[Rationale]]) -> list[Lesson]:
    """Every sample with one rationale, but for the matches: they are taught to stop."""
    return [
        Lesson(sample, None if sample.question.task == "match" else pool[sample.question.key][index % 6].text)
        for index, sample in enumerate(digits.samples)
    ]
