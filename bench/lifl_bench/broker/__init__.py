"""The broker modes: what Knative Eventing with a NATS JetStream broker does to an update, with real parts.

client -> ingress -> nats-server -> filter -> sidecar (nginx) -> function, and the function's reply the same way
again. It is a model of that path, not Knative: there is no gateway and no activator, ingress and filter are
Python, and the sidecar is "queue-proxy-like". `TUNED` is this path as fast as it could be made with
nats-py, `WIRE` the same with a NATS client that was written for it, `STOCK` what one meets who changes nothing.
"""
