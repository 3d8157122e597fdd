"""Text that comes token by token: nothing lost, no half characters, no part of a stop string."""

import asyncio
import random
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Encoding, Tokenizer, decoders, models

from protocol.identity import new_attempt
from protocol.messages import TokenLogprobs, TokenUpdate
from protocol.request import Request, SamplingParams
from router.front.chat_template import ChatTemplate
from router.front.choice import Choice, Delta
from router.front.detokenizer import MAX_HELD, Detokenizer
from router.front.logprobs import Spelling, TextOffsets, chat_logprobs, completion_logprobs
from router.front.requests import Prompt
from router.front.stop_strings import StopStrings
from router.front.text import MAX_CHARS_USUAL, ModelText
from router.front.token_pieces import TokenPiece, TokenPieces
from tests.integration.router_process import SPECIAL_TOKENS, VOCAB_SIZE, tiny_tokenizer

SPECIAL_IDS = frozenset({0, 1, 2})
ATTEMPT = new_attempt("r", 0, 1, 2)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


def first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Brute force: read character by character until some stop string is complete."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(max_examples=1000, deadline=None)
@given(
    st.lists(st.text("ab", max_size=4), max_size=10),
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=3, unique=True),
)
def test_stop_strings_cut_the_text_exactly_where_reading_it_whole_would(pieces: list[str], stops: list[str]) -> None:
    finder, shown = StopStrings(stops), ""
    expected, stop = first_stop("".join(pieces), stops)
    for piece in pieces:
        shown += finder.feed(piece)
        assert expected.startswith(shown), "a part of a stop string was shown"
        if finder.matched is not None:
            break
    else:
        shown += finder.flush()
    assert (shown, finder.matched) == (expected, stop)


def test_stop_strings_hold_back_no_more_than_they_must() -> None:
    finder = StopStrings(["END"])
    assert [finder.feed(piece) for piece in ("abc", "E", "N", "x", "EN")] == ["abc", "", "", "ENx", ""]
    assert finder.flush() == "EN"


@pytest.mark.parametrize("seed", range(200))
def test_text_of_any_tokens_adds_up_to_what_decoding_them_at_once_gives(tokenizer: Tokenizer, seed: int) -> None:
    rng = random.Random(seed)
    token_ids = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(0, 60))]
    detokenizer = Detokenizer(tokenizer, SPECIAL_IDS)
    pieces = [detokenizer.feed(token_id) for token_id in token_ids]
    assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(token_ids)


@pytest.mark.parametrize("text", ["日本 😀 naïve", "a😀b", "👩‍👩‍👧", "plain words only"])
def test_characters_of_several_tokens_come_whole(tokenizer: Tokenizer, text: str) -> None:
    detokenizer = Detokenizer(tokenizer, SPECIAL_IDS)
    pieces = [detokenizer.feed(token_id) for token_id in tokenizer.encode(text).ids]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_cut_off_by_the_end_is_shown_as_such(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, SPECIAL_IDS)
    ids = tokenizer.encode("é").ids  # two bytes that no merge joined
    assert len(ids) == 2
    assert detokenizer.feed(ids[0]) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_bytes_that_never_become_a_character_are_not_held_for_ever(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, SPECIAL_IDS)
    lead = tokenizer.encode("é").ids[0]
    pieces = [detokenizer.feed(lead) for _ in range(MAX_HELD + 1)]
    assert pieces[MAX_HELD - 1] == "\ufffd" * MAX_HELD
    assert detokenizer.feed(tokenizer.token_to_id("a")) == "\ufffda"


def spaces_before_words() -> Tokenizer:
    """As Mistral's and Llama 2's: a word carries the space before it, which is not shown where a text begins."""
    words = ["<s>", "▁Once", "▁upon", "▁a", "▁time", ",", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


@pytest.mark.parametrize("num_before", range(16))
@pytest.mark.parametrize("is_cut", [False, True])
def test_a_text_that_goes_on_keeps_the_space_before_its_first_word(num_before: int, is_cut: bool) -> None:
    tokenizer = spaces_before_words()
    before, after = [0, *[1, 2, 3] * 5][:num_before], [4, 5, 4, 0, 4]
    if is_cut:  # the first half of a character ends what stands before
        before.append(tokenizer.token_to_id("<0xC3>"))
    detokenizer = Detokenizer(tokenizer, frozenset({0}), before)
    text = "".join(detokenizer.feed(token_id) for token_id in after) + detokenizer.flush()
    assert text.lstrip(" ") == "time, time time"
    assert text.startswith(" ") == (num_before > 1 or is_cut)


@pytest.mark.parametrize("make", ["tiny_tokenizer", "spaces_before_words"])
@pytest.mark.parametrize("num_before", [0, 3])
@pytest.mark.parametrize("character", ["é", "日", "😀"])
def test_a_character_that_begins_in_the_prompt_comes_whole(make: str, num_before: int, character: str) -> None:
    tokenizer: Tokenizer = globals()[make]()
    prompt = [5, 6, 7][:num_before]
    *first, last = byte_tokens(tokenizer, character)
    detokenizer = Detokenizer(tokenizer, frozenset(), [*prompt, *first])
    assert detokenizer.feed(last) + detokenizer.flush() == character
    cut_short = Detokenizer(tokenizer, frozenset(), [*prompt, *first])
    assert "".join(map(cut_short.feed, byte_tokens(tokenizer, f",{character},"))) == f",{character},"


def byte_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a text's single bytes."""
    pieces = TokenPieces(tokenizer)
    ids = {pieces.piece(token_id).data: token_id for token_id in reversed(range(tokenizer.get_vocab_size()))}
    return [ids[bytes([byte])] for byte in text.encode()]


@pytest.mark.parametrize("before", [[], [1]])
def test_after_bytes_that_never_become_a_character_the_text_goes_on_with_its_space(before: list[int]) -> None:
    tokenizer = spaces_before_words()
    bad = tokenizer.token_to_id("<0xC3>")
    detokenizer = Detokenizer(tokenizer, frozenset({0}))
    pieces = [detokenizer.feed(token_id) for token_id in [*before, *[bad] * MAX_HELD, 4, 5, 4]]
    assert "".join(pieces) == "Once" * len(before) + "\ufffd" * MAX_HELD + " time, time"


def test_a_token_has_its_own_bytes_and_text_whatever_the_vocabulary(tokenizer: Tokenizer) -> None:
    of_bytes, of_words = TokenPieces(tokenizer), TokenPieces(spaces_before_words())
    metaspace = Tokenizer(models.BPE({"▁cat": 0, "cat": 1}, []))
    metaspace.decoder = decoders.Metaspace()
    spelled = {
        " two": of_bytes.piece(tokenizer.encode(" two").ids[0]),
        "<|user|>": of_bytes.piece(1),
        " Once": of_words.piece(1),
        ",": of_words.piece(5),
        "\n": of_words.piece(6 + 0x0A),
        " cat": TokenPieces(metaspace).piece(0),
        "cat": TokenPieces(metaspace).piece(1),
    }
    assert spelled == {text: TokenPiece(text, text.encode()) for text in spelled}
    half = TokenPiece("bytes:\\xe2", b"\xe2")
    assert (of_bytes.piece(tokenizer.token_to_id("â")), of_words.piece(6 + 0xE2)) == (half, half)
    assert of_bytes.piece(VOCAB_SIZE + 5) == TokenPiece(f"token_id:{VOCAB_SIZE + 5}", None)


@pytest.mark.parametrize("seed", range(20))
def test_bytes_of_tokens_add_up_to_their_text(tokenizer: Tokenizer, seed: int) -> None:
    rng = random.Random(seed)
    token_ids = [rng.randrange(len(SPECIAL_TOKENS), tokenizer.get_vocab_size()) for _ in range(60)]
    pieces = TokenPieces(tokenizer)
    data = b"".join(pieces.piece(token_id).data or b"" for token_id in token_ids)
    assert data.decode(errors="replace") == tokenizer.decode(token_ids)


def test_log_probabilities_name_every_token_and_say_where_it_begins() -> None:
    tokenizer = Tokenizer(models.BPE({"▁cat": 0, "cat": 1, **{f"<0x{b:02X}>": b + 2 for b in range(256)}}, []))
    tokenizer.decoder = spaces_before_words().decoder
    text = ModelText(tokenizer, "", 100)
    ids = [0, 1, *(byte + 2 for byte in "日".encode()), 0]
    drawn = [(token_id, TokenLogprobs(-1.0, (0, 1, ord("c") + 2, 2), (-0.5, -0.6, -0.7, -0.8))) for token_id in ids]
    offsets = TextOffsets()
    parts = [completion_logprobs(part, Spelling(text), offsets) for part in (drawn[:3], drawn[3:])]
    assert [token for part in parts for token in part.tokens][:3] == [" cat", "cat", "bytes:\\xe6"]
    assert [offset for part in parts for offset in part.text_offset] == [0, 4, 7, 7, 7, 8]
    assert parts[0].top_logprobs[1] == {" cat": -0.5, "c": -0.7, "\0": -0.8, "cat": -1.0}
    tokenizer.add_tokens([AddedToken("cat", special=False, normalized=False)])
    chat = chat_logprobs(drawn, Spelling(text))
    assert [bytes(entry.bytes or []) for entry in chat.content] == [b" cat", b"cat", b"\xe6", b"\x97", b"\xa5", b" cat"]


def test_two_tokens_of_one_spelling_keep_both_their_log_probabilities() -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0, "<0x61>": 1, "b": 2}, []))
    tokenizer.decoder = decoders.ByteFallback()
    drawn = [(2, TokenLogprobs(-3.0, (1, 0), (-0.1, -0.2)))]
    text = ModelText(tokenizer, "", 100)
    [tops] = completion_logprobs(drawn, Spelling(text), TextOffsets()).top_logprobs
    assert tops == {"a": -0.1, "token_id:0": -0.2, "b": -3.0}
    by_id = completion_logprobs(drawn, Spelling(text, as_ids=True), TextOffsets())
    assert by_id.tokens == ["token_id:2"]
    assert by_id.top_logprobs == [{"token_id:1": -0.1, "token_id:0": -0.2, "token_id:2": -3.0}]


def test_a_character_of_several_tokens_comes_whole_behind_a_prompt(tokenizer: Tokenizer) -> None:
    before = tokenizer.encode("one 日 two").ids
    for num_before in range(len(before)):
        detokenizer = Detokenizer(tokenizer, SPECIAL_IDS, before[:num_before])
        assert "".join(detokenizer.feed(token_id) for token_id in tokenizer.encode("日x😀").ids) == "日x😀"


class SlowTokenizer:
    """One whose long texts take until they are let go."""

    def __init__(self) -> None:
        self.has_begun, self.go_on = threading.Event(), threading.Event()

    def get_vocab(self) -> dict[str, int]:
        return {"x" * 100: 0}

    def to_str(self) -> str:
        return '{"decoder": null}'

    def get_added_tokens_decoder(self) -> dict[int, object]:
        return {}

    def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> list[Encoding]:
        if len(texts[0]) > MAX_CHARS_USUAL:
            self.has_begun.set()
            assert self.go_on.wait(10)
        return [tiny_tokenizer().encode("one")]


def test_long_texts_keep_nobody_waiting_but_one_another() -> None:
    async def scenario() -> None:
        tokenizer = SlowTokenizer()
        text = ModelText(tokenizer, ChatTemplate("{{ messages[0].content }}", {}), 1 << 20)  # type: ignore[arg-type]
        long = [asyncio.create_task(text.encode("x" * (MAX_CHARS_USUAL + 1), "prompt")) for _ in range(8)]
        await asyncio.to_thread(tokenizer.has_begun.wait, 10)
        assert await asyncio.wait_for(text.encode("x" * MAX_CHARS_USUAL, "prompt"), 5)
        assert await asyncio.wait_for(text.render([{"role": "user", "content": "x" * 9000}], {}), 5)
        tokenizer.go_on.set()
        assert all(await asyncio.gather(*long))
        text.close()

    asyncio.run(scenario())


def choice_of(
    detokenizer: Detokenizer | None, stops: Sequence[str] = (), shows_stop: bool = False, **sampling: Any
) -> Choice:
    request = Request("r", (1,), SamplingParams(**{"max_tokens": 9, "seed": 0, **sampling}))
    return Choice(0, Prompt(request.prompt_token_ids), request, detokenizer, stops, shows_stop)


def feed_all(choice: Choice, token_ids: list[int], reason: str | None) -> Delta:
    for index, token_id in enumerate(token_ids):
        last = index == len(token_ids) - 1
        choice.feed(TokenUpdate(ATTEMPT, index, token_id, None, reason if last else None))
        if choice.finish_reason is not None:
            break
    return choice.take()


def test_a_stop_string_ends_the_choice_at_its_token_and_is_not_in_the_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one two three four").ids
    choice = choice_of(Detokenizer(tokenizer, SPECIAL_IDS), ["o th"])
    delta = feed_all(choice, ids, "length")
    assert (delta.text, choice.finish_reason, choice.stop_reason) == ("one tw", "stop", "o th")
    assert choice.num_tokens == 3
    assert delta.token_ids == ids[:3]


def test_stop_strings_do_not_count_before_min_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one two one two").ids
    choice = choice_of(Detokenizer(tokenizer, SPECIAL_IDS), ["two"], min_tokens=2)
    assert feed_all(choice, ids, "length").text == "one two one "


def test_text_held_back_for_a_stop_string_comes_out_at_the_end(tokenizer: Tokenizer) -> None:
    choice = choice_of(Detokenizer(tokenizer, SPECIAL_IDS), ["three four"])
    assert feed_all(choice, tokenizer.encode("two three").ids, "length").text == "two three"
    assert choice.finish_reason == "length"


def test_a_token_that_ends_the_text_is_no_part_of_it(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one two three").ids
    assert feed_all(choice_of(Detokenizer(tokenizer, SPECIAL_IDS)), ids, "stop").text == "one two"


@pytest.mark.parametrize(("ignores_eos", "reason"), [(False, None), (True, 7)])
def test_the_reason_is_the_stop_token_unless_the_model_itself_ends_with_it(ignores_eos: bool, reason: int) -> None:
    ends = {"stop_token_ids": (7, 8), "eos_token_ids": (7, 9), "ignore_eos": ignores_eos}
    for token_id, expected in ((7, reason), (8, 8), (9, None)):
        choice = choice_of(None, **ends)
        feed_all(choice, [5, token_id], "stop")
        assert (choice.finish_reason, choice.stop_reason) == ("stop", expected)


def test_what_ends_a_text_is_part_of_it_when_asked_for(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one two three").ids
    for special_ids, text in ((SPECIAL_IDS, "one two three"), (None, "one two three<|end|>")):
        choice = choice_of(Detokenizer(tokenizer, special_ids), shows_stop=True)
        assert feed_all(choice, [*ids, 0], "stop").text == text
    choice = choice_of(Detokenizer(tokenizer, SPECIAL_IDS), ["o th", "wo"], shows_stop=True)
    assert feed_all(choice, ids, "length").text == "one two"
    hidden = choice_of(Detokenizer(tokenizer, None))
    assert feed_all(hidden, [1, *ids, 0], "stop").text == "<|user|>one two three"


def test_a_model_without_a_tokenizer_has_tokens_but_no_text() -> None:
    choice = choice_of(None, ["x"])
    delta = feed_all(choice, [7, 8, 9], "length")
    assert (delta.text, delta.token_ids, choice.finish_reason) == ("", [7, 8, 9], "length")
