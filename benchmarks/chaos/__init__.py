"""Breaks a running cluster on purpose, and compares every token with the undisturbed run.

    from milliways.benchmarks.chaos.faults import Fault
    from milliways.benchmarks.chaos.run import LoadSize, report_of, run_trial, started_cluster
    from milliways.benchmarks.chaos.trial import Plan

    plan = Plan(faults=(Fault.KILL_ROUTER,), seed=0, duration_s=10.0)
    with started_cluster(["--workers", "3"]) as cluster:
        heard = run_trial(cluster, plan, LoadSize(), print)
    assert report_of(plan, LoadSize(), heard, ended=[]).holds

It owns the requests of the load (`requests`), the clients (`clients`, `load`), the faults and the
code that injects them (`faults`, `victims`, `injectors`; `endings` for those that end a cluster),
and the report (`report`). `milliways chaos` reads the command line and prints.

Invariants:

- The seed decides the requests, and which faults come in which order.
- A process that was stopped is always resumed, also when a run is interrupted.
- An answer counts only if it is equal to the undisturbed answer, bit for bit.
- Only `ray_actuator` imports Ray. The modules marked "Pure" do no I/O.
"""
