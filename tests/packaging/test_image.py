"""The Dockerfile: clean by hadolint, and what the guide promises of the image."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.packaging.project import ROOT, copy_source, tool

TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
INSTRUCTIONS = [
    line.split(maxsplit=1) for line in re.sub(r"\\\n\s*", "", TEXT).splitlines() if line and not line.startswith("#")
]


def stage(name: str) -> list[list[str]]:
    """The instructions of one stage, after those of the stages it is made from."""
    found: list[list[str]] = []
    inside = False
    for instruction, rest in INSTRUCTIONS:
        if instruction == "FROM":
            base, _, own = rest.partition(" AS ")
            inside = own == name
            if inside and not base.startswith("$"):
                found += stage(base)
        elif inside:
            found.append([instruction, rest])
    return found


def last(name: str, instruction: str) -> str:
    return [rest for found, rest in stage(name) if found == instruction][-1]


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run([tool("hadolint"), str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_last_stage_is_the_server() -> None:
    assert [rest for instruction, rest in INSTRUCTIONS if instruction == "FROM"][-1].endswith("AS server")


@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("server", ["gunicorn", "-c", "gunicorn.conf.py"]),
        ("local", ["orchestrator", "up", "--run-dir", "/tmp/orchestrator"]),
    ],
)
def test_the_first_process_is_the_program_itself(target: str, command: list[str]) -> None:
    assert json.loads(last(target, "CMD")) == command
    assert last(target, "STOPSIGNAL") == "SIGTERM"
    assert not [rest for instruction, rest in stage(target) if instruction == "ENTRYPOINT"]


@pytest.mark.parametrize("target", ["server", "local"])
def test_it_is_not_root_and_has_a_health_check(target: str) -> None:
    assert last(target, "USER") == "10001:10001"
    assert last(target, "EXPOSE") == "8004"
    command = json.loads(last(target, "HEALTHCHECK").partition("CMD ")[2])
    assert command[:2] == ["python", "-c"]
    compile(command[2], "healthcheck", "exec")
    assert "/livez" in command[2]


def test_packages_come_from_the_lock_alone() -> None:
    installs = [part for i, rest in INSTRUCTIONS if i == "RUN" for part in rest.split("&&") if "pip" in part]
    assert installs
    for part in installs:
        if " install " in part:
            assert "--require-hashes" in part or "--no-index" in part, part


def test_both_contexts_leave_the_same_things_out() -> None:
    assert (ROOT / ".dockerignore").read_bytes() == (ROOT / "Dockerfile.dockerignore").read_bytes()


@pytest.mark.parametrize("parent", [False, True], ids=["this folder", "the folder above"])
def test_both_contexts_give_the_same_source(tmp_path_factory: pytest.TempPathFactory, parent: bool) -> None:
    """Plays the stage `source` on a folder: COPY as Docker matches patterns, then the RUN line in a shell."""
    context = tmp_path_factory.mktemp("context")
    wanted = ("orchestrator", "pyproject.toml", "README.md", "gunicorn.conf.py", "requirements")
    copy_source(context / "orchestrator" if parent else context, *wanted)
    if parent:
        (context / "docker-compose.yml").write_text("services: {}\n", encoding="utf-8")
    image = tmp_path_factory.mktemp("image")
    for instruction, rest in stage("source"):
        rest = rest.replace("${PROJECT}", "orchestrator")
        if instruction == "COPY":
            *sources, target = rest.split()
            _copy(context, sources, image / target.lstrip("/"))
        elif instruction == "RUN":
            script = rest.replace("/context", f"{image}/context").replace("/src", f"{image}/src")
            subprocess.run(["sh", "-euc", script], check=True)
    for name in wanted:
        assert (image / "src" / name).exists(), name
    assert (image / "src" / "orchestrator" / "server" / "pool.py").exists()
    assert (image / "src" / "requirements" / "server.txt").exists()


def _copy(context: Path, sources: list[str], target: Path) -> None:
    matches = {source: sorted(context.glob(source)) for source in sources}
    assert any(matches.values()), "a COPY that matches nothing is an error"
    for source, found in matches.items():
        assert found or "[" in source, f"{source} is no pattern, so it has to be there"
        for path in found:
            if path.is_dir():
                shutil.copytree(path, target, dirs_exist_ok=True)
            else:
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, target / path.name)
