"""Installs hashed requirements with pip: one line of progress instead of pip's many, the whole output in a log file.

Usage: python install.py LOG_FILE REQUIREMENTS... [-- PIP_OPTION...]

Exits with pip's code; when pip failed, its last lines go to standard error.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

TAIL_LINES = 5
MAX_LINE = 300
STEP_WITHOUT_TERMINAL = 20

_PACKAGE = re.compile(r"(?:Collecting|Processing|Requirement already satisfied:) (\S+)")


def locked_names(requirements: list[str]) -> set[str]:
    """The package names that lock files pin, in pip's spelling of the file."""
    lines = (line for name in requirements for line in Path(name).read_text(encoding="utf-8").splitlines())
    return {line.split("==")[0] for line in lines if "==" in line and not line.startswith((" ", "#"))}


def main(arguments: list[str]) -> int:
    """Run pip and show how far it is."""
    options: list[str] = []
    if "--" in arguments:
        cut = arguments.index("--")
        arguments, options = arguments[:cut], arguments[cut + 1 :]
    log_file, requirements = arguments[0], arguments[1:]
    total = len(locked_names(requirements))
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    command += ["--progress-bar=off", "--require-hashes", *options]
    command += [f"--requirement={name}" for name in requirements]
    lines: list[str] = []
    seen = 0
    terminal = sys.stdout.isatty()
    with (
        Path(log_file).open("w", encoding="utf-8") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip,
    ):
        assert pip.stdout is not None
        for line in pip.stdout:
            log.write(line)
            lines.append(line)
            if line.startswith("Installing collected"):
                _show(f"{seen} packages here, unpacking", terminal, last=True)
            elif match := _PACKAGE.match(line):
                seen += 1
                if terminal or seen % STEP_WITHOUT_TERMINAL == 0:
                    name = re.split(r"==|-\d", Path(match[1]).name)[0]
                    _show(f"package {seen} of at most {total}: {name}", terminal)
    if pip.returncode:
        sys.stdout.write("\n" if terminal else "")
        sys.stderr.writelines(line[:MAX_LINE].rstrip() + "\n" for line in lines[-TAIL_LINES:])
    return pip.returncode


def _show(text: str, terminal: bool, *, last: bool = False) -> None:
    sys.stdout.write(f"\r\x1b[K  {text}{chr(10) if last else ''}" if terminal else f"  {text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
