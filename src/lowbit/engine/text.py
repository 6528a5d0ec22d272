"""Token ids to text that may be shown: whole characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class PieceStream(Protocol):
    """What `Tokenizer.stream()` returns: whole characters as soon as they are known."""

    def push(self, token_id: int) -> str: ...
    def flush(self) -> str: ...


class StopFilter:
    """Passes text on, except what is or may still become a stop string.

    Text that could be the beginning of a stop string is held back until the next piece decides.
    The earliest match in the text wins, and the text ends just before it.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.matched: str | None = None

    def push(self, piece: str) -> str:
        """Return the text that is certain after `piece`; sets `matched` at a stop string."""
        if self.matched is not None:
            return ""
        if not self._stop:
            return piece
        text = self._held + piece
        hits = [(text.find(s), i) for i, s in enumerate(self._stop) if s in text]
        if hits:
            at, index = min(hits)
            self.matched, self._held = self._stop[index], ""
            return text[:at]
        keep = self._possible_start(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The held-back text, once nothing more comes."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            end = text[len(text) - length :]
            if any(s.startswith(end) for s in self._stop):
                return length
        return 0


class TextAssembler:
    """The two stages together: token ids in, text for the reader out."""

    def __init__(self, pieces: PieceStream, stop: Sequence[str]) -> None:
        self._pieces = pieces
        self._filter = StopFilter(stop)

    @property
    def stopped(self) -> bool:
        return self._filter.matched is not None

    def push(self, token_id: int) -> str:
        return self._filter.push(self._pieces.push(token_id))

    def finish(self) -> str:
        """What is left when generation ends without a stop string (an unfinished character included)."""
        rest = self._filter.push(self._pieces.flush())
        return rest + self._filter.flush()
