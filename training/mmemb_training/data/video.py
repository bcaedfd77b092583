"""The captions and questions of LLaVA-Hound (arXiv 2404.01258; hub: ShareGPTVideo/train_video_and_instruction).

    FOLDER/video_instruction/train/sft/video_caption_300k.jsonl
    FOLDER/video_instruction/train/sft/video_240k_caption_15k.jsonl     240,000 questions, then captions
        each line {"id", "video": a folder's name, "conversations": [{"from": "human", "value": "<video>\\nWhat ...?"},
        {"from": "gpt", "value": what it answers}]}
    FOLDER/train_300k/<video>/c01_0001.jpeg ...                         two frames per second, once unpacked there

VLM2Vec (github.com/TIGER-AI-Lab/VLM2Vec) makes three tasks of them, and so does this: a video finds its caption, a
caption its video, and a video with a question the answer. Its instructions are kept, and so are its 8 frames, evenly
spread from the first to the last; what a caption was asked for with is the instruction of the first task.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mmemb_deploy.errors import OptionError
from mmemb_training.data.files import how_to_get, json_lines
from mmemb_training.samples import Question, Sample, Target

REPOSITORY = "ShareGPTVideo/train_video_and_instruction"
CAPTIONS = "video_instruction/train/sft/video_caption_300k.jsonl"
QUESTIONS = "video_instruction/train/sft/video_240k_caption_15k.jsonl"
QUESTION_LINES = 240_000
FRAMES_FOLDER = "train_300k"
FRAMES_PER_SECOND = 2.0
FRAMES = 8
PLACEHOLDER = "<video>"
FIND_VIDEO = "Find a video that contains the following visual content:"
SEE_VIDEO = "Understand the content of the provided video."
ANSWER = "Answer a question based on the content of a video."


def read_video_captions(folder: Path) -> Iterator[Sample]:
    """Read videos that find their captions; captions of the same words are equal."""
    for line in _lines(folder, CAPTIONS):
        yield Sample(
            question=Question(
                key=f"video-caption/{line.number}",
                task="video-caption",
                content=_frames(folder, line.video),
                instruction=line.asked,
            ),
            wanted=line.told,
            target=Target(content={"text": line.told}, labels=frozenset({line.told})),
        )


def read_captioned_videos(folder: Path) -> Iterator[Sample]:
    """Read captions that find their videos."""
    for line in _lines(folder, CAPTIONS):
        yield Sample(
            question=Question(
                key=f"video-retrieval/{line.number}",
                task="video-retrieval",
                content={"text": line.told},
                instruction=FIND_VIDEO,
            ),
            wanted=line.video,
            target=Target(content=_frames(folder, line.video), labels=frozenset({line.video}), instruction=SEE_VIDEO),
        )


def read_video_questions(folder: Path, *, lines: int = QUESTION_LINES) -> Iterator[Sample]:
    """Read videos with a question that find the answer; answers of the same words are equal."""
    for line in islice(_lines(folder, QUESTIONS), lines):
        yield Sample(
            question=Question(
                key=f"video-qa/{line.number}",
                task="video-qa",
                content=_frames(folder, line.video) | {"text": line.asked},
                instruction=ANSWER,
            ),
            wanted=line.told,
            target=Target(content={"text": line.told}, labels=frozenset({line.told})),
        )


@dataclass(frozen=True)
class _Line:
    number: int  # in its file, from 1
    video: str
    asked: str
    told: str


def _lines(folder: Path, name: str) -> Iterator[_Line]:
    path = folder / name
    for number, line in json_lines(path, how_to_get(REPOSITORY, folder)):
        match line:
            case {
                "video": str(video),
                "conversations": [{"from": "human", "value": str(asked)}, {"from": "gpt", "value": str(told)}, *_],
            } if told.strip():
                yield _Line(number, video, asked.replace(PLACEHOLDER, "").strip(), told.strip())
            case _:
                raise OptionError(f"{path}, line {number} names no video and what a human asked and gpt told about it")


def _frames(folder: Path, video: str) -> dict[str, Any]:
    """Return the content of a video: FRAMES paths, evenly spread, or all where there are fewer, and their seconds."""
    frames = folder / FRAMES_FOLDER / video
    # Numbers have four digits, and more where those do not suffice.
    paths = sorted(frames.glob("*.jpeg"), key=lambda path: (len(path.name), path.name))
    if not paths:
        raise OptionError(
            f"{frames} is missing or holds no .jpeg; unpack the frames with: "
            f"cd {folder / FRAMES_FOLDER} && for f in *.tar.gz; do tar -xzf $f; done"
        )
    chosen = range(len(paths))
    if len(paths) > FRAMES:
        chosen = np.linspace(0, len(paths) - 1, FRAMES).round().astype(int).tolist()
    return {
        "video": [str(paths[index]) for index in chosen],
        "timestamps": [index / FRAMES_PER_SECOND for index in chosen],
    }
