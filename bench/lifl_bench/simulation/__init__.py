"""`func simulate`: rounds of a large cluster, simulated event by event.

What decides is the platform's own code: the whole coordinator of `lifl.cluster`, asked with the messages that
nodes send, and a node's account of its leaves from `lifl.control`. Simulated is only what these are given and what
follows from it: when clients send, how long cores, links and workers take (`costs`), and how workers fold.

Left out: what clients download, memory that is touched for the first time, pools that are full, and failures.
"""
