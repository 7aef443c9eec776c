"""moecc.runtime.text: pieces join to what the tokenizer decodes at once, up to a stop string."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import pytest
from conftest import MODELS
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

from moecc.runtime.text import TextStream

MARK = "\ufffd"
WORDS = [
    "a",
    "n",
    "'",
    "t",
    "s",
    "ve",
    "v",
    "re",
    "m",
    ".",
    ",",
    "?",
    "do",
    "n't",
    "world",
    "中",
    "",
]
PARTS = [f"##{word}" for word in ["", "a", "n", "'", "t", "s", "e", "world"]]
PIECES = ["▁", "▁▁", "▁▁▁▁", "▁a", "▁the", "a", "b", ".", "中", "é", "▁'", MARK, f"b{MARK}"]
SPECIAL = [AddedToken("<s>", special=True), AddedToken("</s>", special=True)]


def word_level(vocab: Sequence[str], decoder: Any, **options: Any) -> PreTrainedTokenizerFast:
    """A tokenizer that decodes with `decoder`; the last tokens are added, two special."""
    ids = {token: i for i, token in enumerate(vocab)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=vocab[0]))
    tokenizer.decoder = decoder
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


@cache
def byte_level() -> Any:
    return AutoTokenizer.from_pretrained(MODELS / "nano-base")


@cache
def byte_fallback() -> Any:
    """As Llama 2's and Mixtral's; token i below 256 is byte i."""
    decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return word_level([f"<0x{byte:02X}>" for byte in range(256)] + PIECES, decoder)


@cache
def word_piece(clean: bool) -> Any:
    decoder = decoders.WordPiece(cleanup=clean)
    return word_level(WORDS + PARTS, decoder, clean_up_tokenization_spaces=clean)


class Slow(PreTrainedTokenizer):  # type: ignore[misc]
    """One that decodes in Python, as the old ones of BERT."""

    words = (*WORDS[:-1], *PARTS, "[UNK]", "[SEP]")

    def get_vocab(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)}

    @property
    def vocab_size(self) -> int:
        return len(self.words)

    def _convert_token_to_id(self, token: str) -> int:
        return self.words.index(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.words[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return " ".join(tokens).replace(" ##", "").strip()


@cache
def slow() -> Any:
    return Slow(unk_token="[UNK]", sep_token="[SEP]", clean_up_tokenization_spaces=True)


TOKENIZERS = {
    "byte-level": byte_level,
    "metaspace": cache(lambda: word_level(PIECES, decoders.Metaspace())),
    "word-piece": cache(lambda: word_piece(False)),
    "word-piece-clean": cache(lambda: word_piece(True)),
    "suffix": cache(lambda: word_level(["a</w>", "a", "b", "b</w>"], decoders.BPEDecoder())),
    "slow": slow,
}


def tokens_of(tokenizer: Any, lists: int = 40) -> st.SearchStrategy[list[int]]:
    """Any tokens: special ones, bytes that are no text, and some that are none of the tokenizer."""
    past = 3 if tokenizer.is_fast else 0
    ids = st.integers(0, len(tokenizer) - 1 + past)
    few = st.lists(ids, min_size=1, max_size=4).flatmap(
        lambda some: st.lists(st.sampled_from(some), max_size=lists)
    )
    return st.one_of(st.lists(ids, max_size=lists), few)


def pieces(
    tokenizer: Any, tokens: Sequence[int], stop: tuple[str, ...] = (), skip: bool = True
) -> Iterator[str]:
    stream = TextStream(tokenizer, stop, skip)
    for token in tokens:
        text, stopped = stream.push([token])
        yield text
        if stopped is not None:
            break
    yield stream.finish()


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_join_to_the_text(name: str, skip: bool) -> None:
    tokenizer = TOKENIZERS[name]()

    @settings(max_examples=100, deadline=None)
    @given(tokens_of(tokenizer))
    def check(tokens: list[int]) -> None:
        whole = tokenizer.decode(tokens, skip_special_tokens=skip)
        assert "".join(pieces(tokenizer, tokens, skip=skip)) == whole
        stream = TextStream(tokenizer, (), skip)
        assert stream.push(tokens)[0] + stream.finish() == whole

    check()


MARKED = {256 + i for i, piece in enumerate(PIECES) if MARK in piece}
BYTES = st.one_of(
    st.integers(256, 256 + len(PIECES) + 2).map(lambda token: [token]),
    st.characters(codec="utf-8").map(lambda char: list(char.encode())),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(BYTES, max_size=40).map(lambda parts: list(itertools.chain(*parts))))
def test_byte_fallback(tokens: list[int]) -> None:
    tokenizer = byte_fallback()
    found = list(pieces(tokenizer, tokens))
    assert "".join(found) == tokenizer.decode(tokens, skip_special_tokens=True)
    if MARK not in bytes(t for t in tokens if t < 256).decode() and not MARKED & set(tokens):
        assert MARK not in "".join(found)


def test_byte_fallback_keeps_what_it_has_shown() -> None:
    tokenizer = byte_fallback()
    for count in range(1, 60):
        tokens = [*"中é".encode(), *[0xFF] * count, 256 + PIECES.index("a")]
        assert tokenizer.decode(tokens) == MARK * (5 + count) + "a"
        assert "".join(pieces(tokenizer, tokens)) == "中é" + MARK * (3 + count) + "a"
        # Bytes that are no text come first: nothing was shown that decodes otherwise later.
        for garbage in ([0xFF], [0xE4], [0xE4, 0xB8], [0x80]):
            tokens = garbage * count + [256 + PIECES.index("▁a")] * 3
            assert "".join(pieces(tokenizer, tokens)) == tokenizer.decode(tokens)


def bytes_of(text: str) -> list[int]:
    """Tokens of the byte-level tokenizer, one a byte."""
    return [byte_token(byte) for byte in text.encode()]


@cache
def byte_token(byte: int) -> int:
    tokenizer = byte_level()
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [other for other in range(256) if other not in kept]
    char = chr(byte) if byte in kept else chr(256 + rest.index(byte))
    token: int = tokenizer.convert_tokens_to_ids(char)
    return token


@settings(max_examples=200, deadline=None)
@given(st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("é中😀a")), max_size=30))
def test_characters_are_shown_whole_and_at_once(text: str) -> None:
    assume(MARK not in text)
    stream = TextStream(byte_level())
    for char in text:
        *first, last = bytes_of(char)
        assert stream.push(first) == ("", None)
        assert stream.push([last]) == (char, None)
    assert stream.finish() == ""


def test_a_replacement_character_of_the_text_is_shown() -> None:
    stream = TextStream(byte_level())
    assert stream.push(bytes_of(f"a{MARK}")) == ("a", None)  # it may be an incomplete character
    assert stream.push(bytes_of("b")) == (f"{MARK}b", None)
    assert stream.push(bytes_of("c😀")[:-1]) == ("c", None)
    assert stream.finish() == MARK


def test_tokens_without_text_do_not_push_out_the_others() -> None:
    tokenizer = TOKENIZERS["metaspace"]()
    special = len(tokenizer) - 1
    tokens = [PIECES.index("▁a"), *[special] * 99, PIECES.index("▁the")]
    assert "".join(pieces(tokenizer, tokens)) == "a the"
    first, *rest = bytes_of("中")
    assert "".join(pieces(byte_level(), [first, *[0] * 99, *rest])) == "中"


def test_a_character_after_many_unclear_bytes() -> None:
    for count in range(60):
        tokens = [byte_token(0xFF)] * count + bytes_of("😀")
        assert "".join(pieces(byte_level(), tokens)) == MARK * count + "😀"


@pytest.mark.parametrize("name", ["word-piece-clean", "slow"])
@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["a", "'", ".", "a"], "a '. a"),
        (["n", "'", "world", "a"], "n'world a"),
        (["a", "n", "'", "t", "."], "an't."),
        (["a", "'", "ve", "'", "re"], "a've're"),
    ],
)
def test_clean_up(name: str, words: list[str], text: str) -> None:
    tokenizer = TOKENIZERS[name]()
    tokens = [WORDS.index(word) for word in words]
    assert tokenizer.decode(tokens) == text
    assert "".join(pieces(tokenizer, tokens)) == text


def test_clean_up_of_two_spaces() -> None:
    tokenizer = word_piece(True)
    tokens = [WORDS.index(word) for word in ["a", "", "'", "s", "a"]]
    assert tokenizer.decode(tokens) == "a's a"
    assert "".join(pieces(tokenizer, tokens)) == "a's a"


def test_clean_up_waits_for_what_it_may_change() -> None:
    tokenizer = word_piece(True)
    tokens = [WORDS.index(word) for word in ["do", "n", "'", "t", "world", ".", "n", "a"]]
    assert tokenizer.decode(tokens) == "don't world. n a"
    found = list(pieces(tokenizer, tokens))
    assert found == ["do", "", "", "n't", " world", ".", "", " n a", ""]


STOPS = st.lists(st.text("ab中", min_size=1, max_size=5), min_size=1, max_size=4).map(tuple)


def until_stop(text: str, stop: Sequence[str]) -> tuple[str, str | None]:
    for end in range(len(text) + 1):
        found = [string for string in stop if text[:end].endswith(string)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(max_examples=500, deadline=None)
@given(st.text("ab中", max_size=20), STOPS, st.lists(st.integers(1, 9), min_size=1))
def test_stop_strings(text: str, stop: tuple[str, ...], sizes: list[int]) -> None:
    tokens = bytes_of(text)
    stream = TextStream(byte_level(), stop)
    whole, by = until_stop(text, stop)
    shown, stopped = "", None
    for size in itertools.cycle(sizes):
        if not tokens or stopped is not None:
            break
        new, stopped = stream.push(tokens[:size])
        del tokens[:size]
        shown += new
        if stopped is None:
            # What is held back is no more than the start of a stop string, or of a character.
            complete = text.encode()[: len(text.encode()) - len(tokens)].decode(errors="ignore")
            starts = {string[:end] for string in stop for end in range(len(string))}
            held = max(len(start) for start in starts if complete.endswith(start))
            assert shown == complete[: len(complete) - held]
    assert stopped == by
    assert shown + stream.finish() == whole


@settings(max_examples=100, deadline=None)
@given(tokens_of(byte_level()), st.text("abe 中", min_size=1, max_size=3), st.data())
def test_stop_strings_in_any_text(tokens: list[int], inserted: str, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(tokens)))
    tokens = [*tokens[:place], *byte_level().encode(f"é{inserted}."), *tokens[place:]]
    whole = byte_level().decode(tokens, skip_special_tokens=True)
    found = list(pieces(byte_level(), tokens, (inserted,)))
    assert "".join(found) == whole[: whole.index(inserted)]


def test_a_stop_string_may_begin_in_what_was_held_back() -> None:
    stream = TextStream(byte_level(), ("\n\nUser", "ababc"))
    assert stream.push(bytes_of("ab")) == ("", None)
    assert stream.push(bytes_of("ab")) == ("", None)
    assert stream.push(bytes_of("ab")) == ("ab", None)
    assert stream.push(bytes_of("x\n")) == ("ababx", None)
    assert stream.push(bytes_of("\n\nU")) == ("\n", None)
    assert stream.push(bytes_of("ser: hi")) == ("", "\n\nUser")
    assert stream.finish() == ""


def test_which_stop_string_wins() -> None:
    for stop in itertools.permutations(["bcd", "c", "abc", "bc"]):
        stream = TextStream(byte_level(), stop)
        assert stream.push(bytes_of("xabcd")) == ("x", "abc")  # complete with "c", and longest
    stream = TextStream(byte_level(), ("xabcd", "b"))
    assert stream.push(bytes_of("xabcd")) == ("xa", "b")


def test_the_rest_ends_before_a_stop_string_too() -> None:
    stream = TextStream(byte_level(), (f"b{MARK}",))
    assert stream.push(bytes_of("ab😀")[:-1]) == ("a", None)
    assert stream.finish() == ""
    stream = TextStream(TOKENIZERS["metaspace"](), ("b",))
    assert stream.push([PIECES.index(f"b{MARK}")]) == ("", "b")
    assert stream.finish() == ""


class Spy:
    """A tokenizer that notes the longest list it was given."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.clean_up_tokenization_spaces = tokenizer.clean_up_tokenization_spaces
        self.longest = 0

    def decode(self, tokens: list[int], **options: Any) -> str:
        self.longest = max(self.longest, len(tokens))
        text: str = self._tokenizer.decode(tokens, **options)
        return text


@pytest.mark.parametrize(
    ("name", "run", "longest"),
    [
        ("byte-level", bytes_of("a"), 9),
        ("byte-level", [0], 9),  # a special token
        ("byte-level", [0, 5], 9),
        ("byte-level", bytes_of("中"), 12),
        ("byte-level", [1999, 3071, 10**6], 9),
        ("byte-level", [byte_token(0xFF)], 33),
        ("byte-level", [byte_token(0xF0)], 33),
        ("byte-level", [byte_token(byte) for byte in (0x80, 0xF0, 0x9F)], 33),
        ("byte-fallback", [0xFF], 33),
        ("byte-fallback", [0xE4, 0xB8], 33),
        ("byte-fallback", [0xE4, 0xB8, 0xAD], 12),
        ("byte-fallback", [256 + PIECES.index("▁")], 9),
        ("word-piece-clean", [WORDS.index("n")], 33),
        ("slow", [WORDS.index("'")], 33),
        ("slow", [len(WORDS) - 1], 9),  # "##", which adds nothing
    ],
)
def test_the_window_is_bounded(name: str, run: list[int], longest: int) -> None:
    tokenizer = byte_fallback() if name == "byte-fallback" else TOKENIZERS[name]()
    spy = Spy(tokenizer)
    tokens = (run * 600)[:600]
    assert "".join(pieces(spy, tokens)) == tokenizer.decode(tokens, skip_special_tokens=True)
    assert spy.longest <= longest


def test_runs_of_unclear_bytes_do_not_hold_the_text_back() -> None:
    stream = TextStream(byte_level())
    shown = "".join(stream.push([byte_token(0xFF)])[0] for _ in range(100))
    assert shown == MARK * 97
    # Characters that each token leaves incomplete: never is all of the text sure.
    split = [*bytes_of("中")[1:], bytes_of("中")[0]]
    stream = TextStream(byte_level())
    stream.push(bytes_of("中")[:1])
    assert [stream.push(split)[0] for _ in range(100)] == ["中"] * 100
