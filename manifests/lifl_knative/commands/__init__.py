"""The commands of `func` that make images or ask a cluster."""
