"""What each token of a vocabulary stands for by itself: its bytes, and its text where they are whole characters.

Decoding a token alone does not tell: the space before a first word is dropped, and half a character becomes U+FFFD.
So the vocabulary's own piece is read, by the steps that the tokenizer's decoder takes. For log probabilities.
"""

import json
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import msgspec
from tokenizers import Tokenizer

DecoderStep = Callable[[str], str | bytes]


class TokenPiece(msgspec.Struct, frozen=True):
    """text: "bytes:\\xe2", as OpenAI writes it, for parts of characters. data: None where the id has no token."""

    text: str
    data: bytes | None


class TokenPieces:
    """Remembers the pieces that were asked for last."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = {token_id: token.content for token_id, token in tokenizer.get_added_tokens_decoder().items()}
        self._steps = [_step(part) for part in _parts(json.loads(tokenizer.to_str())["decoder"])]
        self.piece = lru_cache(maxsize=1 << 16)(self._piece)

    def _piece(self, token_id: int) -> TokenPiece:
        written = self._added.get(token_id)
        if written is not None:
            return TokenPiece(written, written.encode())
        written = self._tokenizer.id_to_token(token_id)
        if written is None:  # a row that only fills up the model's embedding
            return TokenPiece(f"token_id:{token_id}", None)
        return _named(self._bytes(written))

    def _bytes(self, written: str) -> bytes:
        for step in self._steps:
            result = step(written)
            if isinstance(result, bytes):
                return result
            written = result
        return written.encode(errors="replace")


def _named(data: bytes) -> TokenPiece:
    try:
        return TokenPiece(data.decode(), data)
    except UnicodeDecodeError:
        return TokenPiece("bytes:" + "".join(f"\\x{byte:02x}" for byte in data), data)


def _parts(decoder: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The steps of a decoder as its file describes them, nested ones in their place."""
    if decoder is None:
        return
    if decoder["type"] != "Sequence":
        yield decoder
    for part in decoder.get("decoders", ()):
        yield from _parts(part)


def _step(part: dict[str, Any]) -> DecoderStep:
    """Return what a step makes of one piece. What it does to a text as a whole is none of a piece's business."""
    match part:
        case {"type": "ByteLevel"}:
            return _from_byte_alphabet
        case {"type": "ByteFallback"}:
            return _from_hexadecimal
        case {"type": "Metaspace", "replacement": str(mark)} | {
            "type": "Replace",
            "pattern": {"String": str(mark)},
            "content": " ",
        }:
            return lambda piece: piece.replace(mark, " ")
        case {"type": "BPEDecoder", "suffix": str(suffix)}:
            return lambda piece: piece.replace(suffix, " ")
        case {"type": "WordPiece", "prefix": str(prefix)}:
            return lambda piece: piece.removeprefix(prefix) if piece.startswith(prefix) else " " + piece
        case _:
            return lambda piece: piece


def _from_hexadecimal(piece: str) -> str | bytes:
    """Bytes without a token of their own are written as <0x0A>."""
    return bytes([int(piece[3:5], 16)]) if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", piece) else piece


def _from_byte_alphabet(piece: str) -> bytes:
    return b"".join(_BYTES.get(character) or character.encode(errors="replace") for character in piece)


def _byte_alphabet() -> dict[str, bytes]:
    """GPT-2's: printable bytes stand for themselves, all others for the characters from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): bytes([byte]) for byte in printable}
    return alphabet | {chr(0x100 + index): bytes([byte]) for index, byte in enumerate(rest)}


_BYTES = _byte_alphabet()
