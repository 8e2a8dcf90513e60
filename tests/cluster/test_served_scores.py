"""Prompts scored by a real cluster over HTTP and gRPC: exactly a single process's scores."""

import asyncio
import json
from contextlib import aclosing
from typing import Any

import httpx
import openai
import pytest

from milliways.api.resuming import GenerateClient
from milliways.cluster.cli import main as cli
from milliways.v1 import generate_pb2, sampling_pb2
from tests.demo_requests import PROMPT
from tests.served_cluster import ServedCluster

# Long enough for several chunks of prefill.
LONG = " ".join([PROMPT, "42.", "Welcome to the restaurant at the end of the universe."] * 6)
PROMPTS = [PROMPT, "Welcome to", LONG]
Logprobs = dict[str, Any]


def generated(
    capsys: pytest.CaptureFixture[str], prompt: str, num_tokens: int
) -> tuple[str, Logprobs]:
    """The output of `milliways generate`, which runs its own engine."""
    options = ["--echo", "--logprobs", "5", "--temperature", "0", "--max-tokens", str(num_tokens)]
    assert cli.main(["generate", "--json", prompt, *options]) == 0
    (choice,) = json.loads(capsys.readouterr().out)["choices"]
    return choice["text"], {k: v for k, v in choice["logprobs"].items() if k != "top_token_ids"}


@pytest.mark.parametrize("num_tokens", [0, 4])
@pytest.mark.parametrize("stream", [False, True])
def test_http_scores_prompts_as_the_generate_command(
    cluster: ServedCluster, capsys: pytest.CaptureFixture[str], num_tokens: int, stream: bool
) -> None:
    wanted = [generated(capsys, prompt, num_tokens) for prompt in PROMPTS]
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0) as client:
        # Twice: the second time every block of the prompts is cached.
        for _ in range(2):
            answer: Any = client.completions.create(
                model="demo",
                prompt=PROMPTS,
                max_tokens=num_tokens,
                temperature=0,
                logprobs=5,
                echo=True,
                n=2,
                stream=stream,
            )
            received = joined(list(answer) if stream else [answer])
            assert received == [one for one in wanted for _ in range(2)]


def joined(pieces: list[Any]) -> list[tuple[str, Logprobs]]:
    choices: dict[int, tuple[str, Logprobs]] = {}
    for choice in (choice for piece in pieces for choice in piece.choices):
        text, columns = choices.setdefault(choice.index, ("", {}))
        for name, values in choice.logprobs.model_dump().items():
            columns.setdefault(name, []).extend(values)
        choices[choice.index] = (text + choice.text, columns)
    return [choices[index] for index in sorted(choices)]


@pytest.mark.parametrize("num_tokens", [0, 4])
def test_grpc_scores_prompts_as_the_generate_command(
    cluster: ServedCluster, capsys: pytest.CaptureFixture[str], num_tokens: int
) -> None:
    wanted = [generated(capsys, prompt, num_tokens)[1] for prompt in PROMPTS]

    async def score(client: GenerateClient, prompt: str) -> list[float]:
        request = generate_pb2.GenerateRequest(
            text=prompt,
            max_tokens=num_tokens,
            prompt_logprobs=5,
            sampling=sampling_pb2.SamplingParams(temperature=0, num_logprobs=5),
        )
        logprobs: list[float] = []
        async with aclosing(client.generate(request, timeout_s=60)) as stream:
            async for response in stream:
                logprobs += [score.logprob for score in response.prompt_logprobs]
                logprobs += [event.logprob for event in response.events]
        return logprobs

    async def main() -> list[list[float]]:
        async with GenerateClient([f"127.0.0.1:{cluster.grpc_port}"]) as client:
            return await asyncio.gather(*(score(client, prompt) for prompt in PROMPTS))

    received = asyncio.run(main())
    assert [[None, *logprobs] for logprobs in received] == [one["token_logprobs"] for one in wanted]


def test_what_cannot_be_scored_is_refused_by_name(cluster: ServedCluster) -> None:
    body = {"model": "demo", "prompt": PROMPT, "echo": True}
    for field, value, more in (
        ("logprobs", "21", {"logprobs": 21}),
        ("max_tokens", "0", {"max_tokens": 0}),
    ):
        answer = httpx.post(f"{cluster.url}/v1/completions", json=body | more, timeout=30)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["param"] == field
        assert error["message"].startswith(f"{field} = {value}")
