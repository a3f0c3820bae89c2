"""Coordinate-wise trimmed mean: leaves out the largest and the smallest values of each parameter.

Yin et al. 2018, arXiv:1803.01498. Every client counts the same, whatever its number of samples.
"""

from lifl import GatheredUpdates, aggregator

TRIM = 0.2
"""The part of the clients that is left out at each end, less than a half."""


@aggregator(gather=True)
def trimmed_mean(updates: GatheredUpdates) -> None:
    """Average each parameter without its extreme values."""
    cut = int(TRIM * len(updates))
    for inputs, output in updates.sorted_tiles():
        inputs[cut : len(updates) - cut].mean(axis=0, out=output)
