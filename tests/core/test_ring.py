"""The ring: stable, balanced, and moving no session it need not move."""

from __future__ import annotations

import collections

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core.ring import owner

SESSION_IDS = st.text("ABCxyz0189._:-", min_size=1, max_size=128)
SLOTS = st.lists(st.integers(0, 127), min_size=1, max_size=24, unique=True)


@given(SESSION_IDS, SLOTS, st.randoms(use_true_random=False))
def test_the_owner_does_not_depend_on_the_order_of_slots(session_id, slots, random):
    shuffled = list(slots)
    random.shuffle(shuffled)
    assert owner(session_id, slots) == owner(session_id, shuffled)
    assert owner(session_id, slots) in slots


@given(SESSION_IDS, SLOTS, st.integers(128, 200))
def test_a_new_slot_takes_sessions_only_for_itself(session_id, slots, new):
    before = owner(session_id, slots)
    assert owner(session_id, [*slots, new]) in (before, new)


@given(SESSION_IDS, SLOTS.filter(lambda slots: len(slots) > 1), st.data())
def test_a_lost_slot_moves_only_its_own_sessions(session_id, slots, data):
    lost = data.draw(st.sampled_from(slots))
    before = owner(session_id, slots)
    after = owner(session_id, [slot for slot in slots if slot != lost])
    if before != lost:
        assert after == before


@pytest.mark.parametrize("slots", [2, 4, 7, 16])
def test_sessions_spread_evenly(slots):
    sessions = 8000
    counts = collections.Counter(owner(f"call-{n}", range(slots)) for n in range(sessions))
    share = sessions / slots
    # Six standard deviations of a binomial: equal chances miss this once in hundreds of millions of keys.
    slack = 6 * (share * (1 - 1 / slots)) ** 0.5
    assert all(abs(counts[slot] - share) < slack for slot in range(slots))


def test_the_owner_is_the_same_in_every_version():
    """Nodes of different versions must agree while a roll-out is under way."""
    assert [owner(f"test_{n:03}", range(4)) for n in range(12)] == [1, 3, 1, 2, 3, 2, 0, 1, 2, 0, 3, 0]


def test_an_empty_ring_is_refused():
    with pytest.raises(ValueError, match="no slot"):
        owner("test_001", [])
