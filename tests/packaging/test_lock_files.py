"""The lock files: complete, exact, hashed, consistent, and without the name of a registry."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.packaging.project import REQUIREMENTS, pyproject

LOCKS = ("build", "server", "run", "test", "peers")
EXTRAS = {
    "server": ("auth",),
    "run": ("auth", "embedded", "local"),
    "test": ("auth", "embedded", "local", "bench", "test"),
    "peers": ("peers",),
}
ENTRY = re.compile(
    r"^(?P<requirement>[A-Za-z0-9][^\n\\]*?) \\\n(?P<hashes>(?: +--hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.M
)


def entries(lock: str) -> Iterator[tuple[Requirement, int]]:
    """Each locked requirement, with the number of its hashes."""
    text = (REQUIREMENTS / f"{lock}.txt").read_text(encoding="utf-8")
    for match in ENTRY.finditer(text):
        yield Requirement(match["requirement"]), match["hashes"].count("--hash=")


def versions(lock: str) -> dict[str, set[str]]:
    """The locked versions of each package; more than one where they differ between Pythons."""
    found: dict[str, set[str]] = {}
    for requirement, _ in entries(lock):
        found.setdefault(canonicalize_name(requirement.name), set()).add(str(requirement.specifier).removeprefix("=="))
    return found


@pytest.mark.parametrize("lock", LOCKS)
def test_every_line_is_an_exact_version_with_hashes(lock: str) -> None:
    text = (REQUIREMENTS / f"{lock}.txt").read_text(encoding="utf-8")
    named = [line for line in text.splitlines() if line and not line.startswith((" ", "#"))]
    found = list(entries(lock))
    assert len(found) == len(named) > 0
    for requirement, hashes in found:
        assert re.fullmatch(r"==[^,*]+", str(requirement.specifier)), requirement
        assert hashes >= 1
        assert requirement.url is None


@pytest.mark.parametrize("lock", sorted(EXTRAS))
def test_everything_that_pyproject_asks_for_is_locked(lock: str) -> None:
    project = pyproject()["project"]
    wanted = [] if lock == "peers" else list(project["dependencies"])
    for extra in EXTRAS[lock]:
        wanted += project["optional-dependencies"][extra]
    locked = versions(lock)
    for text in wanted:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        assert name in locked, f"{text} is not in requirements/{lock}.txt: run make lock"
        for version in locked[name]:
            assert requirement.specifier.contains(version), f"requirements/{lock}.txt has {name} {version}, not {text}"


@pytest.mark.parametrize("lock", ["build", "server", "run"])
def test_one_environment_can_hold_them_all(lock: str) -> None:
    widest = versions("test")
    for name, found in versions(lock).items():
        assert found == widest[name], name


def test_the_build_backend_is_locked() -> None:
    (backend,) = (Requirement(text) for text in pyproject()["build-system"]["requires"])
    assert all(backend.specifier.contains(version) for version in versions("build")[backend.name])


@pytest.mark.parametrize("path", sorted(REQUIREMENTS.iterdir()), ids=lambda path: path.name)
def test_no_registry_is_named(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"https?://|index-url|find-links|trusted-host", text)


def test_no_extra_pulls_a_training_framework() -> None:
    assert not {"torch", "tensorflow", "jax"} & set(versions("test")) | {"torch"} & set(versions("peers"))
