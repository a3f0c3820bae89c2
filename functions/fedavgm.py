"""FedAvgM: federated averaging with momentum on the server.

Hsu, Qi and Brown 2019, arXiv:1909.06335.
"""

from lifl import Aggregate, FedAvgM, ModelUpdate, aggregator


@aggregator(server_optimizer=FedAvgM(lr=1.0, momentum=0.9))
def fedavgm(total: Aggregate, update: ModelUpdate) -> None:
    """Average the models, then step towards the mean with momentum."""
    total.add(update, weight=update.num_samples)
