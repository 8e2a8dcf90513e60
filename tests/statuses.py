"""The status of a cluster of two workers, of which one answers and one is lost."""

from typing import Any

from milliways.wire.status import (
    ClusterStatus,
    DeviceStatus,
    DispatchStatus,
    GenerationStatus,
    ProcessStatus,
    RouterStatus,
    SettingsStatus,
    WorkerStatus,
)

DEVICE = DeviceStatus(
    device="cpu:0", layers=(0, 2), has_ends=True, num_experts=3, bytes=2000, memory_bytes=5000
)
ROUTER = RouterStatus(
    requests=11,
    tokens=12,
    tokens_per_s=1.25,
    positions=13,
    steps=14,
    replays=15,
    active_requests=16,
    running=17,
    waiting=18,
    placement_epoch=7,
    kv_blocks_used=19,
    kv_blocks_total=20,
    transports={"worker-0": "direct", "worker-1": "none: opening"},
    dispatch=DispatchStatus(resent_rows=21, hedged_calls=22, parked=23),
    standby="worker-1",
    standby_blocks_copied=24,
    standby_bytes_copied=25,
    standby_blocks_dropped=26,
    standby_blocks_kept=27,
)
PROCESS = ProcessStatus(
    placement_epoch=7,
    layers=(0, 2),
    has_ends=True,
    num_experts=3,
    devices=(DEVICE,),
    bytes_read=31,
    bytes_wanted=32,
    calls=33,
    merged_calls=34,
    rows=35,
    waiting_calls=36,
    router=ROUTER,
)
ANSWERING = WorkerStatus(
    worker_id="worker-0",
    incarnation=2,
    pid=101,
    state="ready",
    process=PROCESS,
    role="attention+router+experts",
    node="node-of-0",
    address="10.0.0.1:1",
    router_address="10.0.0.1:2",
    waits_for="",
    last_error="",
    quick_deaths=0,
    experts=((0, 1), (1, 0), (1, 1)),
)
SILENT = WorkerStatus(
    worker_id="worker-1",
    incarnation=3,
    pid=0,
    state="lost",
    process=None,
    role="none yet",
    node="",
    address="",
    router_address="",
    waits_for="its restart in 1 s",
    last_error="it died",
    quick_deaths=1,
    experts=(),
)
CLUSTER = ClusterStatus(
    model="demo",
    placement_epoch=7,
    is_complete=True,
    uptime_s=12.5,
    deaths=4,
    controller_pid=100,
    settings=SettingsStatus(
        declared={"workers.count": 2, "workers.resources": {"milliways_worker": 1.0}},
        declared_at_s=1.5,
        observed={"workers.count": 1},
        pending=("workers.count: 2 declared, 1 ready",),
        by_worker={"worker-0": {"workers.threads_each": 1}},
        unconfirmed=("worker-0",),
        problem="",
    ),
    workers=(ANSWERING, SILENT),
    generation=2,
    generations=(
        GenerationStatus(
            generation=1,
            model="small",
            num_workers=3,
            num_ready=3,
            is_complete=True,
            serves=False,
            text="ends when its requests have ended",
        ),
        GenerationStatus(
            generation=2,
            model="demo",
            num_workers=2,
            num_ready=1,
            is_complete=True,
            serves=True,
            text="serves",
        ),
    ),
)

# What `milliways status --json` prints of it. Tools read this: no key of it may change.
AS_JSON: dict[str, Any] = {
    "model": "demo",
    "placement_epoch": 7,
    "is_complete": True,
    "uptime_s": 12.5,
    "deaths": 4,
    "controller_pid": 100,
    "settings": {
        "declared": {"workers.count": 2, "workers.resources": {"milliways_worker": 1.0}},
        "declared_at_s": 1.5,
        "observed": {"workers.count": 1},
        "pending": ["workers.count: 2 declared, 1 ready"],
        "by_worker": {"worker-0": {"workers.threads_each": 1}},
        "unconfirmed": ["worker-0"],
        "problem": "",
    },
    "workers": [
        {
            "worker_id": "worker-0",
            "incarnation": 2,
            "pid": 101,
            "state": "ready",
            "placement_epoch": 7,
            "layers": [0, 2],
            "has_ends": True,
            "num_experts": 3,
            "devices": [
                {
                    "device": "cpu:0",
                    "layers": [0, 2],
                    "has_ends": True,
                    "num_experts": 3,
                    "bytes": 2000,
                    "memory_bytes": 5000,
                }
            ],
            "bytes_read": 31,
            "bytes_wanted": 32,
            "calls": 33,
            "merged_calls": 34,
            "rows": 35,
            "waiting_calls": 36,
            "router": {
                "requests": 11,
                "tokens": 12,
                "tokens_per_s": 1.25,
                "positions": 13,
                "steps": 14,
                "replays": 15,
                "active_requests": 16,
                "running": 17,
                "waiting": 18,
                "placement_epoch": 7,
                "kv_blocks_used": 19,
                "kv_blocks_total": 20,
                "transports": {"worker-0": "direct", "worker-1": "none: opening"},
                "dispatch": {"resent_rows": 21, "hedged_calls": 22, "parked": 23},
                "standby": "worker-1",
                "standby_blocks_copied": 24,
                "standby_bytes_copied": 25,
                "standby_blocks_dropped": 26,
                "standby_blocks_kept": 27,
            },
            "role": "attention+router+experts",
            "node": "node-of-0",
            "address": "10.0.0.1:1",
            "router_address": "10.0.0.1:2",
            "waits_for": "",
            "last_error": "",
            "quick_deaths": 0,
            "experts": [[0, 1], [1, 0], [1, 1]],
        },
        {
            "worker_id": "worker-1",
            "incarnation": 3,
            "pid": 0,
            "state": "lost",
            "role": "none yet",
            "node": "",
            "address": "",
            "router_address": "",
            "waits_for": "its restart in 1 s",
            "last_error": "it died",
            "quick_deaths": 1,
            "experts": [],
        },
    ],
    "generation": 2,
    "generations": [
        {
            "generation": 1,
            "model": "small",
            "num_workers": 3,
            "num_ready": 3,
            "is_complete": True,
            "serves": False,
            "text": "ends when its requests have ended",
        },
        {
            "generation": 2,
            "model": "demo",
            "num_workers": 2,
            "num_ready": 1,
            "is_complete": True,
            "serves": True,
            "text": "serves",
        },
    ],
}

# What /metrics has of it, without its comments.
AS_METRICS = """\
milliways_placement_epoch 7
milliways_worker_deaths_total 4
milliways_worker_state{worker_id="worker-0",state="loading"} 0
milliways_worker_state{worker_id="worker-0",state="ready"} 1
milliways_worker_state{worker_id="worker-0",state="draining"} 0
milliways_worker_state{worker_id="worker-0",state="stopped"} 0
milliways_worker_state{worker_id="worker-0",state="lost"} 0
milliways_worker_state{worker_id="worker-1",state="loading"} 0
milliways_worker_state{worker_id="worker-1",state="ready"} 0
milliways_worker_state{worker_id="worker-1",state="draining"} 0
milliways_worker_state{worker_id="worker-1",state="stopped"} 0
milliways_worker_state{worker_id="worker-1",state="lost"} 1
milliways_worker_calls_total{worker_id="worker-0"} 33
milliways_worker_merged_calls_total{worker_id="worker-0"} 34
milliways_worker_rows_total{worker_id="worker-0"} 35
milliways_sequences_running{worker_id="worker-0"} 17
milliways_queue_length{worker_id="worker-0"} 18
milliways_requests_active{worker_id="worker-0"} 16
milliways_kv_blocks_used{worker_id="worker-0"} 19
milliways_kv_blocks_total{worker_id="worker-0"} 20
milliways_router_requests_total{worker_id="worker-0"} 11
milliways_router_tokens_total{worker_id="worker-0"} 12
milliways_router_positions_total{worker_id="worker-0"} 13
milliways_router_steps_total{worker_id="worker-0"} 14
milliways_router_replays_total{worker_id="worker-0"} 15
milliways_standby_blocks_copied_total{worker_id="worker-0"} 24
milliways_standby_copied_bytes_total{worker_id="worker-0"} 25
milliways_standby_blocks_dropped_total{worker_id="worker-0"} 26
milliways_standby_blocks_kept_total{worker_id="worker-0"} 27
"""
