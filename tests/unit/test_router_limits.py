"""What one client may take from all others: values in a body, shares of a quota, places in a line."""

import asyncio
import json
import threading
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from router.front.body import MAX_CONTAINERS, MAX_VALUES, BodyReader
from router.front.errors import ApiError
from router.front.json_meter import JsonMeter
from router.front.quota import Quota, owner_of
from router.front.work_pool import WorkPool

TEXT = st.text('\\\\"[]{},:ab\u00e9', max_size=8)
JSON = st.recursive(
    st.none() | st.integers() | TEXT,
    lambda values: st.lists(values, max_size=4) | st.dictionaries(TEXT, values, max_size=4),
)


def census(value: Any) -> tuple[int, int]:
    """Count lists and objects, and everything in them, one by one."""
    if not isinstance(value, list | dict):
        return 0, 0
    inside = list(value.values()) if isinstance(value, dict) else value
    counts = [census(item) for item in inside]
    return 1 + sum(count[0] for count in counts), len(inside) + sum(count[1] for count in counts)


@given(JSON, st.lists(st.integers(0, 200), max_size=4), st.booleans())
def test_the_meter_never_counts_less_than_there_is_however_the_text_is_cut(
    value: Any, cuts: list[int], is_ascii: bool
) -> None:
    data, meter = json.dumps(value, ensure_ascii=is_ascii).encode(), JsonMeter()
    ends = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    for begin, end in pairwise(ends):
        meter.feed(data[begin:end])
    num_containers, num_values = census(value)
    assert meter.num_containers == num_containers
    assert num_values <= meter.num_values <= num_values + num_containers


def read(data: bytes, piece: int = 65536) -> bytes:
    """Read a body that comes in pieces."""
    messages = [
        {"type": "http.request", "body": data[at : at + piece], "more_body": at + piece < len(data)}
        for at in range(0, len(data), piece)
    ]

    async def receive() -> Any:
        return messages.pop(0)

    request = Request({"type": "http", "headers": [], "client": ("127.0.0.1", 1)}, receive)
    return bytes(asyncio.run(BodyReader(Quota(1 << 23, 1 << 23), 1000).read(request)))


@pytest.mark.parametrize(
    "data",
    [
        b'{"prompt":[' + b"[]," * MAX_CONTAINERS + b"[]]}",
        b'{"tools":[' + b"{}," * MAX_CONTAINERS + b"{}]}",
        b'{"prompt":[' + b"1," * MAX_VALUES + b"1]}",
        b'{"tools":{' + b'"a":1,' * MAX_VALUES + b'"b":1}}',
    ],
    ids=["lists", "objects", "numbers", "members"],
)
def test_a_body_of_too_many_values_is_refused_before_it_is_decoded(data: bytes) -> None:
    with pytest.raises(ApiError, match="the body holds more than") as caught:
        read(data)
    assert caught.value.status == 400


@pytest.mark.parametrize("prompt", ['a,[{"\\' * 500_000, "\\" * 1_000_000, list(range(MAX_VALUES - 9))], ids=len)
def test_a_large_body_of_few_values_is_read(prompt: object) -> None:
    data = json.dumps({"prompt": prompt}, separators=(",", ":")).encode()
    assert read(data) == data


def test_a_quota_is_shared_and_comes_back() -> None:
    quota = Quota(total=10, per_owner=6)
    assert quota.take("a", 6)
    assert not quota.take("a", 1)
    assert quota.take("b", 4)
    assert not quota.take("c", 1)
    quota.give_back("a", 6)
    assert quota.take("c", 6)


def test_an_ipv6_network_is_one_owner() -> None:
    assert owner_of(("2001:db8::1", 1)) == owner_of(("2001:db8:0:0:ffff::2", 2)) != owner_of(("2001:db8:0:1::1", 1))
    assert owner_of(("10.0.0.1", 1)) != owner_of(("10.0.0.2", 1))


def test_a_line_that_is_full_refuses_and_lets_in_again() -> None:
    async def scenario() -> None:
        pool, go_on = WorkPool("work", num_threads=1, max_waiting=1), threading.Event()
        inside = [asyncio.create_task(pool.run(go_on.wait, 10)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(ApiError, match="wait for work") as caught:
            await pool.run(len, "x")
        assert caught.value.status == 429
        go_on.set()
        assert await asyncio.gather(*inside) == [True, True]
        assert await pool.run(len, "x") == 1
        pool.close()

    asyncio.run(scenario())
