"""The commands for people: make's targets, the set-up script's way out of every bad start, what CI calls."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.packaging.project import ROOT, bare_environment, copy_source

TARGETS = ("help", "run", "test", "lint", "bench", "bench-peers", "loadtest", "lock", "image", "clean")
SCRIPTS = sorted((ROOT / "scripts").glob("*.sh"))
NEEDED = ("sh", "dirname", "cat", "cksum", "uname", "flock", "rm", "grep")


@pytest.mark.parametrize("target", TARGETS)
def test_target_exists(target: str) -> None:
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_run_ends_in_the_program_itself() -> None:
    """Without a shell in between: Ctrl-C and SIGTERM reach the program, and its exit code is the command's."""
    done = subprocess.run(["make", "--dry-run", "run"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].split()[:3] == ["exec", ".venv/bin/orchestrator", "up"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_is_plain_shell(script: Path) -> None:
    assert script.read_text(encoding="utf-8").startswith("#!/bin/sh\n")
    assert script.stat().st_mode & stat.S_IXUSR
    done = subprocess.run(["sh", "-n", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_ci_runs_make_test_and_the_gate() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & stat.S_IXUSR
    text = script.read_text(encoding="utf-8")
    assert "set -euo pipefail" in text
    assert text.index("make test </dev/null") < text.index("make bench ARGS='gate --no-turns'")
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class Machine:
    """A copy of the project on a machine that has only the programs put into its one PATH folder."""

    def __init__(self, folder: Path) -> None:
        self.project = copy_source(folder / "project", "scripts", "requirements", "pyproject.toml")
        self.programs = folder / "bin"
        self.programs.mkdir()
        for name in NEEDED:
            found = shutil.which(name)
            assert found, name
            (self.programs / name).symlink_to(found)

    def add(self, name: str, body: str) -> Path:
        path = self.programs / name
        path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
        path.chmod(0o755)
        return path

    def set_up(self, mode: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", "scripts/setup.sh", mode],
            cwd=self.project,
            env=bare_environment(**environ) | {"PATH": str(self.programs)},
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("set-up: ")
    return line


def test_no_python_is_one_clear_line(machine: Machine) -> None:
    assert "Python 3.11 or newer was not found" in one_line(machine.set_up("run"))


def test_old_python_counts_as_none(machine: Machine) -> None:
    machine.add("python3", "exit 1")
    assert "Python 3.11 or newer was not found" in one_line(machine.set_up("run"))


def test_a_named_python_that_is_too_old_is_named(machine: Machine) -> None:
    old = machine.add("python3.9", "exit 1")
    line = one_line(machine.set_up("run", PYTHON=str(old)))
    assert f"PYTHON={old}" in line
    assert "3.11" in line


def test_python_without_venv_says_what_to_install(machine: Machine) -> None:
    machine.add("python3", 'case "$2" in *ensurepip*) exit 1 ;; esac')
    assert "apt-get install python3-venv" in one_line(machine.set_up("run"))


def test_unknown_set_up_is_named(machine: Machine) -> None:
    assert "everything is not accepted: run, test or peers" in one_line(machine.set_up("everything"))


class Environment:
    """A stand-in for a virtual environment: its python only writes down how it was called."""

    def __init__(self, machine: Machine) -> None:
        self.calls = machine.project.parent / "calls"
        machine.add(
            "python3",
            'case "$*" in\n*"-m venv"*)\n'
            f"    mkdir -p .venv/bin; cp {machine.programs}/venv-python .venv/bin/python\n"
            "    echo VIRTUAL_ENV=$(pwd)/.venv >.venv/bin/activate ;;\nesac",
        )
        machine.add(
            "venv-python", f'echo "$@" >>{self.calls}; case "$*" in *install.py*) exit ${{PIP_FAILS:-0}} ;; esac'
        )
        for name in ("mkdir", "cp"):
            (machine.programs / name).symlink_to(str(shutil.which(name)))

    def installs(self) -> list[str]:
        if not self.calls.exists():
            return []
        return [line for line in self.calls.read_text(encoding="utf-8").splitlines() if "install.py" in line]


def test_set_up_happens_once(machine: Machine) -> None:
    environment = Environment(machine)
    assert machine.set_up("run").returncode == 0
    assert machine.set_up("run").stdout == ""
    assert len(environment.installs()) == 1
    assert "requirements/run.txt" in environment.installs()[0]
    assert "--only-binary=:all:" in environment.installs()[0]


def test_the_test_set_up_serves_run_as_well(machine: Machine) -> None:
    environment = Environment(machine)
    assert machine.set_up("test").returncode == 0
    assert machine.set_up("run").stdout == ""
    assert len(environment.installs()) == 1


@pytest.mark.parametrize("changed", ["requirements/run.txt", "pyproject.toml"])
def test_a_change_of_what_it_needs_sets_up_anew(machine: Machine, changed: str) -> None:
    environment = Environment(machine)
    machine.set_up("run")
    with (machine.project / changed).open("a", encoding="utf-8") as file:
        file.write("# changed\n")
    assert machine.set_up("run").returncode == 0
    assert len(environment.installs()) == 2


def test_a_failed_set_up_is_said_and_done_again_from_the_start(machine: Machine) -> None:
    environment = Environment(machine)
    assert "pip could not install requirements/run.txt" in one_line(machine.set_up("run", PIP_FAILS="1"))
    leftover = machine.project / ".venv" / ".incomplete"
    assert leftover.exists()
    assert machine.set_up("run").returncode == 0
    assert len(environment.installs()) == 2
    assert not leftover.exists()


def test_a_moved_folder_sets_up_anew(machine: Machine) -> None:
    environment = Environment(machine)
    machine.set_up("run")
    machine.project = machine.project.rename(machine.project.with_name("moved"))
    assert machine.set_up("run").returncode == 0
    assert len(environment.installs()) == 2


def test_pip_failure_shows_the_end_of_its_output(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.txt"
    wrong.write_text("no-such-package==1.0 --hash=sha256:" + "0" * 64 + "\n", encoding="utf-8")
    log = tmp_path / "log"
    done = subprocess.run(
        [sys.executable, "scripts/install.py", str(log), str(wrong), "--", "--no-index"],
        cwd=ROOT,
        env={**os.environ, "PIP_CONFIG_FILE": os.devnull},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "no-such-package" in done.stderr
    assert len(done.stderr.splitlines()) <= 5
    assert "no-such-package" in log.read_text(encoding="utf-8")
