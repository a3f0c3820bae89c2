"""The attributes of a model update, in both content modes."""

import base64
import json
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lifl.errors import Refused
from lifl_gateway.event import UpdateEvent, event_from_headers, event_from_json

ATTRIBUTES = {
    "specversion": "1.0",
    "type": "dev.lifl.update.v1",
    "id": "7",
    "source": "alice",
    "round": "3",
    "numsamples": "12.5",
}


def environ(**changes):
    return {f"HTTP_CE_{name.upper()}": value for name, value in (ATTRIBUTES | changes).items()}


def structured(**changes):
    event = ATTRIBUTES | {"data_base64": base64.b64encode(b"tensors").decode()} | changes
    return json.dumps({name: value for name, value in event.items() if value is not None}).encode()


def test_headers_become_an_event():
    assert event_from_headers(environ()) == UpdateEvent("alice", "7", 3, 12.5, False)


def test_a_delta_is_marked():
    assert event_from_headers(environ(kind="delta")).is_delta


def test_a_source_is_percent_decoded_utf8():
    assert event_from_headers(environ(source="urn:%E2%82%AC/1")).client == "urn:\u20ac/1"


def test_a_quoted_source_is_unquoted():
    assert event_from_headers(environ(source='"a \\"b\\""')).client == 'a "b"'


@pytest.mark.parametrize(
    "change",
    [
        {"specversion": ""},
        {"specversion": "0.3"},
        {"type": "dev.lifl.update.v2"},
        {"id": ""},
        {"id": "x" * 257},
        {"source": ""},
        {"source": "%FF"},
        {"source": "a" * 257},
        {"source": "%E2%82%AC" * 86},
        {"source": "a%0Ab"},
        {"source": "a%00b"},
        {"round": ""},
        {"round": "0"},
        {"round": "-1"},
        {"round": "1.0"},
        {"round": "\u00b2"},
        {"round": "1_0"},
        {"round": "9" * 5000},
        {"numsamples": ""},
        {"numsamples": "0"},
        {"numsamples": "-1"},
        {"numsamples": "nan"},
        {"numsamples": "inf"},
        {"numsamples": "1e400"},
        {"numsamples": "1_0"},
        {"numsamples": str(2**40 + 1)},
        {"kind": "gradient"},
    ],
)
def test_a_bad_attribute_is_refused_by_name(change):
    with pytest.raises(Refused) as caught:
        event_from_headers(environ(**change))
    assert caught.value.status == 400
    assert next(iter(change)) in caught.value.detail


@given(st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=60))
def test_every_printable_client_id_survives_its_encoding(client):
    assert event_from_headers(environ(source=quote(client))).client == client


@given(st.dictionaries(st.sampled_from(sorted(ATTRIBUTES)), st.text(st.characters(max_codepoint=255))))
def test_headers_of_any_text_become_an_event_or_are_refused(changes):
    try:
        event = event_from_headers(environ(**changes))
    except Refused:
        return
    assert 0 < event.num_samples <= 2**40
    assert event.round >= 1


def test_a_structured_event_carries_its_data():
    event, data = event_from_json(structured(round=3, numsamples=12.5, time="2026-01-01T00:00:00Z", other=[1]))
    assert event == UpdateEvent("alice", "7", 3, 12.5, False)
    assert data == b"tensors"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b"\xff\xfe",
        structured(round=None),
        structured(round=True),
        structured(data_base64=None),
        structured(data_base64="%%%"),
        structured(source="\ud800"),
        structured(numsamples="many"),
        b'{"x":' + b"[" * 200_000,
    ],
)
def test_a_broken_structured_event_is_refused(body):
    with pytest.raises(Refused) as caught:
        event_from_json(body)
    assert caught.value.status == 400


def test_a_structured_event_of_another_content_is_refused():
    with pytest.raises(Refused) as caught:
        event_from_json(structured(datacontenttype="application/json"))
    assert caught.value.status == 415
