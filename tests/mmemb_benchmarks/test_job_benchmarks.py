"""The measurements of jobs run, and each way embeds the same photos. No figure is asserted."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmemb_benchmarks.measure.memory import measure_memory
from mmemb_benchmarks.measure.overlap import measure_overlap, write_photos
from mmemb_benchmarks.timing import timed_engine
from mmemb_benchmarks.workload import assemble, load_uncached
from mmemb_deploy.bundle.folder import NANO


def test_photos_are_embedded_in_three_ways_by_one_engine(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    write_photos(photos, 5, (120, 90), seed=0)
    pixels = [np.asarray(Image.open(path)) for path in sorted(photos.iterdir())]
    assert {each.shape for each in pixels} == {(90, 120, 3)}
    assert len({each.tobytes() for each in pixels}) == 5
    opened, engine = load_uncached(None, "onnxruntime", 1)
    spent = defaultdict[str, float](float)
    embedder = assemble(opened, timed_engine(engine, spent))
    found = measure_overlap(
        embedder, spent, photos, {"batch_size": 2}, prepare_threads=2, rounds=2, report=lambda _: None
    )
    assert (found.photos, found.rounds, found.megapixels) == (5, 2, 120 * 90 / 1e6)
    assert list(found.ways) == ["nothing ahead", "a chunk ahead", "rows ahead"]
    assert all(0 < way.idle_share < 1 for way in found.ways.values())
    vectors = [np.load(path)["embedding"] for path in sorted(tmp_path.glob("vectors-*.npz"))]
    expected = embedder.encode_document([{"image": each} for each in pixels])
    assert len(vectors) == 2
    for each in vectors:
        np.testing.assert_allclose(each, expected, atol=1e-5)


@pytest.mark.parametrize("has_engine", [True, False])
def test_the_memory_of_a_job_is_that_of_a_process_of_its_own(has_engine: bool) -> None:
    found = measure_memory(NANO, "onnxruntime", 1, 0, [30], ".npz", has_engine=has_engine, report=lambda _: None)
    assert [(each.rows, each.has_engine) for each in found] == [(30, has_engine)]
    assert found[0].peak_bytes >= found[0].before_bytes > 0
    assert found[0].output_bytes > 30 * 4 * 128
