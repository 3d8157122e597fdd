"""What the digest of the KV kernels is certain to find, shown from its keys and tried on payloads."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.plain.digest_kv import START, digest_keys, digest_kv

MOST_WORDS = 16 * 256 * 4 // 4
"""Of one unit: 16 tokens of 256 dimensions in float32."""

UNIT_BYTES = 256


def digests(payload: np.ndarray, row_bytes: int) -> list[int]:
    return digest_kv(torch.from_numpy(payload), row_bytes, UNIT_BYTES).tolist()


def some_bytes(num_bytes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, num_bytes, np.uint8)


def test_keys_are_such_that_any_two_flipped_bits_and_any_two_exchanged_words_are_found():
    """Two flips at bit a of two words cancel only if their keys are equal or opposite modulo 2^(64 - a), a < 32.

    At different bits they never cancel, because all keys are odd; and exchanged words only if their keys are equal
    modulo 2^33. So it is enough that all keys and their opposites differ in their low 33 bits.
    """
    keys = digest_keys(MOST_WORDS, torch.device("cpu")).tolist()
    assert all(key % 2 for key in keys)
    residues = {sign * key % 2**33 for key in keys for sign in (1, -1)}
    assert len(residues) == 2 * MOST_WORDS


@given(st.data())
def test_flips_and_exchanges_change_the_digest_of_their_unit_and_of_no_other(data):
    payload = some_bytes(4 * 640)
    before = digests(payload, 640)  # rows of two and a half units
    words = payload.view(np.uint32)
    one, other = (data.draw(st.integers(0, len(words) - 1)) for _ in range(2))
    if data.draw(st.booleans()):
        words[[one, other]] = words[[other, one]]
    else:
        words[one] ^= np.uint32(1) << np.uint32(data.draw(st.integers(0, 31)))
        words[other] ^= np.uint32(1) << np.uint32(data.draw(st.integers(0, 31)))
    changed = {word // 160 * 3 + word % 160 // 64 for word in (one, other) if words[word] != some_words()[word]}
    after = digests(payload, 640)
    assert {unit for unit in range(12) if before[unit] != after[unit]} == changed


def some_words() -> np.ndarray:
    return some_bytes(4 * 640).view(np.uint32)


def test_top_bits_of_two_words_do_not_cancel():
    payload = some_bytes(UNIT_BYTES)
    before = digests(payload, UNIT_BYTES)
    payload[3] ^= 0x80
    payload[11] ^= 0x80
    assert digests(payload, UNIT_BYTES) != before


def test_exchanged_units_and_a_value_moved_by_one_word_are_found():
    payload = some_bytes(2 * UNIT_BYTES)
    first, second = digests(payload, 2 * UNIT_BYTES)
    assert digests(np.roll(payload, UNIT_BYTES), 2 * UNIT_BYTES) == [second, first]
    assert digests(np.roll(payload, 4), 2 * UNIT_BYTES)[0] not in (first, second)
    alone = np.zeros(UNIT_BYTES, np.uint8)
    found = set()
    for place in range(0, UNIT_BYTES, 4):
        alone[:] = 0
        alone[place] = 1
        found.add(digests(alone, UNIT_BYTES)[0])
    assert len(found) == UNIT_BYTES // 4


def test_zeros_do_not_look_like_memory_that_was_never_written():
    assert digests(np.zeros(UNIT_BYTES, np.uint8), UNIT_BYTES) == [START]
    assert START != 0


def test_random_damage_is_found():
    """Every digest of 20,000 random payloads is another one, and so is almost every half of one."""
    payload = torch.from_numpy(some_bytes(20_000 * UNIT_BYTES))
    found = digest_kv(payload, UNIT_BYTES, UNIT_BYTES)
    assert len(found.unique()) == 20_000
    assert len((found & 0xFFFFFFFF).unique()) > 19_980
    assert len((found >> 32).unique()) > 19_980
