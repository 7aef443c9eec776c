"""Texts that models are measured on: pairs of an encoder-decoder, and tokenizers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAIR_HINT = 'an encoder-decoder needs lines such as {"input": "...", "target": "..."}'


def read_pairs(text: str) -> Iterator[tuple[str, str]]:
    """`input` and `target` of every line that is not empty; ValueError names one without them."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            source, target = value["input"], value["target"]
        except (ValueError, TypeError, KeyError, RecursionError):
            source = target = None
        if not (isinstance(source, str) and isinstance(target, str) and source and target):
            raise ValueError(f"line {number} is not a pair")
        yield source, target


def encode_pair(tokenizer: Any, source: str, target: str) -> tuple[list[int], list[int]]:
    """Tokens that are read, and that are to be predicted, with the end token if there is one."""
    written = tokenizer(text_target=target, verbose=False)["input_ids"]
    if tokenizer.eos_token_id is not None and written[-1:] != [tokenizer.eos_token_id]:
        written = [*written, tokenizer.eos_token_id]
    return tokenizer(source, verbose=False)["input_ids"], written


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder; ValueError says in one line why it does not load."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain ones
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(what) from None
