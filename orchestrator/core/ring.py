"""Rendezvous hashing: which slot of the worker pool owns a session.

Every slot gets a score for the session and the highest score wins, so a slot that leaves moves its own sessions and no
others, and one that joins takes an equal share from each. The scores are keyed blake2b: equal on every worker and node.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Any

_KEY = b"orchestrator session ring 1"
_SCORE_BYTES = 8


@functools.lru_cache(maxsize=1024)
def _seed(slot: int) -> Any:
    """A hash that has taken in the key and the slot; copying it costs half of building it."""
    return hashlib.blake2b(slot.to_bytes(8, "big", signed=True), digest_size=_SCORE_BYTES, key=_KEY)


def owner(session_id: str, slots: Sequence[int]) -> int:
    """The slot among `slots` that owns `session_id`; their order does not matter.

    Raises ValueError when there is no slot.
    """
    if not slots:
        raise ValueError("no slot to choose from")
    if len(slots) == 1:
        return slots[0]
    name = session_id.encode()
    best = slots[0]
    best_score = b""
    for slot in slots:
        scored = _seed(slot).copy()
        scored.update(name)
        score = scored.digest()
        if score > best_score or (score == best_score and slot < best):
            best = slot
            best_score = score
    return best
