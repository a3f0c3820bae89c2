"""A function to start from: what it adds up decides what the next model is.

It is called once for each model update, in any order and in several processes at once, and what these add up is
summed. So decide by the update alone: its tensors (`update.array(name)`, `update.tensor(name)`), `update.client`,
`update.num_samples`, `update.round`. An update that is not added does not count.
"""

from lifl import Aggregate, ModelUpdate, aggregator


@aggregator
def minimal(total: Aggregate, update: ModelUpdate) -> None:
    """Average the models, whatever the clients' numbers of samples."""
    total.add(update, weight=1.0)
