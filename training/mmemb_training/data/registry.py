"""The data sets by name: `read("mmeb/CIRR", folder)`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from mmemb_deploy.errors import check_known
from mmemb_training.data.mmeb_train import SUBSETS, read_mmeb
from mmemb_training.data.video import read_captioned_videos, read_video_captions, read_video_questions
from mmemb_training.data.visual_documents import REPOSITORIES, read_pages
from mmemb_training.samples import Sample

Reader = Callable[[Path], Iterator[Sample]]  # from the folder of a data set as it was downloaded

DATASETS: dict[str, Reader] = {
    **{f"mmeb/{subset}": partial(read_mmeb, subset) for subset in SUBSETS},
    **{name: partial(read_pages, name) for name in REPOSITORIES},
    "video-caption": read_video_captions,
    "video-retrieval": read_captioned_videos,
    "video-qa": read_video_questions,
}


def read(name: str, folder: Path) -> Iterator[Sample]:
    """Yield the samples of a data set, in its order, reading files as it goes.

    Raises OptionError for a name that is not in DATASETS; on the way, for what is missing or malformed in the folder.
    """
    check_known("data set", name, DATASETS)
    return DATASETS[name](folder)
