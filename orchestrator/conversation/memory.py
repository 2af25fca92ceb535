"""What a conversation remembers: what the caller said and what the caller heard, in the bounds of HISTORY_TURNS."""

from __future__ import annotations

from typing import Any

from orchestrator.core.transcript import Transcript
from orchestrator.store.record import HistoryEntry, SessionRecord


class Memory:
    """The history of a session. An answer cut short by a barge-in stands in it only as far as it was heard."""

    __slots__ = ("_entries", "_limit", "created_at", "epoch")

    def __init__(self, created_at: float, history_turns: int, epoch: int = 0) -> None:
        self._entries: list[HistoryEntry] = []
        self._limit = history_turns * 2
        self.created_at = created_at
        self.epoch = epoch

    @classmethod
    def restored(cls, record: SessionRecord, history_turns: int) -> Memory:
        """The memory that `record` kept, and the question of a turn that never came to its end."""
        memory = cls(record.created_at, history_turns, record.epoch)
        memory._entries = list(record.history)
        if record.state not in ("IDLE", "LISTENING"):
            memory.add_turn(record.turn_number, Transcript(tuple(record.utterance), (record.partial,)).text.strip(), "")
        return memory

    def add_turn(self, turn_number: int, said: str, heard: str) -> None:
        """Turn `turn_number` is over; an empty part leaves no entry."""
        if said:
            self._entries.append(HistoryEntry(role="user", text=said, turn_number=turn_number))
        if heard:
            self._entries.append(HistoryEntry(role="assistant", text=heard, turn_number=turn_number))
        if len(self._entries) > self._limit:
            del self._entries[: len(self._entries) - self._limit]

    def history(self) -> tuple[HistoryEntry, ...]:
        """Oldest first."""
        return tuple(self._entries)

    def as_dicts(self) -> list[dict[str, Any]]:
        """For a description in JSON."""
        return [{"role": e.role, "text": e.text, "turn_number": e.turn_number} for e in self._entries]

    def record(
        self, session_id: str, state: str, turn_number: int, transcript: Transcript, seq: int, now: float
    ) -> SessionRecord:
        """What the store keeps of the session. `now` is Unix seconds."""
        return SessionRecord(
            session_id=session_id,
            epoch=self.epoch,
            state=state,
            turn_number=turn_number,
            utterance=list(transcript.fixed),
            partial=" ".join(transcript.partial),
            history=list(self._entries),
            seq=seq,
            created_at=self.created_at,
            updated_at=now,
        )
