"""The files that deploy a server: they name what there is."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[3] / "examples" / "serve"


def test_the_dashboard_draws_metrics_that_a_server_has(served: Any) -> None:
    served.post("/v1/embeddings", {"input": ["seven", "three plus four"]})
    served.post("/v1/embeddings", {"input": ""})
    text = served.get("/metrics").text
    types = dict(re.findall(r"^# TYPE (\S+) (\w+)$", text, re.MULTILINE))
    labels = {
        name: re.findall(r'(\w+)="', labels)
        for name, labels in re.findall(r"^(mmemb:\w+)\{(.*?)\}", text, re.MULTILINE)
    }
    dashboard = json.loads((EXAMPLES / "grafana.json").read_text())
    drawn = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    names = {name for expression in drawn for name in re.findall(r'__name__="([^"]+)"', expression)}
    assert len(names) > 12
    for name in names:
        kind = types.get(name) or types[name.removesuffix("_bucket")]
        assert kind == ("histogram" if name.endswith("_bucket") else "counter" if name.endswith("_total") else "gauge")
    parted = re.findall(r'by \(([\w, ]+)\) \(rate\(\{__name__="([^"]+)"', " ".join(drawn))
    assert len(parted) > 8
    for by, name in parted:
        assert name not in labels or set(by.split(", ")) <= set(labels[name]), name


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_takes_the_unit_and_finds_its_sandbox_tight(tmp_path: Path) -> None:
    unit = tmp_path / "mmemb.service"
    unit.write_text((EXAMPLES / "mmemb.service").read_text().replace("/opt/mmemb/bin/mmemb", "/bin/true"))
    checked = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
