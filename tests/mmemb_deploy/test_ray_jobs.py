"""Embedding on a Ray cluster of this machine: whoever dies, no row is lost, none is doubled."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmemb_deploy import BackendError, Embedder, InputError, OptionError
from mmemb_deploy.cli.main import main
from mmemb_deploy.jobs.job import Job
from mmemb_deploy.jobs.run import embed_source
from mmemb_deploy.jobs.source import CHUNK as USUAL
from mmemb_deploy.jobs.source import Source, read_source
from mmemb_deploy.options import EncodeOptions

ray = pytest.importorskip("ray", reason="needs the extra ray")
parquet = pytest.importorskip("pyarrow.parquet", reason="comes with the extra ray")
psutil = pytest.importorskip("psutil", reason="comes with ray")

from mmemb_deploy.jobs.ray import TRIES, Worker, embed_on_ray  # noqa: E402  # what is above skips first

# Ray warns of itself, and leaves sockets to the collector
pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("default")]

CHUNK, CHUNKS = 4, 60
ALWAYS: EncodeOptions = {"reasoning": "always"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Start a cluster of two cores, and stop it; gives its address."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # of its workers
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        context = ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield context.address_info["address"]
        ray.shutdown()


def ids(source: Source) -> list[str]:
    return [record.id for record in source.records()]


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """Sixty chunks of texts, the last of which ends with an image."""
    Image.new("RGB", (28, 28), "teal").save(tmp_path / "teal.png")
    contents: list[Any] = [{"id": f"row {place}", "text": f"{place} plus 3"} for place in range(CHUNK * CHUNKS - 1)]
    contents.append({"id": "picture", "image": "teal.png"})
    path = tmp_path / "inputs.jsonl"
    path.write_text("\n".join(map(json.dumps, contents)))
    return path


class Count:
    """What a job says of its progress."""

    def __init__(self) -> None:
        self.said: list[int] = []

    def __call__(self, rows: int) -> None:
        self.said.append(rows)


class KillsAWorker(Count):
    """Kills one worker by its process id once the first chunk is done."""

    killed: int | None = None

    def __call__(self, rows: int) -> None:
        super().__call__(rows)
        if rows and self.killed is None:
            workers = [each for each in psutil.Process().children(recursive=True) if "MapWorker" in each.name()]
            workers[0].kill()
            workers[0].wait(30)
            self.killed = workers[0].pid


@pytest.mark.usefixtures("cluster")
def test_no_row_is_lost_and_none_doubled_when_a_worker_is_killed(lines: Path, tmp_path: Path) -> None:
    source, done = read_source(lines, chunk=CHUNK), KillsAWorker()
    summary = embed_on_ray(Job(source, tmp_path / "ray.npz", ALWAYS, document=False, keep_going=False), done)
    embed_source(Embedder.load(), Job(source, tmp_path / "here.npz", ALWAYS, False, False), lambda _: None)
    assert done.killed is not None
    assert sum(done.said) == summary.rows == CHUNK * CHUNKS
    ray_s, here = np.load(tmp_path / "ray.npz"), np.load(tmp_path / "here.npz")
    assert ray_s["id"].tolist() == ids(source)
    assert ray_s["rationale"].tolist() == here["rationale"].tolist()
    np.testing.assert_allclose(ray_s["embedding"], here["embedding"], atol=1e-5)
    assert not (tmp_path / "ray.npz.parts").exists()


@pytest.mark.usefixtures("cluster")
def test_a_bad_row_is_marked_or_stops_a_job_that_goes_on_once_it_is_mended(lines: Path, tmp_path: Path) -> None:
    source, picture = read_source(lines, chunk=CHUNK), tmp_path / "teal.png"
    good = picture.read_bytes()
    picture.write_bytes(b"no image")
    never: EncodeOptions = {"reasoning": "never"}
    with pytest.raises(InputError, match=rf"input {CHUNK * CHUNKS - 1}: .*no image of a known format"):
        embed_on_ray(Job(source, tmp_path / "strict.npz", never, False, False), lambda _: None, workers=1)
    assert not (tmp_path / "strict.npz").exists()

    marked = Job(source, tmp_path / "marked.npz", never, document=False, keep_going=True)
    assert embed_on_ray(marked, lambda _: None, workers=1).failures == 1
    written = np.load(marked.output)
    assert written["id"].tolist() == ids(source)
    assert "no image of a known format" in written["error"][-1]
    assert np.isnan(written["embedding"][-1]).all()
    assert np.isfinite(written["embedding"][:-1]).all()

    picture.write_bytes(good)
    done = Count()
    assert embed_on_ray(Job(source, tmp_path / "strict.npz", never, False, False), done, workers=1).failures == 0
    assert done.said[0] > 0
    assert sum(done.said) == CHUNK * CHUNKS
    assert np.load(tmp_path / "strict.npz")["id"].tolist() == ids(source)


def test_a_job_whose_process_was_killed_goes_on_with_or_without_ray(
    cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, many = 5 * USUAL, tmp_path / "many.jsonl"
    many.write_text("\n".join(json.dumps(f"{place} plus 3") for place in range(rows)))
    command = ["embed", str(many), str(tmp_path / "out.parquet"), "--reasoning", "always", "--json"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "RAY_ADDRESS": cluster}
    process = subprocess.Popen(
        [sys.executable, "-m", "mmemb_deploy", *command, "--ray", "--workers=1"], env=environment
    )
    parts = tmp_path / "out.parquet.parts"
    while not any(parts.glob("*.npz")):
        assert process.poll() is None, "it ended before a chunk was done"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out.parquet").exists()
    with pytest.raises(SystemExit, match="0"):
        main(command)
    assert json.loads(capsys.readouterr().out)["rows"] == rows
    assert parquet.read_table(tmp_path / "out.parquet")["id"].to_pylist() == ids(read_source(many))


def test_a_chunk_that_ends_its_workers_ends_the_job(lines: Path) -> None:
    def die() -> Embedder:
        raise SystemExit

    job = Job(read_source(lines, chunk=CHUNK), lines.with_name("out.npz"), {}, document=False, keep_going=False)
    job.parts.mkdir()
    chunk = {"start": np.array([8])}
    for _ in range(TRIES):
        with pytest.raises(SystemExit):
            Worker(die, job)(chunk)
    failure = pickle.loads(Worker(die, job)(chunk)["failure"][0])
    assert isinstance(failure, BackendError)
    assert "4 workers died while they had the inputs from 8 on" in str(failure)


def test_options_that_contradict_each_other_are_refused(lines: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (["--workers", "2"], "what --ray takes"),
        (["--ray", "--device", "1"], "each worker takes"),
        (["--ray", "--prepare-threads", "2"], "each worker has one"),
    ):
        with pytest.raises(SystemExit):
            main(["embed", str(lines), str(lines.with_name("out.npz")), *options])
        assert message in capsys.readouterr().err


@pytest.mark.usefixtures("cluster")
def test_a_backend_for_gpus_needs_a_gpu_in_the_cluster(lines: Path) -> None:
    job = Job(read_source(lines, chunk=CHUNK), lines.with_name("out.npz"), {}, document=False, keep_going=False)
    with pytest.raises(Exception, match="the Ray cluster has no GPU"):
        embed_on_ray(job, lambda _: None, backend="tensorrt")
    with pytest.raises(OptionError, match="'tensorflow' is not known"):
        embed_on_ray(job, lambda _: None, backend="tensorflow")
