"""FedAdagrad: federated averaging with Adagrad on the server, for clients whose data differ much.

Reddi et al. 2021, arXiv:2003.00295. The learning rate of the server is the setting to try first.
"""

from lifl import Aggregate, FedAdagrad, ModelUpdate, aggregator


@aggregator(server_optimizer=FedAdagrad(lr=0.1))
def fedadagrad(total: Aggregate, update: ModelUpdate) -> None:
    """Average the models, then step towards the mean with Adagrad."""
    total.add(update, weight=update.num_samples)
