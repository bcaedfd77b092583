"""Embedding what lies on disk: nothing finished is lost, nothing is mixed up, nothing is held whole."""

import csv
import json
import math
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import pytest
from PIL import Image

from mmemb_deploy import BackendError, Embedder, InputError, OptionError
from mmemb_deploy.jobs import run as running
from mmemb_deploy.jobs.ahead import Ahead
from mmemb_deploy.jobs.job import Job, Summary, check_output
from mmemb_deploy.jobs.parts import COLUMNS, write_part
from mmemb_deploy.jobs.records import UNDIVIDED, Division, Record
from mmemb_deploy.jobs.run import embed_source
from mmemb_deploy.jobs.source import read_source
from mmemb_deploy.options import EncodeOptions

CHUNK = 3  # rows, so that few inputs make several


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """Seven inputs: texts, an image beside the file, and ids of their own."""
    Image.new("RGB", (20, 20), "teal").save(tmp_path / "teal.png")
    contents: list[Any] = [f"text {place}" for place in range(5)]
    contents += [{"id": "picture", "image": "teal.png"}, {"text": "last", "id": 9}]
    path = tmp_path / "inputs.jsonl"
    path.write_text("\n".join(map(json.dumps, contents)) + "\n\n")
    return path


def run(
    embedder: Embedder, source: Path, output: Path, *, keep_going: bool = False, **options: Unpack[EncodeOptions]
) -> Summary:
    """Embed a source as queries."""
    found = read_source(source, keep_going=keep_going, limits=embedder.manifest.limits, chunk=CHUNK)
    job = Job(found, output, options, document=False, keep_going=keep_going)
    return embed_source(embedder, job, lambda _: None, prepare_threads=2)


def records(source: Path, division: Division = UNDIVIDED) -> list[Record]:
    """Return the rows of a source."""
    return list(read_source(source, division=division, chunk=CHUNK).records())


def test_rows_keep_their_order_ids_files_and_values(tiny_embedder: Embedder, lines: Path, tmp_path: Path) -> None:
    summary = run(tiny_embedder, lines, tmp_path / "out.npz", reasoning="never")
    written = np.load(tmp_path / "out.npz")
    assert (summary.rows, summary.failures, summary.reasoned) == (7, 0, 0)
    assert written["id"].tolist() == ["1", "2", "3", "4", "5", "picture", "9"]
    assert written["file"].tolist() == ["", "", "", "", "", "teal.png", ""]
    expected = tiny_embedder.encode(list(read_source(lines).inputs()), reasoning="never")
    np.testing.assert_allclose(written["embedding"], expected, atol=1e-5)
    assert not (tmp_path / "out.npz.parts").exists()


@pytest.mark.parametrize("rate", [None, 0.5])
def test_parquet_holds_what_npz_holds(tiny_embedder: Embedder, lines: Path, tmp_path: Path, rate: float | None) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    for name in ("out.npz", "out.parquet"):
        summary = run(
            tiny_embedder, lines, tmp_path / name, reasoning="auto" if rate else "always", reasoning_rate=rate
        )
        assert summary.reasoned == (2 if rate else 7)  # of chunks of 3, 3 and 1 a half each
    table, archive = parquet.read_table(tmp_path / "out.parquet"), np.load(tmp_path / "out.npz")
    assert table.column_names == list(COLUMNS)
    for name, values in table.to_pydict().items():
        np.testing.assert_array_equal(np.array(values), archive[name])
    assert table.schema.field("embedding").type.list_size == tiny_embedder.dim


@pytest.mark.parametrize("precision", ["float32", "int8", "ubinary"])
def test_vectors_can_be_mapped_into_memory_where_they_lie(
    tiny_embedder: Embedder, lines: Path, tmp_path: Path, precision: str
) -> None:
    run(tiny_embedder, lines, tmp_path / "out.npz", reasoning="never", precision=precision)
    vectors = np.load(tmp_path / "out.npz")["embedding"]
    with zipfile.ZipFile(tmp_path / "out.npz") as archive, (tmp_path / "out.npz").open("rb") as file:
        member = archive.getinfo("embedding.npy")
        assert member.compress_type == zipfile.ZIP_STORED
        file.seek(member.header_offset + 26)
        begin = file.tell() + 4 + sum(np.frombuffer(file.read(4), "<u2").tolist())
        begin += member.file_size - vectors.nbytes  # behind numpy's own header
        assert begin % 64 == 0  # else each product would copy them all
        mapped = np.memmap(file, vectors.dtype, "r", begin, vectors.shape)
        np.testing.assert_array_equal(mapped, vectors)


def test_an_interrupted_job_goes_on_with_the_chunks_that_are_missing(
    tiny_embedder: Embedder, lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []

    def interrupted(part: Path, *arguments: Any) -> None:
        if len(written) == 1:
            raise KeyboardInterrupt
        write_part(part, *arguments)
        written.append(part.name)

    monkeypatch.setattr(running, "write_part", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_embedder, lines, tmp_path / "out.npz", reasoning="never")
    assert not (tmp_path / "out.npz").exists()
    first = written.copy()

    def counting(part: Path, *arguments: Any) -> None:
        write_part(part, *arguments)
        written.append(part.name)

    monkeypatch.setattr(running, "write_part", counting)
    run(tiny_embedder, lines, tmp_path / "out.npz", reasoning="never")
    assert sorted(written) == ["000000000.npz", "000000003.npz", "000000006.npz"]  # each was done once
    assert len(first) == 1
    assert np.load(tmp_path / "out.npz")["id"].tolist() == [record.id for record in records(lines)]


@pytest.mark.slow
def test_a_job_that_is_killed_loses_no_row_and_doubles_none() -> None:
    script = Path(__file__).parents[1] / "kill_embed.py"
    command = [sys.executable, str(script), "--kills", "2", "--rows", "600"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert killed.returncode == 0, killed.stderr


def test_a_chunk_in_the_middle_is_read_from_its_own_place(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = tmp_path / "folder"
    for name in ("a/1.txt", "a/2.md", "a.txt", "b/c/3.txt", "b/c.txt", "z.txt", "notes.doc"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    rows = [{"id": f"{place}", "text": f'seven,\n"{place}"'} for place in range(10)]
    (tmp_path / "some.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    with (tmp_path / "some.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["id", "text"])
        writer.writeheader()
        writer.writerows(rows)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "some.parquet", row_group_size=4)
    files = ["a/1.txt", "a/2.md", "a.txt", "b/c/3.txt", "b/c.txt", "z.txt"]
    ids = [row["id"] for row in rows]
    for name, expected in (("folder", files), ("some.jsonl", ids), ("some.csv", ids), ("some.parquet", ids)):
        source = read_source(tmp_path / name, chunk=CHUNK)
        everything = [record.id for record in source.records()]
        assert everything == expected
        for start in source.starts:
            assert [record.id for record in source.records(start)] == everything[start:]
        last = source.starts[-1]
        assert [(start, place, record.id) for start, place, record in source.chunks([last])] == [
            (last, place, name) for place, name in enumerate(everything[last:])
        ]


@pytest.mark.parametrize("change", ["shorter", "another"])
def test_a_source_that_changed_is_another_job_and_stops_one_that_runs(
    tiny_embedder: Embedder, lines: Path, tmp_path: Path, change: str
) -> None:
    before = read_source(lines, chunk=CHUNK)
    rows = lines.read_text().splitlines()[:-2]  # the last is blank
    lines.write_text("\n".join([*rows, json.dumps({"id": "new", "text": "row"})] if change == "another" else rows))
    assert read_source(lines).fingerprint != before.fingerprint
    job = Job(before, tmp_path / "out.npz", {"reasoning": "never"}, document=False, keep_going=False)
    with pytest.raises(OptionError, match="changed since this job began, in the 3 rows from 6 on"):
        embed_source(tiny_embedder, job, lambda _: None)
    assert not job.part(6).exists()


def test_a_part_that_holds_other_rows_is_named(tiny_embedder: Embedder, lines: Path, tmp_path: Path) -> None:
    source = read_source(lines, chunk=CHUNK)
    job = Job(source, tmp_path / "out.npz", {}, document=False, keep_going=False)
    assert job.begin(tiny_embedder.manifest, None) == [0, 3, 6]
    rows = list(source.records())
    write_part(job.part(0), rows[3:6], [tiny_embedder.encode_detailed(["a", "b", "c"])])
    with pytest.raises(BackendError, match=r"000000000\.npz does not hold each row of the source once"):
        embed_source(tiny_embedder, job, lambda _: None)


def test_parts_of_another_job_are_neither_used_nor_lost(tiny_embedder: Embedder, lines: Path, tmp_path: Path) -> None:
    parts = tmp_path / "out.npz.parts"
    parts.mkdir()
    (parts / "job.json").write_text('{"inputs": "another"}')
    (parts / "000000000.npz").touch()
    with pytest.raises(
        OptionError, match=r"the work of another job, with another bundle and .*another inputs and another keep_going"
    ):
        run(tiny_embedder, lines, tmp_path / "out.npz")
    assert (parts / "job.json").read_text() == '{"inputs": "another"}'
    (parts / "000000000.npz").unlink()  # where nothing is finished, nothing can be mixed up
    assert run(tiny_embedder, lines, tmp_path / "out.npz", reasoning="never").rows == 7


@pytest.mark.parametrize("mark", [None, "no JSON"])
def test_parts_that_nobody_owns_are_not_used(
    tiny_embedder: Embedder, lines: Path, tmp_path: Path, mark: str | None
) -> None:
    parts = tmp_path / "out.npz.parts"
    parts.mkdir()
    (parts / "000000000.npz").touch()
    if mark is not None:
        (parts / "job.json").write_text(mark)
    with pytest.raises(OptionError, match="the work of another job"):
        run(tiny_embedder, lines, tmp_path / "out.npz")


@pytest.mark.parametrize("rate", [None, 0.5])
def test_a_bad_row_is_named_by_its_place_once_the_chunks_before_it_are_kept(
    tiny_embedder: Embedder, lines: Path, tmp_path: Path, rate: float | None
) -> None:
    (tmp_path / "teal.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"input 5: .*no image of a known format"):
        run(tiny_embedder, lines, tmp_path / "out.npz", reasoning_rate=rate)
    assert [path.name for path in sorted((tmp_path / "out.npz.parts").iterdir())] == ["000000000.npz", "job.json"]


@pytest.mark.parametrize("rate", [None, 0.5])
def test_bad_rows_are_marked_and_the_others_survive(
    tiny_embedder: Embedder, tmp_path: Path, rate: float | None
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content in {"0.txt": b"zero", "1.txt": b"\xff\xfe", "2.txt": b" ", "3.png": b"none"}.items():
        (folder / name).write_bytes(content)
    (folder / "4.txt").write_text("x" * (tiny_embedder.manifest.limits.max_text_chars + 1))
    summary = run(tiny_embedder, folder, tmp_path / "out.npz", keep_going=True, reasoning_rate=rate)
    written = np.load(tmp_path / "out.npz")
    assert summary.failures == 4
    reasons = ["", "cannot be read as a text in UTF-8", "nothing to embed", "no image of a known format", "characters"]
    for error, reason in zip(written["error"], reasons, strict=True):
        assert (reason in error) if reason else error == ""
    assert np.isnan(written["embedding"][1:]).all()
    assert np.isfinite(written["embedding"][0]).all()


def test_a_folder_gives_its_images_and_texts_by_name(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "words.txt").write_text("seven")
    Image.new("L", (9, 9)).save(tmp_path / "a.PNG")
    (tmp_path / "notes.md").write_text("# eight")
    (tmp_path / "table.xls").write_text("not an input")
    assert [(record.id, record.file) for record in records(tmp_path)] == [
        (name, name) for name in ("a.PNG", "b/words.txt", "notes.md")
    ]
    assert list(read_source(tmp_path).inputs()) == [{"image": str(tmp_path / "a.PNG")}, "seven", "# eight"]


def test_columns_of_csv_and_parquet_are_the_parts_of_an_input(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "some.csv").write_text('text,image,images,fps\nseven,,,\n,a.png,,\n,,"[""b.png"",""/c/d.png""]",2\n')
    here = str(tmp_path)
    assert [(record.id, record.file, record.input) for record in records(tmp_path / "some.csv")] == [
        ("1", "", {"text": "seven"}),
        ("2", "a.png", {"image": f"{here}/a.png"}),
        ("3", "", {"images": [f"{here}/b.png", "/c/d.png"], "fps": 2}),
    ]
    rows = [
        {"id": 7, "image": {"bytes": b"some", "path": "a.png"}, "document": None, "pages": None},
        {"id": 8, "image": {"bytes": None, "path": "a.png"}, "document": None, "pages": None},
        {"id": 9, "image": None, "document": "d.pdf", "pages": [3]},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "some.parquet")
    assert [(record.id, record.file, record.input, record.page) for record in records(tmp_path / "some.parquet")] == [
        ("7", "", {"image": b"some"}, 0),
        ("8", "a.png", {"image": f"{here}/a.png"}, 0),
        ("9", "d.pdf", {"document": f"{here}/d.pdf", "pages": [3]}, 3),
    ]


def test_a_document_is_a_row_for_each_page_or_one(tmp_path: Path) -> None:
    pdfium = pytest.importorskip("pypdfium2")
    with pdfium.PdfDocument.new() as document:
        for _ in range(4):
            document.new_page(100, 100)
        document.save(tmp_path / "paper.pdf")
    (tmp_path / "z.jsonl").write_text('{"id": "mine", "document": "paper.pdf", "text": "what?"}')
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "paper.pdf").write_bytes((tmp_path / "paper.pdf").read_bytes())
    (folder / "broken.pdf").write_bytes(b"%PDF-1.7")
    with pytest.raises(InputError, match="input 0: "):
        read_source(folder, keep_going=False)
    source = read_source(folder, chunk=CHUNK)
    found = list(source.records())
    assert [record.id for record in found] == ["broken.pdf", *(f"paper.pdf#page={page}" for page in (1, 2, 3, 4))]
    assert isinstance(found[0].content(source.limits), InputError)
    assert [record.id for record in source.records(3)] == ["paper.pdf#page=3", "paper.pdf#page=4"]
    assert (found[3].file, found[3].page) == ("paper.pdf", 3)
    assert found[3].input == {"document": str(folder / "paper.pdf"), "pages": [3]}
    mine = records(tmp_path / "z.jsonl")
    assert [record.id for record in mine] == [f"mine#page={page}" for page in (1, 2, 3, 4)]
    assert mine[1].input == {"document": str(tmp_path / "paper.pdf"), "text": "what?", "pages": [2]}
    whole = records(folder / "paper.pdf", Division(whole_documents=True))
    assert [(record.id, record.page, record.input) for record in whole] == [
        ("paper.pdf", 0, {"document": str(folder / "paper.pdf")})
    ]


@pytest.mark.parametrize(
    ("seconds", "total", "ids"),
    [
        (None, 25.0, [""]),
        (10, 25.0, ["#t=0,10", "#t=10,20", "#t=20,25"]),
        (10, 20.4, ["#t=0,10", "#t=10,20.4"]),  # what is left is too short for a row
        (2.5, 5.0, ["#t=0,2.5", "#t=2.5,5"]),
        (10, 0.04, ["#t=0,0.04"]),
    ],
)
def test_a_video_is_one_row_or_one_for_every_few_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float | None, total: float, ids: list[str]
) -> None:
    monkeypatch.setattr("mmemb_deploy.jobs.records.duration", lambda *_: total)
    (tmp_path / "clip.mp4").touch()
    found = records(tmp_path / "clip.mp4", Division(clip_seconds=seconds))
    assert [record.id for record in found] == [f"clip.mp4{mark}" for mark in ids]
    if seconds is None:
        assert math.isnan(found[0].second)
    else:
        times = [(record.input["start"], record.input["end"]) for record in found]
        assert [record.second for record in found] == [start for start, _ in times]
        assert [start for start, _ in times[1:]] == [end for _, end in times[:-1]]
        assert (times[0][0], times[-1][1]) == (0, total)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '"fine"\n{"text":', "line 2 is not JSON"),
        ("a.jsonl", "7", "line 1 is a int"),
        ("a.jsonl", "\n", "holds no inputs"),
        ("a.jsonl", '"f\xfc"', "line 1 is not UTF-8"),
        ("a.csv", "", "no column with inputs: .*known are id, text, image"),
        ("a.csv", "id,txt\n1,2", "the column 'txt'.*known are id, text, image"),
        ("a.csv", "id\n1", "no column with inputs"),
        ("a.csv", "id,text\n1,2\n3", "row 2 has 1 cells"),
        ("a.csv", 'text,pages\none,"1,2"', "row 1: pages is '1,2', which is not JSON"),
        ("a.csv", 'text\n"open', "is not a CSV file in UTF-8, at byte 10: unexpected end of data"),
        ("a.parquet", "no parquet", "cannot be read as a parquet file"),
    ],
)
def test_a_malformed_file_names_its_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(OptionError, match=message):
        read_source(tmp_path / name)


def test_an_output_that_cannot_be_is_refused_first(tmp_path: Path) -> None:
    (tmp_path / "there.npz").touch()
    refusals = {"a.csv": r"must end in \.npz or \.parquet", "there.npz": "exists", "no/a.npz": "create it first"}
    for name, message in refusals.items():
        with pytest.raises(OptionError, match=message):
            check_output(tmp_path / name)
    with pytest.raises(OptionError, match="does not exist"):
        read_source(tmp_path / "absent")
    with pytest.raises(OptionError, match="clip_seconds is 0"):
        Division(clip_seconds=0)


def numbers(count: int, most: list[int]) -> Iterator[int]:
    """Yield numbers, and keep the largest."""
    for number in range(count):
        most.append(number)
        yield number


def test_results_are_made_ahead_in_order_and_no_more_than_fit() -> None:
    begun, gate = list[int](), threading.Semaphore(0)

    def make(number: int) -> int:
        gate.acquire()
        return 10 * number

    with Ahead(make, numbers(9, begun), threads=3, most=4, weigh=lambda _: 1, most_weight=9) as ahead:
        assert ahead.take(wait=False) is None
        gate.release(9)
        for number in range(9):
            assert ahead.take(wait=True) == (number, 10 * number)
            assert len(begun) <= number + 1 + 4
        assert ahead.take(wait=True) is None
        assert ahead.ended


def test_heavy_results_keep_threads_from_beginning_more() -> None:
    made = threading.Semaphore(0)

    def make(number: int) -> int:
        made.release()
        return number

    with Ahead(make, iter(range(100)), threads=1, most=50, weigh=lambda _: 10, most_weight=25) as ahead:
        for _ in range(3):
            assert made.acquire(timeout=20)
        assert not made.acquire(timeout=0.05)  # 30 wait
        assert ahead.take(wait=True) == (0, 0)
        assert made.acquire(timeout=20)


@pytest.mark.parametrize("threads", [1, 3])
def test_what_goes_wrong_is_raised_in_its_turn(threads: int) -> None:
    def make(number: int) -> int:
        if number == 2:
            raise InputError("two is bad")
        return number

    def three() -> Iterator[int]:
        yield from range(2)
        raise OptionError("there is no more")

    with Ahead(make, iter(range(9)), threads=threads, most=9) as ahead:
        assert [ahead.take(wait=True), ahead.take(wait=True)] == [(0, 0), (1, 1)]
        with pytest.raises(InputError, match="two is bad"):
            ahead.take(wait=True)
    with Ahead(make, three(), threads=threads, most=9) as ahead:
        assert [ahead.take(wait=True), ahead.take(wait=True)] == [(0, 0), (1, 1)]
        with pytest.raises(OptionError, match="there is no more"):
            ahead.take(wait=True)


def test_a_job_that_was_killed_after_its_last_step_says_that_its_output_is_whole(tmp_path: Path) -> None:
    (tmp_path / "out.npz").touch()
    (tmp_path / "out.npz.parts").mkdir()
    with pytest.raises(OptionError, match=r"out\.npz exists.*it is whole, and .*out\.npz\.parts can be removed"):
        check_output(tmp_path / "out.npz")
