"""Rules and dashboard, held to the names that the cluster exports."""

import json
import shutil
import subprocess
from typing import Any

import pytest

from tests.deploy_checks import (
    DEPLOY,
    METRICS,
    KeyPath,
    key_paths,
    misspell,
    read_documents,
    rule_problems,
    show,
    unknown_series,
)

RULES_FILE = DEPLOY / "prometheus" / "rules.yaml"
[RULES] = read_documents(RULES_FILE)
RECORDED = {
    rule["record"] for group in RULES["groups"] for rule in group["rules"] if "record" in rule
}
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "prometheus" / "dashboard.json").read_text())
KEYS = list(key_paths(RULES, free=frozenset({"labels", "annotations"})))


def test_rules_are_right() -> None:
    assert rule_problems(RULES) == []


@pytest.mark.parametrize("path", KEYS, ids=show)
def test_misspelt_key_is_caught(path: KeyPath) -> None:
    assert rule_problems(misspell(RULES, path)) != []


def test_misspelt_metric_is_caught() -> None:
    assert unknown_series("", "rate(milliways_tokns_total[5m])", RECORDED) != []


def test_every_metric_is_watched() -> None:
    text = RULES_FILE.read_text("utf-8")
    assert [metric for metric in sorted(METRICS) if metric not in text] == []


@pytest.mark.parametrize("panel", DASHBOARD["panels"], ids=lambda panel: panel["title"])
def test_panel_shows_what_is_recorded(panel: dict[str, Any]) -> None:
    assert panel["targets"]
    for target in panel["targets"]:
        assert unknown_series(panel["title"], target["expr"], RECORDED) == []


def test_prometheus_takes_the_rules() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    done = subprocess.run(
        [promtool, "check", "rules", str(RULES_FILE)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
