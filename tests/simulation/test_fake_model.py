"""The model that is computed by hand gives what its docstring says, and shows every slip."""

from milliways.model.sampling_params import SamplingParams
from milliways.router.requests.request import GenerationRequest
from tests.simulation.fake_model import expected_streams, fake_config

GREEDY = SamplingParams(temperature=0.0)


def test_the_example_of_the_docstring_is_right() -> None:
    request = GenerationRequest(prompt_ids=(5, 3), max_tokens=1, sampling=GREEDY)
    [stream] = expected_streams(request, fake_config(num_layers=1))
    assert [token.token_id for token in stream.tokens] == [54]
