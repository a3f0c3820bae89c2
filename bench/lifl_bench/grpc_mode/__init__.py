"""The `grpc` mode: a tree of aggregators that always run, with updates streamed to them over gRPC.

protocol    names, channel options, and how things travel
rounds      an aggregator's rounds and sums, without any I/O
server      the process of one aggregator
deployment  starts the tree, and the clients' side of it
"""

from lifl_bench.grpc_mode.deployment import COPIES, COPIES_DETAIL, GrpcDeployment

__all__ = ["COPIES", "COPIES_DETAIL", "GrpcDeployment"]
