"""Heads of HTTP requests: what passes and what is refused before anything is parsed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lifl.errors import Refused
from lifl_gateway.http_head import HeadFacts, check_head


def head(*fields: str, line: str = "POST /v1/jobs HTTP/1.1") -> bytes:
    return "\r\n".join([line, *fields, "", ""]).encode("latin-1")


def refusal(data: bytes) -> Refused:
    with pytest.raises(Refused) as caught:
        check_head(data)
    return caught.value


def test_a_plain_head_passes_with_its_length():
    assert check_head(head("Host: a", "Content-Length: 12")) == HeadFacts(12, True, False, False)


def test_a_head_without_a_length_has_none():
    assert check_head(head("Host: a")) == HeadFacts(0, False, False, False)


def test_an_expectation_is_noted():
    assert check_head(head("Host: a", "Content-Length: 1", "Expect: 100-Continue")).expects_continue


def test_http_1_0_expects_nothing_and_needs_no_host():
    facts = check_head(head("Expect: 100-continue", line="POST / HTTP/1.0"))
    assert not facts.expects_continue


def test_a_transfer_encoding_is_noted():
    assert check_head(head("Host: a", "Transfer-Encoding: chunked")).is_chunked


@pytest.mark.parametrize(
    "fields",
    [
        ("Content-Length: 1",),  # no host
        ("Host: a", "Content-Length: 1", "Content-Length: 1"),
        ("Host: a", "Content-Length: 1", "Transfer-Encoding: chunked"),
        ("Host: a", "Content-Length: -1"),
        ("Host: a", "Content-Length: +1"),
        ("Host: a", "Content-Length: 1_0"),
        ("Host: a", "Content-Length: 0x10"),
        ("Host: a", "Content-Length: 1,1"),
        ("Host: a", "Content-Length: \xb2"),
        ("Host: a", "Content-Length:"),
        ("Host: a", "Content-Length: " + "9" * 19),
        ("Host: a", "Content-Length : 1"),
        ("Host: a", " folded: 1"),
        ("Host: a", "no colon"),
        ("Host: a", ": no name"),
        ("Host: a", "X: a\nY: b"),
        ("Host: a", "X: a\rY: b"),
        ("Host: a", "X: \0"),
        ("Host: a", "Host: b"),
        ("Host: a", "ce-source: a", "CE-Source: b"),
        ("Host: a", "Authorization: a", "authorization: b"),
    ],
)
def test_a_head_that_can_be_read_in_two_ways_is_refused(fields):
    assert refusal(head(*fields)).status == 400


@pytest.mark.parametrize(
    "line",
    [
        "",
        "GET",
        "GET /",
        "GET  / HTTP/1.1",
        "GET / HTTP/1.1 ",
        "G\tT / HTTP/1.1",
        "GET / http/1.1",
        "GET /a b HTTP/1.1",
    ],
)
def test_a_malformed_request_line_is_refused(line):
    assert refusal(head("Host: a", line=line)).status == 400


@pytest.mark.parametrize("line", ["PRI * HTTP/2.0", "GET / HTTP/0.9", "GET / HTTP/1.2"])
def test_another_version_is_refused_as_such(line):
    assert refusal(head("Host: a", line=line)).status == 505


def test_another_expectation_is_refused_as_such():
    assert refusal(head("Host: a", "Expect: miracles")).status == 417


def test_too_many_fields_are_refused_as_such():
    assert refusal(head("Host: a", *(f"X-{i}: 1" for i in range(100)))).status == 431


@given(st.binary(max_size=300))
def test_any_bytes_pass_or_are_refused(data):
    try:
        facts = check_head(data + b"\r\n\r\n")
    except Refused:
        return
    assert facts.length >= 0


@given(
    st.lists(
        st.tuples(
            st.from_regex(r"[A-Za-z][A-Za-z0-9-]{0,20}", fullmatch=True), st.text('abc: \t;,="', max_size=20)
        ),
        max_size=20,
    )
)
def test_fields_of_any_text_pass_when_they_decide_nothing(fields):
    extra = {f"x-{name}".lower(): value for name, value in fields}
    assert check_head(head("Host: a", *(f"{n}: {v}" for n, v in extra.items()))).length == 0
