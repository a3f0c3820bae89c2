"""Events of one moment, of which the first makes the others void."""

from __future__ import annotations

import selectors
import socket

from lifl.event_loop import ready_keys


def test_what_an_event_closes_gets_none_of_the_same_moment() -> None:
    pairs = [socket.socketpair() for _ in range(3)]
    with selectors.DefaultSelector() as selector:
        for reader, writer in pairs:
            selector.register(reader, selectors.EVENT_READ)
            writer.send(b"x")
        seen = []
        for key in ready_keys(selector, 5.0):
            seen.append(key.fileobj)
            for reader, _ in pairs:
                if reader is not key.fileobj and reader.fileno() >= 0:
                    selector.unregister(reader)
                    reader.close()
        assert len(seen) == 1
    for reader, writer in pairs:
        reader.close()
        writer.close()


def test_a_number_that_has_gone_to_another_file_gets_no_event_of_the_one_before() -> None:
    pairs = [socket.socketpair() for _ in range(2)]
    with selectors.DefaultSelector() as selector:
        for reader, writer in pairs:
            selector.register(reader, selectors.EVENT_READ, "old")
            writer.send(b"x")
        seen = []
        for key in ready_keys(selector, 5.0):
            seen.append(key.data)
            for reader, _ in pairs:
                selector.unregister(reader)
                selector.register(reader, selectors.EVENT_READ, "new")
        assert seen == ["old"]
        assert sorted(key.data for key in ready_keys(selector, 5.0)) == ["new", "new"]
    for pair in pairs:
        for end in pair:
            end.close()
