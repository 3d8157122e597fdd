"""The router's guess of what decode groups hold, against a list of everything that was ever said."""

import random

from router.control.held_prefixes import PIECE_TOKENS, HeldPrefixes


def common_prefix(ours: list[int], theirs: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))


def test_the_guess_is_the_longest_common_beginning_in_whole_pieces() -> None:
    rng = random.Random(1)
    said: list[tuple[int, str, list[int]]] = []
    held = HeldPrefixes()
    for _ in range(300):
        earlier = rng.choice(said)[2] if said else []
        text = earlier[: rng.randrange(len(earlier) + 1)] + [rng.randrange(3) for _ in range(rng.randrange(200))]
        epoch, salt = rng.randrange(3), rng.choice("ab")
        same = [other for e, s, other in said if (e, s) == (epoch, salt)]
        longest = max((common_prefix(text, other) // PIECE_TOKENS for other in same), default=0)
        assert held.num_held(epoch, salt, text) == longest * PIECE_TOKENS
        held.remember(epoch, salt, text)
        said.append((epoch, salt, text))
    held.forget(1)
    assert all(held.num_held(1, salt, text) == 0 for _, salt, text in said)
    assert any(held.num_held(2, salt, text) for _, salt, text in said)


def test_what_was_not_heard_of_for_longest_is_forgotten_first() -> None:
    held = HeldPrefixes(max_pieces=4)
    texts = [[number] * PIECE_TOKENS * 2 for number in range(3)]
    held.remember(1, "", texts[0])
    held.remember(1, "", texts[1])
    held.remember(1, "", texts[0])
    held.remember(1, "", texts[2])
    assert [held.num_held(1, "", text) // PIECE_TOKENS for text in texts] == [2, 0, 2]
