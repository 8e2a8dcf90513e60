"""The figures of the data plane's hops, calculated from given times."""

from milliways.benchmarks.speed.dataplane import CONTESTANTS, format_hops, hops_to_json, take_turns

MICROSECONDS = {
    "uds": 100.0,
    "tcp": 120.0,
    "aio": 1000.0,
    "ring": 50.0,
    "carried": 300.0,
    "shm": 150.0,
    "grpc": 1300.0,
}


def test_hops_are_compared_with_their_floors_round_by_round() -> None:
    measured: list[str] = []

    def time_calls(contestant: str, num_tokens: int, num_calls: int) -> list[float]:
        measured.append(contestant)
        # All get slower in every round, as on a machine whose other load grows.
        slowdown = 1 + measured.count("uds")
        return [MICROSECONDS[contestant] * num_tokens * slowdown * 1e-6] * num_calls

    figures = take_turns(time_calls, 4, 3, (1, 8))
    assert len(figures.find("uds", 8).seconds) == 12
    assert measured[: len(CONTESTANTS)] == list(CONTESTANTS)
    # Each round begins with another contestant.
    rounds = measured[len(CONTESTANTS) :]
    assert rounds[: len(CONTESTANTS)] == list(CONTESTANTS)
    assert rounds[len(CONTESTANTS) :][: len(CONTESTANTS)] == [*CONTESTANTS[1:], CONTESTANTS[0]]
    ratios = {(ratio.contestant, ratio.num_tokens): ratio for ratio in figures.ratios}
    assert ratios["shm", 8].is_reached and 1.0 < ratios["shm", 8].ratio < 2.0
    lines = format_hops(figures).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[2:-1]] == ["1 token", "8 tokens"]
    assert ratios["ring", 8].is_reached and not ratios["carried", 8].is_reached
    assert sum("aim 2 " in line and "missed" not in line for line in lines) == 1
    assert sum("floor" in line and "Unix" in line for line in lines) == 1
    assert sum("aim 1.15 " in line and line.count("(missed)") == 2 for line in lines) == 1
    assert len(hops_to_json(figures)["seconds"]["shm 8"]) == 12
