"""The autoscaler class `plan.autoscaling.lifl.dev`: the coordinator's plan sets how many pods a function has.

    plan        what the coordinator says of functions, and the long poll that asks it
    roles       which PodAutoscalers stand for a function now
    decision    from a PodAutoscaler, what is around it and the plan to what is to be written: no I/O
    conditions  a PodAutoscaler's status
    objects     names and fields of the objects
    controller  watches the objects, and writes what was decided
    monitor     /healthz, /readyz and /metrics

`python -m lifl_knative.autoscaler` runs it. See docs/autoscaling.md.
"""
