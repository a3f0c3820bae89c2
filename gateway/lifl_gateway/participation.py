"""A client asks to take part in a round: what it sends, and what it is told."""

from __future__ import annotations

from typing import Final

import msgspec
from lifl.errors import Refused
from lifl.messages import Selection
from lifl.slot import MAX_CLIENT_ID_BYTES

from lifl_gateway.problems import untimely


class Participant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who wants to take part."""

    client: str
    """The client's id, as in `ce-source`: at most 256 bytes of UTF-8 that can be printed."""


_decoder: Final = msgspec.json.Decoder(Participant)


def decode_participant(data: bytes) -> Participant:
    """Decode and check; raises Refused 400 for what is no JSON, 422 for the rest."""
    try:
        participant = _decoder.decode(data)
    except msgspec.ValidationError as error:
        raise Refused(422, "Invalid participant", str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refused(400, "Bad Request", f"the body is not JSON: {error}") from None
    client = participant.client
    try:
        size = len(client.encode())
    except UnicodeEncodeError:
        size = 0
    if not 0 < size <= MAX_CLIENT_ID_BYTES or not client.isprintable():
        raise Refused(422, "Invalid participant", f"client: 1 to {MAX_CLIENT_ID_BYTES} bytes that can be printed")
    return participant


def not_selected(round_number: int) -> Refused:
    """What a client is told whose update came without its having a place in the round."""
    return Refused(
        409, "Not selected", f"enough other clients take part in round {round_number}; take part in the next"
    )


def answer_selection(selection: Selection, round_number: int) -> tuple[dict[str, object], int]:
    """The body and the status of the answer; raises Refused when the client does not take part."""
    match selection.status:
        case "late" | "early":
            raise untimely(selection.status, round_number, selection.round)
        case "enough":
            raise Refused(
                409,
                "Enough clients",
                f"{selection.selected} of {selection.places} clients are selected for round {round_number}",
            )
    # 200 where nothing was noted down: the client was selected before, or the job selects nobody.
    status = 201 if selection.status == "selected" else 200
    return {"status": "selected", "round": round_number}, status
