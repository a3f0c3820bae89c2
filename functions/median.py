"""Coordinate-wise median of the clients' models: bears nearly half of them being wrong.

Yin et al. 2018, arXiv:1803.01498. Every client counts the same, whatever its number of samples.
"""

from lifl import GatheredUpdates, aggregator


@aggregator(gather=True)
def median(updates: GatheredUpdates) -> None:
    """Take the median of each parameter; of an even number, the mean of the middle two."""
    low, high = (len(updates) - 1) // 2, len(updates) // 2
    for inputs, output in updates.sorted_tiles():
        output[:] = (inputs[low] + inputs[high]) / 2
