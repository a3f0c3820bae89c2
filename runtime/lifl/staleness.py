"""Asynchronous aggregation with a buffer (FedBuff): how much an update counts that was trained from an old model.

Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022. The server adds up the
differences that come in, whatever model each was trained from, and makes a new model of every K of them:

    model += sum(w_i * s(t_i) * d_i) / sum(w_i)        s(t) = (1 + t) ** -a

w_i is the client's weight and t_i how many models have come since the one that it was trained from. s is the
polynomial weight of FedAsync (Xie et al., "Asynchronous Federated Optimization", 2019), which FedBuff uses with
a = 1/2. It is not in the denominator: old differences move the model less, and do not make the others count more.
"""

from __future__ import annotations

from typing import Literal

from lifl.messages import JobSpec

Time = Literal["early", "late", "open"]


def staleness_weight(staleness: int, exponent: float) -> float:
    """s(t): what the difference of an update is multiplied with that is so many models old; 1 for a fresh one."""
    return float((1 + max(0, staleness)) ** -exponent)


def oldest_base(spec: JobSpec, round_number: int) -> int:
    """The first round whose model an update that counts in this round may have been trained from."""
    return max(1, round_number - spec.max_staleness) if spec.mode == "async" else round_number


def time_of(spec: JobSpec, base: int, round_number: int) -> Time:
    """How an update that was trained from the model of round `base` stands in time while a round is open."""
    if base > round_number:
        return "early"
    return "open" if base >= oldest_base(spec, round_number) else "late"


def contributor_of(spec: JobSpec, client: str, base: int) -> str:
    """What names an update that counts once: its client in a round; in an asynchronous job its client and `base`.

    `base` is the round whose model it was trained from. A buffer may have two updates of a client, with two bases.
    """
    return f"{client}@{base}" if spec.mode == "async" else client


def base_of(contributor: str) -> int:
    """The round whose model an update of an asynchronous job was trained from."""
    return int(contributor.rpartition("@")[2])
