"""FedAdam: federated averaging with Adam on the server, for clients whose data differ much.

Reddi et al. 2021, arXiv:2003.00295. The learning rate of the server is the setting to try first.
"""

from lifl import Aggregate, FedAdam, ModelUpdate, aggregator


@aggregator(server_optimizer=FedAdam(lr=0.1))
def fedadam(total: Aggregate, update: ModelUpdate) -> None:
    """Average the models, then step towards the mean with Adam."""
    total.add(update, weight=update.num_samples)
