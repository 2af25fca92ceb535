"""The LLM's messages for a turn: instructions, what retrieval found, what was said and heard before, the question."""

from __future__ import annotations

from collections.abc import Iterable

from orchestrator.downstream.types import UNKNOWN_INTENT, Intent, Message, Retrieval
from orchestrator.store.record import HistoryEntry

MAX_PASSAGES = 5


def build_messages(
    system_prompt: str, history: Iterable[HistoryEntry], intent: Intent, retrieval: Retrieval | None, question: str
) -> list[Message]:
    """OpenAI chat messages. The passages stand in the system message behind a line `Passages:`, numbered from 1."""
    lines = [system_prompt]
    if intent is not UNKNOWN_INTENT and intent.name:
        goal = f" ({intent.user_goal})" if intent.user_goal else ""
        lines.append(f"The caller's intent seems to be: {intent.name}{goal}.")
    passages = retrieval.passages[:MAX_PASSAGES] if retrieval is not None else ()
    if retrieval is not None and not passages and retrieval.answer:
        passages = (retrieval.answer,)
    if passages:
        lines.append("Passages:")
        lines.extend(f"[{number}] {' '.join(passage.split())}" for number, passage in enumerate(passages, start=1))
    messages: list[Message] = [{"role": "system", "content": "\n".join(lines)}]
    messages.extend({"role": entry.role, "content": entry.text} for entry in history)
    messages.append({"role": "user", "content": question})
    return messages
