"""What single tokens stand for, as log probabilities show them."""

from __future__ import annotations

import re
from typing import Any

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_level() -> dict[str, int]:
    """The characters that byte-level BPE writes for bytes, as GPT-2 chose them."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in plain]
    table = {chr(byte): byte for byte in plain}
    return {**table, **{chr(256 + i): byte for i, byte in enumerate(moved)}}


_BYTE_LEVEL = _byte_level()


class Vocabulary:
    """Texts and bytes of the tokens of a transformers tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def text(self, token: int) -> str:
        """The text of a token; U+FFFD where it is part of a character."""
        if token not in self._texts:
            text = str(self._tokenizer.decode([token]))
            # SentencePiece drops the space in front of a text, which in its middle is wanted.
            if self._piece(token).startswith("\u2581") and not text.startswith(" "):
                text = f" {text}"
            self._texts[token] = text
        return self._texts[token]

    def data(self, token: int) -> bytes | None:
        """The UTF-8 bytes of a token, part of a character too; None if they are not known."""
        text = self.text(token)
        if "\ufffd" not in text:
            return text.encode()
        piece = self._piece(token)
        byte = _BYTE_PIECE.fullmatch(piece)
        if byte:
            return bytes.fromhex(byte[1])
        if piece and all(c in _BYTE_LEVEL for c in piece):
            return bytes(_BYTE_LEVEL[c] for c in piece)
        return None

    def _piece(self, token: int) -> str:
        return str(self._tokenizer.convert_ids_to_tokens(token) or "")
