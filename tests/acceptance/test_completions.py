"""Text completions through the whole service, with tiny models of random weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.synthetic import models as synthetic
from shared.synthetic import tokenizers
from tests.integration.test_prompt_logprobs import expected
from tests.support.chat import ENDLESS, EOS, begun, streaming
from tests.support.child import in_child
from tests.support.generation import Trial
from tests.support.service import TINY, Client, Reply, Service, openai_error, until, up

COMPLETIONS = "/v1/completions"
BARE, FILLER, VECTORS = "acme/bare", "acme/filler", "acme/vectors"
FIM_PRE, FIM_SUF, FIM_MID = 100, 101, 102
CONTEXT_LENGTH = 4096
NEAR = 0.02  # of log probabilities: batches of other sizes use other kernels


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("completions")
    metadata = {"llama.context_length": CONTEXT_LENGTH}
    synthetic.tiny_llama(home / f"models/{TINY}/tiny-f16.gguf", metadata=metadata)
    synthetic.tiny_llama(home / f"models/{BARE}/bare-f16.gguf", drop={"tokenizer.chat_template"})
    marks = {"pre": FIM_PRE, "suf": FIM_SUF, "mid": FIM_MID}
    filling = {f"tokenizer.ggml.fim_{name}_token_id": token for name, token in marks.items()}
    synthetic.tiny_llama(home / f"models/{FILLER}/filler-f16.gguf", metadata=filling)
    synthetic.tiny_bert(home / f"models/{VECTORS}/vectors-f32.gguf")
    with up(home) as service:
        yield service


def ask(client: Client, **fields: Any) -> Reply:
    return client.post(COMPLETIONS, {"model": TINY, "temperature": 0, **fields})


def answered(client: Client, **fields: Any) -> Any:
    """Return the reply to a request that must succeed."""
    reply = ask(client, **fields)
    assert reply.status == 200, reply.text
    assert reply.headers["loadstone-instance"] == reply.json()["model"]
    return reply.json()


def chunks(client: Client, **fields: Any) -> list[Any]:
    """Return the chunks of a streamed request that must succeed."""
    reply = ask(client, stream=True, **fields)
    assert reply.status == 200, reply.text
    assert reply.headers["content-type"].startswith("text/event-stream")
    *events, last, end = reply.text.split("\n\n")
    assert (last, end) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events if event != ":"]


def tokens_of(text: str) -> list[int]:
    """Return tokens of the tokenizer of `synthetic.tiny_llama`, one for each letter, without the first one of every
    prompt."""
    tokens: Any = tokenizers.spm()["tokenizer.ggml.tokens"]
    return [int(tokens.index(letter)) for letter in text]


def test_a_text_is_continued_without_a_template(service: Service) -> None:
    whole = answered(service, prompt="Hello", max_tokens=5, **ENDLESS)
    assert whole["id"].startswith("cmpl-")
    assert (whole["object"], whole["model"], whole["system_fingerprint"][0]) == ("text_completion", TINY, "b")
    (choice,) = whole["choices"]
    assert (choice["index"], choice["logprobs"], choice["finish_reason"]) == (0, None, "length")
    assert choice["text"]
    usage = whole["usage"]
    by_tokens = answered(service, prompt=[1, *tokens_of("Hi")], max_tokens=5, **ENDLESS)
    assert by_tokens["usage"]["prompt_tokens"] == 3, "tokens are taken as they are"
    assert (usage["completion_tokens"], usage["total_tokens"]) == (5, usage["prompt_tokens"] + 5)
    twice = answered(service, prompt="<s>Hello", max_tokens=5, **ENDLESS)
    assert twice["choices"][0]["text"] == choice["text"], "the first token is not doubled"
    assert twice["usage"]["prompt_tokens"] == usage["prompt_tokens"]
    assert whole["timings"]["predicted_n"] == 5


def test_a_model_without_a_template_completes(service: Service) -> None:
    assert answered(service, model=BARE, prompt="Hello", max_tokens=3, **ENDLESS)["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"logprobs": 2, "echo": True},
        {"n": 2, "temperature": 1.5, "seed": 3, "logprobs": 0},
        {"prompt": ["Hello", [1, 300, 301]], "echo": True, "logprobs": 1},
        {"echo": True, "max_tokens": 0},
        {"logit_bias": {str(EOS): 100}},  # the model ends it
    ],
)
def test_a_stream_has_the_text_of_a_whole_reply(service: Service, fields: dict[str, Any]) -> None:
    fields = {"prompt": "Hello World", "max_tokens": 12, **ENDLESS, **fields}
    whole = answered(service, **fields)
    *parts, last = chunks(service, stream_options={"include_usage": True}, **fields)
    assert {(part["object"], part["model"], part["id"]) for part in parts} == {
        ("text_completion", whole["model"], last["id"])
    }
    assert (last["choices"], last["usage"]["total_tokens"]) == ([], whole["usage"]["total_tokens"])
    assert all("usage" not in part and len(part["choices"]) == 1 for part in parts)
    for choice in whole["choices"]:
        own = [part["choices"][0] for part in parts if part["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in own) == choice["text"]
        assert [part["finish_reason"] for part in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1]["finish_reason"] == choice["finish_reason"]
        logprobs = [part["logprobs"] for part in own if part["logprobs"] is not None]
        if choice["logprobs"] is None:
            assert logprobs == []
        else:
            for name in ("tokens", "text_offset"):
                assert [one for part in logprobs for one in part[name]] == choice["logprobs"][name]
            assert sum(len(part["token_logprobs"]) for part in logprobs) == len(choice["logprobs"]["token_logprobs"])


def test_answers_are_numbered_by_prompt_and_choice(service: Service) -> None:
    prompts: list[Any] = ["a b", [1, 300], "Hello World", "x", "yz", "Hello", "one more"]
    fields: dict[str, Any] = {"n": 2, "max_tokens": 6, "temperature": 1.5, "seed": 5, **ENDLESS}
    whole = answered(service, prompt=prompts, **fields)
    assert [choice["index"] for choice in whole["choices"]] == [*range(14)]
    assert "timings" not in whole
    alone = [answered(service, prompt=prompt, **fields) for prompt in prompts]
    assert whole["usage"]["prompt_tokens"] == sum(one["usage"]["prompt_tokens"] for one in alone)
    assert whole["usage"]["completion_tokens"] == 7 * 2 * 6
    echoed = answered(service, prompt=prompts, echo=True, **{**fields, "max_tokens": 1})["choices"]
    for i in (0, 4, 6, 8, 10, 12):
        if isinstance(prompts[i // 2], str):
            assert echoed[i]["text"].startswith(prompts[i // 2])
            assert echoed[i + 1]["text"].startswith(prompts[i // 2])


@pytest.mark.parametrize("prompt", ["Hello World", "  two spaces", "größer als €", "", "\n\nx"])
def test_an_echo_begins_with_the_prompt_and_its_tokens(service: Service, prompt: str) -> None:
    (choice,) = answered(service, prompt=prompt, echo=True, logprobs=3, max_tokens=4, **ENDLESS)["choices"]
    assert choice["text"].startswith(prompt)
    logprobs = choice["logprobs"]
    tokens, offsets = logprobs["tokens"], logprobs["text_offset"]
    assert tokens[0] == "<s>"
    assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0], offsets[:2]) == (None, None, [0, 0])
    assert all(value <= 0 for value in logprobs["token_logprobs"][1:])
    assert len({len(values) for values in logprobs.values()}) == 1
    for token, top in zip(tokens[1:], logprobs["top_logprobs"][1:], strict=True):
        assert token in top
        assert 3 <= len(top) <= 4
    assert offsets == sorted(offsets)
    first_generated = len(tokens) - 4
    assert offsets[first_generated] == len(prompt)
    for token, offset in zip(tokens[1:], offsets[1:], strict=True):
        if offset and not token.startswith("bytes:"):
            assert choice["text"].startswith(token, offset)


def test_a_prompt_alone_may_be_scored(service: Service) -> None:
    whole = answered(service, prompt=[tokens_of("abc"), tokens_of("de")], echo=True, logprobs=1, max_tokens=0)
    assert [choice["text"] for choice in whole["choices"]] == ["abc", "de"]
    assert [choice["finish_reason"] for choice in whole["choices"]] == ["length", "length"]
    assert [choice["logprobs"]["tokens"] for choice in whole["choices"]] == [["a", "b", "c"], ["d", "e"]]
    assert whole["choices"][0]["logprobs"]["text_offset"] == [0, 1, 2]
    assert whole["usage"]["completion_tokens"] == 0


def computed(root: Path, prompts: list[list[int]]) -> list[list[tuple[float, bool]]]:
    """Return the log probability of each token of prompts but the first, and whether it is the most probable one, as
    the engine computes them without the service."""
    trial = Trial(root, context_length=2048)
    found = []
    for prompt in prompts:
        rows = expected(trial, prompt)
        found.append([(float(rows[i, t]), int(rows[i].argmax()) == t) for i, t in enumerate(prompt[1:])])
    return found


def scores(choice: dict[str, Any], n_context: int) -> tuple[float, bool]:
    """Return the log probability of a continuation, and whether it is the most probable one, as
    lm-evaluation-harness reads it (`LocalCompletionsAPI.parse_logprobs`, lm_eval/models/openai_completions.py)."""
    logprobs = choice["logprobs"]["token_logprobs"][n_context:-1]
    tops = choice["logprobs"]["top_logprobs"][n_context:-1]
    return sum(logprobs), all(one == max(top.values()) for one, top in zip(logprobs, tops, strict=True))


def test_evaluations_read_what_the_engine_computes(running: Service, service: Service, tmp_path: Path) -> None:
    """The requests of lm-evaluation-harness' `local-completions`, while a stream runs."""
    shutil.copytree(running.models_dir / TINY, tmp_path / "models" / TINY)
    prompts = [[1, *(262 + (start + i * i) % 90 for i in range(n))] for start, n in enumerate((2, 5, 1000, 40, 3, 90))]
    found = in_child(computed, tmp_path / "models", prompts)
    body = {"model": TINY, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    service.loaded(TINY, context_length=2048)
    n_context = 2
    with streaming(service, model=TINY, **ENDLESS) as beside:
        begun(beside)
        replies = [service.post(COMPLETIONS, {**body, "prompt": given}).json() for given in ([prompts[2]], prompts)]
    for given, reply in zip(([prompts[2]], prompts), replies, strict=True):
        assert [choice["index"] for choice in reply["choices"]] == [*range(len(given))]
        for prompt, choice in zip(given, reply["choices"], strict=True):
            assert len(choice["logprobs"]["tokens"]) == len(prompt) + 1
            own = found[prompts.index(prompt)]
            for one, (logprob, _) in zip(choice["logprobs"]["token_logprobs"][1:-1], own, strict=True):
                assert abs(one - logprob) < NEAR
            logprob, is_greedy = scores(choice, n_context)
            assert abs(logprob - sum(one for one, _ in own[n_context - 1 :])) < NEAR * len(prompt)
            assert is_greedy == all(is_best for _, is_best in own[n_context - 1 :])


def test_the_token_that_ends_an_answer_is_reported(service: Service) -> None:
    """Evaluations take the last token of a reply for the one that was generated, and not for one of the prompt."""
    fields: dict[str, Any] = {"logprobs": 1, "max_tokens": 1, "logit_bias": {str(EOS): 100}}
    for echo, tokens in ((True, ["<s>", "a", "</s>"]), (False, ["</s>"])):
        (choice,) = answered(service, prompt=[[1, *tokens_of("a")]], echo=echo, **fields)["choices"]
        assert (choice["text"], choice["finish_reason"]) == ("<s>a" if echo else "", "stop")
        assert choice["logprobs"]["tokens"] == tokens


def test_a_continuation_that_the_model_would_choose_is_greedy(service: Service) -> None:
    fields: dict[str, Any] = {"logprobs": 1, "echo": True, "max_tokens": 1, **ENDLESS}
    (choice,) = answered(service, prompt="Hello", **fields)["choices"]
    told = choice["text"].removeprefix("Hello")
    for text, is_greedy in ((f"Hello{told}", True), ("Hello@", False)):
        (choice,) = answered(service, prompt=text, **fields)["choices"]
        assert scores(choice, len(choice["logprobs"]["tokens"]) - 2)[1] is is_greedy


def test_a_suffix_needs_a_model_that_fills_gaps(service: Service) -> None:
    message = openai_error(
        ask(service, prompt="a", suffix="b"), 400, "invalid_request_error", "invalid_value", "suffix"
    )
    assert "no tokens" in message
    filled = answered(service, model=FILLER, prompt="a", suffix="b", max_tokens=4, **ENDLESS)
    plain = answered(service, model=FILLER, prompt="a", suffix="", max_tokens=4, **ENDLESS)
    assert filled["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"prompt": None}, "invalid_type", "prompt"),
        ({"prompt": []}, "invalid_value", "prompt"),
        ({"prompt": [[]]}, "invalid_value", "prompt[0]"),
        ({"prompt": [1, "a"]}, "invalid_type", "prompt"),
        ({"prompt": {"text": "a"}}, "invalid_type", "prompt"),
        ({"prompt": [-1]}, "invalid_value", "prompt[0]"),
        ({"prompt": [1, 100_000]}, "invalid_value", "prompt"),
        ({"prompt": ["fine", [100_000]]}, "invalid_value", "prompt"),
        ({"prompt": "a", "logprobs": 6}, "invalid_value", "logprobs"),
        ({"prompt": "a", "logprobs": True}, "invalid_type", "logprobs"),
        ({"prompt": "a", "best_of": 2}, "not_supported", "best_of"),
        ({"prompt": "a", "n": 5}, "invalid_value", "n"),
        ({"prompt": "a", "suffix": "b", "echo": True}, "invalid_value", "echo"),
        ({"prompt": "a", "max_tokens": -2}, "invalid_value", "max_tokens"),
        ({"prompt": "a", "grammar": 'root ::= "a"'}, "not_supported", "grammar"),
        ({"prompt": "a", "response_format": {"type": "json_object"}}, "not_supported", "response_format"),
    ],
)
def test_what_is_wrong_is_refused_before_the_first_byte(
    service: Service, fields: dict[str, Any], code: str, param: str, stream: bool
) -> None:
    service.loaded(TINY)
    openai_error(ask(service, stream=stream, **fields), 400, "invalid_request_error", code, param)


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_over_the_context_is_refused_in_known_words(service: Service, stream: bool) -> None:
    service.loaded(TINY, context_length=256)
    for prompt in ([1] * 256, [1] * 257, ["fine", "Hello " * 1000]):
        reply = ask(service, prompt=prompt, stream=stream)
        assert reply.status == 400
        error = reply.json()["error"]
        assert (error["type"], error["code"]) == ("exceed_context_size_error", "context_length_exceeded")
        assert (error["param"], error["n_ctx"]) == ("prompt", 256)
        assert (
            error["n_prompt_tokens"] == len(prompt) if isinstance(prompt[0], int) else error["n_prompt_tokens"] > 1000
        )
        assert "This model's maximum context length is 256 tokens. However, your " in error["message"]
        assert "exceeds the available context size (256 tokens)" in error["message"]
    whole = answered(service, prompt=[1] * 255, max_tokens=100, **ENDLESS)
    assert (whole["usage"]["prompt_tokens"], whole["choices"][0]["finish_reason"]) == (255, "length")


def test_an_embedding_model_completes_nothing(service: Service) -> None:
    message = openai_error(
        ask(service, model=VECTORS, prompt="a"), 400, "invalid_request_error", "invalid_value", "model"
    )
    assert "embedding" in message


def test_a_long_list_of_prompts_does_not_fill_the_queue(service: Service) -> None:
    service.loaded(TINY)
    whole = answered(service, prompt=[[1, 259 + i % 90] for i in range(300)], max_tokens=1, **ENDLESS)
    assert len(whole["choices"]) == 300
    assert whole["usage"]["completion_tokens"] == 300


def test_a_client_that_leaves_ends_all_its_prompts(service: Service) -> None:
    service.loaded(TINY, context_length=CONTEXT_LENGTH)
    prompts = [[1, 259 + i % 90] for i in range(200)]
    with streaming(service, path=COMPLETIONS, model=TINY, prompt=prompts, **ENDLESS) as received:
        next(received)
        until(lambda: service.metric("requests_running", instance=TINY) > 0, "they run")
    until(lambda: service.metric("requests_running", instance=TINY) == 0, "none is left")
    assert service.metric("requests_waiting", instance=TINY) == 0
    assert answered(service, prompt="a", max_tokens=1)["usage"]["completion_tokens"] <= 1


def test_a_long_prompt_is_echoed_in_all_answers(service: Service) -> None:
    """Together they are more than a client may leave unread, but the client has sent it itself."""
    service.loaded(TINY, context_length=CONTEXT_LENGTH, parallel=64)
    tokens: Any = tokenizers.spm()["tokenizer.ggml.tokens"]
    prompt = [1, *[int(tokens.index("\u2581assistant"))] * 4000]
    whole = answered(service, prompt=prompt, echo=True, n=64, max_tokens=1, **ENDLESS)
    assert len(whole["choices"]) == 64
    assert all(choice["text"].startswith("<s>" + " assistant" * 4000) for choice in whole["choices"])
