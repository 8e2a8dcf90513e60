"""The pure part of `milliways chaos`: its requests, victims, comparisons, report and picture."""

import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from milliways.benchmarks.chaos.answers import Answer, Choice, Outcome, difference
from milliways.benchmarks.chaos.faults import (
    ENDS_CLUSTER,
    IMPOSSIBLE,
    POSSIBLE,
    Fault,
    parse_faults,
    plan_faults,
)
from milliways.benchmarks.chaos.histogram import BOUNDS_S, counts, draw_histogram
from milliways.benchmarks.chaos.load import Load
from milliways.benchmarks.chaos.report import (
    Ending,
    FaultRecord,
    format_report,
    make_report,
    percentile,
)
from milliways.benchmarks.chaos.requests import MODES, ChaosRequest, Surface, draw_requests
from milliways.benchmarks.chaos.resource_usage import Sample, format_growth, growth, take_sample
from milliways.benchmarks.chaos.victims import Place, Replication, WorkerFacts, choose
from milliways.v1 import router_pb2
from milliways.wire.errors import ConfigError
from milliways.wire.placement import ExpertId
from milliways.wire.view import ClusterView, Member, WorkerState
from tests.simulation.faults import Fault as SimulatedFault

REQUESTS = draw_requests(28, max_tokens=8, seed=1)


def test_requests_are_of_all_modes_over_both_protocols() -> None:
    kinds = Counter((request.mode, request.surface) for request in REQUESTS)
    assert kinds == {(mode, surface): 2 for mode in MODES for surface in Surface}
    assert (
        REQUESTS
        == draw_requests(28, max_tokens=8, seed=1)
        != draw_requests(28, max_tokens=8, seed=2)
    )


@pytest.mark.parametrize("sent", REQUESTS[:14], ids=str)
def test_both_protocols_send_the_same_request(sent: Any) -> None:
    body, message = sent.http_body("demo"), sent.grpc_message()
    assert (body["prompt"], body["seed"]) == (message.text, message.sampling.seed)
    assert body.get("n", 1) == max(1, message.num_samples) == sent.num_samples
    assert body.get("stop", []) == list(message.stop)
    assert body.get("logprobs", 0) == message.sampling.num_logprobs
    assert body.get("echo", False) == message.echo == message.HasField("prompt_logprobs")
    for name in ("temperature", "top_p", "presence_penalty", "frequency_penalty"):
        default = getattr(type(message.sampling)(), name)
        assert getattr(message.sampling, name) == pytest.approx(body.get(name, default))


def test_faults_are_read_from_their_names() -> None:
    assert parse_faults("freeze, kill-expert") == (Fault.FREEZE, Fault.KILL_EXPERT)


@pytest.mark.parametrize("text", ["", "earthquake", "freeze,earthquake"])
def test_unknown_fault_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--faults"):
        parse_faults(text)


@pytest.mark.parametrize("fault", IMPOSSIBLE)
def test_fault_that_cannot_be_injected_is_refused_with_the_reason(fault: Fault) -> None:
    with pytest.raises(ConfigError, match="from outside"):
        parse_faults(f"freeze,{fault.value}")


def test_fault_that_no_signal_can_inject_is_tested_in_simulation() -> None:
    assert SimulatedFault(Fault.DROP_REPLY.value)
    assert set(POSSIBLE) | set(IMPOSSIBLE) == set(Fault)


def test_every_fault_comes_once_before_one_is_repeated() -> None:
    made = list(islice(plan_faults(POSSIBLE, 7), 3 * len(POSSIBLE)))
    for turn in range(3):
        faults = [s.fault for s in made[turn * len(POSSIBLE) : (turn + 1) * len(POSSIBLE)]]
        assert sorted(faults, key=POSSIBLE.index) == list(POSSIBLE)
    assert made == list(islice(plan_faults(POSSIBLE, 7), len(made)))
    assert made != list(islice(plan_faults(POSSIBLE, 8), len(made)))


def facts(name: str, **more: Any) -> WorkerFacts:
    shown = {"num_experts": 1, "num_layers": 4, "is_router": True} | more
    return WorkerFacts(place=Place(name=name, node_id="n", pid=1), **shown)


CUT = [
    facts("begins", is_router=False),
    facts("ends", num_active_requests=2),
    facts("only experts", num_layers=0, is_router=False),
]
ALIKE = [facts("idle"), facts("busy", num_active_requests=2, num_kv_blocks_used=5)]


@pytest.mark.parametrize(
    ("fault", "workers", "victim"),
    [
        (Fault.KILL_EXPERT, CUT, "only experts"),
        (Fault.KILL_ATTENTION, CUT, "begins"),
        (Fault.KILL_ROUTER, CUT, "ends"),
        (Fault.KILL_EXPERT, ALIKE, "idle"),
        (Fault.KILL_ATTENTION, ALIKE, "busy"),
        (Fault.KILL_ROUTER, ALIKE, "busy"),
    ],
)
def test_victim_is_a_worker_that_fits_the_fault_best(
    fault: Fault, workers: list[WorkerFacts], victim: str
) -> None:
    for draw in range(3):
        place = choose(fault, workers, draw)
        assert place is not None and place.name == victim


def test_any_worker_can_be_frozen() -> None:
    places = [choose(Fault.FREEZE, CUT, draw) for draw in range(3)]
    assert {place.name for place in places if place} == {"begins", "ends", "only experts"}


def test_there_is_no_victim_if_no_worker_fits() -> None:
    assert choose(Fault.KILL_ROUTER, [CUT[0], CUT[2]], 0) is None
    assert choose(Fault.FREEZE, [], 0) is None


def view_of(*states: WorkerState) -> ClusterView:
    members = {
        f"w{i}": Member(
            worker_id=f"w{i}",
            incarnation=1,
            address="",
            state=state,
            num_layers=1,
            has_ends=True,
            experts=frozenset({ExpertId(0, i % 2)}),
        )
        for i, state in enumerate(states)
    }
    chains = {name: (name,) for name in members}
    return ClusterView(placement_epoch=1, members=members, chains=chains)


def test_cluster_is_restored_when_everything_is_replicated_as_before() -> None:
    ready = WorkerState.READY
    baseline = Replication.of(view_of(ready, ready, ready))
    assert baseline.holds_in(view_of(ready, ready, ready))
    for state in (WorkerState.LOST, WorkerState.LOADING, WorkerState.DRAINING):
        assert not baseline.holds_in(view_of(ready, ready, state))


def answer(*token_ids: int, logprob: float = -1.0, reason: str = "stop") -> Answer:
    text = "".join(map(str, token_ids))
    choice = Choice(list(token_ids), [logprob for _ in token_ids], text, reason)
    return Answer([choice], [float(i) for i in range(len(token_ids))])


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (answer(1, 2, 3), ""),
        (answer(1, 7, 3), "token_ids[1]: [7, 3], was [2, 3]"),
        (answer(1, 2), "token_ids[2]: [], was [3]"),
        (answer(1, 2, 3, logprob=-1.0000001), "logprobs[0]"),
        (answer(1, 2, 3, reason="length"), "finish_reason: 'length', was 'stop'"),
    ],
)
def test_answers_are_compared_bit_for_bit(other: Answer, expected: str) -> None:
    found = difference(answer(1, 2, 3), other)
    assert expected in found and bool(expected) == bool(found)


def test_token_that_comes_twice_is_an_error() -> None:
    got = Answer.of(REQUESTS[0])
    event = router_pb2.TokenEvent(token_id=5, index=0)
    got.add_event(event, 0.0)
    with pytest.raises(ValueError, match="token 0 came after 1"):
        got.add_event(event, 0.0)


def test_scores_of_a_prompt_are_compared_and_may_come_only_once() -> None:
    scores = [router_pb2.PromptLogprob(position=i, token_id=5, logprob=-i) for i in (1, 2)]
    wanted, got = Answer.of(REQUESTS[0]), Answer.of(REQUESTS[0])
    wanted.add_scores(scores)
    got.add_scores(scores[:1])
    assert "prompt_logprobs[1]" in difference(wanted, got)
    with pytest.raises(ValueError, match="prompt token 1 came after 1"):
        got.add_scores(scores[:1])
    got.add_scores(scores[1:])
    assert difference(wanted, got) == ""


def test_http_chunks_make_the_same_answer_as_grpc_events() -> None:
    by_http, by_grpc = Answer.of(REQUESTS[0]), Answer.of(REQUESTS[0])
    last = router_pb2.FINISH_REASON_LENGTH
    by_grpc.add_event(router_pb2.TokenEvent(token_id=5, text="a"), 1.0)
    by_grpc.add_event(router_pb2.TokenEvent(token_id=6, index=1, text="b", finish_reason=last), 2.0)
    for now_s, token_id, text, reason in ((1.0, 5, "a", None), (2.0, 6, "b", "length")):
        piece = {"index": 0, "token_ids": [token_id], "text": text, "logprobs": None}
        by_http.add_chunk({"choices": [piece | {"finish_reason": reason}]}, now_s)
    (one,), (other,) = by_http.choices, by_grpc.choices
    assert (one.token_ids, one.text, one.finish_reason) == ([5, 6], "ab", "length")
    assert (other.token_ids, other.text, other.finish_reason) == ([5, 6], "ab", "length")
    assert by_http.is_complete and by_http.token_times_s == by_grpc.token_times_s


def outcome(index: int, started_s: float, got: Answer, error: str = "") -> Outcome:
    ended_s = started_s + 3.0
    return Outcome(
        request_index=index, started_s=started_s, ended_s=ended_s, answer=got, error=error
    )


def test_stall_is_the_longest_wait_between_two_tokens_in_a_period() -> None:
    got = answer(1, 2, 3)
    got.token_times_s = [10.5, 10.6, 11.0]
    one = outcome(0, 10.0, got)
    assert one.first_token_s == pytest.approx(0.5)
    assert one.stall_s() == pytest.approx(0.4)
    assert one.stall_s(since_s=10.0, until_s=10.55) == pytest.approx(0.1)
    assert one.stall_s(since_s=10.55, until_s=10.7) == pytest.approx(0.4)
    assert one.stall_s(since_s=11.5) == 0.0
    assert outcome(0, 10.0, got, error="broke").stall_s() == pytest.approx(2.0)
    assert outcome(0, 10.0, Answer.of(REQUESTS[0])).first_token_s is None


def test_report_counts_what_ran_during_each_fault() -> None:
    records = [
        FaultRecord(fault=Fault.FREEZE, victim="w0", began_s=10.0, ended_s=11.0, restored_s=11.0),
        FaultRecord(
            fault=Fault.KILL_ROUTER, victim="w1", began_s=20.0, ended_s=20.0, restored_s=28.0
        ),
    ]
    undisturbed = [outcome(0, 0.0, answer(1, 2)), outcome(1, 0.0, answer(3))]
    disturbed = [
        outcome(0, 9.0, answer(1, 2)),
        outcome(1, 10.5, answer(4)),
        outcome(0, 25.0, answer(1, 2), error="UNAVAILABLE"),
        outcome(1, 50.0, answer(3)),
    ]
    report = make_report(REQUESTS, undisturbed, disturbed, records)
    rows = {row.name: row for row in report.rows}
    assert list(rows) == ["none (undisturbed)", "kill-router", "freeze", "all"]
    freeze, kill, total = rows["freeze"], rows["kill-router"], rows["all"]
    assert (freeze.count, freeze.num_requests, freeze.num_differing) == (1, 2, 1)
    assert (kill.num_requests, kill.num_failed, kill.stalls_s) == (1, 1, ())
    assert (total.count, total.num_requests, total.num_failed, total.num_differing) == (2, 4, 1, 1)
    assert kill.recoveries_s == (8.0,) and len(total.stalls_s) == 2
    assert not report.holds and len(report.complaints) == 2
    table = format_report(report)
    assert "UNAVAILABLE" in table and "BROKEN" in table and "token_ids[0]" in table


def test_promise_holds_if_no_answer_changed() -> None:
    records = [FaultRecord(fault=Fault.SLOW, victim="w0", began_s=1.0, ended_s=2.0, restored_s=2.0)]
    run = [outcome(0, 0.0, answer(1, 2))]
    report = make_report(REQUESTS, run, run, records)
    assert report.holds and "the promise holds" in format_report(report)


def test_connection_may_break_only_if_its_own_server_was_killed() -> None:
    def broken(at_s: float) -> Outcome:
        got = answer(1, 2)
        got.note_break(at_s, OSError("reset"))
        return outcome(0, at_s - 1.0, got)

    def record(fault: Fault) -> FaultRecord:
        return FaultRecord(fault=fault, victim="it", began_s=10.0, ended_s=10.0, restored_s=15.0)

    undisturbed = [outcome(0, 0.0, answer(1, 2))]
    for fault in POSSIBLE:
        report = make_report(REQUESTS, undisturbed, [broken(10.5), broken(16.0)], [record(fault)])
        assert report.holds == (fault in (Fault.KILL_INGRESS, Fault.KILL_PROXY))
        assert report.rows[-1].num_resumed == 2
    late = make_report(REQUESTS, undisturbed, [broken(30.0)], [record(Fault.KILL_INGRESS)])
    assert not late.holds and "no fault explains: OSError: reset" in format_report(late)
    (kept,) = broken(10.5).compared({0: answer(1, 2)}).answer.breaks
    assert kept.at_s == 10.5


def test_cluster_that_does_not_recover_breaks_the_promise() -> None:
    records = [
        FaultRecord(fault=Fault.SLOW, victim="w0", began_s=1.0, ended_s=2.0, restored_s=None)
    ]
    run = [outcome(0, 0.0, answer(1, 2))]
    assert not make_report(REQUESTS, run, run, records).holds


def ending(fault: Fault, **more: Any) -> Ending:
    shown = {"exit_code": 0, "reason": "finishing requests", "after_s": 3.0, "num_left": 0} | more
    return Ending(fault=fault, **shown)


RAYLET_GONE = {"exit_code": 1, "reason": "Ray's raylet was killed by SIGKILL: the cluster ends"}


@pytest.mark.parametrize(
    ("how", "problems"),
    [
        (ending(Fault.SIGTERM), []),
        (ending(Fault.SIGTERM, exit_code=1), ["ended with exit code 1, not 0"]),
        (ending(Fault.SIGTERM, num_left=2), ["left 2 processes"]),
        (ending(Fault.SIGTERM, exit_code=None, after_s=180.0), ["has not ended within 180 s"]),
        (ending(Fault.KILL_RAYLET, **RAYLET_GONE), []),
        (ending(Fault.KILL_RAYLET, exit_code=1, reason=""), ["did not say why it ended: ''"]),
        (
            ending(Fault.KILL_RAYLET, **RAYLET_GONE | {"exit_code": 0}),
            ["ended with exit code 0, not 1"],
        ),
    ],
)
def test_cluster_that_is_ended_must_end_as_promised(how: Ending, problems: list[str]) -> None:
    assert list(how.problems) == problems
    run = [outcome(0, 0.0, answer(1, 2))]
    report = make_report(REQUESTS, run, run, [], [how])
    assert report.holds == (not problems)
    assert str(how) in format_report(report)


def test_requests_may_be_lost_with_ray_but_not_on_sigterm() -> None:
    undisturbed = [outcome(0, 0.0, answer(1, 2))]
    lost = outcome(0, 9.0, answer(1), error="connection refused")
    lost.answer.note_break(10.5, OSError("reset"))
    other = outcome(0, 9.0, answer(7, 2))
    later = outcome(0, 15.0, answer(1), error="connection refused")

    def holds(fault: Fault, *disturbed: Outcome) -> bool:
        record = FaultRecord(
            fault=fault, victim="serve", began_s=10.0, ended_s=12.0, restored_s=None
        )
        return make_report(REQUESTS, undisturbed, disturbed, [record]).holds

    assert holds(Fault.KILL_RAYLET, lost)
    assert not holds(Fault.SIGTERM, lost)
    for fault in ENDS_CLUSTER:
        assert holds(fault, outcome(0, 9.0, answer(1, 2)))
        assert not holds(fault, other)
        assert not holds(fault, later)


class SlowClient:
    """Sends one token when it is told to, and the rest when it is told again."""

    def __init__(self) -> None:
        self.num_sent = 0
        self.first, self.rest = threading.Event(), threading.Event()

    def send(self, request: ChaosRequest, answer: Answer) -> None:
        self.num_sent += 1
        for told, reason in ((self.first, ""), (self.rest, "length")):
            assert told.wait(30.0)
            for choice in answer.choices:
                choice.add([1], "a", None, reason)
            answer.token_times_s.append(0.0)


def test_load_begins_no_more_only_while_all_that_run_have_a_token() -> None:
    client = SlowClient()
    load = Load(REQUESTS[:3], dict.fromkeys(Surface, client), num_clients=2)
    assert not load.begin_no_more_if_all_have_a_token()
    load.start()
    wait_until(lambda: client.num_sent == 2)
    assert not load.begin_no_more_if_all_have_a_token()
    client.first.set()
    wait_until(load.begin_no_more_if_all_have_a_token)
    assert load.num_ended == 0
    client.rest.set()
    assert [one.error for one in load.stop()] == ["", ""]
    assert client.num_sent == 2


def test_outcome_that_dropped_its_tokens_after_comparison_counts_the_same() -> None:
    wanted = {0: answer(1, 2), 1: answer(3)}
    same, other = (
        outcome(0, 9.0, answer(1, 2)).compared(wanted),
        outcome(1, 9.0, answer(4)).compared(wanted),
    )
    assert same.difference == "" and "token_ids[0]" in (other.difference or "")
    assert same.answer.choices == [] and same.compared({}) is same
    failed = outcome(1, 9.0, answer(4), error="UNAVAILABLE").compared(wanted)
    assert failed.difference == "" and failed.error
    undisturbed = [outcome(0, 0.0, answer(1, 2)), outcome(1, 0.0, answer(3))]
    total = make_report(REQUESTS, undisturbed, [same, other, failed], []).rows[-1]
    assert (total.num_requests, total.num_failed, total.num_differing) == (3, 1, 1)


def sample(at_s: float, memory_bytes: int, num_descriptors: int) -> Sample:
    return Sample(
        at_s=at_s,
        num_processes=9,
        memory_bytes=memory_bytes,
        num_descriptors=num_descriptors,
    )


def test_growth_compares_the_first_samples_with_the_last() -> None:
    samples = [sample(10.0 * i, 10**6 * (100 + i), 50) for i in range(10)]
    assert growth(samples)["memory, MB"] == (100.5, 108.5)
    assert growth(samples)["descriptors"] == (50, 50)
    assert "descriptors 50 → 50" in format_growth(samples)
    assert format_growth(samples[:4]) == ""


def test_sample_covers_a_process_and_its_children() -> None:
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE) as process:
        wait_until(lambda: (s := take_sample(process.pid, 0.0)) is not None and s.num_processes > 1)
        process.communicate(b"\n", timeout=30)
    assert take_sample(process.pid, 0.0) is None


def test_descriptors_of_rays_log_monitor_are_counted_apart(tmp_path: Path) -> None:
    script = tmp_path / "log_monitor.py"
    script.write_text("files = [open('/dev/null') for _ in range(50)]\nprint(flush=True)\ninput()")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, str(script)], **pipes) as process:
        assert process.stdout is not None
        process.stdout.readline()
        taken = take_sample(process.pid, 0.0)
        process.communicate(b"\n", timeout=30)
    assert taken is not None and taken.num_processes == 1
    assert taken.num_log_descriptors > 50 and taken.num_descriptors == 0


def wait_until(holds: Callable[[], bool]) -> None:
    until_s = time.monotonic() + 30.0
    while not holds():
        assert time.monotonic() < until_s
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("share", "value"), [(0.5, 50.0), (0.99, 99.0), (1.0, 100.0), (0.001, 1.0)]
)
def test_percentile(share: float, value: float) -> None:
    assert percentile(map(float, range(1, 101)), share) == value
    assert percentile([], share) == 0.0


def test_histogram_counts_every_stall_once() -> None:
    stalls_s = [0.001, 0.01, 0.011, 0.3, 1e9]
    assert sum(counts(stalls_s)) == len(stalls_s)
    assert counts(stalls_s)[0] == 2 and counts(stalls_s)[-1] == 1
    assert len(counts([])) == len(BOUNDS_S) + 1


def test_histogram_is_valid_svg_with_its_texts() -> None:
    root = ElementTree.fromstring(draw_histogram("5 < 6", [0.02, 0.03], [0.5]))
    assert root.tag.endswith("svg")
    texts = [element.text for element in root.iter() if element.text]
    assert "5 < 6" in texts and "no fault: 2 streams" in texts
