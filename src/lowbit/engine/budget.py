"""What steps take, and so how many prompt tokens one may have without stalling the running streams.

Sarathi-Serve (arXiv:2403.02310) bounds the prompt tokens of a step by the time between tokens that users
accept. Here that time is itself fitted, online: the seconds of a step as a function of its tokens, whatever
they are for, linear between powers of two and moved by each step that is measured. The same curve tells
speculation what guesses cost. Only latency depends on it; tokens never do.
"""

from __future__ import annotations

MINIMUM_CHUNK = 16  # prompt tokens: progress even where decodes alone take longer than the target
MAXIMUM_CHUNK = 512  # bounds the activations' memory and the time until a cancellation is noticed
# Without a target, a step with prompt tokens may take this many times what its decodes take alone.
STRETCH = 2.0
# With no stream running nobody waits between tokens; a newcomer waits for the step at hand.
ALONE_SECONDS = 0.25
KNOTS = 13  # 1, 2, 4 .. 4096 tokens
SHARE = 0.2  # of a new measurement
OUTLIER = 3.0  # times the expectation; what is beyond (a machine that paused) counts as this


class StepTimes:
    """Seconds of a step by its tokens.

    target_seconds: between two tokens of a stream; None: STRETCH times the decodes alone.
    """

    def __init__(self, target_seconds: float | None = None) -> None:
        self.target_seconds = target_seconds
        self._seen = [False] * KNOTS
        # Before the first measurement: in units of nothing, but growing as steps do.
        self._curve = [1e-3 * (1 + 0.1 * (1 << i)) for i in range(KNOTS)]

    def seconds(self, tokens: int) -> float:
        """Expected seconds of a step of `tokens` tokens; positive."""
        i = max(min(tokens.bit_length() - 1, KNOTS - 2), 0)
        low = self._curve[i]
        return low + (self._curve[i + 1] - low) * (tokens / (1 << i) - 1)

    @property
    def prompt_token_seconds(self) -> float:
        """Of one prompt token in a full chunk."""
        return self.seconds(MAXIMUM_CHUNK) / MAXIMUM_CHUNK

    def chunk(self, decode_tokens: int) -> int:
        """Prompt tokens for a step that also takes `decode_tokens` of running streams."""
        if decode_tokens == 0:
            target = ALONE_SECONDS
        elif self.target_seconds is None:
            target = STRETCH * self.seconds(decode_tokens)
        else:
            target = self.target_seconds
        most = decode_tokens + MAXIMUM_CHUNK
        while most > decode_tokens + MINIMUM_CHUNK:
            i = min((most - 1).bit_length() - 1, KNOTS - 2)
            bottom = max(1 << i, decode_tokens + MINIMUM_CHUNK)
            high, low = self.seconds(most), self.seconds(bottom)
            if low <= target:
                if high > target:
                    most = bottom + int((most - bottom) * (target - low) / (high - low))
                break
            most = bottom
        return max(MINIMUM_CHUNK, most - decode_tokens)

    def observe(self, tokens: int, seconds: float) -> None:
        """Learn from a step that is done."""
        if tokens >= 1 << KNOTS:
            return
        i = min(tokens.bit_length() - 1, KNOTS - 2)
        right = tokens / (1 << i) - 1
        left = 1 - right
        expected = self.seconds(tokens)
        known = (left == 0 or self._seen[i]) and (right == 0 or self._seen[i + 1])
        if known:
            move = SHARE * (min(seconds, OUTLIER * expected) - expected)
        else:
            move = seconds - expected
        move /= left * left + right * right
        if left:
            self._seen[i] = True
            self._curve[i] += move * left
        if right:
            self._seen[i + 1] = True
            self._curve[i + 1] += move * right
        self._fill()

    def _fill(self) -> None:
        """Guess the knots that are not measured and let time not fall with tokens."""
        curve, seen = self._curve, self._seen
        first = seen.index(True)
        curve[first] = max(curve[first], 1e-9)
        for i in range(first - 1, -1, -1):
            curve[i] = 0.9 * curve[i + 1]
        for i in range(first + 1, KNOTS):
            # Twice the tokens take up to twice as long; the weights, read once, make it less.
            curve[i] = max(curve[i], curve[i - 1]) if seen[i] else 1.7 * curve[i - 1]
