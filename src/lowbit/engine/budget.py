"""How many prompt tokens a step may take, so that running streams do not stall.

Sarathi-Serve (arXiv:2403.02310) bounds the prompt tokens of a step by the time between tokens that users
accept. Here the time itself is fitted, online: a step takes the seconds of its decodes plus a rate per
prompt token, both running means. Only latency depends on it; tokens never do.
"""

from __future__ import annotations

MINIMUM_CHUNK = 16  # prompt tokens: progress even where decodes alone take longer than the target
MAXIMUM_CHUNK = 512  # bounds the activations' memory and the time until a cancellation is noticed
FIRST_CHUNK = 64  # before anything has been measured
# Without a target, a step with prompt tokens may take this many times what its decodes take alone.
STRETCH = 2.0
# With no stream running nobody waits between tokens; a newcomer waits for the step at hand.
ALONE_SECONDS = 0.25
SHARE = 0.2  # of a new measurement in a running mean


class StepTimes:
    """Running means of what steps take, and the chunk that follows from them.

    target_seconds: between two tokens of a stream; None: STRETCH times the decodes alone.
    """

    def __init__(self, target_seconds: float | None = None) -> None:
        self.target_seconds = target_seconds
        self.prompt_token_seconds = 0.0  # 0: not measured yet
        self._decode: dict[int, float] = {}  # tokens of decodes in a step -> its seconds

    def decode_seconds(self, tokens: int) -> float:
        """Of a step with `tokens` tokens of running streams and nothing else; 0 if nothing is known."""
        if tokens == 0 or not self._decode:
            return 0.0
        known = self._decode.get(tokens)
        if known is not None:
            return known
        # From the nearest count: the weights are read once, so time grows more slowly than the count.
        near = min(self._decode, key=lambda n: abs(n - tokens))
        return self._decode[near] * (1 + 0.5 * (tokens - near) / max(tokens, near))

    def chunk(self, decode_tokens: int) -> int:
        """Prompt tokens for a step that also takes `decode_tokens` of running streams."""
        if self.prompt_token_seconds == 0:
            return FIRST_CHUNK
        if decode_tokens == 0:
            spare = ALONE_SECONDS
        else:
            decode = self.decode_seconds(decode_tokens)
            target = STRETCH * decode if self.target_seconds is None else self.target_seconds
            spare = target - decode
        return max(MINIMUM_CHUNK, min(MAXIMUM_CHUNK, int(spare / self.prompt_token_seconds)))

    def observe(self, decode_tokens: int, prompt_tokens: int, seconds: float) -> None:
        """Learn from a step that is done."""
        if prompt_tokens == 0:
            old = self._decode.get(decode_tokens)
            self._decode[decode_tokens] = seconds if old is None else old + SHARE * (seconds - old)
            return
        extra = max(seconds - self.decode_seconds(decode_tokens), 0.0) / prompt_tokens
        if decode_tokens and decode_tokens not in self._decode:
            return  # the decodes' part is a guess; wait for a clean measurement
        old_rate = self.prompt_token_seconds
        share = SHARE if prompt_tokens >= MINIMUM_CHUNK else SHARE * prompt_tokens / MINIMUM_CHUNK
        self.prompt_token_seconds = extra if old_rate == 0 else old_rate + share * (extra - old_rate)
