"""Who may do what: bearer tokens from a file, one `client-id token` a line; `*` stands for an operator.

A client may upload its own updates and read jobs and models. An operator may do everything. Without a file
everyone may do everything, which is why a gateway without one listens on loopback only.
"""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path
from typing import Final, NamedTuple

from lifl.errors import InvalidInput, Refused

from lifl_gateway.problems import Unauthorized

_OPERATOR: Final = "*"


class Identity(NamedTuple):
    """Who sends a request."""

    client: str
    is_operator: bool

    def require_operator(self) -> None:
        """Raise Refused 403 unless this is an operator."""
        if not self.is_operator:
            raise Refused(403, "Forbidden", "this needs an operator's token")

    def require_client(self, client: str) -> None:
        """Raise Refused 403 unless this may act for `client`."""
        if not self.is_operator and self.client != client:
            raise Refused(403, "Forbidden", "the token belongs to another client")


ANYONE: Final = Identity("", True)


class Tokens:
    """The known tokens; an empty one of None knows everybody."""

    def __init__(self, identities: dict[str, Identity] | None = None) -> None:
        """`identities` by token."""
        self._known = (
            None if identities is None else {_digest(t): (t.encode(), who) for t, who in identities.items()}
        )

    @classmethod
    def from_file(cls, path: Path) -> Tokens:
        """Read a token file; raises InvalidInput naming the line that is wrong, OSError when unreadable."""
        identities: dict[str, Identity] = {}
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            words = line.rsplit(None, 1)
            if len(words) != 2:
                raise InvalidInput(f"{path}:{number}: expected 'client-id token'")
            client, token = words[0].strip(), words[1]
            if token in identities:
                raise InvalidInput(f"{path}:{number}: this token is there twice")
            identities[token] = Identity(client, client == _OPERATOR)
        if not identities:
            raise InvalidInput(f"{path}: no tokens in it; nobody could use the gateway")
        return cls(identities)

    def identify(self, authorization: str | None) -> Identity:
        """Who shows this Authorization header; raises Unauthorized."""
        if self._known is None:
            return ANYONE
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Unauthorized("send 'Authorization: Bearer <token>'")
        shown = token.strip().encode("latin-1", "replace")
        # Found by digest, so that the time of the search says nothing about the tokens.
        stored, identity = self._known.get(_digest_bytes(shown), (b"", None))
        if identity is None or not hmac.compare_digest(stored, shown):
            raise Unauthorized("the token is not known")
        return identity


def _digest(token: str) -> bytes:
    return _digest_bytes(token.encode())


def _digest_bytes(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()
