"""What HTTP bodies may say: every value that cannot be served is a 400 that names its parameter."""

import json
from pathlib import Path

import pytest

from protocol.errors import ConfigError
from protocol.generation_config import SamplingDefaults, load_sampling_defaults
from router.front.errors import ApiError
from router.front.requests import sampling_params
from router.front.schemas import ChatBody, CompletionBody, parse_body
from router.front.unserved import HARMLESS, IN_MESSAGES, WITHOUT_EFFECT

VOCAB_SIZE = 100
PLAIN = SamplingDefaults()
USER = [{"role": "user", "content": "hi"}]


def complaint(body: object, body_type: type = CompletionBody) -> ApiError:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(ApiError) as caught:
        sampling_params(parse_body(data, body_type), 16, None, (), VOCAB_SIZE, PLAIN)
    assert caught.value.status == 400
    assert caught.value.detail.type == "invalid_request_error"
    return caught.value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", "5"),
        ("max_tokens", 1.5),
        ("max_tokens", 10**400),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("top_k", 1 << 64),
        ("min_p", -0.5),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1e-7),
        ("n", 2),
        ("n", 0),
        ("seed", 1 << 63),
        ("seed", 0.5),
        ("stop", ""),
        ("stop", ["a"] * 17),
        ("stop", "x" * 257),
        ("stop", [1]),
        ("logit_bias", {"100": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"five": 1}),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {str(i): 0 for i in range(1025)}),
        ("stop_token_ids", [100]),
        ("stop_token_ids", [True]),
        ("min_tokens", 17),
        ("min_tokens", -1),
        ("logprobs", 6),
        ("logprobs", True),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("model", 7),
        ("best_of", 2),
        ("suffix", "after"),
        ("response_format", {"type": "json_object"}),
        ("prompt_embeds", "AAAA"),
        ("bad_words", ["x"]),
        ("use_beam_search", True),
        ("prompt_logprobs", 1),
        ("structured_outputs", {"json": {}}),
        ("truncate_prompt_tokens", -2),
        ("truncation_side", "left"),
        ("add_special_tokens", "no"),
        ("allowed_token_ids", [1]),
        ("max_completion_tokens", 5),
        ("top_logprobs", 2),
        ("messages", []),
        ("priority", 1),
        ("regex", "a+"),
        ("kv_transfer_params", {"do_remote_decode": True}),
        ("request_id", "mine"),
    ],
)
def test_a_bad_parameter_is_named(name: str, value: object) -> None:
    assert complaint({"prompt": "x", name: value}).detail.param == name


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_refused(literal: str) -> None:
    complaint(f'{{"prompt": "x", "temperature": {literal}}}'.encode())


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"prompt": "\\ud800"}', b'{"a":' + b"[" * 100_000]
)
def test_what_is_no_json_object_is_refused(data: bytes) -> None:
    complaint(data)


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hi", "messages"),
        ([{"role": "wizard", "content": "x"}], "messages"),
        ([{"role": "tool", "content": "x"}], "messages"),
        ([{"role": "user"}], "messages"),
        ([{"role": "user", "content": None}], "messages"),
        ([{"role": "assistant", "content": "x", "refusal": "no"}], "messages.refusal"),
        ([{"role": "user", "content": "x", "tool_call_id": "7"}], "messages.tool_call_id"),
        ([{"role": "assistant", "content": None, "audio": {"id": "a"}}], "messages.audio"),
        ([{"role": "user", "content": []}], "messages"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "messages"),
        ([{"role": "assistant", "content": "", "tool_calls": [{}]}], "messages.tool_calls"),
        (USER * 1025, "messages"),
    ],
)
def test_messages_that_cannot_be_served_are_refused(messages: object, param: str) -> None:
    assert complaint({"messages": messages}, ChatBody).detail.param == param


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("functions", [{}]),
        ("chat_template", "{{ 1 }}"),
        ("chat_template_kwargs", [1]),
        ("prompt", "x"),
        ("separate_reasoning", True),
        ("documents", [{}]),
        ("top_logprobs", 21),
        ("max_completion_tokens", 0),
        ("modalities", ["audio"]),
        ("echo", True),
    ],
)
def test_chat_parameters_that_are_not_served_are_refused(name: str, value: object) -> None:
    assert complaint({"messages": USER, name: value}, ChatBody).detail.param == name


def test_defaults_nulls_and_what_asks_for_nothing_are_fine() -> None:
    names = {*ChatBody.__struct_fields__, *HARMLESS, *WITHOUT_EFFECT} - {"messages"}
    parse_body(json.dumps({"messages": USER, **dict.fromkeys(names)}).encode(), ChatBody)
    harmless = {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "n": 1, "unheard_of": {"a": 1}}
    harmless |= {"length_penalty": 1.0}
    body = parse_body(json.dumps({"messages": USER, **harmless}).encode(), ChatBody)
    params = sampling_params(body, 16, None, (3,), VOCAB_SIZE, PLAIN)
    assert (params.temperature, params.top_k, params.top_p, params.eos_token_ids) == (1.0, 0, 1.0, (3,))


def test_values_that_ask_for_nothing_are_taken_and_notes_with_any_value() -> None:
    fields: dict[str, object] = {name: values[-1] for name, values in HARMLESS.items() if values}
    fields |= dict.fromkeys(WITHOUT_EFFECT, "anything")
    parse_body(json.dumps({"prompt": "x", **fields}).encode(), CompletionBody)
    parse_body(json.dumps({"messages": USER, **fields, "echo": False}).encode(), ChatBody)


def test_the_page_says_what_becomes_of_every_field() -> None:
    page = Path("docs/http.md").read_text()
    served, rest = page.split("## Taken without effect")
    taken, refused = rest.split("## Refused")
    own = {*CompletionBody.__struct_fields__, *ChatBody.__struct_fields__}
    for part, names in ((served, own), (taken, WITHOUT_EFFECT), (refused, {*HARMLESS, *IN_MESSAGES} - own)):
        assert {name for name in names if f"`{name}`" not in part} == set()
    assert (own | HARMLESS.keys()).isdisjoint(WITHOUT_EFFECT)


def test_parameters_arrive_as_they_were_sent() -> None:
    sent = {
        "temperature": 0,
        "top_k": -1,
        "top_p": 0.5,
        "min_p": 0.25,
        "seed": -(1 << 63),
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "repetition_penalty": 1.5,
        "logit_bias": {"7": -100},
        "stop_token_ids": [1, 2],
        "min_tokens": 3,
        "ignore_eos": True,
    }
    params = sampling_params(
        parse_body(json.dumps({"prompt": "x", **sent}).encode(), CompletionBody), 9, 4, (5,), 100, PLAIN
    )
    assert (params.top_k, params.seed, params.logit_bias) == (0, -(1 << 63), {7: -100.0})
    for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"):
        assert getattr(params, name) == sent[name]
    assert (params.stop_token_ids, params.min_tokens, params.ignore_eos, params.num_logprobs) == ((1, 2), 3, True, 4)


def test_what_a_request_does_not_say_its_model_does() -> None:
    defaults = SamplingDefaults(temperature=0.6, top_k=20, top_p=0.95, repetition_penalty=1.1)
    names = ("temperature", "top_k", "top_p", "repetition_penalty")
    for sent, wanted in (
        ({}, (0.6, 20, 0.95, 1.1)),
        ({"temperature": None, "top_p": None}, (0.6, 20, 0.95, 1.1)),
        ({"temperature": 0, "top_k": -1, "top_p": 1, "repetition_penalty": 1}, (0.0, 0, 1.0, 1.0)),
        ({"top_k": 0}, (0.6, 0, 0.95, 1.1)),
    ):
        body = parse_body(json.dumps({"prompt": "x", **sent}).encode(), CompletionBody)
        params = sampling_params(body, 16, None, (), VOCAB_SIZE, defaults)
        assert tuple(getattr(params, name) for name in names) == wanted


@pytest.mark.parametrize(
    ("said", "found"),
    [
        (None, ""),
        ({}, ""),
        ({"temperature": 0.6, "top_k": 20, "eos_token_id": [1, 2], "do_sample": True}, "temperature 0.6, top_k 20"),
        ({"temperature": None, "top_k": -1, "top_p": 1.0, "min_p": 0.1}, "min_p 0.1"),
    ],
)
def test_a_models_own_sampling_is_read_and_told(said: object, found: str, tmp_path: Path) -> None:
    if said is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(said))
    assert str(load_sampling_defaults(tmp_path)) == found


@pytest.mark.parametrize(
    "said", ['{"temperature": "hot"}', '{"top_p": 0}', '{"temperature": 7}', "[]", "{", "[" * 9999]
)
def test_a_models_sampling_that_cannot_be_is_refused_with_a_remedy(said: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(said)
    with pytest.raises(ConfigError, match=r"generation_config\.json holds a value that cannot be.*sampling_defaults"):
        load_sampling_defaults(tmp_path)


def test_without_a_seed_every_request_draws_its_own() -> None:
    body = parse_body(b'{"prompt": "x"}', CompletionBody)
    assert len({sampling_params(body, 16, None, (), VOCAB_SIZE, PLAIN).seed for _ in range(10)}) == 10
