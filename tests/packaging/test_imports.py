"""Whatever the project imports, pyproject.toml asks for by name."""

from __future__ import annotations

import ast
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.packaging.project import ROOT, pyproject

OURS = {"orchestrator", "bench", "loadtests", "tests"}
# What a folder may import beyond the core.
MAY_USE = {
    "orchestrator": ("auth", "embedded", "local"),
    "bench": ("embedded", "bench", "peers"),
    "loadtests": ("embedded", "bench"),
    "tests": ("auth", "embedded", "local", "bench", "test"),
}
# Modules of packages that another one brings along on purpose, or whose name says nothing of the package's.
BROUGHT_ALONG = {
    "pydantic": "fastapi",
    "starlette": "fastapi",
    "cryptography": "pyjwt",
    "pipecat": "pipecat-ai",
    "loguru": "pipecat-ai",
    "openai": "pipecat-ai",
    "gevent": "locust",
    "multidict": "aiohttp",
    "yarl": "aiohttp",
    "packaging": "pytest",
}


def imported(folder: str) -> dict[str, str]:
    """The top-level modules that a folder imports, with a file that does."""
    found: dict[str, str] = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for name in names:
                found.setdefault(name.split(".")[0], str(path.relative_to(ROOT)))
    return found


@pytest.mark.parametrize("folder", sorted(MAY_USE))
def test_imports_are_asked_for(folder: str) -> None:
    project = pyproject()["project"]
    asked = list(project["dependencies"])
    for extra in MAY_USE[folder]:
        asked += project["optional-dependencies"][extra]
    names = {canonicalize_name(Requirement(text).name) for text in asked}
    distributions = packages_distributions()
    beside = {path.stem for path in Path(ROOT / folder).rglob("*.py")}
    for module, where in imported(folder).items():
        if module in OURS or module in sys.stdlib_module_names or module in beside:
            continue
        homes = {canonicalize_name(name) for name in distributions.get(module, [module])}
        homes |= {canonicalize_name(BROUGHT_ALONG[module])} if module in BROUGHT_ALONG else set()
        assert homes & names, f"{where} imports {module}, which pyproject.toml does not ask for"
