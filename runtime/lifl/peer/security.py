"""Who may talk to a node: those who know the cluster's token, have a certificate of its authority, or both.

With TLS both sides show a certificate, and one that the authority has signed makes its owner a member. Names in
certificates are not compared: members know each other by address, and an address may move. A token without TLS
travels in the clear; use it on networks that can be trusted.
"""

from __future__ import annotations

import hmac
import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lifl.errors import InvalidInput

if TYPE_CHECKING:
    import ssl


@dataclass(frozen=True)
class Credentials:
    """What a node shows to others, and what it asks of them. Without anything everybody is let in."""

    token: str = ""
    server_tls: ssl.SSLContext | None = None
    """For connections that others make."""
    client_tls: ssl.SSLContext | None = None
    """For connections that it makes itself."""

    @classmethod
    def from_files(
        cls,
        token: Path | None = None,
        certificate: Path | None = None,
        key: Path | None = None,
        authority: Path | None = None,
    ) -> Credentials:
        """Read the token (the file's only line) and the PEM files, which go together or not at all.

        Raises InvalidInput when they cannot be used.
        """
        shown = _read_token(token) if token is not None else ""
        files = (certificate, key, authority)
        if all(file is None for file in files):
            return cls(shown)
        if certificate is None or key is None or authority is None:
            raise InvalidInput("TLS between nodes needs a certificate, its key and the authority, all three")
        contexts = (_context(is_server, certificate, key, authority) for is_server in (True, False))
        return cls(shown, *contexts)

    @property
    def admits_everybody(self) -> bool:
        """Neither a token nor a certificate is asked for."""
        return not self.token and self.server_tls is None

    def accepts(self, token: str) -> bool:
        """Whether who shows this token may go on."""
        return not self.token or hmac.compare_digest(self.token.encode(), token.encode())

    def check_listening(self, host: str, *, allow_anonymous: bool) -> None:
        """Raise InvalidInput where strangers could come in and nobody said that they may."""
        if self.admits_everybody and not allow_anonymous and not is_loopback(host):
            raise InvalidInput(
                f"{host} can be reached from other machines: give nodes a token or certificates, or allow "
                "anonymous ones if everyone who reaches it may take part"
            )


OPEN = Credentials()
"""No token and no TLS."""


def is_loopback(host: str) -> bool:
    """Whether only processes of this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _read_token(path: Path) -> str:
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path}: cannot read the token: {error}") from error
    if not token or len(token.split()) != 1 or len(token) > 4096:
        raise InvalidInput(f"{path}: expected one token of at most 4096 characters and nothing else")
    return token


def _context(is_server: bool, certificate: Path, key: Path, authority: Path) -> ssl.SSLContext:
    import ssl  # only nodes that use it pay for it

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if is_server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_cert_chain(certificate, key)
        context.load_verify_locations(authority)
    except OSError as error:  # ssl.SSLError is one
        raise InvalidInput(f"cannot use {certificate}, {key} and {authority}: {error}") from error
    return context
