"""The documents say what the code does, as far as a machine can tell."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from orchestrator.settings import Settings
from tests.packaging.project import ROOT

DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")])
DEPLOYMENT = ROOT / "docs" / "ORCHESTRATOR_DEPLOYMENT.md"


def test_the_guides_state_table_is_the_one_the_code_runs_on() -> None:
    script = ROOT / "scripts" / "fsm_diagram.py"
    checked = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False, cwd=ROOT)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("variable", [spec.metadata["env"] for spec in fields(Settings)])
def test_every_setting_is_in_the_deployment_guide(variable: str) -> None:
    assert f"`{variable}`" in DEPLOYMENT.read_text()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text()):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target
