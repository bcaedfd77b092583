"""Embedding files: nothing finished is lost, nothing is mixed up."""

import json
import threading
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import pytest
from PIL import Image

from mmemb_deploy import Embedder, InputError, OptionError
from mmemb_deploy.embedder import Prepared
from mmemb_deploy.jobs import files as jobs
from mmemb_deploy.jobs.files import Job, ahead, embed_source, read_source
from mmemb_deploy.options import EncodeOptions


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three inputs a chunk, so that few inputs make several."""
    monkeypatch.setattr(jobs, "CHUNK", 3)


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
    embedder: Embedder, lines: Path, output: Path, *, keep_going: bool = False, **options: Unpack[EncodeOptions]
) -> jobs.Summary:
    """Embed a file of JSON lines as queries."""
    source = read_source(lines)
    job = Job(source, output, options, document=False, keep_going=keep_going)
    return embed_source(embedder, job, lambda _: None)


def test_rows_keep_their_order_ids_and_values(tiny_embedder: Embedder, lines: Path, tmp_path: Path) -> None:
    summary = run(tiny_embedder, lines, tmp_path / "out.npz", reasoning="never")
    written = np.load(tmp_path / "out.npz")
    assert (summary.rows, summary.failures, summary.reasoned) == (7, 0, 0)
    assert written["id"].tolist() == ["1", "2", "3", "4", "5", "picture", "9"]
    expected = tiny_embedder.encode(read_source(lines).inputs, reasoning="never")
    np.testing.assert_allclose(written["embedding"], expected, atol=1e-5)
    assert not (tmp_path / "out.npz.parts").exists()


def test_parquet_holds_what_npz_holds(tiny_embedder: Embedder, lines: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    for name in ("out.npz", "out.parquet"):
        run(tiny_embedder, lines, tmp_path / name, reasoning="always")
    table, archive = parquet.read_table(tmp_path / "out.parquet").to_pydict(), np.load(tmp_path / "out.npz")
    assert list(table) == list(jobs.COLUMNS)
    for name in jobs.COLUMNS:
        np.testing.assert_array_equal(np.array(table[name]), archive[name])


def test_an_interrupted_job_goes_on_after_the_last_finished_chunk(
    tiny_embedder: Embedder, lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    embed = Embedder.run

    def counting(self: Embedder, prepared: Prepared) -> Any:
        calls.append(prepared.inputs)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return embed(self, prepared)

    monkeypatch.setattr(Embedder, "run", counting)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_embedder, lines, tmp_path / "out.npz", reasoning="never")
    assert not (tmp_path / "out.npz").exists()
    run(tiny_embedder, lines, tmp_path / "out.npz", reasoning="never")
    assert calls == [3, 3, 3, 1]  # the chunk that was cut off runs again, the first does not
    assert len(np.load(tmp_path / "out.npz")["id"]) == 7


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


def test_a_bad_row_is_named_by_its_place_in_the_whole_file(
    tiny_embedder: Embedder, lines: Path, tmp_path: Path
) -> None:
    (tmp_path / "teal.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"input 5: .*no image of a known format"):
        run(tiny_embedder, lines, tmp_path / "out.npz", reasoning="never")
    assert [path.name for path in sorted((tmp_path / "out.npz.parts").iterdir())] == ["000000000.npz", "job.json"]


def test_bad_rows_are_marked_and_the_others_survive(tiny_embedder: Embedder, lines: Path, tmp_path: Path) -> None:
    (tmp_path / "teal.png").unlink()
    summary = run(tiny_embedder, lines, tmp_path / "out.npz", keep_going=True)
    written = np.load(tmp_path / "out.npz")
    assert summary.failures == 1
    assert "where there is no file" in written["error"][5]
    assert np.isnan(written["embedding"][5]).all()
    assert np.isfinite(np.delete(written["embedding"], 5, axis=0)).all()


def test_a_folder_gives_its_images_and_texts_by_name(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "words.txt").write_text("seven")
    Image.new("L", (9, 9)).save(tmp_path / "a.PNG")
    (tmp_path / "notes.md").write_text("not an input")
    source = read_source(tmp_path)
    assert source.ids == ["a.PNG", "b/words.txt"]
    assert source.inputs == [{"image": str(tmp_path / "a.PNG")}, "seven"]


@pytest.mark.parametrize(
    ("text", "message"),
    [('"fine"\n{"text":', "line 2 is not JSON"), ("7", "line 1 is a int"), ("\n", "holds no inputs")],
)
def test_a_malformed_file_names_its_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "inputs.jsonl").write_text(text)
    with pytest.raises(OptionError, match=message):
        read_source(tmp_path / "inputs.jsonl")


def test_an_output_that_cannot_be_is_refused_first(tmp_path: Path) -> None:
    (tmp_path / "there.npz").touch()
    refusals = {"a.csv": r"must end in \.npz or \.parquet", "there.npz": "exists", "no/a.npz": "create it first"}
    for name, message in refusals.items():
        with pytest.raises(OptionError, match=message):
            jobs.check_output(tmp_path / name)
    with pytest.raises(OptionError, match="does not exist"):
        read_source(tmp_path / "absent")


def test_the_next_chunk_is_prepared_while_one_is_embedded() -> None:
    begun, seen = [threading.Event() for _ in range(3)], list[int]()

    def prepare(chunk: int) -> int:
        begun[chunk].set()
        return 10 * chunk

    for chunk, prepared in ahead(prepare, range(3)):
        assert prepared == 10 * chunk
        assert all(event.wait(20) for event in begun[: chunk + 2])
        assert not any(event.is_set() for event in begun[chunk + 2 :])
        seen.append(chunk)
    assert seen == [0, 1, 2]
