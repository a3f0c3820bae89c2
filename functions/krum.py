"""Krum: takes the one model that lies closest to its neighbours, and so ignores outliers as a whole.

Blanchard et al. 2017, arXiv:1703.02757. Chooses well while more than 2 * FAULTY + 2 clients take part.
"""

from lifl import GatheredUpdates, aggregator

FAULTY = 1
"""How many clients may be wrong or hostile."""


@aggregator(gather=True)
def krum(updates: GatheredUpdates) -> None:
    """Choose the update whose squared distances to its nearest others have the smallest sum."""
    neighbours = max(1, len(updates) - FAULTY - 2)
    distances = updates.squared_distances()
    distances.sort(axis=1)  # the first of each row is the update itself, at distance 0
    best = distances[:, 1 : neighbours + 1].sum(axis=1).argmin()
    for inputs, output in updates.tiles():
        output[:] = inputs[best]
