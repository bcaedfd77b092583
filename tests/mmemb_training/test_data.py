"""Public training sets, written small in their published layouts, become samples that training can read."""

import json
import sys
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from mmemb_deploy.errors import MissingExtraError, OptionError
from mmemb_deploy.inputs.parse import Request, parse
from mmemb_training.data import table as table_module
from mmemb_training.data.mmeb_train import SUBSETS
from mmemb_training.data.registry import DATASETS, read
from mmemb_training.data.table import SampleTable, read_samples, write_samples
from mmemb_training.data.video import CAPTIONS, QUESTIONS, read_video_questions
from mmemb_training.samples import Question, Sample, Target

Rows = Sequence[dict[str, Any]]
EMPTY = {"qry_image_path": "", "pos_image_path": "", "neg_text": "", "neg_image_path": ""}


def picture(path: Path, shade: int) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 8), (shade, 0, 0)).save(path)
    return str(path)


def encoded(shade: int) -> bytes:
    stream = BytesIO()
    Image.new("RGB", (8, 12), (shade, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def table(path: Path, rows: Rows, *, row_group_size: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=row_group_size)


def mmeb(folder: Path, subset: str, rows: Rows) -> list[Sample]:
    """Write a subset with the images that its rows name, and read it."""
    full = [EMPTY | row for row in rows]
    for index, row in enumerate(full):
        for column in ("qry_image_path", "pos_image_path", "neg_image_path"):
            if row[column]:
                picture(folder / row[column], index)
    table(folder / subset / "original-00000-of-00001.parquet", full)
    return list(read(f"mmeb/{subset}", folder))


def requests(samples: Iterable[Sample]) -> list[Request]:
    """What the runtime makes of every content of samples; it refuses what it cannot read."""
    return [
        parse(content)
        for sample in samples
        for content in (
            sample.question.content,
            sample.target.content,
            *(target.content for target in sample.negatives),
        )
    ]


def test_an_image_question_keeps_its_words_and_drops_the_placeholder(tmp_path: Path) -> None:
    image = "images/A-OKVQA/Train/A-OKVQA_image_0.jpg"
    row = {
        "qry": "<|image_1|>\nRepresent the given image with the following question: What is the man awaiting?\n",
        "qry_image_path": image,
        "pos_text": "cab ",
        "neg_text": "train",
    }
    (sample,) = samples = mmeb(tmp_path, "A-OKVQA", [row])
    assert sample.question.key == "mmeb/A-OKVQA/0"
    assert sample.question.task == "mmeb/A-OKVQA"
    assert sample.question.content == {"text": "What is the man awaiting?", "image": str(tmp_path / image)}
    assert sample.question.instruction == "Represent the given image with the following question:"
    assert sample.wanted == "cab"
    assert sample.target == Target(content={"text": "cab"}, labels=frozenset({"cab"}))
    assert sample.negatives == (Target(content={"text": "train"}, labels=frozenset({"train"})),)
    assert [len(request.images) for request in requests(samples)] == [1, 0, 0]


def test_an_image_target_has_its_own_instruction_and_so_has_a_negative_without_words(tmp_path: Path) -> None:
    row = {
        "qry": "Represent the given dialogue about an image, which is used for image retrieval: Q:a dog?\nA:yes\n\n",
        "pos_text": "<|image_1|>\nRepresent the given image\n",
        "pos_image_path": "images/VisDial/Train/0.jpg",
        "neg_image_path": "images/VisDial/Train/1.jpg",
    }
    (sample,) = samples = mmeb(tmp_path, "VisDial", [row])
    assert sample.question.content == {"text": "Q:a dog?\nA:yes"}
    for target, name in zip((sample.target, *sample.negatives), ("0.jpg", "1.jpg"), strict=True):
        assert target.content == {"image": str(tmp_path / "images/VisDial/Train" / name)}
        assert target.labels == {f"images/VisDial/Train/{name}"}
        assert target.instruction == "Represent the given image"
    requests(samples)


def test_a_stray_placeholder_is_dropped_and_a_caption_is_part_of_the_label(tmp_path: Path) -> None:
    about = "<|image_1|>\nRepresent the given Wikipedia image with related text information: "
    rows = [
        {
            "qry": "<|image_1|>\nFind a Wikipedia image that answers this question: Which body part?\n",
            "pos_text": about + caption,
            "pos_image_path": "images/WebQA/Train/1.jpg",
        }
        for caption in ("A coin.\n", "A half.\n", "A coin.\n")
    ]
    first, second, third = samples = mmeb(tmp_path, "WebQA", rows)
    assert first.question.content == {"text": "Which body part?"}
    assert first.target.content["text"] == "A coin."
    assert second.wanted not in first.target.labels
    assert third.wanted in first.target.labels
    requests(samples)


def test_words_that_do_not_begin_with_the_instruction_stay_text(tmp_path: Path) -> None:
    row = {"qry": "<|image_1|>\nName the class.\n", "qry_image_path": "images/VOC2007/Train/0.jpg", "pos_text": "bus"}
    (sample,) = mmeb(tmp_path, "VOC2007", [row])
    assert sample.question.instruction == ""
    assert sample.question.content["text"] == "Name the class."


def test_rows_without_a_side_are_left_out_and_keys_stay_those_of_the_rows(tmp_path: Path) -> None:
    query = "Find me an everyday image that matches the given caption: "
    image = {"pos_text": "<|image_1|>\nRepresent the given image.\n", "pos_image_path": "images/MSCOCO_t2i/Train/0.jpg"}
    rows = [{"qry": query + "\n", **image}, {"qry": query + "a dog", "pos_text": ""}, {"qry": query + "a cat", **image}]
    assert [sample.question.key for sample in mmeb(tmp_path, "MSCOCO_t2i", rows)] == ["mmeb/MSCOCO_t2i/2"]


def test_every_subset_reads_a_query_that_is_only_its_instruction(tmp_path: Path) -> None:
    for subset, words in SUBSETS.items():
        row: dict[str, str] = {
            "qry": f"<|image_1|>\n{words.query}\n",
            "qry_image_path": f"images/{subset}/Train/0.jpg",
            "pos_text": "x",
        }
        if words.target:
            row |= {"pos_text": f"<|image_1|>\n{words.target}\n", "pos_image_path": f"images/{subset}/Train/1.jpg"}
        (sample,) = mmeb(tmp_path, subset, [row])
        assert sample.question.instruction == words.query
        assert sample.question.content.keys() == {"image"}
        assert sample.target.instruction == (words.target or None)


def test_negatives_may_be_absent_and_files_are_read_in_order_and_lazily(tmp_path: Path) -> None:
    for part in range(2):
        rows = [
            {"qry": "q", "qry_image_path": "", "pos_text": f"{part}-{index}", "pos_image_path": ""}
            for index in range(200)
        ]
        table(tmp_path / "ChartQA" / f"original-0000{part}-of-00002.parquet", rows, row_group_size=50)
    table(tmp_path / "ChartQA" / "diverse_instruction-00000-of-00001.parquet", [{"qry": "paraphrased"}])
    assert [sample.wanted for sample in read("mmeb/ChartQA", tmp_path)] == [
        f"{part}-{index}" for part in range(2) for index in range(200)
    ]
    (tmp_path / "ChartQA" / "original-00001-of-00002.parquet").write_bytes(b"damaged")
    assert next(read("mmeb/ChartQA", tmp_path)).negatives == ()


def test_what_is_missing_is_named_with_the_command_that_brings_it(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"CIRR/original-\*\.parquet is missing.*hf download TIGER-Lab/MMEB-train"):
        next(read("mmeb/CIRR", tmp_path))
    row = {"qry": "<|image_1|>\nIdentify the scene shown in the image\n", "qry_image_path": "images/SUN397/0.jpg"}
    table(tmp_path / "SUN397" / "original-00000-of-00001.parquet", [EMPTY | row | {"pos_text": "raft"}])
    with pytest.raises(OptionError, match=r"images/SUN397/0\.jpg is missing.*python unzip_file\.py"):
        next(read("mmeb/SUN397", tmp_path))
    with pytest.raises(OptionError, match=r"data/train-\*\.parquet is missing.*hf download vidore/colpali_train_set"):
        next(read("colpali", tmp_path))
    with pytest.raises(OptionError, match=r"video_caption_300k\.jsonl is missing.*hf download ShareGPTVideo"):
        next(read("video-caption", tmp_path))


def test_a_file_without_a_column_is_named(tmp_path: Path) -> None:
    table(tmp_path / "CIRR" / "original-00000-of-00001.parquet", [{"qry": "q", "pos_text": "t"}])
    with pytest.raises(OptionError, match="has no column 'qry_image_path'; it has qry, pos_text"):
        next(read("mmeb/CIRR", tmp_path))


def test_an_unknown_name_is_refused_with_the_nearest_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="did you mean 'mmeb/CIRR'"):
        read("mmeb/CIR", tmp_path)


def test_reading_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table(tmp_path / "CIRR" / "original-00000-of-00001.parquet", [EMPTY])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"mmemb-deploy\[train\]"):
        next(read("mmeb/CIRR", tmp_path))


@pytest.mark.parametrize("name", ["colpali", "visrag-in-domain", "visrag-synthetic"])
def test_questions_find_pages_which_are_written_out_once(tmp_path: Path, name: str) -> None:
    rows = [
        {"query": query, "image": {"bytes": encoded(shade), "path": None}, "source": "SlideVQA"}
        for query, shade in (("How many?", 1), (None, 2), ("Which year?", 1), ("Who?", 3))
    ]
    table(tmp_path / "data" / "train-00000-of-00001.parquet", rows)
    table(tmp_path / "data" / "test-00000-of-00001.parquet", rows)
    first, second, third = samples = list(read(name, tmp_path))
    assert [sample.question.key for sample in samples] == [f"{name}/0", f"{name}/2", f"{name}/3"]
    assert first.question.content == {"text": "How many?"}
    assert Path(first.target.content["image"]).read_bytes() == encoded(1)
    assert second.wanted in first.target.labels
    assert third.wanted not in first.target.labels
    assert len(list((tmp_path / "pages").iterdir())) == 2
    assert list(read(name, tmp_path)) == samples
    requests(samples)


def test_a_row_without_a_page_is_named(tmp_path: Path) -> None:
    rows = [{"query": "Who?", "image": {"bytes": data, "path": None}} for data in (encoded(1), None)]
    table(tmp_path / "data" / "train-00000-of-00001.parquet", rows)
    reader = read("colpali", tmp_path)
    next(reader)
    with pytest.raises(OptionError, match="row 1 holds no image"):
        next(reader)


def talk(video: str, asked: str, told: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": told}]
    return {"id": f"{video}_1", "video": video, "conversations": turns}


def videos(folder: Path, name: str, lines: Sequence[Any], **frames: int) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for video, count in frames.items():
        for index in range(count):
            picture(folder / "train_300k" / video / f"c01_{index + 1:04d}.jpeg", index)
    return folder


def test_captions_are_read_in_both_directions(tmp_path: Path) -> None:
    asked = "<video>\nWrite an in-depth depiction of the video."
    lines = [talk("v_long-Scene-001", asked, "Balls on a line.\n"), talk("short", asked, "A cat.")]
    folder = videos(tmp_path, CAPTIONS, lines, **{"v_long-Scene-001": 29, "short": 3})
    to_text, from_text = (list(read(name, folder)) for name in ("video-caption", "video-retrieval"))
    long, short = (sample.question.content for sample in to_text)
    assert [Path(frame).name for frame in long["video"]] == [f"c01_{n:04d}.jpeg" for n in (1, 5, 9, 13, 17, 21, 25, 29)]
    assert long["timestamps"] == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0]
    assert short["timestamps"] == [0.0, 0.5, 1.0]
    assert to_text[0].question.instruction == "Write an in-depth depiction of the video."
    assert to_text[0].target.content == {"text": "Balls on a line."}
    assert to_text[0].wanted in to_text[0].target.labels
    assert from_text[0].question.content == {"text": "Balls on a line."}
    assert from_text[0].target.content == long
    assert from_text[0].wanted in from_text[0].target.labels
    assert from_text[1].wanted not in from_text[0].target.labels
    np.testing.assert_allclose(requests(to_text)[0].timestamps, long["timestamps"])
    requests(from_text)


def test_a_question_is_the_text_beside_its_video_and_the_captions_behind_are_not_read(tmp_path: Path) -> None:
    lines = [
        talk("v", "<video>\nWhere is it?", "In a newsroom."),
        talk("v", "Is it day?\n<video>", "Yes."),
        talk("v", "<video>\nDescribe.", "A caption."),
    ]
    folder = videos(tmp_path, QUESTIONS, lines, v=2)
    samples = list(read_video_questions(folder, lines=2))
    assert [sample.question.content["text"] for sample in samples] == ["Where is it?", "Is it day?"]
    assert [sample.wanted for sample in samples] == ["In a newsroom.", "Yes."]
    assert len(list(read("video-qa", folder))) == 3
    requests(samples)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"video": "v", "conversations": []}, "line 1 names no video and what a human asked"),
        ({"id": "v"}, "line 1 names no video"),
        (talk("v", "<video>\nWhat?", " "), "line 1 names no video"),
        (talk("absent", "<video>\nWhat?", "That."), r"train_300k/absent is missing.*tar -xzf"),
    ],
)
def test_a_malformed_line_and_missing_frames_are_named(tmp_path: Path, line: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        next(read("video-caption", videos(tmp_path, CAPTIONS, [line])))


def test_a_line_that_is_no_json_is_named(tmp_path: Path) -> None:
    (videos(tmp_path, CAPTIONS, []) / CAPTIONS).write_text("\n{")
    with pytest.raises(OptionError, match="line 2 is not JSON"):
        next(read("video-caption", tmp_path))


def test_the_registry_names_all_public_sets() -> None:
    assert len(DATASETS) == 20 + 3 + 3


def test_samples_come_back_from_their_table_one_at_a_time_whatever_they_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_module, "BATCH", 2)
    video = {"video": ["a.jpeg", "b.jpeg"], "timestamps": [0.0, 0.5], "text": "what?"}
    near = Target(content={"text": "near"}, labels=frozenset({"x", "y"}), instruction="")
    samples = [
        Sample(
            question=Question(key=f"k{index}", task=f"t{index % 3}", content=content, instruction=instruction),
            wanted="x",
            target=Target(content={"image": f"{index}.png"}, labels=frozenset({str(index)})),
            negatives=(near,) * (index % 3),
        )
        for index, (content, instruction) in enumerate([(video, None), ({"text": "é"}, "Find it."), ("words", "")] * 2)
    ]
    write_samples(samples[:5], tmp_path / "one.arrow")
    write_samples(samples[5:], tmp_path / "two.arrow")
    held = SampleTable([tmp_path / "one.arrow", tmp_path / "two.arrow"])
    assert list(held) == samples
    assert list(held[1::3]) == samples[1::3]
    assert list(held.question_keys()) == [f"k{index}" for index in range(6)]
    assert [held.tasks[task] for task in held.task_N] == [sample.question.task for sample in samples]


def test_a_data_set_is_read_once_and_its_folder_is_for_no_other(tmp_path: Path) -> None:
    rows = [{"qry": f"a {index}", "pos_text": "b"} for index in range(3)]
    mmeb(tmp_path, "WebQA", rows)
    data = [f"mmeb/WebQA={tmp_path}"]
    assert len(read_samples(data, 2, tmp_path / "samples")) == 2
    (tmp_path / "WebQA" / "original-00000-of-00001.parquet").unlink()
    assert [one.question.key for one in read_samples(data, 2, tmp_path / "samples")] == ["mmeb/WebQA/0", "mmeb/WebQA/1"]
    with pytest.raises(OptionError, match="another limit"):
        read_samples(data, 3, tmp_path / "samples")
