"""`func simulate`: rounds of a large cluster, simulated event by event.

What decides is the platform's own code: the whole coordinator of `lifl.cluster`, asked with the messages that
nodes send, and a node's account of its leaves from `lifl.control`. Simulated is only what these are given and what
follows from it: when clients send, how long cores, links and workers take (`costs`), and how workers fold.

Questions to the coordinator are HTTP requests as in `lifl.cluster.member_link`, one at a time from each node, with
all messages that wait; the coordinator deals with them one after another.

Left out: what clients download, heartbeats as work of the coordinator, what a gateway asks its own node besides
two questions for each upload, memory that is touched for the first time, pools that are full, and failures.
"""
