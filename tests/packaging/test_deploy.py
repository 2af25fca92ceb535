"""The other files in deploy/, and the guide's table of settings, against what the program really has."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
from dataclasses import MISSING, fields
from typing import Any

import pytest
import yaml

from orchestrator.server.pool import DRAIN_MARGIN_S, WORKER_TIMEOUT_S
from orchestrator.settings import Settings, load_settings
from tests.packaging.project import DEPLOY, ROOT, load_yaml

GUIDE = (ROOT / "docs" / "ORCHESTRATOR_DEPLOYMENT.md").read_text(encoding="utf-8")
IN_WORDS = {"WEB_CONCURRENCY", "NODE_NAME", "LLM_SYSTEM_PROMPT", "FALLBACK_TEXT"}
METRIC = re.compile(r"orchestrator_[a-z_]+")


def test_haproxy_accepts_its_configuration() -> None:
    haproxy = shutil.which("haproxy")
    if haproxy is None:
        line = "haproxy is missing (apt-get install haproxy)"
        if os.environ.get("CI", "").lower() in ("1", "true", "yes"):
            pytest.fail(line, pytrace=False)
        pytest.skip(line)
    command = [haproxy, "-c", "-f", str(DEPLOY / "haproxy.cfg")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_guide_has_every_setting_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `([A-Z0-9_]+)` \| ([^|]+?) \| ", GUIDE, re.M))
    assert set(rows) == {spec.metadata["env"] for spec in fields(Settings)}
    for spec in fields(Settings):
        variable = spec.metadata["env"]
        if variable in IN_WORDS:
            continue
        assert spec.default is not MISSING
        shown = rows[variable].strip("`")
        shown = "" if shown == "(empty)" else shown
        assert spec.metadata["parse"](shown) == spec.default, variable


def test_no_kubernetes_setting_is_unknown_or_wrong() -> None:
    documents = {document["kind"]: document for document in _documents()}
    data = documents["ConfigMap"]["data"]
    load_settings(data)
    assert set(data) <= {spec.metadata["env"] for spec in fields(Settings)}


def test_kubernetes_waits_for_the_drain_and_probes_what_is_there() -> None:
    documents = {document["kind"]: document for document in _documents()}
    pod = documents["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    sleep = float(re.findall(r"sleep\((\d+)\)", container["lifecycle"]["preStop"]["exec"]["command"][-1])[0])
    drain = float(documents["ConfigMap"]["data"]["DRAIN_TIMEOUT_SECONDS"])
    assert pod["terminationGracePeriodSeconds"] > sleep + drain + DRAIN_MARGIN_S
    probes = {name: container[name]["httpGet"]["path"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert probes == {"startupProbe": "/livez", "livenessProbe": "/livez", "readinessProbe": "/readyz"}
    liveness = container["livenessProbe"]
    assert liveness["periodSeconds"] * liveness.get("failureThreshold", 3) > WORKER_TIMEOUT_S


def test_the_systemd_unit_lets_the_pool_drain() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(DEPLOY / "orchestrator.service", encoding="utf-8")
    service = unit["Service"]
    assert service["KillMode"] == "mixed"
    assert float(service["TimeoutStopSec"]) > load_settings({}).drain_timeout_seconds + DRAIN_MARGIN_S
    assert service["ExecStart"].endswith("/gunicorn -c gunicorn.conf.py")


def test_alerts_ask_for_metrics_that_exist() -> None:
    source = (ROOT / "orchestrator" / "telemetry" / "prometheus.py").read_text(encoding="utf-8")
    there = set(METRIC.findall(source))
    rules = [rule for group in load_yaml(DEPLOY / "alerts.yml")["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules)
    asked = {name for rule in rules for name in METRIC.findall(rule["expr"])}
    assert asked
    for name in asked:
        assert re.sub(r"_(bucket|total|sum|count)$", "", name) in there, name


def test_the_budget_in_the_alert_is_the_budget() -> None:
    (rule,) = (
        rule
        for group in load_yaml(DEPLOY / "alerts.yml")["groups"]
        for rule in group["rules"]
        if rule["alert"] == "OrchestratorOverBudget"
    )
    assert float(rule["expr"].split(">")[-1]) * 1000 == load_settings({}).e2e_budget_ms


def test_prometheus_scrapes_the_page_and_reads_the_rules() -> None:
    configuration = load_yaml(DEPLOY / "prometheus.yml")
    assert [(DEPLOY / name).exists() for name in configuration["rule_files"]] == [True]
    (job,) = configuration["scrape_configs"]
    assert (job["job_name"], job["metrics_path"]) == ("orchestrator", "/metrics")


def test_files_that_the_guide_names_exist() -> None:
    named = set(re.findall(r"`((?:deploy|requirements|orchestrator|scripts)/[\w./-]+)`", GUIDE))
    assert named
    for name in named:
        assert (ROOT / name).exists(), name


def _documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8")))
