"""Specifications of jobs as clients send them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lifl.errors import Refused
from lifl.messages import JobSpec
from lifl_gateway.job_spec import LIMITS, decode_job_spec

LEAST = {"name": "a", "function": "fedavg", "goal": 4}


def test_the_least_specification_gets_the_defaults():
    assert decode_job_spec(json.dumps(LEAST).encode()) == JobSpec(**LEAST)


def test_an_integer_may_be_written_as_a_float():
    assert decode_job_spec(b'{"name":"a","function":"f","goal":4.0}').goal == 4


def test_what_is_wrong_is_named_with_its_limit():
    with pytest.raises(Refused) as caught:
        decode_job_spec(json.dumps(LEAST | {"goal": 0, "slots": -1}).encode())
    assert caught.value.status == 422
    assert "goal: from 1 to 1,000,000" in caught.value.detail
    assert "slots" in caught.value.detail


@pytest.mark.parametrize("name", sorted(LIMITS))
def test_each_limit_holds(name):
    limits = LIMITS[name]
    wrong = (
        ["", "-a", "A", "a" * 64, "a\n"] if "pattern" in limits else [limits["minimum"] - 1, limits["maximum"] + 1]
    )
    for value in wrong:
        with pytest.raises(Refused):
            decode_job_spec(json.dumps(LEAST | {name: value}).encode())


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(JobSpec.__struct_fields__), _JSON))
def test_any_values_make_a_specification_or_are_refused(changes):
    try:
        spec = decode_job_spec(json.dumps(LEAST | changes).encode())
    except Refused:
        return
    assert spec.goal >= 1


@given(st.binary(max_size=100))
def test_any_bytes_make_a_specification_or_are_refused(data):
    with pytest.raises(Refused):
        decode_job_spec(data)
