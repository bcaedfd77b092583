"""The registry of MMEB-V2: what its 78 tasks are called, how each is scored, and where its data lies.

Names, groups, repositories, folders and instructions are those of the benchmark's public evaluation code
(github.com/TIGER-AI-Lab/VLM2Vec: `experiments/public/eval`, `src/constant`, `src/data/eval_dataset`). Its archives
unpack into other folders than its configuration names in places; github.com/QwenLM/Qwen3-VL-Embedding reads them
there, so that some tasks know two folders. All folders are relative to the data root.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mmemb_deploy.errors import OptionError, check_known

SUBGROUPS = {
    "image": ("CLS", "QA", "RET", "VG"),
    "video": ("CLS", "QA", "RET", "MRET"),
    "visdoc": ("ViDoRe-v1", "ViDoRe-v2", "VisRAG", "OOD"),
}
HIT = "hit@1"
NDCG = "ndcg_linear@5"
FRAMES = 8  # of a video, as VLM2Vec samples them; most later models report on 64
CLIP_FRAMES = 8  # of a candidate clip in moment retrieval, where more are not saved


@dataclass(frozen=True, kw_only=True)
class Task:
    """One of the 78; `annotations` and `media` are folders under the data root."""

    name: str
    group: str
    subgroup: str
    scope: Literal["row", "corpus"] = "corpus"
    """Whether a query ranks the candidates of its own row, or the whole corpus."""

    reader: str
    """The layout of its annotations, a key of STILL_READERS or VIDEO_READERS in `readers`."""

    hub: str
    """The hub data set of its annotations."""

    annotations: str
    media: tuple[str, ...]
    """Where its images or frames may lie; the first of these folders that exists is read."""

    subset: str | None = None
    """The configuration of the hub data set."""

    split: str = "test"
    instruction: str | None = None
    """What queries are embedded for; None where the annotations say it row by row, or by their kind."""

    target_instruction: str | None = None
    """What candidates are embedded for; None takes the bundle's, or the rows' own."""

    limit: int | None = None
    """Leading queries that belong to the task, of a data set that holds more."""

    @property
    def metric(self) -> str:
        """The figure that counts, by its name in the public score files."""
        return NDCG if self.group == "visdoc" else HIT

    @property
    def frames(self) -> int:
        """Frames per video, by default; 0 where nothing is a video."""
        return FRAMES if self.group == "video" else 0


def _image(subgroup: str, reader: str, names: str) -> list[Task]:
    return [
        Task(
            name=name,
            group="image",
            subgroup=subgroup,
            scope="row",
            reader=reader,
            hub="ziyjiang/MMEB_Test_Instruct",
            annotations=f"image-tasks/{name}",
            media=("image-tasks",),
        )
        for name in names.split()
    ]


def _video(
    name: str,
    subgroup: str,
    reader: str,
    instruction: str | None,
    *,
    hub: str | None = None,
    frames: str | None = None,
    **facts: Any,
) -> Task:
    hub = hub or f"VLM2Vec/{name}"
    folder = f"video-tasks/frames/video_{subgroup.lower()}"
    media = [f"{folder}/{frames or name}"]
    if subgroup == "RET":
        media.append(f"{folder}/data/ziyan/video_retrieval/{name}/frames")
    elif frames == "Charades_STA":
        media.append(f"{folder}/{name}")
    return Task(
        name=name,
        group="video",
        subgroup=subgroup,
        reader=reader,
        hub=hub,
        annotations=f"video-tasks/{hub.partition('/')[2]}",
        media=tuple(media),
        instruction=instruction,
        **facts,
    )


def _visdoc(subgroup: str, name: str, hub: str, folder: str | None = None) -> Task:
    visrag = subgroup == "VisRAG"
    return Task(
        name=name,
        group="visdoc",
        subgroup=subgroup,
        reader="visrag" if visrag else "vidore",
        hub=hub,
        annotations=f"visdoc-tasks/{hub.partition('/')[2]}",
        media=(f"visdoc-tasks/{folder or name}", f"visdoc-tasks/images/{folder or name}"),
        split="train" if visrag else "test",
        instruction="Find a document image that matches the given query:",
        target_instruction="Understand the content of the provided document image.",
    )


_ANSWER = (
    "Given a video and a question, select the most accurate answer from the provided candidates. "
    "Return only the exact text of your chosen answer."
)
_SEE = "Understand the content of the provided video."
_MOMENT = "Find the clip that corresponds to the described scene in the given video:"

_IMAGE = [
    *_image(
        "CLS",
        "image_text",
        "ImageNet-1K N24News HatefulMemes VOC2007 SUN397 Place365 ImageNet-A ImageNet-R ObjectNet Country211",
    ),
    *_image("QA", "image_text", "OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W ScienceQA VizWiz GQA TextVQA"),
    *_image("RET", "text_image", "VisDial VisualNews_t2i MSCOCO_t2i WebQA EDIS Wiki-SS-NQ"),
    *_image("RET", "image_text", "VisualNews_i2t MSCOCO_i2t"),
    *_image("RET", "image_image", "CIRR NIGHTS OVEN FashionIQ"),
    *_image("VG", "image_image", "MSCOCO RefCOCO RefCOCO-Matching Visual7W-Pointing"),
]

_VIDEO = [
    _video("K700", "CLS", "video_class", "Recognize the category of the video content.", hub="VLM2Vec/Kinetics-700"),
    _video(
        "SmthSmthV2",
        "CLS",
        "video_choice",
        "What actions or object interactions are being performed by the person in the video?",
        scope="row",
        frames="SSv2",
        limit=1000,
    ),
    _video("HMDB51", "CLS", "video_class", "What actions or objects interactions are the person in the video doing?"),
    _video("UCF101", "CLS", "video_class", "What activities or sports are being performed by the person in the video?"),
    _video("Breakfast", "CLS", "video_class", "Recognize the breakfast type that the person is cooking in the video."),
    _video("MVBench", "QA", "mvbench", _ANSWER, scope="row", split="train"),
    _video("Video-MME", "QA", "videomme", _ANSWER, scope="row"),
    _video("NExTQA", "QA", "nextqa", _ANSWER, scope="row", subset="MC"),
    _video("EgoSchema", "QA", "egoschema", _ANSWER, scope="row", subset="Subset"),
    _video("ActivityNetQA", "QA", "activitynetqa", _ANSWER, scope="row"),
    _video(
        "DiDeMo",
        "RET",
        "video_caption",
        "Find a video that includes the following described scenes:",
        target_instruction=_SEE,
    ),
    _video(
        "MSR-VTT",
        "RET",
        "video_caption",
        "Find a video that contains the following visual content:",
        subset="test_1k",
        target_instruction=_SEE,
    ),
    _video(
        "MSVD",
        "RET",
        "video_caption",
        "Find the video snippet that corresponds to the given summary:",
        target_instruction=_SEE,
    ),
    _video(
        "VATEX", "RET", "video_caption", "Select a video that fits the description provided:", target_instruction=_SEE
    ),
    _video(
        "YouCook2",
        "RET",
        "video_caption",
        "Find a video that demonstrates the following action while making a recipe:",
        hub="lmms-lab/YouCook2",
        split="val",
        target_instruction=_SEE,
    ),
    _video("QVHighlight", "MRET", "moment", _MOMENT, scope="row", target_instruction=_SEE),
    _video("Charades-STA", "MRET", "moment", _MOMENT, scope="row", frames="Charades_STA", target_instruction=_SEE),
    _video(
        "MomentSeeker",
        "MRET",
        "momentseeker",
        None,
        scope="row",
        target_instruction="Understand the content of the provided video clip.",
    ),
]

_VIDORE_V1 = (
    "arxivqa_test_subsampled docvqa_test_subsampled infovqa_test_subsampled tabfquad_test_subsampled tatdqa_test "
    "shiftproject_test syntheticDocQA_artificial_intelligence_test syntheticDocQA_energy_test "
    "syntheticDocQA_government_reports_test syntheticDocQA_healthcare_industry_test"
)
_VIDORE_V2 = {
    "esg_reports_human_labeled_v2": "esg_reports_human_labeled_v2",
    "biomedical_lectures_v2_multilingual": "biomedical_lectures_v2",
    "economics_reports_v2_multilingual": "economics_reports_v2",
    "esg_reports_v2_multilingual": "esg_reports_v2",
}
_OUT_OF_DOMAIN = {
    "ViDoSeek-page": "VLM2Vec/ViDoSeek-page-fixed",
    "ViDoSeek-doc": "VLM2Vec/ViDoSeek",
    "MMLongBench-page": "VLM2Vec/MMLongBench-page-fixed",
    "MMLongBench-doc": "VLM2Vec/MMLongBench-doc",
}

_VISDOC = [
    *(
        _visdoc("ViDoRe-v1", f"ViDoRe_{repository.partition('_test')[0]}", f"vidore/{repository}_beir")
        for repository in _VIDORE_V1.split()
    ),
    *(_visdoc("ViDoRe-v2", f"ViDoRe_{name}", f"vidore/{hub}", name) for name, hub in _VIDORE_V2.items()),
    *(
        _visdoc("VisRAG", f"VisRAG_{name}", f"openbmb/VisRAG-Ret-Test-{name}")
        for name in ("ArxivQA", "ChartQA", "MP-DocVQA", "SlideVQA", "InfoVQA", "PlotQA")
    ),
    *(_visdoc("OOD", name, hub) for name, hub in _OUT_OF_DOMAIN.items()),
]

TASKS = {task.name: task for task in (*_IMAGE, *_VIDEO, *_VISDOC)}


def select(names: Sequence[str]) -> list[Task]:
    """Return the tasks of some names: of a task ("K700"), of a group ("video") or of a sub-group ("video/QA").

    Raises OptionError for a name that is none of these, and for no name at all.
    """
    groups = [*SUBGROUPS, *(f"{group}/{part}" for group, parts in SUBGROUPS.items() for part in parts)]
    if not names:
        raise OptionError(f"tasks is empty: name tasks or groups, such as {', '.join(groups)}")
    for name in names:
        check_known("task or group", name, [*TASKS, *groups])
    wanted = set(names)
    return [task for task in TASKS.values() if wanted & {task.name, task.group, f"{task.group}/{task.subgroup}"}]
