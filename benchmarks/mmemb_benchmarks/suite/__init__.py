"""The pytest-benchmark suite, by stage and by workload, on one bundle and backend: `run_suite` runs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmemb_benchmarks.suite.setting import Setting
from mmemb_deploy.errors import OptionError


def run_suite(setting: Setting, output: Path, select: str) -> int:
    """Run the benchmarks whose names `select` matches, as `pytest -k` does; write pytest-benchmark's JSON.

    Returns pytest's exit code: 0, or 1 where a benchmark failed. Raises OptionError where nothing is selected.
    """
    status = pytest.main(
        [str(Path(__file__).parent), "-q", "-k", select, f"--benchmark-json={output}",
         "--benchmark-columns=median,iqr,rounds", "--benchmark-sort=fullname", "--benchmark-disable-gc"],
        plugins=[setting],
    )  # fmt: skip
    if status == pytest.ExitCode.NO_TESTS_COLLECTED:
        raise OptionError(f"--select is {select!r}: it matches no benchmark; `mmemb bench suite` lists their names")
    return int(status)
