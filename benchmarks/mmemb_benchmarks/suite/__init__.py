"""The pytest-benchmark suite, by stage and by workload, on one bundle and backend: `run_suite` runs it."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from mmemb_benchmarks.suite.setting import Setting
from mmemb_deploy.errors import OptionError
from mmemb_deploy.files import write_whole


def run_suite(setting: Setting, output: Path, select: str) -> int:
    """Run the benchmarks whose names `select` matches, as `pytest -k` does; write pytest-benchmark's JSON.

    Returns pytest's exit code: 0, or 1 where a benchmark failed, and then writes nothing. Raises OptionError where
    nothing is selected.
    """
    setting.times.clear()
    with TemporaryDirectory() as scratch:
        pooled = Path(scratch, output.name)
        for _ in range(setting.passes):
            status = pytest.main(
                [
                    str(Path(__file__).parent),
                    "-q",
                    "-k",
                    select,
                    f"--benchmark-json={pooled}",
                    "--benchmark-quiet",
                    "--benchmark-disable-gc",
                ],
                plugins=[setting],
            )
            if status == pytest.ExitCode.NO_TESTS_COLLECTED:
                raise OptionError(
                    f"--select is {select!r}: it matches no benchmark; `mmemb bench suite` lists their names"
                )
            if status:
                return int(status)
        write_whole(output, pooled.read_bytes())
    return 0
