"""JSON from strangers: bodies, and their fields read one by one with the type checked."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from moecc.errors import RequestError

MAX_INT = 2**31 - 1

_SHOWN = 80
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def shown(name: str) -> str:
    """A client's own string, short enough for a message."""
    return name if len(name) <= _SHOWN else f"{name[: _SHOWN - 3]}..."


def parse_object(raw: bytes) -> dict[str, Any]:
    """The JSON object in a body; RequestError for anything else.

    What comes back can be printed as UTF-8 and has no NaN, infinity or numbers without bound.
    """
    try:
        text = raw.decode()
        value = json.loads(text, parse_constant=_not_json)
        if _ESCAPED_SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()  # half a pair cannot be encoded
    except UnicodeError:
        raise RequestError("the body is not valid Unicode") from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RequestError(f"the body is not JSON: {reason}") from None
    if not isinstance(value, dict):
        raise RequestError("the body must be a JSON object")
    return value


def _not_json(constant: str) -> NoReturn:
    raise ValueError(f"`{constant}` is not a JSON number")


class Fields:
    """The fields of a JSON object; null stands for an absent one.

    Every method raises RequestError naming the field if its value has the wrong type.

    Args:
        path: where the object is in the body, such as `messages[0].`.
    """

    def __init__(self, value: dict[str, Any], path: str = "") -> None:
        self._left = dict(value)
        self._path = path

    def take(self, name: str) -> Any:
        """The value of a field, unchecked; None if it is absent."""
        return self._left.pop(name, None)

    def refuse(self, name: str, reason: str) -> NoReturn:
        where = shown(self._path + name)
        raise RequestError(f"`{where}` {reason}", param=where)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.refuse(name, "must be true or false")
        return value

    def integer(self, name: str, low: int, high: int) -> int | None:
        value = self.take(name)
        if value is not None and (type(value) is not int or not low <= value <= high):
            self.refuse(name, f"must be an integer between {low} and {high}")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.take(name)
        if value is None:
            return default
        found = to_number(value)
        if found is None:
            self.refuse(name, "must be a finite number")
        return found

    def text(self, name: str) -> str | None:
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            self.refuse(name, "must be a string")
        return value

    def required_text(self, name: str) -> str:
        value = self.text(name)
        if value is None:
            self.refuse(name, "is required")
        return value

    def object(self, name: str) -> dict[str, Any]:
        value = self.take(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.refuse(name, "must be an object")
        return value

    def integers(self, name: str, most: int) -> tuple[int, ...] | None:
        """A list of at most `most` token ids."""
        value = self.take(name)
        if value is None:
            return None
        if not is_tokens(value):
            self.refuse(name, f"must be a list of integers between 0 and {MAX_INT}")
        if len(value) > most:
            self.refuse(name, f"must have at most {most} entries")
        return tuple(value)

    def finish(self, no_op: dict[str, tuple[Any, ...]]) -> None:
        """Refuses what has not been taken, but for fields at a value that asks for nothing.

        Args:
            no_op: such values by field; an empty tuple is any value.
        """
        for name, value in self._left.items():
            if name not in no_op:
                self.refuse(name, "is not supported")
            allowed = no_op[name]
            # 0 == False and 1 == True, but a client that mixes them up should know.
            same = any(type(value) is type(v) and value == v for v in allowed)
            if value is not None and allowed and not same:
                values = " or ".join(json.dumps(v) for v in allowed if v is not None)
                self.refuse(name, f"is supported only as {values or 'null'}")


def to_number(value: Any) -> float | None:
    """A JSON number as a float; None for anything else and for what is not finite."""
    if type(value) not in (int, float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def is_tokens(value: Any) -> bool:
    """Whether a JSON value is a list of what could be token ids."""
    return isinstance(value, list) and all(type(t) is int and 0 <= t <= MAX_INT for t in value)
