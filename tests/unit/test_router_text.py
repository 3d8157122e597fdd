"""Text that comes token by token: nothing lost, no half characters, no part of a stop string."""

import asyncio
import json
import random
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Encoding, Tokenizer, decoders, models

from protocol.errors import ConfigError
from protocol.identity import new_attempt
from protocol.messages import TokenUpdate
from router.front.chat_template import ChatTemplate, load_chat_template
from router.front.choice import Choice, Delta
from router.front.detokenizer import MAX_HELD, Detokenizer
from router.front.stop_strings import StopStrings
from router.front.text import MAX_CHARS_USUAL, ModelText
from tests.integration.router_process import VOCAB_SIZE, tiny_tokenizer

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
    assert text.startswith(" ") == (num_before > 1 and not is_cut)


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
        assert await asyncio.wait_for(text.encode_chat([{"role": "user", "content": "x" * 9000}]), 5)
        tokenizer.go_on.set()
        assert all(await asyncio.gather(*long))
        text.close()

    asyncio.run(scenario())


def feed_all(choice: Choice, token_ids: list[int], reason: str | None) -> Delta:
    delta = Delta()
    for index, token_id in enumerate(token_ids):
        last = index == len(token_ids) - 1
        choice.feed(TokenUpdate(ATTEMPT, index, token_id, None, reason if last else None), delta)
        if choice.finish_reason is not None:
            break
    return delta


def test_a_stop_string_ends_the_choice_at_its_token_and_is_not_in_the_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one two three four").ids
    choice = Choice(Detokenizer(tokenizer, SPECIAL_IDS), ["o th"])
    delta = feed_all(choice, ids, "length")
    assert (delta.text, choice.finish_reason, choice.stop_reason) == ("one tw", "stop", "o th")
    assert choice.num_tokens == 3
    assert delta.token_ids == ids[:3]


def test_stop_strings_do_not_count_before_min_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one two one two").ids
    choice = Choice(Detokenizer(tokenizer, SPECIAL_IDS), ["two"], min_tokens=2)
    assert feed_all(choice, ids, "length").text == "one two one "


def test_text_held_back_for_a_stop_string_comes_out_at_the_end(tokenizer: Tokenizer) -> None:
    choice = Choice(Detokenizer(tokenizer, SPECIAL_IDS), ["three four"])
    assert feed_all(choice, tokenizer.encode("two three").ids, "length").text == "two three"
    assert choice.finish_reason == "length"


def test_a_token_that_ends_the_text_is_no_part_of_it(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one two three").ids
    assert feed_all(Choice(Detokenizer(tokenizer, SPECIAL_IDS)), ids, "stop").text == "one two"


def test_a_model_without_a_tokenizer_has_tokens_but_no_text() -> None:
    choice = Choice(None, ["x"])
    delta = feed_all(choice, [7, 8, 9], "length")
    assert (delta.text, delta.token_ids, choice.finish_reason) == ("", [7, 8, 9], "length")


def test_chat_templates_run_in_a_sandbox_and_their_complaints_are_errors() -> None:
    assert (
        ChatTemplate("{{ bos_token }}{{ messages[0].content }}", {"bos_token": "<s>"}).render(
            [{"role": "user", "content": "hi"}]
        )
        == "<s>hi"
    )
    for source in (
        "{{ raise_exception('no') }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].content.no.such }}",
    ):
        with pytest.raises(ValueError, match="does not accept these messages"):
            ChatTemplate(source, {}).render([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("test", ["message.role == 'system'", "message['role'] in ['system']"])
def test_what_a_developer_says_is_the_systems_where_the_template_has_no_developer(test: str) -> None:
    body = "{% for message in messages %}{% if TEST %}<{{ message.role }}>{{ message.content }}{% endif %}{% endfor %}"
    messages = [{"role": "developer", "content": "Be brief."}]
    assert ChatTemplate(body.replace("TEST", test), {}).render(messages) == "<system>Be brief."
    own = ChatTemplate(body.replace("TEST", test + ' or message.role == "developer"'), {})
    assert own.render(messages) == "<developer>Be brief."


@pytest.mark.parametrize("template", [7, {"a": 1}, ["x"], [{"name": "default"}], [{"name": "default", "template": 7}]])
def test_what_is_no_chat_template_is_refused_in_a_sentence(template: object, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(ConfigError, match="has for a chat template is none"):
        load_chat_template(tmp_path)


def test_a_chat_template_that_is_no_text_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="has for a chat template is none"):
        load_chat_template(tmp_path)
