"""Whose turn it is: a virtual token counter per tenant.

The tenant that has been served least goes first. A prompt token that is computed counts 1 (one found in the
prefix cache nothing), a generated token 2, and a tenant that comes back is lifted to the smallest counter of
those present, so that nobody saves up idle time. Source: arXiv:2401.00588 (VTC).
"""

from __future__ import annotations

PROMPT_WEIGHT = 1
OUTPUT_WEIGHT = 2


class TenantCounters:
    """Counters of the tenants that have requests in the engine."""

    def __init__(self) -> None:
        self._used: dict[str, int] = {}
        self._requests: dict[str, int] = {}
        self._left_at: dict[str, int] = {}  # counters of tenants that are gone, while they still matter

    def used(self, tenant: str) -> int:
        """Weighted tokens of a tenant that is present."""
        return self._used[tenant]

    def enter(self, tenant: str) -> None:
        """A request of `tenant` has arrived."""
        if tenant in self._requests:
            self._requests[tenant] += 1
            return
        floor = min(self._used.values(), default=0)
        self._used[tenant] = max(floor, self._left_at.pop(tenant, 0))
        self._requests[tenant] = 1
        # Below the floor the past makes no difference: whoever returns is lifted to it anyway.
        if len(self._left_at) > 2 * len(self._used) + 64:
            self._left_at = {name: used for name, used in self._left_at.items() if used > floor}

    def leave(self, tenant: str) -> None:
        """A request of `tenant` has ended."""
        self._requests[tenant] -= 1
        if self._requests[tenant] == 0:
            del self._requests[tenant]
            used = self._used.pop(tenant)
            if self._used and used > min(self._used.values()):
                self._left_at[tenant] = used

    def charge(self, tenant: str, prompt_tokens: int, output_tokens: int) -> None:
        self._used[tenant] += PROMPT_WEIGHT * prompt_tokens + OUTPUT_WEIGHT * output_tokens
