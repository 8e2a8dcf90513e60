"""The log-probabilities of a prompt, by hand. `test_kill_matrix` covers them during deaths."""

from milliways.router.requests.request import GenerationRequest
from tests.simulation.fake_model import expected_scores, fake_config


def test_the_example_of_the_model_is_scored_by_hand() -> None:
    request = GenerationRequest(prompt_ids=(5, 3), max_tokens=0, prompt_logprobs=1)
    # After position 0 the row is (504, 98): 504 + 3 * 98 = 798 = 12 * 64 + 30.
    (score,) = expected_scores(request, fake_config(num_layers=1))
    assert (score.token_id, score.logprob) == (3, -504 / 8191 - 3)
    assert score.top_logprobs == ((30, -504 / 8191),)
