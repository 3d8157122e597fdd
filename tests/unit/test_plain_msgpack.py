"""What processes say to one another is plain MessagePack: another library reads the same contents, and writes them too.

Values are made from the types, so a message, a field or a kind of worker that is new is tested without a line here.
"""

import struct
from collections.abc import Callable
from itertools import count
from typing import Any, NamedTuple, get_args

import msgpack
import msgspec
import pytest
from msgspec import inspect

from kv_transfer.frames import FRAME_VERSION, FrameHeader, decode_header, digest_of, encode_header
from protocol import codec, orders
from protocol.messages import PROTOCOL_VERSION, AnyMessage, Message
from protocol.orders import AnyOrder, AnyReport, Order, Report
from protocol.topology import AnyRoleSection
from tests.unit.test_house_rules import PRODUCT
from worker import launch
from worker.launch import WorkerLaunch

EVERYTHING = [*get_args(AnyMessage), *get_args(AnyOrder), *get_args(AnyReport), FrameHeader]
EPOCHS = (2**63 - 1, 2**62)
HEADER_PREFIX = struct.Struct("<BQ")

FORBIDDEN = ("enc_hook", "dec_hook", "ext_hook", "msgpack.Ext", "msgspec.Raw")


class Samples:
    """Makes values of a type, all numbers and texts different from one another, so that nothing can trade places.

    is_full: every field that may be left out is there; otherwise none is.
    """

    def __init__(self, is_full: bool) -> None:
        self._is_full = is_full
        self._numbers = count(3)

    def of(self, cls: Any) -> Any:
        """Return a value of the type. Raise TypeError for a kind of type that is not known here."""
        return self._of(inspect.type_info(cls))

    def _of(self, kind: inspect.Type) -> Any:
        match kind:
            case inspect.Metadata(type=inner):
                return self._of(inner)
            case inspect.BoolType():
                return True
            case inspect.IntType(ge=low, le=high):
                return min((low or 0) + next(self._numbers), high if high is not None else 2**63 - 1)
            case inspect.FloatType(ge=low, le=high):
                return min((low or 0) + next(self._numbers) / 7, high if high is not None else 1e6)
            case inspect.StrType():
                return f"text {next(self._numbers)} äöü 分 \0"
            case inspect.BytesType(min_length=least):
                return bytes([0xC1, 0xFF, next(self._numbers) % 256]).ljust(least or 0, b"\x80")
            case inspect.LiteralType(values=values):
                return values[next(self._numbers) % len(values)]
            case inspect.VarTupleType(item_type=item):
                return (self._of(item), self._of(item)) if self._is_full else ()
            case inspect.TupleType(item_types=items):
                return tuple(self._of(item) for item in items)
            case inspect.DictType(key_type=key, value_type=value):
                return {self._of(key): self._of(value), self._of(key): self._of(value)} if self._is_full else {}
            case inspect.UnionType(types=types):
                return self._of(next(t for t in types if isinstance(t, inspect.NoneType) != self._is_full))
            case inspect.NoneType():
                return None
            case inspect.StructType(cls=cls, fields=fields):
                wanted = [field for field in fields if self._is_full or field.required]
                return cls(**{field.name: self._of(field.type) for field in wanted})
        raise TypeError(f"this test cannot make a value of {kind}")


class Spoken(NamedTuple):
    """One thing that is said. contents: what another library must find in body. read: as the product does."""

    value: Any
    contents: Any
    body: bytes
    read: Callable[[bytes], Any]


def plain(value: Any) -> Any:
    """Return what a value is made of: lists, dictionaries, numbers, texts, bytes, nothing else."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, msgspec.Struct):
        return _plain_struct(value)
    assert value is None or type(value) in (bool, int, float, str, bytes)
    return value


def _plain_struct(value: msgspec.Struct) -> Any:
    config = value.__struct_config__
    fields = {name: plain(getattr(value, name)) for name in value.__struct_fields__}
    if config.array_like:
        return list(fields.values())
    return fields if config.tag is None else {config.tag_field: config.tag, **fields}


def spoken(value: Any) -> Spoken:
    """Encode value as the product does."""
    if isinstance(value, Message):
        envelope = [PROTOCOL_VERSION, *EPOCHS, plain(value)]
        return Spoken(value, envelope, codec.encode(value, *EPOCHS), lambda data: codec.decode(data).message)
    if isinstance(value, Order):
        return Spoken(value, plain(value), orders.encode(value), orders.decode_order)
    if isinstance(value, Report):
        return Spoken(value, plain(value), orders.encode(value), orders.decode_report)
    if isinstance(value, FrameHeader):
        return Spoken(value, plain(value), encode_header(value)[HEADER_PREFIX.size :], read_header)
    assert isinstance(value, WorkerLaunch)
    return Spoken(value, plain(value), launch.encode(value), launch.decode)


def read_header(body: bytes) -> FrameHeader:
    return decode_header(HEADER_PREFIX.pack(FRAME_VERSION, digest_of(body)) + body)


def check(said: Spoken) -> None:
    found = msgpack.unpackb(said.body, strict_map_key=False)  # logit_bias has numbers as keys
    assert found == said.contents
    assert said.read(said.body) == said.value
    assert said.read(msgpack.packb(said.contents)) == said.value


@pytest.mark.parametrize("cls", EVERYTHING, ids=lambda cls: cls.__name__)
def test_another_library_reads_and_writes_what_is_said(cls: type):
    check(spoken(Samples(is_full=True).of(cls)))
    check(spoken(Samples(is_full=False).of(cls)))


@pytest.mark.parametrize("section", get_args(AnyRoleSection), ids=lambda section: section.__name__)
def test_another_library_reads_and_writes_a_worker_s_launch(section: type):
    samples = Samples(is_full=True)
    check(spoken(msgspec.structs.replace(samples.of(WorkerLaunch), role_section=samples.of(section))))


@pytest.mark.parametrize(("base", "union"), [(Message, AnyMessage), (Order, AnyOrder), (Report, AnyReport)])
def test_everything_that_can_be_said_is_in_its_union(base: type, union: Any):
    assert set(base.__subclasses__()) == set(get_args(union))


def test_nothing_of_ours_extends_messagepack():
    wire = [path for path in PRODUCT if "front" not in path.parts]  # HTTP speaks JSON
    found = {path: word for path in wire for word in FORBIDDEN if word in path.read_text(encoding="utf-8")}
    assert found == {}


def test_what_another_library_writes_wrongly_is_refused():
    """So the comparisons above would notice."""
    said = spoken(Samples(is_full=True).of(orders.SendMore))
    assert said.read(msgpack.packb({**said.contents, "num_computed": 0})) != said.value
    with pytest.raises(orders.WireError):
        said.read(msgpack.packb({**said.contents, "num_computed": msgpack.ExtType(1, b"x")}))
