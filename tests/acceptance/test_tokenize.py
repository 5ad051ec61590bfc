"""Tokens and prompts over HTTP, as clients of llama.cpp's server, of vLLM and of OpenAI's API ask for them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from shared import paths
from shared.synthetic import models as synthetic
from tests.support.chat import HELLO, answered, begun, body, streaming
from tests.support.service import TINY, Reply, Service, openai_error, up

BOS, EOS = 1, 2  # of the tokenizer of `synthetic.tiny_llama`
BARE, VECTORS = "acme/bare", "acme/vectors"
TEXT = "What is the capital of France ?"
UNICODE = "unicode 媽 and emoji 🤗"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("tokens")
    synthetic.tiny_llama(home / f"models/{TINY}/tiny-f16.gguf")
    synthetic.tiny_llama(home / f"models/{BARE}/bare-f16.gguf", drop={"tokenizer.chat_template"})
    synthetic.tiny_bert(home / f"models/{VECTORS}/vectors-f32.gguf")
    with up(home) as service:
        yield service


def ok(reply: Reply) -> Any:
    assert reply.status == 200, reply.text
    return reply.json()


def tokens(service: Service, **fields: Any) -> Any:
    return ok(service.post(paths.TOKENIZE, {"model": TINY, **fields}))


# ---- texts


def test_a_text_survives_its_tokens(service: Service) -> None:
    for text in (TEXT, UNICODE, "", 500 * UNICODE):
        found = tokens(service, content=text)
        assert len(found["tokens"]) == found["count"]
        reply = ok(service.post(paths.DETOKENIZE, {"model": TINY, "tokens": found["tokens"]}))
        assert reply == {"content": text, "prompt": text}


def test_both_forms_have_the_same_tokens_and_keys(service: Service) -> None:
    llama, vllm = tokens(service, content=TEXT, add_special=True), tokens(service, prompt=TEXT)
    assert llama == vllm
    assert set(llama) == {"tokens", "count", "max_model_len"}
    assert llama["tokens"][0] == BOS
    assert llama["max_model_len"] == service.instances()[TINY]["config"]["context_length"]
    bare = tokens(service, content=TEXT)
    assert bare == tokens(service, prompt=TEXT, add_special_tokens=False)
    assert [BOS, *bare["tokens"]] == llama["tokens"]


def test_control_tokens_are_parsed_unless_the_client_forbids_it(service: Service) -> None:
    assert tokens(service, content="</s>")["tokens"] == [EOS]
    assert tokens(service, prompt="</s>", add_special_tokens=False)["tokens"] == [EOS]
    spelled = tokens(service, content="</s>", parse_special=False)["tokens"]
    assert EOS not in spelled
    assert ok(service.post(paths.DETOKENIZE, {"model": TINY, "tokens": spelled}))["content"] == "</s>"


def test_pieces_are_texts_or_the_bytes_of_a_part_of_one(service: Service) -> None:
    found = tokens(service, content=UNICODE, with_pieces=True)["tokens"]
    assert [each["id"] for each in found] == tokens(service, content=UNICODE)["tokens"]
    parts = [each["piece"] for each in found]
    assert any(isinstance(part, list) for part in parts), "no token of this tokenizer is the emoji"
    whole = b"".join(bytes(part) if isinstance(part, list) else part.encode() for part in parts)
    assert whole.decode().strip() == UNICODE
    strings = tokens(service, prompt=UNICODE, add_special_tokens=False, return_token_strs=True)["token_strs"]
    assert [one for one, part in zip(strings, parts, strict=True) if isinstance(part, str)] == [
        part for part in parts if isinstance(part, str)
    ]


def test_an_evaluation_can_do_without_a_tokenizer_of_its_own(service: Service) -> None:
    """lm-evaluation-harness probes a server like this, then encodes and decodes with it, and names no model."""
    service.loaded(TINY)
    info = ok(service.send("GET", paths.TOKENIZER_INFO))
    assert (info["bos_token"], info["eos_token"]) == ("<s>", "</s>")
    assert "messages" in info["chat_template"]

    def encode(text: str) -> Any:
        return ok(service.post(paths.TOKENIZE, {"prompt": text, "add_special_tokens": False}))["tokens"]

    assert isinstance(encode("test"), list)
    assert (encode(info["bos_token"]), encode(info["eos_token"])) == ([BOS], [EOS])
    assert ok(service.post(paths.DETOKENIZE, {"tokens": encode(TEXT)}))["prompt"] == TEXT
    assert ok(service.send("GET", f"{paths.TOKENIZER_INFO}?model={BARE}"))["chat_template"] is None


def test_many_pieces_are_those_of_few(service: Service) -> None:
    few, many = (tokens(service, content=n * TEXT, with_pieces=True)["tokens"] for n in (1, 200))
    assert len(many) > 2000
    assert many[: len(few) - 1] == few[:-1]


# ---- conversations


def test_a_count_is_that_of_the_answer(service: Service) -> None:
    usage = answered(service, model=TINY, max_tokens=1)["usage"]
    counted = service.post(paths.CHAT_INPUT_TOKENS, body(model=TINY))
    assert ok(counted) == {"object": "response.input_tokens", "input_tokens": usage["prompt_tokens"]}
    assert counted.headers["loadstone-instance"] == TINY
    listed = tokens(service, messages=HELLO)
    assert (listed["count"], len(listed["tokens"])) == (usage["prompt_tokens"], usage["prompt_tokens"])
    prompt = ok(service.post(paths.APPLY_TEMPLATE, body(model=TINY)))["prompt"]
    assert "Hello" in prompt
    assert tokens(service, prompt=prompt.removeprefix("<s>"))["tokens"] == listed["tokens"]


def test_a_conversation_over_the_context_is_counted(service: Service) -> None:
    service.loaded(TINY, context_length=256)
    long = [{"role": "user", "content": 300 * "word "}]
    assert ok(service.post(paths.CHAT_INPUT_TOKENS, {"messages": long}))["input_tokens"] > 256


# ---- which model


def test_a_request_loads_the_model_that_it_names(service: Service) -> None:
    assert not service.instances()
    assert tokens(service, content=TEXT)["count"] > 5
    assert list(service.instances()) == [TINY]


def test_without_a_name_the_only_loaded_model_is_asked(service: Service) -> None:
    service.loaded(TINY)
    reply = service.post(paths.TOKENIZE, {"content": TEXT})
    assert ok(reply)["count"] > 5
    assert reply.headers["loadstone-instance"] == TINY


def test_a_model_without_a_template_has_tokens_but_no_prompts(service: Service) -> None:
    service.loaded(BARE)
    assert tokens(service, model=BARE, content=TEXT)["count"] > 5
    for path in (paths.CHAT_INPUT_TOKENS, paths.APPLY_TEMPLATE, paths.TOKENIZE):
        openai_error(
            service.post(path, {"model": BARE, "messages": HELLO}), 501, "not_supported_error", "chat_unavailable"
        )


def test_an_embedding_model_has_tokens_but_no_prompts(service: Service) -> None:
    """It is loaded for them, and is not the model of a request without a name."""
    found = tokens(service, model=VECTORS, content="hello")["tokens"]
    text = ok(service.post(paths.DETOKENIZE, {"model": VECTORS, "tokens": found}))["content"]
    assert "hello" in text
    for path in (paths.CHAT_INPUT_TOKENS, paths.APPLY_TEMPLATE, paths.TOKENIZE):
        reply = service.post(path, {"model": VECTORS, "messages": HELLO})
        assert (reply.status, reply.json()["error"]["param"]) == (400, "model")
    unnamed = service.post(paths.TOKENIZE, {"content": "hello"})
    openai_error(unnamed, 400, "invalid_request_error", "missing_required_parameter", "model")


def test_they_are_answered_while_the_model_answers(service: Service) -> None:
    service.loaded(TINY, parallel=1)
    with streaming(service, model=TINY, logit_bias={str(EOS): -100}) as received:
        begun(received)
        assert tokens(service, content=TEXT)["count"] > 5
        assert "Hello" in ok(service.post(paths.APPLY_TEMPLATE, body(model=TINY)))["prompt"]
        next(received)


# ---- what is refused


@pytest.mark.parametrize(
    ("path", "fields", "code", "param"),
    [
        (paths.TOKENIZE, {}, "missing_required_parameter", "content"),
        (paths.TOKENIZE, {"content": "a", "prompt": "b"}, "invalid_value", "prompt"),
        (paths.TOKENIZE, {"content": 7}, "invalid_type", "content"),
        (paths.TOKENIZE, {"messages": []}, "invalid_value", "messages"),
        (paths.TOKENIZE, {"messages": "Hello"}, "invalid_type", "messages"),
        (paths.DETOKENIZE, {}, "missing_required_parameter", "tokens"),
        (paths.DETOKENIZE, {"tokens": [0, 1 << 20]}, "invalid_value", "tokens"),
        (paths.DETOKENIZE, {"tokens": [-1]}, "invalid_value", "tokens[0]"),
        (paths.DETOKENIZE, {"tokens": [1 << 40]}, "invalid_value", "tokens[0]"),
        (paths.DETOKENIZE, {"tokens": ["a"]}, "invalid_type", "tokens[0]"),
        (paths.APPLY_TEMPLATE, {"messages": []}, "invalid_value", "messages"),
        (paths.CHAT_INPUT_TOKENS, {}, "missing_required_parameter", "messages"),
    ],
)
def test_a_wrong_body_names_its_field(
    service: Service, path: str, fields: dict[str, Any], code: str, param: str
) -> None:
    openai_error(service.post(path, {"model": TINY, **fields}), 400, "invalid_request_error", code, param)


def test_an_unknown_model_is_refused(service: Service) -> None:
    for path, fields in ((paths.TOKENIZE, {"content": "a"}), (paths.DETOKENIZE, {"tokens": []})):
        reply = service.post(path, {"model": "nobody/nothing", **fields})
        openai_error(reply, 404, "invalid_request_error", "model_not_found", "model")


def test_a_text_is_bounded(service: Service) -> None:
    long = json.dumps({"model": TINY, "content": "x" * (1 << 20)}).encode()
    openai_error(service.send("POST", paths.TOKENIZE, content=long), 413, "invalid_request_error", "request_too_large")
