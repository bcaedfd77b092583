"""Search finds what is nearest, in every form that a job writes, and says of each hit where it comes from."""

import base64
import io
import json
import math
import re
import zipfile
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from mmemb_deploy import Embedder, OptionError
from mmemb_deploy.cli.main import main
from mmemb_deploy.inputs.limits import Limits
from mmemb_deploy.jobs.parts import write_member
from mmemb_deploy.search import exact
from mmemb_deploy.search.page import place, write_page
from mmemb_deploy.search.vectors import Hit, Vectors

ROWS, DIM = 900, 64
FAILED = 7
PRECISIONS = "float32", "int8", "ubinary"
FORMS = [f"{precision}{suffix}" for precision in PRECISIONS for suffix in (".npz", ".parquet")]


def unit(rows: NDArray[Any]) -> NDArray[np.float32]:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / lengths, np.float32)


@pytest.fixture(scope="module")
def vectors_ND() -> NDArray[np.float32]:
    """Vectors around 60 centres."""
    rng = np.random.default_rng(0)
    return unit(rng.normal(size=(60, DIM))[rng.integers(60, size=ROWS)] + 0.8 * rng.normal(size=(ROWS, DIM)))


@pytest.fixture(scope="module")
def queries_QD() -> NDArray[np.float32]:
    return unit(np.random.default_rng(1).normal(size=(20, DIM)))


@pytest.fixture(scope="module")
def folder(vectors_ND: NDArray[np.float32], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The vectors in every precision and form, of which one row failed."""
    arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    folder = tmp_path_factory.mktemp("vectors")
    good_ND = vectors_ND.copy()
    good_ND[FAILED] = 0
    embeddings: dict[str, NDArray[Any]] = {
        "float32": np.where(np.arange(ROWS)[:, None] == FAILED, np.float32(np.nan), vectors_ND),
        "int8": np.rint(good_ND * 127).astype(np.int8),
        "ubinary": np.packbits(good_ND > 0, axis=1),
    }
    columns = {
        "id": np.array([f"paper.pdf#page={row}" if row % 2 else f"clip.mp4#t={row}" for row in range(ROWS)]),
        "file": np.array(["paper.pdf" if row % 2 else "clip.mp4" for row in range(ROWS)]),
        "page": np.array([row if row % 2 else 0 for row in range(ROWS)], np.int32),
        "second": np.array([math.nan if row % 2 else row for row in range(ROWS)], np.float32),
        "error": np.array(["it is no image" if row == FAILED else "" for row in range(ROWS)]),
    }
    for name, embedding in embeddings.items():
        with zipfile.ZipFile(folder / f"{name}.npz", "w") as archive:
            for column, values in {"embedding": embedding, **columns}.items():
                write_member(archive, column, values.dtype, values.shape, [values])
        flat = arrow.array(embedding.ravel())
        lists = arrow.FixedSizeListArray.from_arrays(flat, embedding.shape[1])
        parquet.write_table(
            arrow.table({**columns, "embedding": lists}), folder / f"{name}.parquet", row_group_size=200
        )
    return folder


@pytest.fixture(scope="module")
def truth_QK(vectors_ND: NDArray[np.float32], queries_QD: NDArray[np.float32]) -> NDArray[np.int64]:
    scores_QN = queries_QD @ vectors_ND.T
    scores_QN[:, FAILED] = -np.inf
    return np.argsort(-scores_QN, axis=1)[:, :10]


def recall(found_QK: NDArray[np.int64], truth_QK: NDArray[np.int64]) -> float:
    shared = [len(set(found) & set(right)) for found, right in zip(found_QK.tolist(), truth_QK.tolist(), strict=True)]
    return sum(shared) / truth_QK.size


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_searched(
    form: str,
    folder: Path,
    queries_QD: NDArray[np.float32],
    truth_QK: NDArray[np.int64],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exact, "BLOCK_BYTES", 3000)  # so that hits come from many blocks
    vectors = Vectors.open(folder / form)
    assert (len(vectors), vectors.dim, vectors.precision) == (ROWS, DIM, form.partition(".")[0])
    scores_QK, rows_QK = vectors.nearest(queries_QD, 10)
    assert recall(rows_QK, truth_QK) >= {"float32": 1, "int8": 0.9, "ubinary": 0.3}[vectors.precision]
    assert (np.diff(scores_QK) <= 0).all()
    if vectors.precision == "float32":
        assert (rows_QK == truth_QK).all()


@pytest.mark.parametrize("form", FORMS)
def test_a_row_that_failed_never_comes_up(form: str, folder: Path, queries_QD: NDArray[np.float32]) -> None:
    (hits,) = Vectors.open(folder / form).search(queries_QD[:1], ROWS)
    assert FAILED not in [hit.row for hit in hits]
    assert {hit.row for hit in hits} | {FAILED} == set(range(ROWS))
    assert all(math.isfinite(hit.score) for hit in hits)


@pytest.mark.parametrize("form", FORMS)
def test_a_hit_says_where_it_comes_from(form: str, folder: Path, queries_QD: NDArray[np.float32]) -> None:
    (hits,) = Vectors.open(folder / form).search(queries_QD[:1], 10)
    for hit in hits:
        odd = hit.row % 2
        assert hit.id == (f"paper.pdf#page={hit.row}" if odd else f"clip.mp4#t={hit.row}")
        assert (hit.file, hit.page, hit.second) == (
            ("paper.pdf", hit.row, None) if odd else ("clip.mp4", None, hit.row)
        )


def test_scores_are_cosines_in_every_precision(
    folder: Path, vectors_ND: NDArray[np.float32], queries_QD: NDArray[np.float32]
) -> None:
    for precision, bound in (("float32", 1e-6), ("int8", 0.02)):
        (hits,) = Vectors.open(folder / f"{precision}.npz").search(queries_QD[:1], 10)
        assert [hit.score for hit in hits] == pytest.approx(
            [queries_QD[0] @ vectors_ND[hit.row] for hit in hits], abs=bound
        )


def test_other_vectors_of_the_same_rows_judge_what_bits_find(
    folder: Path, queries_QD: NDArray[np.float32], truth_QK: NDArray[np.int64]
) -> None:
    alone = Vectors.open(folder / "ubinary.npz").nearest(queries_QD, 10)[1]
    for judge in ("float32.npz", "int8.npz", "float32.parquet"):
        _, judged = Vectors.open(folder / "ubinary.npz", rescore=folder / judge).nearest(queries_QD, 10)
        assert recall(judged, truth_QK) > recall(alone, truth_QK) + 0.2


def test_an_index_finds_what_an_exact_search_finds(
    folder: Path, queries_QD: NDArray[np.float32], truth_QK: NDArray[np.int64], tmp_path: Path
) -> None:
    for precision in ("float32", "int8"):
        path = tmp_path / f"{precision}.npz"
        path.write_bytes((folder / path.name).read_bytes())
        counted: list[int] = []
        size = Vectors.open(path).build_index(counted.append)
        assert size == path.with_name(f"{precision}.npz.faiss").stat().st_size
        assert sum(counted) == ROWS
        scores_QK, rows_QK = Vectors.open(path, index=True).nearest(queries_QD, 10)
        exact_scores_QK, exact_rows_QK = Vectors.open(path).nearest(queries_QD, 10)
        assert recall(rows_QK, truth_QK) > 0.9
        same = rows_QK == exact_rows_QK
        assert scores_QK[same] == pytest.approx(exact_scores_QK[same], abs=1e-6)
        assert FAILED not in rows_QK


def test_an_index_of_other_vectors_is_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "some.npz"
    path.write_bytes((folder / "float32.npz").read_bytes())
    with pytest.raises(OptionError, match=r"some\.npz\.faiss is not there: write it by `mmemb index"):
        Vectors.open(path, index=True)
    Vectors.open(path).build_index()
    np.savez(path, id=np.array(["a"] * ROWS), embedding=unit(np.random.default_rng(5).normal(size=(ROWS, DIM))))
    with pytest.raises(OptionError, match=r"is no index of .* as it is now"):
        Vectors.open(path, index=True)
    path.with_name("some.npz.faiss").write_bytes(b"nothing")
    with pytest.raises(OptionError, match="is no whole index"):
        Vectors.open(path, index=True)


@pytest.mark.parametrize(("form", "words"), [("float32.parquet", "needs .npz"), ("ubinary.npz", "holds bits")])
def test_what_has_no_index_says_why(form: str, words: str, folder: Path) -> None:
    with pytest.raises(OptionError, match=words):
        Vectors.open(folder / form).build_index()


def test_a_file_of_an_earlier_version_is_searched_too(vectors_ND: NDArray[np.float32], tmp_path: Path) -> None:
    ids = np.array([f"{row}.png" if row else "a sentence" for row in range(ROWS)])
    np.savez(tmp_path / "old.npz", id=ids, embedding=vectors_ND, error=np.array([""] * ROWS))
    vectors = Vectors.open(tmp_path / "old.npz")
    for row, file in ((0, ""), (3, "3.png")):
        (hits,) = vectors.search(vectors_ND[row : row + 1], 1)
        assert (hits[0].id, hits[0].file, hits[0].page, hits[0].second) == (ids[row], file, None, None)


def test_vectors_are_mapped_where_they_lie(folder: Path) -> None:
    (_, block), *_ = Vectors.open(folder / "int8.npz")._stored.blocks(10)  # pyright: ignore[reportPrivateUsage]
    while not isinstance(block, np.memmap) and block.base is not None:
        block = block.base
    assert isinstance(block, np.memmap)


def damaged(folder: Path, kind: str, tmp_path: Path) -> Path:
    target = tmp_path / "damaged.npz"
    whole = (folder / "float32.npz").read_bytes()
    embedding = np.ones((3, 4), np.float32)
    match kind:
        case "cut":
            target.write_bytes(whole[: len(whole) // 2])
        case "compressed":
            np.savez_compressed(target, embedding=embedding)
        case "other":
            np.savez(target, vectors=embedding)
        case "flat":
            np.savez(target, embedding=embedding[0])
        case "double":
            np.savez(target, embedding=embedding.astype(np.float64))
        case "empty":
            np.savez(target, embedding=embedding[:0])
        case "uneven":
            np.savez(target, embedding=embedding, error=np.array([""]))
        case "array":
            with zipfile.ZipFile(target, "w") as archive:
                archive.writestr("embedding.npy", b"not an array at all")
        case "text":
            target = target.with_suffix(".txt")
            target.touch()
        case _:
            target = tmp_path / "absent.npz"
    return target


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("cut", "is no whole .npz file"),
        ("compressed", "is compressed"),
        ("other", "has no array 'embedding', only vectors"),
        ("flat", r"of shape \(4,\)"),
        ("double", "holds vectors of float64"),
        ("empty", "holds no vectors"),
        ("uneven", "'error' has 1 rows, and 'embedding' 3"),
        ("array", "'embedding' is no array"),
        ("text", "ends in '.txt'"),
        ("absent", "is no file"),
    ],
)
def test_a_file_that_cannot_be_searched_says_why(kind: str, words: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=words):
        Vectors.open(damaged(folder, kind, tmp_path))


def test_a_damaged_parquet_file_says_why(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "damaged.parquet"
    path.write_bytes((folder / "float32.parquet").read_bytes()[:-100])
    with pytest.raises(OptionError, match=r"is no whole \.parquet file"):
        Vectors.open(path)
    arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    parquet.write_table(arrow.table({"embedding": [[1.0, 2.0], [1.0]]}), path)
    with pytest.raises(OptionError, match="holds vectors of float64"):
        Vectors.open(path)
    lists = arrow.array([[1.0, 2.0], [1.0]], arrow.list_(arrow.float32()))
    parquet.write_table(arrow.table({"embedding": lists}), path)
    with pytest.raises(OptionError, match="that is missing, or not of 2 values"):
        Vectors.open(path).nearest(np.ones((1, 2), np.float32), 1)


def test_queries_that_do_not_fit_are_refused(folder: Path, queries_QD: NDArray[np.float32]) -> None:
    vectors = Vectors.open(folder / "int8.npz")
    for queries in (queries_QD[0], queries_QD[:, :32], queries_QD.astype(np.int8)):
        with pytest.raises(OptionError, match=rf"queries are {queries.dtype} of shape .* float32 of \(queries, 64\)"):
            vectors.search(queries)
    with pytest.raises(OptionError, match="k is 0"):
        vectors.search(queries_QD, 0)


def test_rows_of_another_job_do_not_rescore(folder: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", embedding=np.ones((3, DIM), np.float32))
    with pytest.raises(OptionError, match=r"3 rows of 64 values, and .* has 900 of 64"):
        Vectors.open(folder / "ubinary.npz", rescore=tmp_path / "other.npz")


def test_a_bundle_of_other_dimensions_is_refused(tmp_path: Path) -> None:
    nano = Embedder.load()
    fitting = {128: None, 64: 64}
    for dim in (128, 64, 32):
        path = tmp_path / f"{dim}.npz"
        np.savez(path, embedding=np.ones((2, dim), np.float32))
        if dim in fitting:
            assert Vectors.open(path).fit(nano) == fitting[dim]
        else:
            with pytest.raises(OptionError, match="vectors of 32 values, and nano makes 128 or 64"):
                Vectors.open(path).fit(nano)


def mmemb(*words: object) -> int:
    """Run the command line here; return its exit code."""
    try:
        main([str(word) for word in words])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `pictures`, twenty digits and a text, and their vectors in `pictures.npz`."""
    load_digits: Any = import_module("sklearn.datasets").load_digits
    folder = tmp_path_factory.mktemp("digits")
    (folder / "pictures").mkdir()
    for number, drawing in enumerate(load_digits().images[:20]):
        picture = Image.fromarray((drawing * 255 / 16).astype(np.uint8)).resize((32, 32), Image.Resampling.BICUBIC)
        picture.save(folder / "pictures" / f"{number:02}.png")
    (folder / "pictures" / "note.txt").write_text("<b>six</b>")
    mmemb("embed", folder / "pictures", folder / "pictures.npz", "--document")
    return folder


def searched(capsys: pytest.CaptureFixture[str], *words: object) -> list[dict[str, Any]]:
    assert mmemb("search", *words, "--json") == 0
    hits: list[dict[str, Any]] = json.loads(capsys.readouterr().out.splitlines()[-1])["hits"]
    return hits


def test_words_a_picture_and_both_are_searched(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vectors, pictures = digits / "pictures.npz", digits / "pictures"
    assert {hit["file"] for hit in searched(capsys, vectors, "seven", "-k", 2)} == {"07.png", "17.png"}
    by_picture = searched(capsys, vectors, "--image", pictures / "03.png", "-k", 2)
    assert [hit["file"] for hit in by_picture] == ["03.png", "13.png"]
    assert by_picture[0]["score"] == pytest.approx(1, abs=1e-4)
    both = searched(capsys, vectors, "a + 4", "--image", pictures / "03.png", "-k", 2)
    assert [hit["file"] for hit in both] != ["03.png", "13.png"]


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_vectors_say_which_bundle_made_them(suffix: str, tmp_path: Path, tiny_embedder: Embedder) -> None:
    (tmp_path / "words.jsonl").write_text('"six"\n')
    assert mmemb("embed", tmp_path / "words.jsonl", tmp_path / f"words{suffix}") == 0
    vectors = Vectors.open(tmp_path / f"words{suffix}")
    assert vectors.note(Embedder.load()) is None
    assert "another bundle made" in str(vectors.note(tiny_embedder))


def test_a_table_of_hits_leaves_out_what_it_has_not(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mmemb("search", digits / "pictures.npz", "seven", "-k", 1)
    shown = capsys.readouterr().out
    assert "07.png" in shown
    assert "score" in shown
    assert "where" not in shown


def test_the_command_indexes_and_searches_by_the_index(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vectors = digits / "pictures.npz"
    mmemb("index", vectors, "--json")
    assert json.loads(capsys.readouterr().out)["output"] == f"{vectors}.faiss"
    assert {hit["file"] for hit in searched(capsys, vectors, "seven", "-k", 2, "--index")} == {"07.png", "17.png"}


def test_a_page_shows_the_query_and_every_hit_and_needs_nothing_else(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "hits.html"
    words = digits / "pictures.npz", "<i>six</i>", "--image", digits / "pictures/06.png", "-k", 21
    hits = searched(capsys, *words, "--page", page, "--source", digits / "pictures")
    shown = page.read_text(encoding="utf-8")
    assert "&lt;i&gt;six&lt;/i&gt;" in shown
    assert "&lt;b&gt;six&lt;/b&gt;" in shown
    assert "<b>" not in shown
    assert shown.count("<img") == 21  # of twenty files and the query
    assert shown.count("<li>") == len(hits) == 21
    assert 'src="http' not in shown
    assert "$" not in shown


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "there is nothing to look for"),
        (["seven", "--page", "hits.png"], "must be a .html file"),
        (["seven", "--page", "hits.html"], "is not there: pass --source"),
    ],
)
def test_a_search_that_cannot_be_shown_says_why(
    words: list[str], complaint: str, digits: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(digits)
    assert mmemb("search", "pictures.npz", *words) == 2
    assert complaint in " ".join(capsys.readouterr().err.split())
    assert not (digits / "hits.html").exists()


def hit(file: str = "", page: int | None = None, second: float | None = None) -> Hit:
    return Hit(0.5, 0, "a", file, page, second)


def test_a_place_is_said_as_people_say_it() -> None:
    assert [place(hit(page=3)), place(hit(second=65.0)), place(hit(second=3725.5)), place(hit())] == [
        "page 3",
        "1:05",
        "1:02:05",
        "",
    ]


def test_a_page_shows_the_page_of_a_document_and_the_frame_of_a_video(tmp_path: Path) -> None:
    colours = ["#ff0000", "#00ff00", "#0000ff"]
    pages = [Image.new("RGB", (300, 400), colour) for colour in colours]
    pages[0].save(tmp_path / "paper.pdf", save_all=True, append_images=pages[1:])
    write_clip(tmp_path / "clip.mp4", colours)
    found = hit(file="paper.pdf", page=2), hit(file="clip.mp4", second=2.0), hit(file="clip.mp4"), hit(file="paper.pdf")
    target = tmp_path / "hits.html"
    write_page(target, "a colour", None, list(found), tmp_path, Limits(), "four hits")
    shown = [
        Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB").resize((1, 1)).getpixel((0, 0))
        for data in re.findall(r"base64,([^\"]+)", target.read_text(encoding="utf-8").partition("<ol>")[2])
    ]
    assert [int(np.argmax(colour)) for colour in shown if isinstance(colour, tuple)] == [1, 2, 0, 0]


def write_clip(path: Path, colours: list[str]) -> None:
    """Write a video that shows each colour for a second."""
    av: Any = import_module("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for colour in colours:
            for _ in range(4):
                container.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (64, 64), colour))))
        container.mux(stream.encode())
