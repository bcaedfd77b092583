"""MMEB-V2: the registry, the public layouts as they lie on disk, both versions of NDCG, and runs that are resumed."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import typer
from PIL import Image
from pyarrow import parquet
from typer.testing import CliRunner

from mmemb_benchmarks.mmeb_v2 import commands, evaluate
from mmemb_benchmarks.mmeb_v2.data import TaskData
from mmemb_benchmarks.mmeb_v2.evaluate import MODES, Evaluation
from mmemb_benchmarks.mmeb_v2.labels import LABELS
from mmemb_benchmarks.mmeb_v2.metrics import CORRECTED, CUTOFFS, Ranked, scores
from mmemb_benchmarks.mmeb_v2.read_video_qa import MVBENCH_SUBSETS
from mmemb_benchmarks.mmeb_v2.read_visdoc import page_name
from mmemb_benchmarks.mmeb_v2.readers import STILL_READERS, VIDEO_READERS, download_annotations, read_task
from mmemb_benchmarks.mmeb_v2.table import Results, groups
from mmemb_benchmarks.mmeb_v2.tasks import HIT, NDCG, TASKS, select
from mmemb_deploy import Embedder
from mmemb_deploy.bundle.folder import NANO
from mmemb_deploy.errors import InputError, OptionError

Rows = Sequence[dict[str, Any]]


@pytest.fixture(scope="module")
def nano() -> Embedder:
    return Embedder.load()


def picture(path: Path, shade: int) -> Path:
    """Write a small image that differs from others of another shade."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(shade).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def clip(folder: Path, count: int, shade: int = 0) -> None:
    """Write a folder of frames, named so that only natural order is right."""
    for place in range(1, count + 1):
        picture(folder / f"frame_{place}.jpg", shade * 100 + place)


def table(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(list(rows)), path)


def lines(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def beir(folder: Path, split: str, *, queries: Rows, corpus: Rows, qrels: Rows) -> None:
    for name, rows in (("queries", queries), ("corpus", corpus), ("qrels", qrels)):
        table(folder / name / f"{split}-00000-of-00001.parquet", rows)


def visdoc_root(root: Path) -> Path:
    """Write a ViDoRe task of 6 pages and 3 queries with unequal grades; page 5 lies only in the corpus' parquet."""
    for page in range(5):
        picture(root / "visdoc-tasks" / "esg_reports_human_labeled_v2" / f"{page}.png", page)
    encoded = BytesIO()
    Image.new("RGB", (32, 32), "red").save(encoded, "PNG")
    beir(
        root / "visdoc-tasks" / "esg_reports_human_labeled_v2",
        "test",
        queries=[{"query-id": place, "query": f"emissions in year {place}"} for place in range(3)],
        corpus=[{"corpus-id": page, "image": {"bytes": encoded.getvalue(), "path": None}} for page in range(6)],
        qrels=[
            {"query-id": 0, "corpus-id": 4, "score": 2},
            {"query-id": 0, "corpus-id": 5, "score": 1},
            {"query-id": 0, "corpus-id": 3, "score": 0},
            {"query-id": 1, "corpus-id": 1, "score": 1},
            {"query-id": 1, "corpus-id": 1, "score": 2},
            {"query-id": 2, "corpus-id": 2, "score": 1},
        ],
    )
    return root


def image_root(root: Path) -> Path:
    """Write ScienceQA: 5 queries about 2 images, with options that rows share."""
    for place in range(2):
        picture(root / "image-tasks" / "ScienceQA" / f"{place}.png", place)
    table(
        root / "image-tasks" / "ScienceQA" / "test-00000-of-00001.parquet",
        [
            {
                "qry_inst": "<|image_1|>\nRepresent the given image with the following question:",
                "qry_text": f"which {place}?",
                "qry_img_path": f"ScienceQA/{place % 2}.png",
                "tgt_inst": "",
                "tgt_text": ["copper", f"iron {place}", "gold"],
                "tgt_img_path": ["", "", ""],
            }
            for place in range(5)
        ],
    )
    return root


# ---------------------------------------------------------------- the registry


def test_the_registry_has_the_78_tasks_in_their_groups() -> None:
    assert len(TASKS) == 78
    assert Counter(task.group for task in TASKS.values()) == {"image": 36, "video": 18, "visdoc": 24}
    sizes = {label: len(tasks) for label, tasks in groups()}
    assert [sizes[f"image/{part}"] for part in ("CLS", "QA", "RET", "VG")] == [10, 10, 12, 4]
    assert [sizes[f"video/{part}"] for part in ("CLS", "QA", "RET", "MRET")] == [5, 5, 5, 3]
    assert [sizes[f"visdoc/{part}"] for part in ("ViDoRe-v1", "ViDoRe-v2", "VisRAG", "OOD")] == [10, 4, 6, 4]
    assert {task.reader for task in TASKS.values()} == STILL_READERS.keys() | VIDEO_READERS.keys()


def test_metric_scope_and_frames_follow_the_benchmark() -> None:
    for task in TASKS.values():
        assert task.metric == (NDCG if task.group == "visdoc" else HIT)
        assert task.frames == (8 if task.group == "video" else 0)
    corpus = {task.name for task in TASKS.values() if task.scope == "corpus" and task.group == "video"}
    assert corpus == {"K700", "HMDB51", "UCF101", "Breakfast", "DiDeMo", "MSR-VTT", "MSVD", "VATEX", "YouCook2"}
    assert {name: len(set(labels)) for name, labels in LABELS.items()} == {
        "K700": 700,
        "UCF101": 101,
        "HMDB51": 51,
        "Breakfast": 10,
    }
    assert TASKS["ViDoRe_tatdqa"].hub == "vidore/tatdqa_test_beir"
    assert TASKS["MMLongBench-page"].hub == "VLM2Vec/MMLongBench-page-fixed"


def test_tasks_are_chosen_by_name_group_and_sub_group() -> None:
    assert [task.name for task in select(["video/MRET", "GQA"])] == [
        "GQA",
        "QVHighlight",
        "Charades-STA",
        "MomentSeeker",
    ]
    assert len(select(["visdoc"])) == 24
    with pytest.raises(OptionError, match="did you mean 'ChartQA'"):
        select(["ChartqA"])


# ---------------------------------------------------------------- the metrics


def test_the_public_figures_are_those_computed_by_hand() -> None:
    figures = scores([Ranked(["b", "x", "a", "y", "c"], ["a", "b", "c", "d"]), Ranked(["x", "y"], ["a"])])
    assert figures["hit@1"] == 0.5
    assert figures["hit@10"] == 0.5
    assert figures["precision@5"] == pytest.approx(0.5 * 3 / 5)
    assert figures["recall@5"] == pytest.approx(0.5 * 3 / 4)
    assert figures["f1@5"] == pytest.approx(0.5 * 2 * 3 / 9)
    assert figures["map@5"] == pytest.approx(0.5 * (1 + 2 / 3 + 3 / 5) / 4)
    assert figures["mrr@10"] == 0.5
    best = 1 + 1 / math.log2(3) + 1 / 2 + 1 / math.log2(5)
    assert figures["ndcg_linear@5"] == pytest.approx(0.5 * (1 + 1 / 2 + 1 / math.log2(6)) / best)
    assert set(figures) == {
        *(f"{name}@{cutoff}" for name in ("hit", "precision", "recall", "f1", "map", "mrr") for cutoff in CUTOFFS),
        *(f"ndcg_{form}@{cutoff}" for form in ("linear", "exponential") for cutoff in CUTOFFS),
        CORRECTED,
    }


def test_a_perfect_graded_ranking_scores_1_corrected_and_what_the_public_scorer_gives_officially() -> None:
    names = [[f"{letter}{place}" for letter in "abc"] for place in range(12)]
    values = [scores([Ranked([*labels, "z"], labels, [2, 1, 1])]) for labels in names]
    assert all(value[CORRECTED] == pytest.approx(1) for value in values)
    best = 2 + 1 / math.log2(3) + 1 / 2
    possible = [1.0, (1 + 2 / math.log2(3) + 1 / 2) / best, (1 + 1 / math.log2(3) + 1) / best]
    assert [round(value, 2) for value in possible] == [1.0, 0.88, 0.84]
    # The grade of 2 goes to the label that the set lists first, wherever that one stands in the ranking.
    script = "import json, sys; print(json.dumps([x.index(list(set(x))[0]) for x in json.loads(sys.argv[1])]))"
    seeded = subprocess.run(
        [sys.executable, "-c", script, json.dumps(names)],
        env=os.environ | {"PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    expected = [possible[place] for place in json.loads(seeded.stdout)]
    assert [value[NDCG] for value in values] == pytest.approx(expected)
    assert len({round(value, 3) for value in expected}) > 1


def test_equal_and_absent_grades_leave_nothing_to_correct() -> None:
    for grades in (None, [1, 1]):
        figures = scores([Ranked(["x", "a", "b"], ["a", "b"], grades)])
        assert figures[NDCG] == figures[CORRECTED]
        assert figures[NDCG] == pytest.approx((1 / math.log2(3) + 1 / 2) / (1 + 1 / math.log2(3)))


# ---------------------------------------------------------------- the layouts


def test_image_rows_with_text_candidates(tmp_path: Path) -> None:
    data = read_task(TASKS["ScienceQA"], image_root(tmp_path))
    assert list(data.corpus) == ["copper", "iron 0", "gold", "iron 1", "iron 2", "iron 3", "iron 4"]
    query = data.queries[1]
    assert query.content == {"text": "which 1?", "image": str(tmp_path / "image-tasks" / "ScienceQA" / "1.png")}
    assert query.instruction == "Represent the given image with the following question:"
    assert query.as_info() == {"cand_names": ["copper", "iron 1", "gold"], "label_name": "copper"}


def test_image_rows_with_image_candidates(tmp_path: Path) -> None:
    folder = tmp_path / "image-tasks"
    for name in ("EDIS/a.jpg", "EDIS/b.jpg", "RefCOCO-Matching/q.jpg", "RefCOCO-Matching/t.jpg"):
        picture(folder / name, 1)
    table(
        folder / "EDIS" / "test-00000-of-00001.parquet",
        [
            {
                "qry_inst": "Find a news image that matches the provided caption:",
                "qry_text": "a storm",
                "qry_img_path": "",
                "tgt_inst": "<|image_1|> Represent the given image with related text:",
                "tgt_text": ["wind ", "sun"],
                "tgt_img_path": ["EDIS/a.jpg", "EDIS/b.jpg"],
            }
        ],
    )
    table(
        folder / "RefCOCO-Matching" / "test-00000-of-00001.parquet",
        [
            {
                "qry_inst": "<|image_1|> Select",
                "qry_text": "man",
                "qry_img_path": "RefCOCO-Matching/q.jpg",
                "tgt_inst": "<|image_1|> Identify",
                "tgt_text": ['"left man"', '"right man"'],
                "tgt_img_path": ["RefCOCO-Matching/t.jpg", "RefCOCO-Matching/t.jpg"],
            }
        ],
    )
    edis = read_task(TASKS["EDIS"], tmp_path)
    assert edis.queries[0].content == {"text": "a storm"}
    assert edis.queries[0].label == "EDIS/a.jpg"
    assert edis.corpus["EDIS/a.jpg"].content == {"image": str(folder / "EDIS/a.jpg"), "text": "wind"}
    assert edis.corpus["EDIS/a.jpg"].instruction == "Represent the given image with related text:"
    matching = read_task(TASKS["RefCOCO-Matching"], tmp_path)
    assert list(matching.corpus) == ["RefCOCO-Matching/t.jpg:left man", "RefCOCO-Matching/t.jpg:right man"]
    assert set(matching.queries[0].content) == {"text", "image"}


def test_video_classes(tmp_path: Path) -> None:
    clip(tmp_path / "video-tasks/frames/video_cls/HMDB51/ride", 17)
    lines(tmp_path / "video-tasks/HMDB51/data/test.jsonl", [{"video_id": "ride", "pos_text": "ride_bike"}])
    lines(tmp_path / "video-tasks/HMDB51/data/train.jsonl", [{"video_id": "absent", "pos_text": "wave"}])
    data = read_task(TASKS["HMDB51"], tmp_path)
    assert sorted(data.corpus, key=str) == sorted(LABELS["HMDB51"])
    frames = data.queries[0].content["video"]
    assert [Path(frame).stem for frame in frames] == [f"frame_{place}" for place in (1, 3, 5, 7, 10, 12, 14, 17)]
    assert read_task(TASKS["HMDB51"], tmp_path, frames=64).frames == 17

    clip(tmp_path / "video-tasks/frames/video_cls/SSv2/7", 3)
    rows = [{"video_id": 7, "pos_text": "Closing something", "neg_text": ["Closing something", "Opening something"]}]
    lines(tmp_path / "video-tasks/SmthSmthV2/data/test.jsonl", rows * 1001)
    choice = read_task(TASKS["SmthSmthV2"], tmp_path)
    assert len(choice.queries) == 1000
    assert choice.queries[0].candidates == ("Closing something", "Opening something")


def test_video_captions(tmp_path: Path) -> None:
    clip(tmp_path / "video-tasks/frames/video_ret/MSVD/v1", 2)
    clip(tmp_path / "video-tasks/frames/video_ret/data/ziyan/video_retrieval/DiDeMo/frames/d1.x", 2)
    folder = tmp_path / "video-tasks/MSVD"
    folder.mkdir(parents=True)
    (folder / "msvd_test.json").write_text(json.dumps([{"video_id": "v1", "video": "v1.avi", "caption": ["a", "b"]}]))
    (folder / "msvd_train.json").write_text(json.dumps([{"video_id": "v0", "video": "v0.avi", "caption": ["c"]}]))
    data = read_task(TASKS["MSVD"], tmp_path)
    assert list(data.corpus) == ["v1"]
    assert data.queries[0].content == {"text": "a"}
    assert data.corpus["v1"].instruction == "Understand the content of the provided video."
    lines(tmp_path / "video-tasks/DiDeMo/didemo_test.jsonl", [{"video": "clips/d1.x.mp4", "caption": "a dog"}])
    assert read_task(TASKS["DiDeMo"], tmp_path).queries[0].label == "d1.x"


def test_moments(tmp_path: Path) -> None:
    media = tmp_path / "video-tasks/frames/video_mret/QVHighlight/v1"
    for place, name in enumerate(("query", "positive", "negative_0", "negative_1")):
        clip(media / name, 12, place)
    lines(tmp_path / "video-tasks/QVHighlight/test.jsonl", [{"query": "a car turns", "video_path": "videos/v1.mp4"}])
    data = read_task(TASKS["QVHighlight"], tmp_path, frames=64)
    query = data.queries[0]
    assert query.candidates == ("v1/negative_0", "v1/negative_1", "v1/positive")
    assert query.label == "v1/positive"
    assert len(query.content["video"]) == 12
    assert len(data.corpus["v1/positive"].content["video"]) == 8

    media = tmp_path / "video-tasks/frames/video_mret/MomentSeeker"
    for place, name in enumerate(("m_a_0", "m_a_1", "m_q")):
        clip(media / "video_frames" / name, 2, place)
    picture(media / "query_i.jpg", 1)
    lines(
        tmp_path / "video-tasks/MomentSeeker/test.jsonl",
        [
            {
                "query": "he sits",
                "input_frames": given,
                "positive_frames": [{"output_path": "m/a_0.mp4"}],
                "negative_frames": [{"output_path": "m/a_1.mp4"}],
            }
            for given in ("", "i.jpg", "m/q.mp4")
        ],
    )
    seeker = read_task(TASKS["MomentSeeker"], tmp_path)
    assert [set(query.content) for query in seeker.queries] == [{"text"}, {"text", "image"}, {"text", "video"}]
    assert len({query.instruction for query in seeker.queries}) == 3
    assert seeker.queries[0].as_info() == {"cand_names": ["m_a_0", "m_a_1"], "label_name": ["m_a_0"]}


def qa_rows() -> dict[str, tuple[str, str, dict[str, Any]]]:
    """Return, per task, the annotation file, the folder of frames and a row."""
    return {
        "MVBench": (
            "json/action_count.json",
            "action_count/v.mp4",
            {"question": "how often?", "video": "v.mp4", "candidates": ["1", "2"], "answer": "2"},
        ),
        "Video-MME": (
            "videomme/test-00000-of-00001.parquet",
            "v",
            {
                "videoID": "v",
                "question": "who?",
                "options": ["A. a dog.", "B. a cat."],
                "answer": "B",
                "question_id": "1",
                "domain": "d",
                "sub_category": "s",
            },
        ),
        "NExTQA": (
            "MC/test-00000-of-00001.parquet",
            "12",
            {
                "video": 12,
                "question": "why",
                "answer": 1,
                "qid": 3,
                "type": "CW",
                "a0": "x",
                "a1": "y",
                "a2": "z",
                "a3": "u",
                "a4": "w",
            },
        ),
        "EgoSchema": (
            "Subset/test-00000-of-00001.parquet",
            "v",
            {
                "video_idx": "v",
                "question": "what?",
                "option": ["A. C eats.", "B. C reads."],
                "answer": "0",
                "question_idx": "9",
            },
        ),
        "ActivityNetQA": (
            "data/test-00000-of-00001.parquet",
            "v_v",
            {"video_name": "v", "question": "is it day", "answer": "no", "question_id": "4"},
        ),
    }


@pytest.mark.parametrize(
    ("name", "text", "candidates", "label"),
    [
        ("MVBench", "how often?\nOptions:\n(A) 1\n(B) 2", {"(A) 1": "(A) 1", "(B) 2": "(B) 2"}, "(B) 2"),
        ("Video-MME", "who?\nA. a dog.\nB. a cat.", {"A. a dog.": "a dog", "B. a cat.": "a cat"}, "B. a cat."),
        ("NExTQA", "why\nOptions:\n(A) x\n(B) y\n(C) z\n(D) u\n(E) w", {text: text for text in "xyzuw"}, "y"),
        ("EgoSchema", "what? A. C eats. B. C reads.", {"A. C eats.": "C eats", "B. C reads.": "C reads"}, "A. C eats."),
        ("ActivityNetQA", "is it day? (A) yes; (B) no.", {"yes": "yes", "no": "no"}, "no"),
    ],
)
def test_video_questions(tmp_path: Path, name: str, text: str, candidates: dict[str, str], label: str) -> None:
    file, frames, row = qa_rows()[name]
    clip(tmp_path / "video-tasks/frames/video_qa" / name / frames, 2)
    path = tmp_path / "video-tasks" / name / file
    if path.suffix == ".json":
        for subset in ("action_sequence", "action_count"):
            path = path.with_name(f"{subset}.json")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps([row] if subset == "action_count" else []))
        with pytest.raises(OptionError, match="episodic_reasoning"):
            read_task(TASKS[name], tmp_path)
        for subset in set(MVBENCH_SUBSETS) - {"action_count"}:
            path.with_name(f"{subset}.json").write_text("[]")
    else:
        table(path, [row])
    data = read_task(TASKS[name], tmp_path)
    (query,) = data.queries
    assert query.content["text"] == text
    assert len(query.content["video"]) == 2
    assert {key: candidate.content["text"] for key, candidate in data.corpus.items()} == candidates
    assert query.candidates == tuple(candidates)
    assert query.label == label
    assert query.as_info()["query"] == text


def test_vidore_keeps_grades_and_ids_and_unpacks_pages_that_only_the_corpus_holds(tmp_path: Path) -> None:
    task = TASKS["ViDoRe_esg_reports_human_labeled_v2"]
    data = read_task(task, visdoc_root(tmp_path))
    assert list(data.corpus) == [0, 1, 2, 3, 4, 5]
    assert Image.open(tmp_path / task.media[0] / "5.png").getpixel((0, 0)) == (255, 0, 0)
    assert data.queries[0].as_info() == {"cand_names": [4, 5], "label_name": [4, 5], "rel_scores": [2, 1]}
    assert data.queries[1].grades == (2,)
    assert data.corpus[0].instruction == "Understand the content of the provided document image."


def test_visrag_and_the_fixed_sets_have_their_own_names_and_folders(tmp_path: Path) -> None:
    key = "a" * 60 + ".jpg"
    name = page_name("visrag", key)
    assert name.startswith("a" * 50 + "_")
    assert name.endswith(".jpg")
    assert len(name) == 50 + 1 + 8 + 4
    picture(tmp_path / "visdoc-tasks/VisRAG_PlotQA" / name, 1)
    queries = [{"query-id": "q", "query": "which?"}]
    beir(
        tmp_path / "visdoc-tasks/VisRAG-Ret-Test-PlotQA",
        "train",
        queries=queries,
        corpus=[{"corpus-id": key}],
        qrels=[{"query-id": "q", "corpus-id": key, "score": 1}],
    )
    assert list(read_task(TASKS["VisRAG_PlotQA"], tmp_path).corpus) == [key]

    picture(tmp_path / "visdoc-tasks/images/MMLongBench-page/p_1.png", 1)
    beir(
        tmp_path / "visdoc-tasks/MMLongBench-page-fixed",
        "test",
        queries=queries,
        corpus=[{"corpus-id": "p_1"}],
        qrels=[{"query-id": "q", "corpus-id": "p_1", "score": 1}],
    )
    assert read_task(TASKS["MMLongBench-page"], tmp_path).queries[0].labels == ("p_1",)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    image_root(tmp_path)
    absent = tmp_path / "image-tasks/ScienceQA/1.png"
    absent.unlink()
    with pytest.raises(InputError, match=r"ScienceQA/1.png is missing"):
        read_task(TASKS["ScienceQA"], tmp_path)
    with pytest.raises(OptionError, match=r"image-tasks/GQA is not a folder.*--hub"):
        read_task(TASKS["GQA"], tmp_path)
    lines(tmp_path / "video-tasks/UCF101/data/test.jsonl", [{"video_id": "v", "pos_text": "Biking"}])
    with pytest.raises(InputError, match="video_cls/UCF101/v is missing"):
        read_task(TASKS["UCF101"], tmp_path)
    lines(tmp_path / "video-tasks/UCF101/data/test.jsonl", [{"video": "v"}])
    with pytest.raises(InputError, match=r"test.jsonl has no column 'video_id'; it has video"):
        read_task(TASKS["UCF101"], tmp_path)
    (tmp_path / "video-tasks/UCF101/data/test.jsonl").rename(tmp_path / "video-tasks/UCF101/data/train.jsonl")
    with pytest.raises(OptionError, match=r"no file of split 'test'; it holds data/train.jsonl"):
        read_task(TASKS["UCF101"], tmp_path)
    task = TASKS["ViDoRe_esg_reports_human_labeled_v2"]
    visdoc_root(tmp_path)
    corpus = [{"corpus-id": page, "image": None} for page in range(6)]
    table(tmp_path / task.annotations / "corpus/test-00000-of-00001.parquet", corpus)
    with pytest.raises(InputError, match=r"5.png is missing, and the corpus holds no image"):
        read_task(task, tmp_path)


# ---------------------------------------------------------------- runs


def test_a_run_ranks_by_cosine_and_writes_the_public_files(nano: Embedder, tmp_path: Path) -> None:
    task = TASKS["ViDoRe_esg_reports_human_labeled_v2"]
    data = read_task(task, visdoc_root(tmp_path / "data"))
    figures = Evaluation(nano, task, data, tmp_path / "out").run(MODES)
    assert [figures[mode]["reasoning_rate"] for mode in ("never", "always")] == [0, 1]
    assert figures["never"]["rationale_tokens"] == 0

    queries = nano.encode([query.content for query in data.queries], instruction=task.instruction, reasoning="never")
    pages = nano.encode_document([page.content for page in data.corpus.values()], instruction=task.target_instruction)
    folder = tmp_path / "out" / "never" / "visdoc"
    written = [json.loads(line) for line in (folder / f"{task.name}_pred.jsonl").read_text().splitlines()]
    for prediction, cosines in zip(written, nano.similarity(queries, pages), strict=True):
        assert prediction["prediction"] == np.argsort(-cosines, kind="stable").tolist()
    assert (written[0]["label"], written[0]["rel_scores"]) == ([4, 5], [2, 1])
    expected = scores([Ranked(line["prediction"], line["label"], line["rel_scores"]) for line in written])
    score = json.loads((folder / f"{task.name}_score.json").read_text())
    assert score == pytest.approx(score | expected)
    assert (score["num_pred"], score["num_data"]) == (3, 3)
    assert all(isinstance(value, (int, float)) for value in score.values())
    info = [json.loads(line) for line in (folder / f"{task.name}_info.jsonl").read_text().splitlines()]
    assert info[0]["label_name"] == [4, 5]
    assert {line["route"] for line in info} == {"fast"}


def test_an_interrupted_run_goes_on_and_a_finished_one_embeds_nothing(
    nano: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = TASKS["ScienceQA"]
    data = read_task(task, image_root(tmp_path / "data"))
    monkeypatch.setattr(evaluate, "CHUNK", 2)
    whole = Evaluation(nano, task, data, tmp_path / "whole").run(MODES)

    calls: list[int] = []
    limit = 7
    encode_detailed = Embedder.encode_detailed

    def counted(self: Embedder, inputs: Sequence[Any], **options: Any) -> Any:
        if len(calls) == limit:
            raise KeyboardInterrupt
        calls.append(len(inputs))
        return encode_detailed(self, inputs, **options)

    monkeypatch.setattr(Embedder, "encode_detailed", counted)
    resumed = Evaluation(nano, task, data, tmp_path / "resumed")
    with pytest.raises(KeyboardInterrupt):
        resumed.run(MODES)
    limit = 1000
    assert resumed.run(MODES) == whole
    assert sum(calls) == len(data.corpus) + 3 * len(data.queries)
    calls.clear()
    assert resumed.run(MODES) == whole
    assert resumed.run(["auto"]) == {"auto": whole["auto"]}
    assert not calls
    for part in resumed.parts.glob("*.npz"):
        part.unlink()
    assert resumed.run(MODES) == whole
    assert not calls


def test_results_of_other_data_or_another_bundle_are_not_mixed(nano: Embedder, tmp_path: Path) -> None:
    task = TASKS["ScienceQA"]
    data = read_task(task, image_root(tmp_path / "data"))
    Evaluation(nano, task, data, tmp_path / "out").run(["never"])
    with pytest.raises(OptionError, match="another data and another queries"):
        Evaluation(nano, task, data.first(2, row_scope=True), tmp_path / "out").run(["never"])
    recalibrated = tmp_path / "recalibrated"
    shutil.copytree(NANO, recalibrated)
    manifest = json.loads((recalibrated / "manifest.json").read_text())
    manifest["gate"]["threshold"] = 0.75
    (recalibrated / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(OptionError, match="another manifest"):
        Evaluation(Embedder.load(recalibrated), task, data, tmp_path / "out").run(["never"])


def test_an_input_that_cannot_be_embedded_is_named(nano: Embedder, tmp_path: Path) -> None:
    data = read_task(TASKS["ScienceQA"], image_root(tmp_path))
    (tmp_path / "image-tasks/ScienceQA/1.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"ScienceQA, query 1: 'image'"):
        Evaluation(nano, TASKS["ScienceQA"], data, tmp_path / "out").run(["never"])


def test_fewer_queries_leave_a_corpus_whole_but_not_the_candidates_of_rows(tmp_path: Path) -> None:
    visdoc: TaskData = read_task(TASKS["ViDoRe_esg_reports_human_labeled_v2"], visdoc_root(tmp_path))
    assert len(visdoc.first(1, row_scope=False).corpus) == 6
    rows = read_task(TASKS["ScienceQA"], image_root(tmp_path)).first(2, row_scope=True)
    assert list(rows.corpus) == ["copper", "iron 0", "gold", "iron 1"]
    assert (len(rows.queries), rows.whole) == (2, 5)


# ---------------------------------------------------------------- the command


def run(*arguments: object) -> Any:
    app = typer.Typer()
    commands.register(app)
    return CliRunner().invoke(app, ["eval", "mmeb-v2", *map(str, arguments)])


def test_the_command_scores_what_is_there_and_says_what_is_not(tmp_path: Path) -> None:
    root = image_root(visdoc_root(tmp_path / "data"))
    out = tmp_path / "out"
    ran = run("--data", root, "--out", out, "--modes", "never,auto", "--max-queries", 2, "--json")
    assert ran.exit_code == 0, ran.output
    figures = json.loads(ran.stdout.splitlines()[-1])
    assert figures["completeness"] == "partial: 2 of 78, a trial on a part of their queries"
    assert len(figures["missing"]) == 76
    assert list(figures["tasks"]) == ["ScienceQA", "ViDoRe_esg_reports_human_labeled_v2"]
    every = figures["means"]["all"]["never"]
    both = [figures["tasks"][name]["modes"]["never"]["score"] for name in figures["tasks"]]
    assert every["score"] == pytest.approx(sum(both) / 2, abs=1e-6)
    assert (every["tasks"], every["of"], every["partial"]) == (2, 78, True)
    assert figures == json.loads((out / "table.json").read_text())
    shown = (out / "table.md").read_text()
    assert "MMEB-V2, partial: 2 of 78" in shown
    assert "| image/QA | ScienceQA | - | 2 of 5 |" in shown
    assert "mean, partial: 1 of 36" in shown
    assert "| all | mean, partial: 2 of 78 |" in shown
    ran = run("--data", root, "--out", out, "--modes", "never", "--max-queries", 2)
    assert "partial: 2 of 78" in ran.stdout


def test_all_78_scores_make_an_overall_mean_that_is_not_partial(tmp_path: Path) -> None:
    for place, task in enumerate(TASKS.values()):
        figures = {HIT: place / 100, NDCG: place / 200, CORRECTED: place / 150} | dict.fromkeys(
            ("num_data", "num_whole", "num_unanswerable", "frames", "reasoning_rate", "rationale_tokens"), 1
        )
        path = evaluate.score_path(tmp_path, "auto", task)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures))
    results = Results.of(tmp_path, ["auto"])
    mean = results.as_json()["means"]["all"]["auto"]
    places = np.arange(78)
    assert mean["score"] == pytest.approx((places[:54].sum() / 100 + places[54:].sum() / 200) / 78, abs=1e-6)
    assert mean["corrected"] == pytest.approx((places[:54].sum() / 100 + places[54:].sum() / 150) / 78, abs=1e-6)
    assert not mean["partial"]
    assert results.completeness == "all 78 tasks"
    assert "partial" not in results.markdown()
    assert results.rich().row_count == 78 + 12 + 3 + 1


def test_mistakes_of_the_command_are_user_errors(tmp_path: Path) -> None:
    for arguments, message in (
        (("--data", tmp_path / "absent"), "is not a folder"),
        (("--data", tmp_path), "holds the annotations of no task"),
        (("--data", tmp_path, "--tasks", "GQQ"), "did you mean 'GQA'"),
        (("--data", tmp_path, "--modes", "sometimes"), "mode 'sometimes' is not known"),
    ):
        failed = run(*arguments).exception
        assert isinstance(failed, OptionError)
        assert message in str(failed)


def test_a_hub_that_cannot_be_reached_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OptionError, match=r"annotations of GQA, data set ziyjiang/MMEB_Test_Instruct"):
        download_annotations(TASKS["GQA"], tmp_path)
