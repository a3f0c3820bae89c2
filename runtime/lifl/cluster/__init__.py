"""Many nodes: the coordinator of a cluster, and what its members tell it."""
