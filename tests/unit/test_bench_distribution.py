"""The figures of `milliways bench cluster` and `bench serve`, calculated from given times."""

import argparse
from dataclasses import replace

import pytest

from milliways.benchmarks.speed.arguments import counts_of, names_of
from milliways.benchmarks.speed.distribution import format_aims, paired_ratio
from milliways.benchmarks.speed.programs.run_cluster import decode_speed
from milliways.benchmarks.speed.rounds import Results
from milliways.benchmarks.speed.served import routers_of
from milliways.benchmarks.speed.serving import (
    Timeline,
    endpoints_to_json,
    format_endpoints,
    measure_endpoints,
)
from milliways.benchmarks.speed.under_load import format_load, measure_load
from milliways.benchmarks.speed.workload import Kind, Workload
from milliways.cluster.cli import main as cli
from milliways.model.errors import InvalidRequestError
from tests.statuses import CLUSTER, SILENT

DECODE_1, DECODE_8 = Workload(Kind.DECODE, 1), Workload(Kind.DECODE, 8)


def cells(table: str) -> list[list[str]]:
    rows = [line.split("|")[1:-1] for line in table.splitlines()]
    return [[cell.strip() for cell in row] for row in rows]


def parsed(*arguments: str) -> argparse.Namespace:
    return cli.build_parser(chosen="bench").parse_args(["bench", *arguments])


def test_parts_of_bench_have_their_own_options() -> None:
    assert parsed("dataplane", "--tokens", "1").tokens == "1"
    assert parsed("cluster").batch == "1,8,32"
    assert parsed("serve", "--max-tokens", "9").max_tokens == 9
    runs = {parsed(*part).run for part in ([], ["dataplane"], ["cluster"], ["serve"])}
    assert len(runs) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dataplane", "--tokens", "0"], "tokens = '0'"),
        (["dataplane", "--tokens", ""], "tokens = ''"),
        (["dataplane", "--tokens", "4096"], "tokens = '4096'"),
        (["dataplane", "--rounds", "0"], "rounds = 0"),
        (["cluster", "--batch", "65"], "batch = '65'"),
        (["cluster", "--batch", ""], "batch = ''"),
        (["cluster", "--workers", "1"], "workers = 1"),
        (["cluster", "--rounds", "0"], "rounds = 0"),
        (["serve", "--workers", "9"], "workers = 9"),
        (["serve", "--max-tokens", "1"], "max-tokens = 1"),
        (["serve", "--rounds", "0"], "rounds = 0"),
    ],
)
def test_bad_option_gives_a_one_line_error(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.main(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1
    assert captured.out == ""


def test_list_is_parsed_or_refused_with_its_name() -> None:
    assert counts_of("n", "1,32") == (1, 32) and counts_of("n", "") == ()
    assert names_of("n", "a,b", ("a", "b")) == ("a", "b")
    with pytest.raises(InvalidRequestError, match="n = 'c'"):
        names_of("n", "a,c", ("a", "b"))


def test_ratio_of_a_cluster_is_the_median_of_the_rounds_ratios() -> None:
    results = Results()
    for ours, alone in ((30, 40), (5, 10), (28, 35)):
        results.add("cluster", DECODE_1, ours)
        results.add("one process", DECODE_1, alone)
    assert paired_ratio(results, "cluster", "one process", DECODE_1) == 0.75
    assert paired_ratio(results, "cluster", "one process", DECODE_8) is None
    table = format_aims(results, "cluster", "one process", [DECODE_1, DECODE_8], {1: 0.6, 8: 0.75})
    assert cells(table)[2:] == [
        ["cluster / one process", "0.75", "-"],
        ["aim", "0.60", "0.75"],
        ["reached", "yes", "-"],
    ]


def test_speed_of_a_cluster_adds_its_routers_speeds_while_all_sequences_decode() -> None:
    # Two sequences have a token every 0.1 s; one that starts later has one every 0.2 s.
    quick = [[i / 10 for i in range(12)], [i / 10 for i in range(12)]]
    slow = [[0.25 + i / 5 for i in range(4)]]
    num_tokens, seconds = decode_speed([quick, slow])
    assert num_tokens / seconds == pytest.approx(20 + 5)


def test_routers_that_never_decode_together_count_from_beginning_to_end() -> None:
    num_tokens, seconds = decode_speed([[[0.0, 1.0]], [[5.0, 6.0]]])
    assert (num_tokens, seconds) == (4, 6.0)


def test_endpoints_take_turns_and_their_first_request_does_not_count() -> None:
    used: list[str] = []

    def send(name: str, first_s: float) -> Timeline:
        used.append(name)
        return Timeline(first_s if used.count(name) > 1 else 9.0, first_s + 1.0, 101)

    figures = measure_endpoints(
        {"router": lambda: send("router", 0.002), "http": lambda: send("http", 0.012)}, 2
    )
    assert used == ["router", "http", "http", "router", "router", "http"]
    assert cells(format_endpoints(figures))[2:] == [
        ["router's own stream: floor", "2.00 (2.00)", "", "10.00 (10.00)", ""],
        ["HTTP, through Serve and the ingress", "12.00 (12.00)", "10.00", "10.00 (10.00)", "0.000"],
    ]
    assert endpoints_to_json(figures)["http"]["first_token_s"] == [0.012, 0.012]


def test_streams_run_at_once_and_their_processor_time_is_counted() -> None:
    spent = iter([1.0, 1.5])

    def send() -> Timeline:
        return Timeline(0.010, 0.030, 4, (0.010, 0.015, 0.020, 0.030))

    one = measure_load("HTTP", [send, send], 5, lambda: {"proxy": next(spent)})
    assert (one.num_streams, len(one.timelines), one.num_tokens) == (2, 10, 40)
    assert one.first_ms == (10.0, 10.0)
    assert one.gap_ms == pytest.approx((5.0, 10.0))
    assert one.cpu_ms_per_request("proxy") == 50.0
    assert one.cpu_ms_per_token("proxy") == 12.5
    assert one.cpu_ms_per_token("ingress") == 0.0
    assert format_load([one]).splitlines()[2].startswith("| 2, HTTP")


def test_a_stream_that_fails_ends_the_measurement() -> None:
    def send() -> Timeline:
        raise RuntimeError("HTTP 503")

    with pytest.raises(RuntimeError, match="503"):
        measure_load("HTTP", [send, send], 5, dict)


def test_routers_are_the_workers_with_a_router_address() -> None:
    workers = tuple(replace(SILENT, router_address=address) for address in ("a:1", ""))
    assert routers_of(replace(CLUSTER, workers=workers)) == ("a:1",)
