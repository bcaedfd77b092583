"""The video tasks: frames lie as images in a folder per video, and say nothing about when they were shown.

Columns differ by data set and are named at each reader; `read_video_qa` has the multiple-choice tasks.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from mmemb_benchmarks.mmeb_v2.annotations import rows_of
from mmemb_benchmarks.mmeb_v2.data import Candidate, Key, Query, TaskData
from mmemb_benchmarks.mmeb_v2.labels import LABELS
from mmemb_benchmarks.mmeb_v2.tasks import CLIP_FRAMES, Task
from mmemb_deploy.errors import InputError

FRAME_SUFFIXES = (".jpg", ".jpeg", ".png")
CAPTION_COLUMNS = {  # of retrieval by caption: the video's name or file, and the caption or captions
    "DiDeMo": ("video", "caption"),
    "MSR-VTT": ("video_id", "caption"),
    "MSVD": ("video_id", "caption"),
    "VATEX": ("videoID", "enCap"),
    "YouCook2": ("id", "sentence"),
}
SEGMENT = "Find the clip that corresponds to the given sentence and video segment:"  # MomentSeeker's three kinds
PICTURE = "Select the video clip that aligns with the given text and image:"
SENTENCE = "Find the clip that corresponds to the given text:"


def frame_paths(folder: Path, count: int) -> list[str]:
    """Return the frames of a folder in natural order: `count` of them evenly spread where more are there.

    Raises InputError that names a folder which is missing or holds no frame.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is missing: unpack the benchmark's frames under the data root")
    names = [path.name for path in folder.iterdir() if path.suffix.lower() in FRAME_SUFFIXES]
    if not names:
        raise InputError(f"{folder} holds no frame ({', '.join(FRAME_SUFFIXES)}): unpack the benchmark's frames again")
    names.sort(key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.lower())])
    if count < len(names):
        names = [names[index] for index in np.linspace(0, len(names) - 1, count, dtype=int)]
    return [str(folder / name) for name in names]


def read_video_class(task: Task, annotations: Path, media: Path, frames: int) -> TaskData:
    """Read classification among all classes: `video_id`, `pos_text`."""
    corpus: dict[Key, Candidate] = {label: Candidate(content={"text": label}) for label in LABELS[task.name]}
    queries: list[Query] = []
    for row in rows_of(task, annotations, "video_id", "pos_text"):
        label = row["pos_text"]
        corpus.setdefault(label, Candidate(content={"text": label}))
        video = frame_paths(media / str(row["video_id"]), frames)
        queries.append(Query(content={"video": video}, instruction=task.instruction, candidates=(label,), label=label))
    return TaskData.of(queries, corpus)


def read_video_choice(task: Task, annotations: Path, media: Path, frames: int) -> TaskData:
    """Read classification among a row's own labels: `video_id`, `pos_text`, and `neg_text`, which holds all of them."""
    corpus: dict[Key, Candidate] = {}
    queries: list[Query] = []
    for index, row in enumerate(rows_of(task, annotations, "video_id", "pos_text", "neg_text")):
        if index == task.limit:
            break
        for text in row["neg_text"]:
            corpus.setdefault(text, Candidate(content={"text": text}))
        queries.append(
            Query(
                content={"video": frame_paths(media / str(row["video_id"]), frames)},
                instruction=task.instruction,
                candidates=tuple(row["neg_text"]),
                label=row["pos_text"],
            )
        )
    return TaskData.of(queries, corpus)


def read_video_caption(task: Task, annotations: Path, media: Path, frames: int) -> TaskData:
    """Read retrieval of videos by caption; of several captions the first counts. Columns: CAPTION_COLUMNS."""
    name_column, caption_column = CAPTION_COLUMNS[task.name]
    corpus: dict[Key, Candidate] = {}
    queries: list[Query] = []
    for row in rows_of(task, annotations, name_column, caption_column):
        name, caption = row[name_column], row[caption_column]
        if task.name == "DiDeMo":
            name = PurePosixPath(name).stem
        if name not in corpus:
            video = frame_paths(media / name, frames)
            corpus[name] = Candidate(content={"video": video}, instruction=task.target_instruction)
        text = caption if isinstance(caption, str) else caption[0]
        queries.append(Query(content={"text": text}, instruction=task.instruction, candidates=(name,), label=name))
    return TaskData.of(queries, corpus)


def read_moment(task: Task, annotations: Path, media: Path, frames: int) -> TaskData:
    """Read moment retrieval: `query`, `video_path`; a video's folder holds `query/`, `positive*/` and other clips."""
    corpus: dict[Key, Candidate] = {}
    queries: list[Query] = []
    for row in rows_of(task, annotations, "query", "video_path"):
        folder = media / PurePosixPath(row["video_path"]).stem
        video = frame_paths(folder / "query", frames)
        clips = sorted(path for path in folder.iterdir() if path.is_dir() and path.name != "query")
        keys = [f"{folder.name}/{clip.name}" for clip in clips]
        right = [key for key, clip in zip(keys, clips, strict=True) if clip.name.startswith("positive")]
        if not right:
            raise InputError(f"{folder} holds no clip whose name starts with 'positive': unpack it again")
        for key, clip in zip(keys, clips, strict=True):
            if key not in corpus:
                content = {"video": frame_paths(clip, min(frames, CLIP_FRAMES))}
                corpus[key] = Candidate(content=content, instruction=task.target_instruction)
        queries.append(
            Query(
                content={"video": video, "text": row["query"]},
                instruction=task.instruction,
                candidates=tuple(keys),
                label=right[0] if len(right) == 1 else tuple(right),
            )
        )
    return TaskData.of(queries, corpus)


def read_momentseeker(task: Task, annotations: Path, media: Path, frames: int) -> TaskData:
    """Read MomentSeeker: `query`, `input_frames` (a clip, a picture or nothing), `positive_frames`, `negative_frames`.

    Clips are named by `output_path`, and their saved frames lie in `video_frames/`.
    """
    corpus: dict[Key, Candidate] = {}
    queries: list[Query] = []
    columns = ("query", "input_frames", "positive_frames", "negative_frames")
    for row in rows_of(task, annotations, *columns):
        given = row["input_frames"] or ""
        content: dict[str, Any] = {"text": row["query"]}
        instruction = SENTENCE
        if given.endswith(".mp4"):
            content["video"] = frame_paths(media / "video_frames" / _clip_name(given), frames)
            instruction = SEGMENT
        elif given.endswith(".jpg"):
            content["image"] = str(media / f"query_{given}")
            instruction = PICTURE
        positive, negative = ([_clip_name(clip["output_path"]) for clip in row[column]] for column in columns[2:])
        for name in (*positive, *negative):
            if name not in corpus:
                clip = frame_paths(media / "video_frames" / name, frames)
                corpus[name] = Candidate(content={"video": clip}, instruction=task.target_instruction)
        queries.append(
            Query(content=content, instruction=instruction, candidates=(*positive, *negative), label=tuple(positive))
        )
    return TaskData.of(queries, corpus)


def _clip_name(path: str) -> str:
    return path.replace("/", "_").split(".mp4")[0]
