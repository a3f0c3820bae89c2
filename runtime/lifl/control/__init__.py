"""The control plane: jobs, rounds, the hierarchy of aggregators, checkpoints, and their coordinator."""
