"""Which router gets a request, and when a broken request is retried."""

from random import Random

import pytest

from milliways.cluster.ingress.routing.retries import DIES_WITHIN_S, Retries
from milliways.cluster.ingress.routing.router_choice import RouterChoice, RouterInfo
from milliways.wire.errors import OverloadedError, PoisonedRequestError
from milliways.wire.load import PROMPT_TOKENS_PER_SEQUENCE, Load

A, B, C = (RouterInfo(name, f"{name}:1") for name in "abc")
PROMPT = tuple(range(100))
ONE = Load(1, 0)


def new_choice(seed: int = 0) -> RouterChoice:
    return RouterChoice(Random(seed))


def picked(choice: RouterChoice, *routers: RouterInfo, now_s: float = 0.0) -> str | None:
    router = choice.try_pick(routers, PROMPT, now_s)
    return router.worker_id if router else None


def test_pick_from_no_router_or_one() -> None:
    assert picked(new_choice()) is None
    assert picked(new_choice(), B) == "b"


def test_least_busy_counts_requests_of_all_ingresses() -> None:
    choice = new_choice()
    assignment = choice.begin("a", PROMPT, ONE)
    assert picked(choice, A, B) == "b"
    choice.report("b", Load(2, 0), 0.0)
    assert picked(choice, A, B) == "a"
    choice.end(assignment)
    assert (choice.num_running("a"), choice.weight("a", 0.0)) == (0, 0.0)


def test_request_of_many_samples_counts_as_many_until_they_end() -> None:
    choice = new_choice()
    many = choice.begin("a", PROMPT, Load(64, 0))
    for _ in range(63):
        choice.begin("b", PROMPT, ONE)
    assert picked(choice, A, B) == "b"
    choice.progressed(many, Load(62, 0))
    assert picked(choice, A, B) == "a"


def test_request_that_has_left_its_router_counts_no_more() -> None:
    choice = new_choice()
    assignment = choice.begin("a", PROMPT, Load(3, 0))
    choice.end(assignment)
    choice.progressed(assignment, Load(2, 0))
    assert choice.weight("a", 0.0) == 0.0


def test_long_prompt_counts_until_it_is_computed() -> None:
    choice = new_choice()
    long = choice.begin("a", PROMPT, Load(1, 8 * PROMPT_TOKENS_PER_SEQUENCE))
    for _ in range(8):
        choice.begin("b", PROMPT, ONE)
    assert picked(choice, A, B) == "b"
    choice.progressed(long, ONE)
    assert picked(choice, A, B) == "a"


def test_equally_busy_routers_are_picked_by_chance_from_a_seed() -> None:
    def picks(seed: int) -> list[str | None]:
        choice = new_choice(seed)
        return [picked(choice, A, B, C) for _ in range(60)]

    assert picks(1) == picks(1) != picks(2)
    assert min(picks(1).count(name) for name in "abc") > 10


def test_report_of_a_silent_router_fades() -> None:
    choice = new_choice()
    choice.report("a", Load(8, 0), 0.0)
    assert choice.weight("a", 2.0) == 8.0
    assert choice.weight("a", 4.0) == 4.0
    choice.begin("a", PROMPT, ONE)
    assert 1.0 < choice.weight("a", 20.0) < 1.1


def test_among_equals_the_longest_shared_prefix_is_picked() -> None:
    choice = new_choice()
    for worker_id, prompt in (("a", PROMPT[:40]), ("b", PROMPT[:70]), ("c", (9, *PROMPT))):
        choice.end(choice.begin(worker_id, prompt, ONE))
    assert picked(choice, A, B, C) == "b"
    choice.forget("b")
    assert picked(choice, A, B, C) == "a"


def test_router_whose_stream_broke_comes_last_for_a_while() -> None:
    choice = new_choice()
    choice.suspect("a", until_s=5.0)
    assert picked(choice, A, B, now_s=4.9) == "b"
    assert picked(choice, A, now_s=4.9) == "a"
    choice.begin("b", (1,), ONE)
    assert picked(choice, A, B, now_s=5.0) == "a"


def test_router_with_copies_is_picked_unless_its_stream_broke() -> None:
    choice = new_choice()
    choice.begin("b", (1,), ONE)
    choice.begin("c", (1,), ONE)
    assert choice.try_pick((A, B, C), PROMPT, 0.0, standby_id="b") == B
    assert choice.try_pick((A, C), PROMPT, 0.0, standby_id="b") == A
    choice.suspect("b", until_s=5.0)
    assert choice.try_pick((A, B, C), PROMPT, 0.0, standby_id="b") == A


def test_silent_router_comes_last_even_if_it_is_idle_or_has_copies() -> None:
    choice = new_choice()
    choice.begin("b", PROMPT, ONE)
    assert choice.try_pick((A, B), PROMPT, 0.0, standby_id="a", silent={"a"}) == B
    assert choice.try_pick((A,), PROMPT, 0.0, silent={"a"}) == A


def test_remembered_prefixes_are_bounded() -> None:
    choice = new_choice()
    for i in range(100):
        choice.end(choice.begin("a", tuple(range(i, i + 8192)), ONE))
    assert len(choice._runs["a"]) <= 8192


def test_attempts_without_progress_are_bounded() -> None:
    retries = Retries(3)
    for _ in range(10):
        for _ in range(2):
            retries.broke("a", "died", was_accepted=True)
        retries.progressed()
    retries.broke("a", "died", was_accepted=True)
    retries.broke("b", "died", was_accepted=True)
    with pytest.raises(PoisonedRequestError, match=r"3 routers in a row.*router a: died"):
        retries.broke("a", "died", was_accepted=True)


def test_router_that_never_had_the_request_does_not_count() -> None:
    retries = Retries(2)
    for _ in range(100):
        retries.broke("a", "refused", was_accepted=False)
    assert retries.avoided == {"a"}


def test_router_that_dies_long_after_it_received_the_request_does_not_count() -> None:
    retries = Retries(2)
    for _ in range(100):
        retries.broke("a", "died", was_accepted=True, lasted_s=DIES_WITHIN_S)
    retries.broke("a", "died", was_accepted=True, lasted_s=0.1)
    with pytest.raises(PoisonedRequestError):
        retries.broke("b", "died", was_accepted=True, lasted_s=0.1)


def test_backoff_grows_until_a_token_comes() -> None:
    retries = Retries(2)
    retries.was_full("a", OverloadedError("full"))
    assert retries.full is not None
    waits_s = [retries.next_round() for _ in range(9)]
    assert (retries.avoided, retries.full) == (set(), None)
    assert waits_s == sorted(waits_s)
    assert (waits_s[0], waits_s[-1]) == (0.02, 1.0)
    retries.progressed()
    assert retries.next_round() == 0.02
