"""The real router process behind real clients: the OpenAI interface, its errors, and nothing that a body breaks."""

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from tokenizers import AddedToken, processors

from protocol.messages import Abort, Prefill, Reserve
from router.launch import GroupSpec
from tests.integration.fake_worker import FakeWorker, expected_tokens
from tests.integration.router_process import (
    MAX_CONTEXT,
    VOCAB_SIZE,
    RouterUnderTest,
    tiny_tokenizer,
    wait_until,
    write_model,
)

TOKENIZER = tiny_tokenizer()
WORDS = "one two three"
IDS = TOKENIZER.encode(WORDS).ids


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RouterUnderTest]:
    """A router with one prefill and one decode group that answer at once."""
    folder = write_model(tmp_path_factory.mktemp("model"))
    with (
        RouterUnderTest(folder) as router,
        FakeWorker(router.control, "prefill"),
        FakeWorker(router.control, "decode"),
    ):
        yield router.await_ready()


@pytest.fixture(scope="module")
def client(router: RouterUnderTest) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{router.url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


def text_of(count: int) -> str:
    return str(TOKENIZER.decode(expected_tokens(IDS, count)))


def test_a_completion_has_its_text_usage_and_reason(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt=WORDS, max_tokens=8)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (text_of(8), "length")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 8, 11)
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 1
    assert client.completions.create(model="tiny", prompt=WORDS).choices[0].text == text_of(16)


def test_a_streamed_completion_adds_up_to_the_whole_one(client: openai.OpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    stream = client.completions.create(
        model="tiny",
        prompt=WORDS,
        max_tokens=40,
        stream=True,
        stream_options=options,  # type: ignore[call-overload]
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == text_of(40)
    assert chunks[-2].choices[0].finish_reason == "length"
    assert [chunk.usage.completion_tokens for chunk in chunks[:-1]] == sorted(
        chunk.usage.completion_tokens for chunk in chunks[:-1]
    )
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 40)


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_give_one_choice_each_in_their_place(client: openai.OpenAI, stream: bool) -> None:
    prompts = [TOKENIZER.encode(text).ids for text in ("one", "two three", "the lazy dog", "日本")]
    answer = client.completions.create(model="tiny", prompt=prompts, max_tokens=6, stream=stream)
    texts = [""] * 4
    for part in answer if stream else [answer]:
        for choice in part.choices:
            texts[choice.index] += choice.text
    assert texts == [TOKENIZER.decode(expected_tokens(ids, 6)) for ids in prompts]


def test_a_chat_goes_through_the_models_template(router: RouterUnderTest, client: openai.OpenAI) -> None:
    prompt = "<|user|>one two<|assistant|>"
    ids = TOKENIZER.encode(prompt, add_special_tokens=False).ids
    for content in ("one two", [{"type": "text", "text": "one two"}]):
        answer = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": content}],
            max_tokens=7,  # type: ignore[list-item]
        )
        assert answer.choices[0].message.content == TOKENIZER.decode(expected_tokens(ids, 7))
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(ids)
    rest = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "one two"}])
    assert rest.usage is not None
    assert rest.usage.total_tokens == MAX_CONTEXT


def test_everything_that_was_said_in_a_chat_is_in_its_prompt(router: RouterUnderTest) -> None:
    said = [
        {"role": "developer", "content": "quick"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": []},
        {"role": "assistant"},
        {"role": "user", "content": "two"},
    ]
    body = {"messages": said, "max_tokens": 1, "return_token_ids": True}
    answer = router.client.post("/v1/chat/completions", json=body).json()
    prompt = "<|user|>quick<|user|>one<|user|><|user|><|user|>two<|assistant|>"
    assert TOKENIZER.decode(answer["prompt_token_ids"], skip_special_tokens=False) == prompt


def test_a_streamed_chat_gives_the_role_once_and_then_text(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "日本 😀"}], max_completion_tokens=30, stream=True
    )
    chunks = list(stream)
    assert [chunk.choices[0].delta.role for chunk in chunks if chunk.choices[0].delta.role] == ["assistant"]
    ids = TOKENIZER.encode("<|user|>日本 😀<|assistant|>", add_special_tokens=False).ids
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TOKENIZER.decode(
        expected_tokens(ids, 30)
    )
    assert chunks[-1].choices[0].finish_reason == "length"


def test_log_probabilities_have_openais_two_shapes(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="tiny", prompt=WORDS, max_tokens=3, logprobs=2).choices[0].logprobs
    assert whole is not None
    assert (whole.tokens, whole.token_logprobs, whole.text_offset) == (["one", " two", " three"], [-0.5] * 3, [0, 3, 7])
    assert whole.top_logprobs is not None
    assert [len(top) for top in whole.top_logprobs] == [3, 3, 3]
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "x"}], max_tokens=4, logprobs=True, top_logprobs=2
    )
    assert chat.choices[0].logprobs is not None
    entries = chat.choices[0].logprobs.content or []
    assert [entry.token for entry in entries] == ["<|user|>", "x", "<|assistant|>", "<|user|>"]
    assert bytes(entries[1].bytes or []) == b"x"
    assert [top.logprob for top in entries[0].top_logprobs] == [-0.5, -0.6]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_and_frees_the_workers(tmp_path: Path, stream: bool) -> None:
    with (
        RouterUnderTest(write_model(tmp_path)) as router,
        FakeWorker(router.control, "prefill") as prefill,
        FakeWorker(router.control, "decode", step_s=0.01) as decode,
    ):
        router.await_ready()
        body = {"prompt": WORDS, "max_tokens": 400, "stop": ["threeone", "zebra"], "stream": stream}
        answer = router.client.post("/v1/completions", json=body)
        if stream:
            chunks = [json.loads(line[6:]) for line in answer.text.split("\n\n")[:-2]]
            text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
            last = chunks[-1]["choices"][0]
            assert answer.text.endswith("data: [DONE]\n\n")
        else:
            last = answer.json()["choices"][0]
            text = last["text"]
        assert (text, last["finish_reason"], last["stop_reason"]) == ("one two ", "stop", "threeone")
        wait_until(lambda: len(decode.messages(Abort)) == 1)
        assert router.status()["requests"] == 0
        metrics = router.client.get("/metrics").text
        assert 'vllm:request_success_total{finished_reason="stop",model_name="tiny"} 1.0' in metrics
        assert prefill.messages(Abort) == []  # it had let go when decode committed


def test_stop_tokens_end_the_text_unless_told_to_go_on(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tiny", prompt=WORDS, max_tokens=30, extra_body={"stop_token_ids": [IDS[2]]}
    )
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("one two", "stop")
    assert answer.choices[0].stop_reason == IDS[2]  # type: ignore[attr-defined]
    longer = client.completions.create(
        model="tiny", prompt=WORDS, max_tokens=30, extra_body={"stop_token_ids": [IDS[2]], "min_tokens": 4}
    )
    assert longer.usage is not None
    assert longer.usage.completion_tokens == 6


def test_echo_puts_the_prompt_before_the_text(client: openai.OpenAI) -> None:
    for prompt in (WORDS, IDS):
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=2, echo=True)  # type: ignore[arg-type]
        assert answer.choices[0].text == WORDS + "one two"
    cut = {"truncate_prompt_tokens": 2}
    answer = client.completions.create(model="tiny", prompt=WORDS, max_tokens=1, echo=True, extra_body=cut)
    assert answer.choices[0].text == " two three" + " two"


def test_token_ids_come_back_when_asked_for(router: RouterUnderTest) -> None:
    body = {"prompt": IDS, "max_tokens": 5, "return_token_ids": True}
    whole = router.client.post("/v1/completions", json=body).json()["choices"][0]
    assert (whole["prompt_token_ids"], whole["token_ids"]) == (IDS, expected_tokens(IDS, 5))
    answer = router.client.post("/v1/completions", json={**body, "stream": True})
    choices = [json.loads(line[6:])["choices"][0] for line in answer.text.split("\n\n")[:-2]]
    assert [choice.get("prompt_token_ids") for choice in choices] == [IDS] + [None] * (len(choices) - 1)
    assert [token for choice in choices for token in choice["token_ids"]] == expected_tokens(IDS, 5)
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 5, "return_token_ids": True}
    answered = router.client.post("/v1/chat/completions", json=chat).json()
    assert answered["choices"][0]["token_ids"] == expected_tokens(answered["choices"][0]["prompt_token_ids"], 5)


def ids_of(router: RouterUnderTest, path: str, **body: object) -> list[int]:
    """Return the prompt's token ids as the workers got them."""
    answer = router.client.post(path, json={"max_tokens": 1, "return_token_ids": True, **body})
    assert answer.status_code == 200, answer.text
    return list(answer.json()["choices"][0]["prompt_token_ids"])


def test_a_prompt_is_cut_as_asked_for(router: RouterUnderTest) -> None:
    for prompt in (WORDS, IDS):
        for wish, ids in (
            ({"truncate_prompt_tokens": 2}, IDS[1:]),
            ({"truncate_prompt_tokens": 2, "truncation_side": "right"}, IDS[:2]),
            ({"truncate_prompt_tokens": 9}, IDS),
        ):
            assert ids_of(router, "/v1/completions", prompt=prompt, **wish) == ids
    long = ids_of(router, "/v1/completions", prompt="one " * 1000, truncate_prompt_tokens=-1, max_tokens=12)
    assert len(long) == MAX_CONTEXT - 12
    chat = [{"role": "user", "content": "one two"}]
    cut = ids_of(router, "/v1/chat/completions", messages=chat, truncate_prompt_tokens=2)
    assert TOKENIZER.decode(cut, skip_special_tokens=False) == " two<|assistant|>"


def test_a_chat_ends_where_it_is_asked_to(router: RouterUnderTest) -> None:
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two three"}]
    for wish, ending in (
        ({}, "two three<|assistant|>"),
        ({"add_generation_prompt": False}, "two three"),
        ({"continue_final_message": True}, "two three"),
    ):
        ids = ids_of(router, "/v1/chat/completions", messages=messages, **wish)
        assert TOKENIZER.decode(ids, skip_special_tokens=False) == f"<|user|>one<|user|>{ending}"
    for wish, param in (
        ({"continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
    ):
        answer = router.client.post("/v1/chat/completions", json={"messages": messages, **wish})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_special_tokens_and_variables_of_the_template_are_as_asked_for(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing("<|end|> $A", special_tokens=[("<|end|>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text('{"temperature": 0.25, "eos_token_id": 0}')
    (folder / "chat_template.jinja").write_text("{{ enable_thinking }}{{ reasoning_effort }}{{ messages[0].content }}")
    with (
        RouterUnderTest(folder, (GroupSpec("colocated", 0),)) as router,
        FakeWorker(router.control, "colocated") as worker,
    ):
        router.await_ready()
        for is_added, ids in ((None, [0, *IDS]), (True, [0, *IDS]), (False, IDS)):
            assert ids_of(router, "/v1/completions", prompt=WORDS, add_special_tokens=is_added) == ids
        assert worker.messages(Prefill)[0].request.sampling.temperature == 0.25  # type: ignore[attr-defined]
        messages = [{"role": "user", "content": " one"}]
        wish = {"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "low"}
        for is_added, begin in ((None, ""), (False, ""), (True, "<|end|>")):
            ids = ids_of(router, "/v1/chat/completions", messages=messages, add_special_tokens=is_added, **wish)
            assert tokenizer.decode(ids, skip_special_tokens=False) == f"{begin}Falselow one"
        body = {"prompt": WORDS, "max_tokens": 4, "ignore_eos": True, "logprobs": 0}
        shown = {"skip_special_tokens": False, "return_tokens_as_token_ids": True}
        hidden, seen = (router.client.post("/v1/completions", json=body | more).json() for more in ({}, shown))
        assert hidden["choices"][0]["text"] == WORDS
        assert seen["choices"][0]["text"] == "<|end|>" + WORDS
        assert hidden["choices"][0]["logprobs"]["text_offset"] == [0, 0, 3, 7]
        assert seen["choices"][0]["logprobs"]["text_offset"] == [0, 7, 10, 14]
        assert seen["choices"][0]["logprobs"]["tokens"] == [f"token_id:{token_id}" for token_id in [0, *IDS]]


def test_what_the_workers_get_is_what_was_asked_for(tmp_path: Path) -> None:
    with (
        RouterUnderTest(write_model(tmp_path), (GroupSpec("colocated", 0),)) as router,
        FakeWorker(router.control, "colocated") as worker,
    ):
        router.await_ready()
        sent = {"seed": -5, "temperature": 0, "top_k": -1, "logit_bias": {"7": 3}, "max_tokens": 4000}
        answer = router.client.post("/v1/completions", json={"prompt": IDS, "cache_salt": "mine", **sent}).json()
        assert answer["usage"]["total_tokens"] == MAX_CONTEXT
        asked = worker.messages(Prefill)[0].request  # type: ignore[attr-defined]
        assert asked == worker.messages(Reserve)[0].request  # type: ignore[attr-defined]
        assert (asked.prompt_token_ids, asked.salt) == (tuple(IDS), "mine")
        params = asked.sampling
        assert (params.seed, params.temperature, params.logit_bias, params.eos_token_ids) == (-5, 0.0, {7: 3.0}, (0,))
        assert answer["id"] == f"cmpl-{asked.request_id}"


BAD_COMPLETIONS = [
    ({"prompt": ""}, 400, "prompt", None),
    ({"prompt": []}, 400, "prompt", None),
    ({"prompt": [[]]}, 400, "prompt", None),
    ({"prompt": [""]}, 400, "prompt", None),
    ({"prompt": None}, 400, "prompt", None),
    ({}, 400, "prompt", None),
    ({"prompt": [1, "two"]}, 400, "prompt", None),
    ({"prompt": [1, [2]]}, 400, "prompt", None),
    ({"prompt": [1, True]}, 400, "prompt", None),
    ({"prompt": [VOCAB_SIZE]}, 400, "prompt", None),
    ({"prompt": [-1]}, 400, "prompt", None),
    ({"prompt": [10**30]}, 400, "prompt", None),
    ({"prompt": ["x"] * 17}, 400, "prompt", None),
    ({"prompt": [1] * MAX_CONTEXT}, 400, "prompt", "context_length_exceeded"),
    ({"prompt": "one " * 100_000}, 400, "prompt", "context_length_exceeded"),
    ({"prompt": "x", "temperature": -1}, 400, "temperature", None),
    ({"prompt": "x", "max_tokens": 0}, 400, "max_tokens", None),
    ({"prompt": "x", "n": 3}, 400, "n", None),
    ({"prompt": "x", "echo": True, "logprobs": 1}, 400, "echo", None),
    ({"prompt": "x", "model": "gpt-7"}, 404, "model", "model_not_found"),
]


@pytest.mark.parametrize(("body", "status", "param", "code"), BAD_COMPLETIONS)
def test_bad_completions_are_refused_in_openais_form(router, body, status, param, code) -> None:
    answer = router.client.post("/v1/completions", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (status, param, code), error
    assert set(error) == {"message", "type", "param", "code"}
    is_too_long = f"maximum context length is {MAX_CONTEXT} tokens" in error["message"]  # what clients look for
    assert is_too_long == (code == "context_length_exceeded")
    assert answer.headers["x-request-id"]
    good = router.client.post("/v1/completions", json={"prompt": WORDS, "max_tokens": 2})
    assert good.json()["choices"][0]["text"] == "one two"


def test_a_text_with_a_token_that_the_model_lacks_is_refused_before_it_meets_a_worker(tmp_path: Path) -> None:
    """As fine-tunes have it that add a padding token to the tokenizer and no row to the model."""
    folder = write_model(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens([AddedToken(f"<|more{index}|>", special=True) for index in range(VOCAB_SIZE)])
    beyond = next(token for token, token_id in tokenizer.get_vocab().items() if token_id == VOCAB_SIZE)
    tokenizer.save(str(folder / "tokenizer.json"))
    with (
        RouterUnderTest(folder, (GroupSpec("colocated", 0),)) as router,
        FakeWorker(router.control, "colocated") as worker,
    ):
        router.await_ready()
        for path, body in (
            ("/v1/completions", {"prompt": f"one {beyond}"}),
            ("/v1/completions", {"prompt": ["one", f"two {beyond}"]}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": f"one {beyond} two"}]}),
        ):
            answer = router.client.post(path, json=body)
            assert answer.status_code == 400
            said = f"holds token id {VOCAB_SIZE}; the vocabulary has ids 0 to {VOCAB_SIZE - 1}"
            assert said in answer.json()["error"]["message"]
        assert router.client.post("/v1/completions", json={"prompt": "one"}).status_code == 200
        assert len(worker.messages(Prefill)) == 1
        assert f"from id {VOCAB_SIZE} ({beyond!r}) on" in router.log.read_text()


def test_a_template_that_refuses_messages_is_the_clients_error(router: RouterUnderTest) -> None:
    messages = [{"role": role, "content": "x"} for role in ("user", "system")]
    answer = router.client.post("/v1/chat/completions", json={"messages": messages})
    assert answer.status_code == 400
    assert "only the first message may be of the system" in answer.json()["error"]["message"]


@pytest.mark.parametrize(("method", "path", "status"), [
    ("GET", "/", 404), ("GET", "/v1/nothing", 404), ("POST", "/v1/completions/", 404),
    ("GET", "/v1/completions", 405), ("DELETE", "/v1/models", 405), ("GET", "/v1/models/other", 404),
])  # fmt: skip
def test_unknown_paths_and_methods_are_refused_in_openais_form(router, method: str, path: str, status: int) -> None:
    answer = router.client.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def test_the_officials_clients_exceptions_are_the_right_ones(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="tiny", prompt="x", temperature=9)
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="other", prompt="x")
    assert caught.value.code == "model_not_found"
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_an_error_is_short_however_long_what_it_names(router: RouterUnderTest) -> None:
    posted = router.client.post("/v1/completions", json={"prompt": "x", "model": "m" * 100_000})
    asked = router.client.get("/v1/models/" + "m" * 20_000)
    assert (posted.status_code, asked.status_code) == (404, 404)
    assert max(len(posted.content), len(asked.content)) < 1000


def exchange(router: RouterUnderTest, *pieces: bytes) -> bytes:
    """Send raw bytes and return everything that comes until the router closes."""
    host, port = router.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=15) as raw:
        try:
            for piece in pieces:
                raw.sendall(piece)
        except OSError:
            pass  # it had seen enough
        answer = b""
        try:
            while chunk := raw.recv(65536):
                answer += chunk
        except ConnectionResetError:
            pass
        return answer


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"


@pytest.mark.parametrize(
    ("pieces", "status"),
    [
        ((HEAD + b"Content-Length: 5000000\r\n\r\n",), b"413"),
        ((HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[b"80000\r\n" + b"x" * 0x80000 + b"\r\n"] * 9), b"413"),
        ((HEAD + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",), b"400"),
        ((HEAD + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",), b"400"),
        ((b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n",), b"400"),
        ((b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\nConnection: close\r\n\r\n",), b"400"),
        ((b"\x00\xff garbage\r\n\r\n",), b"400"),
        ((b"CONNECT /health HTTP/1.1\r\nHost: a\r\n\r\n",), b"400"),
        ((b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 40_000,), b"400"),
        ((b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\nX: " + b"y" * 40_000 + b"\r\n\r\n",), b"400"),
        ((b"GET /health?" + b"y" * 40_000 + b" HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",), b"400"),
        ((b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n" + b"X: y\r\n" * 80 + b"\r\n",), b"400"),
    ],
)
def test_hostile_http_is_refused_and_the_router_goes_on(router, pieces: tuple[bytes, ...], status: bytes) -> None:
    answer = exchange(router, *pieces)
    assert answer.startswith(b"HTTP/1.1 " + status), answer[:200]
    assert b'{"error":{"message":' in answer
    assert router.client.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("head", "piece", "count", "status"),
    [
        (b"Content-Length: 20000000", b"x" * 1_000_000, 20, b"413"),
        (b"Transfer-Encoding: chunked", b"80000\r\n" + b"x" * 0x80000 + b"\r\n", 20, b"413"),
        (b"Content-Length: 4000000", b"[" * 1_000_000, 4, b"400"),
    ],
)
def test_a_client_that_writes_all_before_it_reads_sees_why_its_body_was_refused(
    router: RouterUnderTest, head: bytes, piece: bytes, count: int, status: bytes
) -> None:
    host, port = router.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=15) as raw:
        for part in (HEAD + head + b"\r\n\r\n", *[piece] * count):
            raw.sendall(part)
            time.sleep(0.01)  # or all is written before the answer is
        answer = b"".join(iter(lambda: raw.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 " + status)


@pytest.mark.parametrize("start", [b"2\r\n{}\r\n0\r\n", b"2\r\n{}\r\n0\r\nX: ", b"2;x="], ids=["many", "one", "chunk"])
def test_headers_around_a_body_that_do_not_end_are_cut_off(router: RouterUnderTest, start: bytes) -> None:
    piece = b"X: y\r\n" * 10_000 if start.endswith(b"\n") else b"y" * 60_000
    answer = exchange(router, HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + start, *[piece] * 50)
    assert answer == b""
    assert router.client.get("/health").status_code == 200


def test_a_body_in_many_small_chunks_is_read(router: RouterUnderTest) -> None:
    body = b'{"prompt": [5], "max_tokens": 1, "user": "%b"}' % (b"x" * 100_000)
    chunks = b"".join(b"1;x=y\r\n%c\r\n" % byte for byte in body) + b"0\r\nX: y\r\n\r\n"
    answer = exchange(router, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", chunks)
    assert answer.startswith(b"HTTP/1.1 200")


def test_a_plain_request_id_is_echoed_and_any_other_replaced(router: RouterUnderTest) -> None:
    for sent, is_echoed in (("run-7_a", True), ("x" * 65, False), ("a b", False), ("<script>", False)):
        got = router.client.get("/health", headers={"x-request-id": sent}).headers["x-request-id"]
        assert (got == sent) is is_echoed
    answer = router.client.post("/v1/completions", json={"prompt": "x"}, headers={"x-request-id": "mine"}).json()
    assert answer["id"] != "cmpl-mine"


def test_the_state_pages_tell_what_is_there(router: RouterUnderTest) -> None:
    wait_until(lambda: all(worker["blocks"]["total"] for worker in router.status()["workers"]))  # type: ignore[attr-defined]
    status = router.status()
    workers = status["workers"]
    assert isinstance(workers, list)
    assert [(worker["role"], worker["state"], worker["pid"]) for worker in workers] == [
        ("decode", "ready", 4242),
        ("prefill", "ready", 4242),
    ]
    assert workers[0]["blocks"] == {"total": 100, "free": 90, "cached": 0, "held": 10}
    assert workers[0]["block_size"] == 16
    assert int(workers[0]["epoch"], 16) > 0
    router.client.post("/v1/completions", json={"prompt": WORDS, "max_tokens": 5})
    metrics = router.client.get("/metrics").text
    for line in (
        'tandem_workers{role="decode",state="ready"} 1.0',
        'vllm:kv_cache_usage_perc{group="0",role="decode"} 0.1',
        'tandem_worker_total{counter="frames_received",group="0",role="prefill"} 5.0',
        'vllm:num_requests_running{model_name="tiny"} 0.0',
    ):
        assert line in metrics, line
    assert 'vllm:time_to_first_token_seconds_count{model_name="tiny"}' in metrics
    document = router.client.get("/openapi.json").json()
    assert document["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "prompt" in document["components"]["schemas"]["CompletionBody"]["required"]


OFFER = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
PLAIN_BODY = b'{"prompt": "one two three", "max_tokens": 2}'


@pytest.mark.parametrize(
    "pieces",
    [
        [OFFER + b"Content-Length: %d\r\n\r\n" % len(PLAIN_BODY) + PLAIN_BODY],
        [OFFER + b"Content-Length: %d\r\n\r\n" % len(PLAIN_BODY), PLAIN_BODY[:9], PLAIN_BODY[9:]],
        [OFFER + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(PLAIN_BODY), PLAIN_BODY + b"\r\n0\r\n\r\n"],
    ],
    ids=["whole", "in pieces", "chunked"],
)
def test_an_offer_of_another_protocol_is_passed_over(router: RouterUnderTest, pieces: list[bytes]) -> None:
    """Java's HttpClient offers HTTP/2 with its first request of a connection, and sends the next one behind it."""
    answer = exchange(
        router, *pieces, pieces[0], *pieces[1:], b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    )
    assert answer.count(b"HTTP/1.1 200") == 3, answer
    assert answer.count(b'"text":"one two"') == 2
    assert answer.endswith(b'{"status":"ok"}')


def test_pages_of_named_origins_may_call_and_no_others(router: RouterUnderTest, tmp_path: Path) -> None:
    page, other = "https://chat.example.org", "https://example.org"
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "content-type,authorization"}
    with (
        RouterUnderTest(write_model(tmp_path), (GroupSpec("colocated", 0),), cors_origins=(page,)) as open_router,
        FakeWorker(open_router.control, "colocated"),
    ):
        open_router.await_ready()
        for server, origin, is_let in ((open_router, page, True), (open_router, other, False), (router, page, False)):
            answer = server.client.options("/v1/chat/completions", headers={"origin": origin, **asks})
            assert (answer.status_code == 200) == is_let
            assert ("authorization" in answer.headers.get("access-control-allow-headers", "").lower()) >= is_let
            for body, status in (({"prompt": "one"}, 200), ({"prompt": ""}, 400)):
                got = server.client.post("/v1/completions", json=body, headers={"origin": origin})
                assert got.status_code == status
                assert (got.headers.get("access-control-allow-origin") == origin) == is_let


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"content-type": "application/json"}, 200),
        ({"content-type": "Application/JSON; charset=utf-8", "content-encoding": "identity"}, 200),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"origin": "https://example.org"}, 415),
        ({"content-type": "application/json", "content-encoding": "gzip"}, 415),
    ],
)
def test_only_json_as_it_is_is_read(router: RouterUnderTest, headers: dict[str, str], status: int) -> None:
    answer = router.client.post("/v1/completions", content=PLAIN_BODY, headers=headers)
    assert answer.status_code == status
    assert status == 200 or answer.json()["error"]["message"]


def test_without_a_tokenizer_only_token_ids_are_served(tmp_path: Path) -> None:
    with (
        RouterUnderTest(write_model(tmp_path, with_tokenizer=False)) as router,
        FakeWorker(router.control, "prefill"),
        FakeWorker(router.control, "decode"),
    ):
        router.await_ready()
        for path, body in (
            ("/v1/completions", {"prompt": "text"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ):
            assert router.client.post(path, json=body).status_code == 400
        body = {"prompt": [5, 6, 7], "max_tokens": 4, "return_token_ids": True, "logprobs": 1}
        choice = router.client.post("/v1/completions", json=body).json()["choices"][0]
        assert (choice["text"], choice["token_ids"]) == ("", [5, 6, 7, 5])
        assert choice["logprobs"]["tokens"][0] == "token_id:5"


def test_a_long_text_does_not_hold_up_a_stream(router: RouterUnderTest) -> None:
    """Half a megabyte of text that turns out too long is tokenized beside the event loop."""
    started_s = time.monotonic()
    answer = router.client.post("/v1/completions", json={"prompt": "fox " * 1200})
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert time.monotonic() - started_s < 2
