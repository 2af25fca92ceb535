"""The one error of the local stack that a user is meant to read."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Final

from orchestrator.errors import OrchestratorError

INSTALL_HINT: Final = "pip install 'statemanager-orchestrator[local]'"


class LocalStackError(OrchestratorError):
    """A part of the local stack cannot run. The message is one line that says what to do."""


def missing_packages(modules: Iterable[str]) -> list[str]:
    """Return those of the top-level module names that are not installed, without importing any."""
    return [name for name in modules if importlib.util.find_spec(name) is None]


def load_module(name: str) -> ModuleType:
    """Import a module of the `local` extra.

    Imported by name because these packages carry no types and are absent where the extra is not installed.

    Raises:
        LocalStackError: the module, or something it needs, is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise LocalStackError(
            f"the local stack needs {error.name or name}, which is not installed: {INSTALL_HINT}"
        ) from error


def package_folder(name: str) -> Path:
    """Return the folder of an installed package without importing it.

    Raises:
        LocalStackError: the package is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise LocalStackError(f"the local stack needs {name}, which is not installed: {INSTALL_HINT}")
    return Path(spec.submodule_search_locations[0])
