"""Who has which slot: no slot has two users, none is lost, and a RELEASE frees only what it means."""

import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from hypothesis.strategies import data, integers
from lifl_gateway.slots import SeatSlots, indices_of_seat


def test_seats_share_a_pool_without_overlap():
    shares = [set(indices_of_seat(seat, 3, 8)) for seat in range(3)]
    assert set.union(*shares) == set(range(8))
    assert sum(map(len, shares)) == 8


def test_slots_in_use_by_an_earlier_process_are_not_taken():
    slots = SeatSlots({0: 4, 2: 9}, busy=[2, 5])
    assert slots.free == 1
    held = slots.take()
    assert held is not None
    assert (held.index, held.generation) == (0, 5)
    assert slots.take() is None
    assert slots.release(2, 9)
    assert slots.free == 1


def test_a_release_of_another_generation_frees_nothing():
    slots = SeatSlots({0: 0})
    held = slots.take()
    slots.mark_sent(held)
    assert not slots.release(0, 0)
    assert not slots.release(1, 1)
    assert slots.release(0, 1)
    assert not slots.release(0, 1)
    assert slots.free == 1


def test_a_release_before_the_slot_is_marked_sent_is_not_lost():
    slots = SeatSlots({0: 0})
    held = slots.take()
    assert slots.release(0, 1)
    assert slots.free == 0
    assert not slots.mark_sent(held)
    assert slots.free == 1


def test_generations_wrap_at_32_bits():
    slots = SeatSlots({0: 2**32 - 1})
    held = slots.take()
    assert held is not None
    assert held.generation == 0


def test_settling_frees_only_what_was_sent_before_the_question():
    slots = SeatSlots({0: 0, 1: 0, 2: 0})
    lost, kept = slots.take(), slots.take()
    slots.mark_sent(lost)
    slots.mark_sent(kept)
    believed = slots.sent()
    later = slots.take()
    slots.mark_sent(later)
    slots.settle({kept.index: 1}, believed)
    assert set(slots.sent()) == {kept.index, later.index}


@pytest.mark.parametrize("reused", [False, True])
def test_settling_leaves_a_slot_in_its_next_use_alone(reused):
    slots = SeatSlots({0: 0})
    slots.mark_sent(slots.take())
    believed = slots.sent()
    slots.release(0, 1)
    if reused:
        slots.mark_sent(slots.take())
    slots.settle({}, believed)
    assert slots.free == (0 if reused else 1)


class Slots(RuleBasedStateMachine):
    """Random uses of three slots against a plain model."""

    def __init__(self):
        super().__init__()
        self.slots = SeatSlots({0: 0, 1: 0, 2: 0})
        self.held = {}
        self.sent = {}

    @rule()
    def take(self):
        held = self.slots.take()
        assert (held is None) == (len(self.held) + len(self.sent) == 3)
        if held:
            assert held.index not in self.held
            assert held.index not in self.sent
            self.held[held.index] = held

    @precondition(lambda self: self.held)
    @rule(data=data())
    def give_back(self, data):
        self.slots.give_back(self.held.pop(self.pick(data, self.held)))

    @precondition(lambda self: self.held)
    @rule(data=data())
    def send(self, data):
        index = self.pick(data, self.held)
        self.sent[index] = self.held.pop(index)
        assert self.slots.mark_sent(self.sent[index])

    @precondition(lambda self: self.sent)
    @rule(data=data())
    def release(self, data):
        index = self.pick(data, self.sent)
        assert self.slots.release(index, self.sent.pop(index).generation & 0xFF)

    @rule(index=integers(-1, 4), back=integers(1, 5))
    def stray_release(self, index, back):
        known = self.held.get(index) or self.sent.get(index)
        if known:
            assert not self.slots.release(index, (known.generation - back) & 0xFF)

    @staticmethod
    def pick(data, slots):
        return sorted(slots)[data.draw(integers(0, len(slots) - 1))]

    @invariant()
    def every_slot_is_in_one_place(self):
        assert self.slots.free == 3 - len(self.held) - len(self.sent)


TestSlots = Slots.TestCase
TestSlots.settings = settings(max_examples=50, stateful_step_count=30)
