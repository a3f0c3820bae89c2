"""Bulk bytes between the nodes of a cluster over TCP: models are pulled, partial aggregates are pushed."""
