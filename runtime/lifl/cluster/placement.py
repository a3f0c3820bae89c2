"""Which node folds an update (paper: locality-aware placement).

A node fits while its residual capacity RC is at least what an update takes. `best-fit` chooses the fitting node
with the smallest residual, so that few nodes are used and most merging stays inside a node; `first-fit` the first
one that was registered; `worst-fit` the one with the largest residual. When none fits, these three choose the
largest residual: nothing is refused for want of capacity. `round-robin` takes one node after another, blind to
load and locality. Nodes that are equal come in the order in which they were registered.

Residuals are kept as whole multiples of 2^-20, so that taking and giving back is exact and ties are ties.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Literal, get_args

from lifl.errors import Busy

Policy = Literal["best-fit", "first-fit", "worst-fit", "round-robin"]

POLICIES: Final[tuple[Policy, ...]] = get_args(Policy)
"""In the order in which they are shown."""

_GRAINS: Final = 1 << 20
"""Of one update."""
_LARGEST: Final = 1 << 40
"""Residuals beyond this many updates, up or down, count as this many."""
_NOTHING: Final = -(1 << 62)
"""Below every value, and below what no number of placements brings a residual down to."""


class NoNode(Busy):
    """There is no node to place an update on: none has joined, or all are draining or lost."""

    def __init__(self) -> None:
        super().__init__("no node", "no node of the cluster takes updates at the moment; one has to join")


class PlacementIndex:
    """The nodes that take updates, with their residual capacities; finds the one that a policy chooses.

    Every operation takes O(log n) for n nodes. Not thread-safe. `size` is what one update takes of a residual.
    """

    def __init__(self, residuals: Mapping[str, float] | None = None, *, size: int = 1) -> None:
        self._size = size * _GRAINS
        self._nodes: list[str] = []
        """By position, in the order of registration. Positions of removed nodes stay empty for a while."""
        self._positions: dict[str, int] = {}
        self._residuals = _Tree([])
        self._fitting = _Tree([])
        """Negated residuals of the nodes that fit: the largest is the smallest residual."""
        self._turn = 0
        """Position from which on round-robin looks for the next node."""
        names = residuals or {}
        self._build(list(names), [_to_grains(residual) for residual in names.values()])

    def __len__(self) -> int:
        """Number of nodes."""
        return len(self._positions)

    def __contains__(self, node: object) -> bool:
        """Whether the node is one of those that can be chosen."""
        return node in self._positions

    def add(self, node: str, residual: float) -> None:
        """Have a node take updates. One that is there already keeps its position in the order."""
        if node not in self._positions:
            if len(self._nodes) == self._residuals.width:
                self._compact()
            self._positions[node] = len(self._nodes)
            self._nodes.append(node)
        self.set_residual(node, residual)

    def remove(self, node: str) -> None:
        """Choose a node no more (it drains, left, or is lost); nothing happens if it is not there."""
        position = self._positions.pop(node, None)
        if position is not None:
            self._residuals.set(position, _NOTHING)
            self._fitting.set(position, _NOTHING)

    def residual(self, node: str) -> float:
        """Residual capacity as it was set, less what was taken since. Raises KeyError if it is not there."""
        return self._residuals.value(self._positions[node]) / _GRAINS

    def set_residual(self, node: str, residual: float) -> None:
        """Note a node's residual capacity, in updates. Raises KeyError if it is not there."""
        self._set(self._positions[node], _to_grains(residual))

    def take(self, node: str) -> None:
        """Lower a node's residual by one update. Raises KeyError if it is not there."""
        position = self._positions[node]
        self._set(position, self._residuals.value(position) - self._size)

    def choose(self, policy: Policy) -> str:
        """The node for the next update; its residual stays as it is. Raises NoNode if there is none.

        Of the policies only round-robin remembers what it chose.
        """
        if not self._positions:
            raise NoNode
        if policy == "round-robin":
            return self._nodes[self._next_in_turn()]
        position = self._fitting_position(policy)
        return self._nodes[self._emptiest_position() if position is None else position]

    def place_all(self, count: int, policy: Policy) -> dict[str, int]:
        """Place `count` updates at once, as `choose` and `take` one after another would: updates of each node.

        Only nodes that get some, in the order of registration. Takes O(n log n), however many updates there are.
        Raises NoNode if there is no node.
        """
        if not self._positions:
            raise NoNode
        before = self._residuals.values(len(self._nodes))
        if policy == "round-robin":
            self._deal_out(count)
        else:
            self._level_out(self._fill_up(count, policy))
        after = self._residuals.values(len(self._nodes))
        counts = [(old - new) // self._size for old, new in zip(before, after, strict=True)]
        return {node: count for node, count in zip(self._nodes, counts, strict=True) if count}

    # --- one update ----------------------------------------------------------------------------------------

    def _fitting_position(self, policy: Policy) -> int | None:
        """The position that the policy prefers among those that fit; None for the emptiest of all."""
        if policy == "best-fit":
            return self._fitting.first_of_largest()
        if policy == "first-fit":
            return self._residuals.first_at_least(self._size)
        return None

    def _emptiest_position(self) -> int:
        position = self._residuals.first_of_largest()
        assert position is not None
        return position

    def _next_in_turn(self) -> int:
        position = self._residuals.first_at_least(_NOTHING + 1, self._turn)
        if position is None:
            position = self._residuals.first_at_least(_NOTHING + 1)
        assert position is not None
        self._turn = position + 1
        return position

    # --- many updates --------------------------------------------------------------------------------------

    def _fill_up(self, count: int, policy: Policy) -> int:
        """Place updates while the policy finds a node that fits; returns how many are left.

        The node that best-fit or first-fit chooses stays their choice until it fits no more.
        """
        while count and (position := self._fitting_position(policy)) is not None:
            residual = self._residuals.value(position)
            run = min(count, residual // self._size)
            self._set(position, residual - run * self._size)
            count -= run
        return count

    def _level_out(self, count: int) -> None:
        """Place each update on the node that is the emptiest then."""
        if not count:
            return
        values = self._residuals.values(len(self._nodes))
        present = sorted(self._positions.values())
        counts = _level([values[position] for position in present], count, self._size)
        for position, number in zip(present, counts, strict=True):
            values[position] -= number * self._size
        self._replace(values)

    def _deal_out(self, count: int) -> None:
        """Place one update after another on the next node in turn."""
        values = self._residuals.values(len(self._nodes))
        for position in self._positions.values():
            values[position] -= count // len(self._positions) * self._size
        for _ in range(count % len(self._positions)):
            values[self._next_in_turn()] -= self._size
        self._replace(values)

    # --- the two trees -------------------------------------------------------------------------------------

    def _set(self, position: int, value: int) -> None:
        self._residuals.set(position, value)
        self._fitting.set(position, -value if value >= self._size else _NOTHING)

    def _replace(self, values: Sequence[int]) -> None:
        """Set the values of all positions."""
        self._residuals = _Tree(values)
        self._fitting = _Tree([-value if value >= self._size else _NOTHING for value in values])

    def _build(self, nodes: list[str], values: Sequence[int]) -> None:
        self._nodes = nodes
        self._positions = {node: position for position, node in enumerate(nodes)}
        self._replace(values)

    def _compact(self) -> None:
        """Give positions anew, without those of removed nodes and with room for as many again."""
        before_turn = sum(position < self._turn for position in self._positions.values())
        positions = sorted(self._positions.values())
        values = [self._residuals.value(position) for position in positions]
        self._build([self._nodes[position] for position in positions], values)
        self._residuals.widen()
        self._fitting.widen()
        self._turn = before_turn


def plan_counts(count: int, residuals: Mapping[str, float], policy: Policy, *, size: int = 1) -> dict[str, int]:
    """Place `count` identical updates on nodes with these residual capacities: updates of each that gets some.

    The same as choosing for one after another with each taking `size` of its node's residual, in O(n log n).
    The order of `residuals` is that of registration. Raises NoNode if it is empty.
    """
    return PlacementIndex(residuals, size=size).place_all(count, policy)


def _to_grains(residual: float) -> int:
    """Raises ValueError for what is no number."""
    return round(max(min(residual, _LARGEST), -_LARGEST) * _GRAINS)


def _level(values: Sequence[int], count: int, size: int) -> list[int]:
    """How often each value is lowered by `size` when `count` times the largest, of equal ones the first, is.

    In other words: of all value - k * size, k >= 0, how many of the `count` largest come from each value.
    """
    top = max(values)

    def above(steps: int) -> int:
        bound = top - steps * size
        return sum((value - bound + size - 1) // size for value in values if value > bound)

    low, high = count // len(values), count  # between one value that stands alone and all of them equal
    while low < high:
        middle = (low + high + 1) // 2
        if above(middle) <= count:
            low = middle
        else:
            high = middle - 1
    bound = top - low * size
    counts = [max(0, (value - bound + size - 1) // size) for value in values]
    # Each value above the next bound has exactly one more between the two bounds.
    edge = [
        (value - number * size, -position)
        for position, (value, number) in enumerate(zip(values, counts, strict=True))
    ]
    edge.sort(reverse=True)
    for _, position in edge[: count - sum(counts)]:
        counts[-position] += 1
    return counts


class _Tree:
    """Values at positions 0, 1, ...; each inner node has the larger one of its two children (a tournament)."""

    def __init__(self, values: Sequence[int]) -> None:
        self.width = 1 << max(0, len(values) - 1).bit_length()
        """Positions that there is room for."""
        self._tree = [_NOTHING] * self.width
        self._tree += values
        self._tree += [_NOTHING] * (2 * self.width - len(self._tree))
        self._hold_tournament()

    def _hold_tournament(self) -> None:
        tree = self._tree
        for node in range(self.width - 1, 0, -1):
            left, right = tree[2 * node], tree[2 * node + 1]
            tree[node] = left if left >= right else right

    def widen(self) -> None:
        """Make room for as many positions again."""
        leaves = self._tree[self.width :]
        self._tree = [_NOTHING] * (2 * self.width) + leaves + [_NOTHING] * self.width
        self.width *= 2
        self._hold_tournament()

    def value(self, position: int) -> int:
        """The value at one position."""
        return self._tree[self.width + position]

    def values(self, count: int) -> list[int]:
        """The values at the first positions, as a new list."""
        return self._tree[self.width : self.width + count]

    def set(self, position: int, value: int) -> None:
        """Change the value at one position."""
        tree = self._tree
        node = self.width + position
        tree[node] = value
        while node > 1:
            other = tree[node ^ 1]
            if other > value:
                value = other
            node >>= 1
            if tree[node] == value:
                return
            tree[node] = value

    def first_of_largest(self) -> int | None:
        """The first position that has the largest value; None when all are empty."""
        largest = self._tree[1]
        return None if largest == _NOTHING else self.first_at_least(largest)

    def first_at_least(self, bound: int, start: int = 0) -> int | None:
        """The first position from `start` on whose value is `bound` or more; None if there is none."""
        if start >= self.width:
            return None
        tree = self._tree
        node = self.width + start if start else 1
        while tree[node] < bound:
            while node & 1:  # all that is left of this node's parent has been looked at
                if node == 1:
                    return None
                node >>= 1
            node += 1
        while node < self.width:
            node *= 2
            if tree[node] < bound:
                node += 1
        return node - self.width
