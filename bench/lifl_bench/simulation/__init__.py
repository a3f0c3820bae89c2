"""`func simulate`: rounds of a large cluster, simulated event by event.

What decides is the platform's own code: placement, planning and the coordinator's account of a round from
`lifl.cluster`, the account of a node and its leaves from `lifl.control`. Simulated is only what these are given and
what follows from it: when clients send, how long cores, links and workers take (`costs`), and how workers fold.
"""
