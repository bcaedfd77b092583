"""`benchmarks/gpu.sh`, whole and as it is, where a fake GPU stands in: its commands exist and do what comes next.

The sections themselves are there already, which the script skips: peers and latency ask torch, which has no fake GPU,
and load and the suite take minutes. Some of the suite's stages run after it.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from itertools import product
from pathlib import Path

import pytest

pytestmark = pytest.mark.no_gpu

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
RESULTS = ROOT / "benchmarks" / "results"
FAKE_GPU = ROOT / "tests" / "fake_gpu"
PACKAGES = [FAKE_GPU, ROOT, *(ROOT / name for name in ("training", "export", "engines", "benchmarks"))]


def words(name: str) -> list[str]:
    """Return what a loop of the script goes through."""
    found = re.search(rf"for {name} in (.*); do", SCRIPT.read_text())
    assert found is not None
    return found[1].split()


@pytest.fixture
def environment(tmp_path: Path, tiny_bundle: Path, tiny_checkpoint: Path) -> dict[str, str]:
    """Tiny bundles in the place of those that the script would export, and a result for every section."""
    pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings: pip install 'mmemb-deploy[rtx]'")
    scratch, results = tmp_path / "scratch", tmp_path / "results"
    results.mkdir()
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    for shape in words("shape"):
        shutil.copytree(tiny_checkpoint, scratch / shape)
        (scratch / f"{shape}-bf16").symlink_to(tmp_path / "bundle")  # the first one's engines are the others' too
    end = f"{datetime.now(UTC).date()}-{{}}-NVIDIA-Fake-H100"
    (results / f"{end.format('tests')}.xml").touch()
    for section, kind in re.findall(r'section "(\S+)" (\w+)', SCRIPT.read_text()):
        measured = max(RESULTS.glob(f"*-{kind}-small-cpu.json"))
        for shape, backend in product(words("shape"), words("backend")):
            name = end.format(section.replace("$shape", shape).replace("$backend", backend))
            shutil.copy(measured, results / f"{name}.json")
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},  # xdist's are its own
        "PATH": f"{FAKE_GPU / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(map(str, PACKAGES)),
        "PYTHON": sys.executable,
        "SCRATCH": str(scratch),
        "RESULTS": str(results),
        "FAKE_GPU_REPORT": str(tmp_path / "report.jsonl"),
    }


def test_the_benchmarks_of_a_gpu_go_through(environment: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run([SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall("verified .*min cosine", done.stdout)) == len(words("shape"))
    assert (tmp_path / "scratch" / "report" / "index.html").is_file()
    stages = "(bench_prefill or bench_decode) and not image"
    quick = ["--backend", "tensorrt", "--seconds", "0", "--passes", "1", "--select", stages]
    bundle, timed = tmp_path / "scratch" / f"{words('shape')[0]}-bf16", tmp_path / "suite.json"
    suite = [sys.executable, "-m", "mmemb_deploy", "bench", "suite", str(bundle), "--out", str(timed), *quick]
    done = subprocess.run(suite, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(timed.read_text())["bundle"]["backend"].startswith("tensorrt ")
    processes = [json.loads(line) for line in (tmp_path / "report.jsonl").read_text().splitlines()]
    assert [process["misuses"] for process in processes if process["misuses"]] == []
    assert max(process["counts"].get("runs", 0) for process in processes) > 100
