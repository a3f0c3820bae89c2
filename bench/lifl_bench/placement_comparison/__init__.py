"""Placement policies side by side on a real cluster in network namespaces, and the simulator's prediction of it.

One job for each policy runs on the same cluster. Policies take turns round by round, and what is not measured just
now is idle. Clients are processes on a host of their own that begin at one moment, each at another gateway in
turn; they follow redirects and stay where they were sent, as `lifl.Client` does, and fetch each new model there.
"""
