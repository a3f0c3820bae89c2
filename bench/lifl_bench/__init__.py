"""`func bench`: the same aggregation through LIFL, through a NATS broker with sidecars, and through gRPC.

Needs `pip install lifl[bench]`, and for the broker Debian's nats-server and nginx.
"""
