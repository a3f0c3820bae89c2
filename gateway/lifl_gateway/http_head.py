"""What the head of an HTTP/1.1 request must look like before anything is parsed from it.

Parsers that forgive are how requests are smuggled past a proxy: this one forgives nothing that RFC 9112 does not
demand to forgive. It checks bytes; the parsing itself is left to the standard library. Sans-IO.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from lifl.errors import Refused

MAX_HEAD_BYTES: Final = 64 * 1024
MAX_FIELDS: Final = 100
_LONGEST_LENGTH: Final = 18  # digits of a Content-Length; below 2**63

_TOKEN: Final = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST_LINE: Final = re.compile(rb"(" + _TOKEN + rb") ([!-~\x80-\xff]+) HTTP/(\d)\.(\d)\r\n")
_FIELD: Final = re.compile(rb"(" + _TOKEN + rb"):([^\r\n\0]*)\r\n")
_SINGLE: Final = frozenset(
    {b"authorization", b"content-length", b"content-type", b"expect", b"host", b"transfer-encoding"}
)


class HeadFacts(NamedTuple):
    """What the server itself has to know of a head."""

    length: int
    """Content-Length; 0 when there is none."""
    has_length: bool
    is_chunked: bool
    """There is a Transfer-Encoding: the body's length is not known from the head."""
    expects_continue: bool


def check_head(head: bytes) -> HeadFacts:
    """Check a whole head, up to and with its empty line; raises Refused 400, 417, 431 or 505."""
    line = _REQUEST_LINE.match(head)
    if not line:
        raise _bad("the request line is not 'METHOD target HTTP/1.1'")
    if line[3] != b"1" or line[4] not in b"01":
        raise Refused(505, "HTTP Version Not Supported", "this server speaks HTTP/1.1")
    return _facts(_fields(head, line.end()), is_newest=line[4] == b"1")


def _fields(head: bytes, position: int) -> dict[bytes, bytes]:
    """Collect the fields by lower-case name; those that decide something may be there once only."""
    fields: dict[bytes, bytes] = {}
    count = 0
    while not (position == len(head) - 2 and head.endswith(b"\r\n")):
        field = _FIELD.match(head, position)
        if not field:
            raise _bad("a header line is malformed")
        name = field[1].lower()
        if name in fields and (name in _SINGLE or name.startswith(b"ce-")):
            raise _bad(f"the header {name.decode()} is there twice")
        fields[name] = field[2].strip(b" \t")
        position = field.end()
        count += 1
        if count > MAX_FIELDS:
            raise Refused(431, "Request Header Fields Too Large", f"at most {MAX_FIELDS} header fields")
    return fields


def _facts(fields: dict[bytes, bytes], is_newest: bool) -> HeadFacts:
    if is_newest and b"host" not in fields:
        raise _bad("an HTTP/1.1 request needs a Host header")
    length = fields.get(b"content-length")
    if length is not None and not (length.isdigit() and len(length) <= _LONGEST_LENGTH):
        raise _bad("Content-Length is not a number of bytes")
    chunked = b"transfer-encoding" in fields
    if chunked and length is not None:
        raise _bad("Content-Length and Transfer-Encoding exclude each other")
    expect = fields.get(b"expect", b"").lower()
    if expect not in (b"", b"100-continue"):
        raise Refused(417, "Expectation Failed", "the only known expectation is 100-continue")
    return HeadFacts(int(length or 0), length is not None, chunked, is_newest and bool(expect))


def _bad(detail: str) -> Refused:
    return Refused(400, "Bad Request", detail)
