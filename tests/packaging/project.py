"""Where things are in the project, and its files as data."""

from __future__ import annotations

import os
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
REQUIREMENTS = ROOT / "requirements"

_NOT_SOURCE = shutil.ignore_patterns("__pycache__", ".*", "*.egg-info", "build", "dist", "results")


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def copy_source(target: Path, *names: str) -> Path:
    """A copy of some files and folders of the project, without what running it leaves behind."""
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=_NOT_SOURCE)
        else:
            shutil.copy2(source, target / name)
    return target


def load_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def tool(name: str) -> str:
    """A program of the test environment."""
    path = ROOT / ".venv" / "bin" / name
    found = str(path) if path.exists() else shutil.which(name)
    assert found, f"{name} is not installed: make test sets it up"
    return found


def load_compose(text: str) -> Any:
    """A Compose file in an empty environment: ${NAME:-default} and ${NAME-default} are their defaults."""
    return _interpolate(yaml.safe_load(text))


def _interpolate(value: Any) -> Any:
    if isinstance(value, str):
        return re.sub(r"\$\{\w+:?-([^}]*)\}", r"\1", value)
    if isinstance(value, dict):
        return {key: _interpolate(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_interpolate(item) for item in value]
    return value


def bare_environment(**more: str) -> dict[str, str]:
    """PATH, and nothing that the user's shell has set for pip, make or the project."""
    return {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "LC_ALL": "C.UTF-8", **more}
