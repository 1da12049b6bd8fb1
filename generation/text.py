"""The text of tokens as they come: whole characters, and nothing of what ends it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

UNFINISHED = "\ufffd"  # what a tokenizer gives for bytes that are no whole character
LONGEST = 8  # tokens of one character at most: after them it is no character, and given as it is


class Text:
    """A text that grows by tokens.

    Args:
      decode: the text of some tokens.
      stop: it ends before any of these; what may become one of them is held back.
      end_id: it ends before this token; None: before none.

    Attributes:
      tokens: all that were added, but not the one that ends it.
      reason: why it has ended: "end" (that token), "stop" or what `finish` was told; "" before.
    """

    def __init__(
        self,
        decode: Callable[[Iterable[int]], str],
        stop: Sequence[str] = (),
        end_id: int | None = None,
    ) -> None:
        self._decode, self._stop, self._end_id = decode, tuple(stop), end_id
        self.tokens: list[int] = []
        self.reason = ""
        self._text, self._given = "", 0  # of whole characters; how many of them were given
        self._first = self._seen = 0  # tokens from `_first` are decoded again, to `_seen` are text

    def __str__(self) -> str:
        return self._text

    def add(self, token: int) -> str:
        """The characters that are sure with this token."""
        assert not self.reason, "it has ended"
        if token == self._end_id:
            return self.finish("end")
        self.tokens.append(token)
        self._grow(whole=False)
        return self._give()

    def finish(self, reason: str) -> str:
        """Ends it; the characters that were held back."""
        self._grow(whole=True)
        given = self._give(last=True)
        self.reason = self.reason or reason
        return given

    def _grow(self, *, whole: bool) -> None:
        """Decodes tokens that are not text yet, after those before them: a word's first token has
        its space only there.
        """
        before = self._decode(self.tokens[self._first : self._seen])
        text = self._decode(self.tokens[self._first :])
        unfinished = text.endswith(UNFINISHED) and len(self.tokens) - self._seen < LONGEST
        if unfinished and not whole:
            return
        self._text += text[len(before) :]
        self._first, self._seen = self._seen, len(self.tokens)

    def _give(self, *, last: bool = False) -> str:
        found = [at for at in (self._text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self._text, self.reason, last = self._text[: min(found)], "stop", True
        until = len(self._text) - (0 if last else self._held())
        given = self._text[self._given : until]
        self._given = max(self._given, until)
        return given

    def _held(self) -> int:
        """Characters at the end that may be the beginning of a stop."""
        ends = (
            n for stop in self._stop for n in range(1, len(stop)) if self._text.endswith(stop[:n])
        )
        return max(ends, default=0)
