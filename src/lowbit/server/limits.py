"""Who may ask, how much, and for how long."""

from __future__ import annotations

import hashlib
import hmac
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from lowbit.server.errors import ApiError


@dataclass(frozen=True)
class Limits:
    """Limits of the API process; those of the engine are in EngineConfig.

    requests: answers in the making at once; one key may hold half of them where there are several keys.
    write_seconds: how long a client may leave a stream unread. waiting_pieces: how much text may wait for it.
    """

    body_bytes: int = 16 << 20
    body_seconds: float = 30.0
    requests: int = 256
    request_seconds: float = 600.0
    write_seconds: float = 20.0
    waiting_pieces: int = 4096
    ping_seconds: float = 15.0
    drain_seconds: float = 30.0


class Keys:
    """API keys, kept as digests. A key is a tenant; without keys everybody is one tenant."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def __len__(self) -> int:
        return len(self._digests)

    def tenant(self, authorization: bytes | None) -> str:
        """The tenant of a request. Raises ApiError 401 without a known key.

        Every key is compared in constant time, whatever the outcome.
        """
        if not self._digests:
            return ""
        kind, _, key = (authorization or b"").partition(b" ")
        given = _digest(key.strip())
        found = None
        for digest in self._digests:
            if hmac.compare_digest(digest, given):
                found = digest
        if found is None or kind.lower() != b"bearer":
            raise ApiError(
                401,
                "the API key is missing or wrong; send `Authorization: Bearer KEY` with a key of this server",
                code="invalid_api_key",
            )
        return found.hex()[:16]


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class Slots:
    """Counts the answers in the making, in all and of each tenant."""

    def __init__(self, limits: Limits, tenants: int) -> None:
        self._all = limits.requests
        self._each = max(1, limits.requests // 2) if tenants > 1 else limits.requests
        self._held: Counter[str] = Counter()

    @property
    def held(self) -> int:
        return self._held.total()

    def take(self, tenant: str) -> None:
        """Raises ApiError 429 if there is none left."""
        if self.held >= self._all or self._held[tenant] >= self._each:
            limit = self._all if self.held >= self._all else self._each
            raise ApiError(
                429,
                f"{limit} requests are being answered already, and that is the limit; try again, or serve "
                "with a larger --max-requests",
                code="too_many_requests",
                retry_after=1.0,
            )
        self._held[tenant] += 1

    def give_back(self, tenant: str) -> None:
        self._held[tenant] -= 1
        if not self._held[tenant]:
            del self._held[tenant]
