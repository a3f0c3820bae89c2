"""The two container images: a function's, and that of a node's own processes, coordinator and autoscaler.

An image is a chain of layers, each an image of its own that is kept under a tag made of what went into it:
base, dependencies, lifl, project. A rebuild makes only what changed. Nothing runs in a container while LIFL's own
layers are built: files are put together on this machine, so that no network and no privileges are needed.
"""
