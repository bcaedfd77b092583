"""Samples in Arrow files that are mapped into memory: of a million, those that are in use are Python objects.

A data set is read once, from first to last, and written to a file of its own; a sample is made of its row when it is
asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmemb_deploy.errors import OptionError
from mmemb_deploy.files import claim, whole
from mmemb_deploy.jobs.readers import load_pyarrow
from mmemb_training.data.registry import read
from mmemb_training.samples import Lazy, Question, Sample, Target
from mmemb_training.tables import locked

BATCH = 4096  # rows of a file that are written together


class SampleTable(Lazy[Sample]):
    """The samples of files that `write_samples` wrote, in order; `task_N` are their tasks' numbers, of `tasks`."""

    def __init__(self, files: Sequence[Path]) -> None:
        arrow, _ = load_pyarrow("train")
        opened = [arrow.ipc.open_file(arrow.memory_map(str(file))) for file in files]
        self._batches: list[Any] = [one.get_batch(index) for one in opened for index in range(one.num_record_batches)]
        self._ends = np.cumsum([len(batch) for batch in self._batches], dtype=np.int64)
        named = arrow.chunked_array([batch.column("task") for batch in self._batches], arrow.string())
        coded = named.dictionary_encode().unify_dictionaries().combine_chunks()
        self.tasks: list[str] = coded.dictionary.to_pylist()
        self.task_N: NDArray[np.int32] = coded.indices.to_numpy(zero_copy_only=False)
        super().__init__(len(self.task_N), self._read)

    def question_keys(self) -> Iterator[str]:
        """Yield the keys of the samples, in order, without the rest of them."""
        for batch in self._batches:
            yield from batch.column("key").to_pylist()

    def _read(self, row: int) -> Sample:
        batch = int(np.searchsorted(self._ends, row, side="right"))
        found = self._batches[batch]
        place = row - int(self._ends[batch]) + len(found)
        return _sample({name: found.column(name)[place].as_py() for name in found.schema.names})


def read_samples(data: Sequence[str], limit: int | None, folder: Path) -> SampleTable:
    """Return the samples of "NAME=FOLDER" data sets, at most `limit` of each, from files in `folder`.

    What is not there yet is read from its data set, by one process while others wait. Raises OptionError for anything
    else than NAME=FOLDER, for what is missing or malformed in a data set, and where `folder` holds other data.
    """
    sets: list[tuple[str, Path]] = []
    for one in data:
        name, found, where = one.partition("=")
        if not found:
            raise OptionError(f"data {one!r} is not NAME=FOLDER, such as mmeb/CIRR=downloads/MMEB-train")
        sets.append((name, Path(where)))
    files = [folder / f"{number:02d}-{name.replace('/', '-')}.arrow" for number, (name, _) in enumerate(sets)]
    with locked(folder, wait=True):
        claim(folder, {"data": list(data), "limit": limit})
        for (name, source), file in zip(sets, files, strict=True):
            if not file.is_file():
                write_samples(islice(read(name, source), limit), file)
    samples = SampleTable(files)
    if not samples:
        raise OptionError("data holds no sample: pass --data NAME=FOLDER")
    return samples


def write_samples(samples: Iterable[Sample], file: Path) -> None:
    """Write samples whose contents are JSON, words and paths, to a file that is whole or absent."""
    (arrow, _), rows = load_pyarrow("train"), iter(samples)
    text = arrow.string()
    side = arrow.struct([("content", text), ("labels", arrow.list_(text)), ("instruction", text)])
    fields = [(name, text) for name in ("key", "task", "wanted", "content", "instruction")]
    schema = arrow.schema([*fields, ("target", side), ("negatives", arrow.list_(side))])
    with whole(file) as new, arrow.OSFile(str(new), "wb") as sink, arrow.ipc.new_file(sink, schema) as writer:
        for batch in iter(lambda: [_row(sample) for sample in islice(rows, BATCH)], []):
            writer.write_batch(arrow.RecordBatch.from_pylist(batch, schema))


def _row(sample: Sample) -> dict[str, Any]:
    question = sample.question
    return {
        "key": question.key,
        "task": question.task,
        "wanted": sample.wanted,
        "content": json.dumps(question.content),
        "instruction": question.instruction,
        "target": _side(sample.target),
        "negatives": [_side(target) for target in sample.negatives],
    }


def _side(target: Target) -> dict[str, Any]:
    return {"content": json.dumps(target.content), "labels": sorted(target.labels), "instruction": target.instruction}


def _sample(row: dict[str, Any]) -> Sample:
    question = Question(
        key=row["key"], task=row["task"], content=json.loads(row["content"]), instruction=row["instruction"]
    )
    target, *negatives = map(_target, (row["target"], *row["negatives"]))
    return Sample(question=question, wanted=row["wanted"], target=target, negatives=tuple(negatives))


def _target(side: dict[str, Any]) -> Target:
    return Target(
        content=json.loads(side["content"]), labels=frozenset(side["labels"]), instruction=side["instruction"]
    )
