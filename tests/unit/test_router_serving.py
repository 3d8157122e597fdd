"""What is refused before it becomes a request: too much at once, no worker, no room."""

import pytest

from protocol.generation_config import SamplingDefaults
from protocol.layout import Endpoint, KVLayout, keys_and_values
from router.control.dispatch import Dispatcher
from router.control.policies import POLICIES, ReadyGroup
from router.front import serving
from router.front.chat import ChatCall
from router.front.completions import CompletionCall
from router.front.errors import ApiError
from router.front.requests import Prompt, RequestMaker
from router.front.schemas import ChatBody, CompletionBody
from router.front.serving import Serving


class Controller:
    """The two things of router.control.controller that are asked here."""

    def __init__(self) -> None:
        self.dispatcher = Dispatcher(POLICIES["least_loaded"])
        self.attempts: list[object] = []


class Control:
    def __init__(self) -> None:
        self.controller = Controller()


def serving_of(text: object) -> Serving:
    control = Control()
    requests = RequestMaker(text, control.controller.dispatcher, 64, 100, (), SamplingDefaults())  # type: ignore[arg-type]
    parts = {"control": control, "text": text, "requests": requests, "bodies": None, "metrics": None}
    parts |= {"model_name": "m", "max_context": 64, "timeout_s": 1.0, "created": 0, "metrics_writing": None}
    return Serving(**parts)  # type: ignore[arg-type]


@pytest.fixture
def front() -> Serving:
    return serving_of(None)


def add_group(front: Serving, num_tokens: int) -> None:
    endpoint = Endpoint(1, KVLayout("m", 1, keys_and_values(1, 8, "float32"), 16, 1), "zmq", ("a",))
    front.control.controller.dispatcher.colocate([ReadyGroup(0, 1, endpoint, num_tokens)])


def prompt(num_tokens: int) -> Prompt:
    return Prompt((1,) * num_tokens)


def test_too_many_requests_are_a_429_that_says_when_to_come_back(front: Serving, monkeypatch) -> None:
    front.check_open()
    monkeypatch.setattr(serving, "MAX_REQUESTS", 2)
    front.control.controller.attempts.extend([1, 2])  # type: ignore[attr-defined]
    with pytest.raises(ApiError) as caught:
        front.check_open()
    assert (caught.value.status, caught.value.detail.type) == (429, "rate_limit_error")
    assert caught.value.headers == {"retry-after": "1", "x-should-retry": "true"}


def test_while_draining_nothing_new_is_taken(front: Serving) -> None:
    front.is_draining = True
    with pytest.raises(ApiError) as caught:
        front.check_open()
    assert caught.value.status == 503


@pytest.mark.parametrize(("num_prompt_tokens", "capacity", "room"), [(10, 1000, 54), (63, 1000, 1), (10, 32, 22)])
def test_room_is_what_context_and_cache_leave(front: Serving, num_prompt_tokens: int, capacity: int, room: int) -> None:
    add_group(front, capacity)
    assert front.requests.room_for(prompt(num_prompt_tokens)) == room


@pytest.mark.parametrize(("num_prompt_tokens", "capacity"), [(64, 1000), (32, 32), (40, 32)])
def test_a_prompt_without_room_for_one_token_is_too_long(front: Serving, num_prompt_tokens: int, capacity: int) -> None:
    add_group(front, capacity)
    with pytest.raises(ApiError, match="at most") as caught:
        front.requests.room_for(prompt(num_prompt_tokens))
    assert (caught.value.status, caught.value.detail.code) == (400, "context_length_exceeded")


def test_without_a_worker_a_good_prompt_is_a_503_and_one_too_long_still_a_400(front: Serving) -> None:
    for num_tokens, status in ((5, 503), (64, 400)):
        with pytest.raises(ApiError) as caught:
            front.requests.room_for(prompt(num_tokens))
        assert caught.value.status == status


class Text:
    """Remembers what each text was said to go on from."""

    def __init__(self) -> None:
        self.befores: list[tuple[int, ...]] = []

    def detokenizer(self, before: tuple[int, ...], skips_special: bool) -> None:
        self.befores.append(before)


def test_a_completion_goes_on_from_its_prompt_and_an_answer_in_a_chat_from_nothing() -> None:
    text = Text()
    front = serving_of(text)
    add_group(front, 1000)
    CompletionCall(front, CompletionBody(prompt=""), [Prompt((5, 6)), Prompt((7,), "x")])
    ChatCall(front, ChatBody(messages=[]), [Prompt((8,), begins_text=True)])
    assert text.befores == [(5, 6), (7,), ()]
