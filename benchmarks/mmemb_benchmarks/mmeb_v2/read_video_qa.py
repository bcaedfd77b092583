"""The multiple-choice tasks about videos: the question lists its options, and each option is a candidate of the row.

Columns differ by data set and are named at each reader; questions are put together as the benchmark does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mmemb_benchmarks.mmeb_v2.annotations import rows_of
from mmemb_benchmarks.mmeb_v2.data import Candidate, Key, Query, TaskData
from mmemb_benchmarks.mmeb_v2.read_video import frame_paths
from mmemb_benchmarks.mmeb_v2.tasks import Task
from mmemb_deploy.errors import InputError

MVBENCH_SUBSETS = (
    "episodic_reasoning",
    "action_sequence",
    "action_prediction",
    "action_antonym",
    "fine_grained_action",
    "unexpected_action",
    "object_existence",
    "object_interaction",
    "object_shuffle",
    "moving_direction",
    "action_localization",
    "scene_transition",
    "action_count",
    "moving_count",
    "moving_attribute",
    "state_change",
    "fine_grained_pose",
    "character_order",
    "egocentric_navigation",
    "counterfactual_inference",
)

# of a question: the folder of its frames, its text, the options' texts by key, the right one's key, and more info
Question = tuple[str, str, dict[Key, str], Key, dict[str, Any]]


def mvbench(task: Task, annotations: Path) -> Iterator[Question]:
    """Yield MVBench: `question`, `video`, `candidates`, `answer`, a configuration per subset."""
    for subset in MVBENCH_SUBSETS:
        for row in rows_of(task, annotations, "question", "video", "candidates", "answer", subset=subset):
            options = [f"({letter}) {text}" for letter, text in _lettered(row["candidates"])]
            index = _index(row["candidates"], row["answer"], annotations)
            info = {"subset": subset, "video_id": row["video"], "answer": options[index], "answer_idx": index}
            question = _question(row["question"], row["candidates"])
            yield f"{subset}/{row['video']}", question, dict(zip(options, options, strict=True)), options[index], info


def nextqa(task: Task, annotations: Path) -> Iterator[Question]:
    """Yield NExT-QA: `video`, `question`, `answer` (its index), `qid`, `type`, `a0` .. `a4`."""
    answers = ("a0", "a1", "a2", "a3", "a4")
    for row in rows_of(task, annotations, "video", "question", "answer", "qid", "type", *answers):
        options = [row[column] for column in answers]
        index = int(row["answer"])
        info = {
            "question_id": row["qid"],
            "video_id": row["video"],
            "answer": options[index],
            "answer_idx": index,
            "type": row["type"],
        }
        question = _question(row["question"], options)
        yield str(row["video"]), question, {text: text for text in options}, options[index], info


def videomme(task: Task, annotations: Path) -> Iterator[Question]:
    """Yield Video-MME: `videoID`, `question`, `options` ("A. ..."), `answer` (a letter), and what the info repeats."""
    extra = ("question_id", "domain", "sub_category")
    for row in rows_of(task, annotations, "videoID", "question", "options", "answer", *extra):
        options = row["options"]
        index = _index("ABCD", row["answer"], annotations)
        info = {"video_id": row["videoID"], "answer": row["answer"], "answer_idx": index}
        question = "\n".join([row["question"], *options])
        texts = {option: _unlettered(option) for option in options}
        yield row["videoID"], question, texts, options[index], info | {column: row[column] for column in extra}


def egoschema(task: Task, annotations: Path) -> Iterator[Question]:
    """Yield EgoSchema: `video_idx`, `question`, `option` ("A. ..."), `answer` (its index), `question_idx`."""
    for row in rows_of(task, annotations, "video_idx", "question", "option", "answer", "question_idx"):
        options = row["option"]
        index = int(row["answer"])
        info = {
            "question_id": row["question_idx"],
            "video_id": row["video_idx"],
            "answer": options[index],
            "answer_idx": index,
        }
        question = " ".join([row["question"], *options])
        yield row["video_idx"], question, {option: _unlettered(option) for option in options}, options[index], info


def activitynetqa(task: Task, annotations: Path) -> Iterator[Question]:
    """Yield ActivityNet-QA, its yes-or-no questions: `video_name`, `question`, `answer`, `question_id`."""
    options = ("yes", "no")
    for row in rows_of(task, annotations, "video_name", "question", "answer", "question_id"):
        info = {
            "question_id": row["question_id"],
            "video_id": row["video_name"],
            "answer": row["answer"],
            "answer_idx": _index(options, row["answer"], annotations),
        }
        question = f"{row['question']}? (A) yes; (B) no."
        yield f"v_{row['video_name']}", question, {text: text for text in options}, row["answer"], info


def read_questions(
    questions: Callable[[Task, Path], Iterator[Question]], task: Task, annotations: Path, media: Path, frames: int
) -> TaskData:
    """Read a multiple-choice task about videos; options that are the same words are one candidate."""
    corpus: dict[Key, Candidate] = {}
    queries: list[Query] = []
    for folder, question, texts, label, info in questions(task, annotations):
        for key, text in texts.items():
            corpus.setdefault(key, Candidate(content={"text": text}))
        queries.append(
            Query(
                content={"video": frame_paths(media / folder, frames), "text": question},
                instruction=task.instruction,
                candidates=tuple(texts),
                label=label,
                info=info | {"query": question},
            )
        )
    return TaskData.of(queries, corpus)


def _index(options: Sequence[str], answer: str, annotations: Path) -> int:
    if answer not in options:
        raise InputError(f"{annotations}: the answer {answer!r} is none of {list(options)}")
    return options.index(answer)


def _lettered(options: Sequence[str]) -> Iterator[tuple[str, str]]:
    return ((chr(ord("A") + index), option) for index, option in enumerate(options))


def _question(question: str, options: Sequence[str]) -> str:
    return "\n".join([question, "Options:", *(f"({letter}) {option}" for letter, option in _lettered(options))])


def _unlettered(option: str) -> str:
    """Return "A. a dog." as "a dog": the key of the candidate keeps the letter, its text does not."""
    return option[option.find(". ") :].strip(". ") if ". " in option else option
