"""From a data root to what a task embeds: the reader of every layout, and downloads for annotations that are absent."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from mmemb_benchmarks.mmeb_v2 import read_video as video
from mmemb_benchmarks.mmeb_v2.annotations import SUFFIXES
from mmemb_benchmarks.mmeb_v2.data import TaskData
from mmemb_benchmarks.mmeb_v2.read_image import read_image_text, read_images
from mmemb_benchmarks.mmeb_v2.read_video_qa import activitynetqa, egoschema, mvbench, nextqa, read_questions, videomme
from mmemb_benchmarks.mmeb_v2.read_visdoc import read_pages
from mmemb_benchmarks.mmeb_v2.tasks import Task
from mmemb_deploy.errors import InputError, MissingExtraError, OptionError

STILL_READERS: dict[str, Callable[[Task, Path, Path], TaskData]] = {
    "image_text": read_image_text,
    "text_image": partial(read_images, image_query=False),
    "image_image": partial(read_images, image_query=True),
    "vidore": read_pages,
    "visrag": read_pages,
}
VIDEO_READERS: dict[str, Callable[[Task, Path, Path, int], TaskData]] = {
    "video_class": video.read_video_class,
    "video_choice": video.read_video_choice,
    "video_caption": video.read_video_caption,
    "moment": video.read_moment,
    "momentseeker": video.read_momentseeker,
    "mvbench": partial(read_questions, mvbench),
    "nextqa": partial(read_questions, nextqa),
    "videomme": partial(read_questions, videomme),
    "egoschema": partial(read_questions, egoschema),
    "activitynetqa": partial(read_questions, activitynetqa),
}


def has_annotations(task: Task, root: Path) -> bool:
    """Whether a data root holds the annotations of a task; their media may still be missing."""
    folder = root / task.annotations
    return folder.is_dir() and any(path for suffix in SUFFIXES for path in folder.rglob(f"*{suffix}"))


def read_task(task: Task, root: Path, *, frames: int | None = None) -> TaskData:
    """Read a task whole. `frames` bounds the frames of a video, by default as the benchmark's authors do.

    Raises OptionError for missing annotations; InputError, naming the file or folder, for missing media and for rows
    that are not as the public data sets hold them.
    """
    annotations = root / task.annotations
    media = next((root / folder for folder in task.media if (root / folder).is_dir()), root / task.media[0])
    if task.reader in VIDEO_READERS:
        data = VIDEO_READERS[task.reader](task, annotations, media, frames or task.frames)
    else:
        data = STILL_READERS[task.reader](task, annotations, media)
    if not data.queries:
        raise InputError(f"{annotations} holds no query")
    data.check_media()
    return data


def download_annotations(task: Task, root: Path) -> None:
    """Download a task's annotations to where local copies lie. Media are archives that a person unpacks.

    Raises OptionError where the hub cannot be reached or refuses, MissingExtraError without huggingface_hub.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
    except ModuleNotFoundError as error:
        raise MissingExtraError("huggingface_hub", "eval") from error
    shared = task.group == "image"  # one data set holds all image tasks, a folder each
    folder = root / task.annotations
    try:
        snapshot_download(
            task.hub,
            repo_type="dataset",
            local_dir=folder.parent if shared else folder,
            allow_patterns=[f"{task.name}/*"] if shared else [f"*{suffix}" for suffix in SUFFIXES],
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise OptionError(
            f"the annotations of {task.name}, data set {task.hub}, cannot be downloaded ({error}): "
            f"check the connection, or put them into {folder}"
        ) from error
