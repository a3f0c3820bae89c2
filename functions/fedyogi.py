"""FedYogi: federated averaging with Yogi on the server, for clients whose data differ much.

Reddi et al. 2021, arXiv:2003.00295. The learning rate of the server is the setting to try first.
"""

from lifl import Aggregate, FedYogi, ModelUpdate, aggregator


@aggregator(server_optimizer=FedYogi(lr=0.01))
def fedyogi(total: Aggregate, update: ModelUpdate) -> None:
    """Average the models, then step towards the mean with Yogi."""
    total.add(update, weight=update.num_samples)
