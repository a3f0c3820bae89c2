"""Federated averaging: the mean of the clients' models, weighted by their numbers of samples.

McMahan et al. 2017, arXiv:1602.05629.
"""

from lifl import Aggregate, ModelUpdate, aggregator


@aggregator
def fedavg(total: Aggregate, update: ModelUpdate) -> None:
    """Average the models, each with the weight of its samples."""
    total.add(update, weight=update.num_samples)
