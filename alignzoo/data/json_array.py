"""An array of JSON values in a file, read piece by piece: what is in memory is one value and a piece of the file."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from alignzoo.errors import DataError

_SPACE = re.compile(r"[ \t\n\r]*")
_PIECE = 1 << 20  # bytes
_TAIL = 3  # a number that is cut may seem to end before "." or "e-"
_CUT = 16  # no number, literal or escape that the end of a piece cuts is longer, but for the strings and long numbers


class JsonArray:
    """Goes through the values once. Raises DataError that names the line of what is wrong."""

    def __init__(self, name: str, file: IO[bytes], piece: int = _PIECE) -> None:
        self._name, self._file, self._piece = name, file, piece
        self._bytes = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder()
        self._text, self._at = "", 0  # a piece of the file, and the place in it
        self._lines = 0  # before this piece
        self._ended = False

    def __iter__(self) -> Iterator[Any]:
        self._expect("[")
        if self._next() == "]":
            self._at += 1
        else:
            yield self._value()
            while self._next() == ",":
                self._at += 1
                self._next()
                yield self._value()
            self._expect("]")
        if self._next():
            raise self._broken("Extra data", self._at)

    def _next(self) -> str:
        """The character after any white space, which is not taken yet; "" at the end of the file."""
        while True:
            found = _SPACE.match(self._text, self._at)
            self._at = found.end() if found else self._at
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def _expect(self, character: str) -> None:
        if self._next() != character:
            raise self._broken("Expecting ',' delimiter" if character == "]" else f"Expecting '{character}'", self._at)
        self._at += 1

    def _value(self) -> Any:
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._is_cut(error) and self._more():
                    continue
                raise self._broken(error.msg, error.pos) from error
            except (ValueError, RecursionError) as error:
                line = self._line(self._at)
                raise DataError(f"{self._name}:{line}: JSON that cannot be read", why=str(error)) from error
            if end > len(self._text) - _TAIL and self._more():  # a number may go on
                continue
            self._at = end
            return value

    def _is_cut(self, error: json.JSONDecodeError) -> bool:
        """Whether the error may be that the piece ends within the value."""
        return error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - _CUT

    def _more(self) -> bool:
        """Forgets what was taken and adds a piece, as long as what is left. False at the end of the file."""
        if self._ended:
            return False
        self._lines += self._text.count("\n", 0, self._at)
        self._text, self._at = self._text[self._at :], 0
        piece = self._file.read(max(self._piece, len(self._text)))
        self._ended = not piece
        try:
            self._text += self._bytes.decode(piece, final=self._ended)
        except UnicodeDecodeError as error:
            line = self._lines + self._text.count("\n") + error.object.count(b"\n", 0, error.start) + 1
            raise DataError(f"{self._name}:{line}: not UTF-8 text", fix="save the file as UTF-8") from error
        return True

    def _broken(self, message: str, at: int) -> DataError:
        return DataError(
            f"{self._name}:{self._line(at)}: broken JSON: {message}",
            why="the file begins with [ and is read as one array",
        )

    def _line(self, at: int) -> int:
        return self._lines + self._text.count("\n", 0, at) + 1
