"""From tokens to text that is safe to show.

What a token reads as depends on its neighbors: it may be part of a character, lose its leading
space at the start of a text, or have the space before it taken away. So a window of the last
tokens is decoded anew with each token, and what is new of it is shown once it can no longer
change. The window starts where a character starts and holds a few tokens that were shown
already, so that the new ones read as they do within the whole text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

_CONTEXT = 4  # tokens shown already that the window keeps, at least
_LIMIT = 32  # most tokens in the window; only bytes that are no text get there

# The end of a text that may change with the next token: bytes of a character that is not complete
# (one mark for all of them, or one for each), and what `clean_up_tokenization` may rewrite.
_UNSURE = "\ufffd{1,3}"
_UNCLEAN = " ?n? ?'(?:[vr]|n'?)?| {1,2}(?:n ?)?"


class TextStream:
    """The text of a growing list of tokens, piece by piece, up to the first stop string.

    The pieces join to `tokenizer.decode(tokens, skip_special_tokens=...)`, cut before the stop
    string. One exception: a tokenizer with byte fallback decodes a run of byte tokens to
    replacement characters, as many as bytes, as soon as any part of the run is no UTF-8. Here
    the characters that it began with were shown already and stay.

    The stop string that is complete first ends the text, however it is cut into tokens; of
    those that end at the same character, the longest.
    """

    def __init__(
        self, tokenizer: Any, stop: tuple[str, ...] = (), skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        cleans = getattr(tokenizer, "clean_up_tokenization_spaces", False)
        self._unsure = re.compile(rf"(?:{_UNSURE}{'|' + _UNCLEAN if cleans else ''})\Z")
        self._window: list[int] = []
        self._text = ""  # of the window
        self._sure = ""  # what of it went on to the stop strings
        self._start = 0  # where the window starts next
        self._stops = [_Stop(text) for text in stop]
        self._held = ""  # sure, but it may be the start of a stop string

    def push(self, tokens: Iterable[int]) -> tuple[str, str | None]:
        """What can be shown after these tokens, and the stop string that ended the text if one did.

        Nothing may be pushed after a stop string.
        """
        shown = ""
        for token in tokens:
            text, stop = self._until_stop(self._advance(token))
            shown += text
            if stop is not None:
                self._text = self._sure = ""  # nothing is left to finish
                return shown, stop
        return shown, None

    def finish(self) -> str:
        """The rest of the text, when no more tokens come; it ends before a stop string, too."""
        text, _ = self._until_stop(self._text[len(self._sure) :])
        return text + self._held

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=self._skip_special_tokens)
        return text

    def _advance(self, token: int) -> str:
        """The text that one more token makes sure."""
        text = self._decode([*self._window, token])
        if text == self._text and not self._decode([token, token]):
            return ""  # a special token, say; many of them must not push the others out
        self._window.append(token)
        self._text = text
        unsure = self._unsure.search(text)
        new = ""
        # Byte fallback: an incomplete character hides those before it in its run for a while.
        if unsure is None or text.startswith(self._sure):
            end = unsure.start() if unsure else len(text)
            new = text[len(self._sure) : end]
            self._sure = text[: max(end, len(self._sure))]
        size = len(self._window)
        if unsure is None and size - self._start >= _CONTEXT:
            self._slide(self._start)
        elif size >= _LIMIT:
            new += self._slide(size - _LIMIT // 2)
        return new

    def _slide(self, start: int) -> str:
        """Drops the tokens before `start`; the unsure text that can then no longer be told."""
        self._window = self._window[start:]
        rest = self._text[len(self._sure) :]
        self._text = self._decode(self._window)
        self._start = len(self._window)
        if self._text.endswith(rest):
            self._sure = self._text[: len(self._text) - len(rest)]
            return ""
        self._sure = self._text
        return rest

    def _until_stop(self, text: str) -> tuple[str, str | None]:
        """What can be shown of `text` and what was held back, and the stop string it ends at."""
        held = self._held + text
        if self._stops:
            for end, char in enumerate(text, len(self._held) + 1):
                found = [stop.text for stop in self._stops if stop.advance(char)]
                if found:
                    longest = max(found, key=len)
                    self._held = ""
                    return held[: end - len(longest)], longest
        hold = len(held) - max((stop.matched for stop in self._stops), default=0)
        self._held = held[hold:]
        return held[:hold], None


class _Stop:
    """How much of a stop string the text ends with (D. Knuth, J. Morris and V. Pratt, 1977)."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        self._shorter = [0, 0]  # how much of it its first n characters end with, besides all
        for char in text[1:]:
            self._shorter.append(self._next(self._shorter[-1], char))

    def advance(self, char: str) -> bool:
        """Whether the text ends with the stop string after one more character."""
        self.matched = self._next(self.matched, char)
        return self.matched == len(self.text)

    def _next(self, matched: int, char: str) -> int:
        while matched and self.text[matched] != char:
            matched = self._shorter[matched]
        return matched + (self.text[matched] == char)
