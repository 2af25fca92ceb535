"""Writes the state diagram and the state table into the guide, from the table the code runs on.

`python scripts/fsm_diagram.py` rewrites the part of docs/ORCHESTRATOR_GUIDE.md between its two markers; `--check` exits
with 1 if that would change anything.
"""

from __future__ import annotations

import sys
from pathlib import Path

from orchestrator.core.fsm import TABLE, Row, State, Turn

GUIDE = Path(__file__).resolve().parent.parent / "docs" / "ORCHESTRATOR_GUIDE.md"
BEGIN, END = "<!-- state machine: begin (generated) -->", "<!-- state machine: end -->"


def diagram() -> str:
    """The transitions between states as a Mermaid state diagram; other rows are in the table only."""
    arrows: dict[tuple[State, State], list[str]] = {}
    for row in TABLE:
        if row.next is not row.state:
            arrows.setdefault((row.state, row.next), []).append(row.event.value)
    lines = ["```mermaid", "stateDiagram-v2", "    [*] --> IDLE"]
    for (state, following), events in arrows.items():
        lines.append(f"    {state.value} --> {following.value}: {', '.join(dict.fromkeys(events))}")
    return "\n".join([*lines, "```"])


def table() -> str:
    """Every row, in the order in which rows are tried."""
    lines = ["| state | event | if | next | what happens |", "| --- | --- | --- | --- | --- |"]
    lines.extend(
        f"| {row.state.value} | {row.event.value} | {_guard(row)} | {row.next.value} | {_effects(row) or '–'} |"
        for row in TABLE
    )
    return "\n".join(lines)


def _guard(row: Row) -> str:
    return (row.guard.__doc__ or "") if row.guard is not None else ""


def _effects(row: Row) -> str:
    parts = [] if row.turn is Turn.KEEP else [row.turn.value]
    return "; ".join([*parts, *(effect.value for effect in row.effects)])


def main() -> int:
    text = GUIDE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    new = f"{before}{BEGIN}\n{diagram()}\n\n{table()}\n{END}{after}"
    if "--check" in sys.argv[1:]:
        if new != text:
            sys.stderr.write(f"{GUIDE.name} is not what the state table gives: run python scripts/fsm_diagram.py\n")
        return int(new != text)
    GUIDE.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
