"""What steps take, and so how many prompt tokens one may have without stalling the running streams.

Sarathi-Serve (arXiv:2403.02310) bounds the prompt tokens of a step by the time between tokens that users
accept. Here that time is itself fitted, online: the seconds of a step as a function of its tokens, whatever
they are for, linear between powers of two and moved by each step that is measured. The same curve tells
speculation what guesses cost. Only latency depends on it; tokens never do.
"""

from __future__ import annotations

MINIMUM_CHUNK = 2  # prompt tokens: progress even where decodes alone take longer than the target
MAXIMUM_CHUNK = 512  # bounds the activations' memory and the time until a cancellation is noticed
# Without a target, a step with prompt tokens is meant to take this many times what its decodes take alone, so
# that the slowest of twenty takes less than twice as long.
STRETCH = 1.7
# Nor does a pause of this length hurt once: a prompt that can be read within it is read at once. In chunks as
# small as one stream's step allows, eight short prompts would take three times as long.
PAUSE_SECONDS = 0.1
# With no stream running nobody waits between tokens; a newcomer waits for the step at hand.
ALONE_SECONDS = 0.25
KNOTS = 13  # 1, 2, 4 .. 4096 tokens
SHARE = 0.2  # of a new measurement
OUTLIER = 1.5  # times the expectation; what is beyond (a machine that paused) counts as this
GROWTH = 1.6  # of the time by twice the tokens, where nothing is measured: the weights are read once
DRIFT = 0.005  # per step, of knots that are not measured towards GROWTH: a bad measurement is forgotten


class StepTimes:
    """Seconds of a step by its tokens.

    target_seconds: between two tokens of a stream; None: STRETCH times the decodes alone.
    """

    def __init__(self, target_seconds: float | None = None) -> None:
        self.target_seconds = target_seconds
        self._alone: dict[int, float] = {}  # of steps without prompts, by their tokens
        self._measured = [0] * KNOTS  # how often
        self._curve = [1e-3 * GROWTH**i for i in range(KNOTS)]  # its height is set by the first measurement

    def seconds(self, tokens: int) -> float:
        """Expected seconds of a step of `tokens` tokens; positive."""
        i = max(min(tokens.bit_length() - 1, KNOTS - 2), 0)
        low = self._curve[i]
        return low + (self._curve[i + 1] - low) * (tokens / (1 << i) - 1)

    @property
    def prompt_token_seconds(self) -> float:
        """Of one prompt token in a full chunk."""
        return self.seconds(MAXIMUM_CHUNK) / MAXIMUM_CHUNK

    def chunk(self, decode_tokens: int, first_prompt: int = 0) -> int:
        """Prompt tokens for a step that also takes `decode_tokens` of running streams.

        first_prompt: tokens that the first prompt in line still has to read.
        """
        short = decode_tokens and self.target_seconds is None and first_prompt <= MAXIMUM_CHUNK
        if short and self.seconds(decode_tokens + first_prompt) <= PAUSE_SECONDS:
            return max(first_prompt, self._within_target(decode_tokens))
        return self._within_target(decode_tokens)

    def _within_target(self, decode_tokens: int) -> int:
        if decode_tokens == 0:
            target = ALONE_SECONDS
        elif self.target_seconds is None:
            target = STRETCH * self._alone.get(decode_tokens, self.seconds(decode_tokens))
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

    def observe(self, tokens: int, seconds: float, prompt_tokens: int = 0) -> None:
        """Learn from a step that is done; prompt_tokens: how many of its tokens were of prompts."""
        if not prompt_tokens:
            # Steps with a long prompt pull the curve up, and with it the target, if it were read from there.
            known = self._alone.get(tokens, seconds)
            self._alone[tokens] = known + SHARE * (min(seconds, OUTLIER * known) - known)
        if tokens >= 1 << KNOTS:
            return
        i = min(tokens.bit_length() - 1, KNOTS - 2)
        expected = self.seconds(tokens)
        if not any(self._measured):
            self._curve = [knot * seconds / expected for knot in self._curve]
            expected = seconds
        right = tokens / (1 << i) - 1
        parts = {k: part for k, part in ((i, 1 - right), (i + 1, right)) if part}
        share = max(SHARE, 1 / (1 + min(self._measured[k] for k in parts)))
        move = share * (min(seconds, OUTLIER * expected) - expected)
        move /= sum(part * part for part in parts.values())
        for k, part in parts.items():
            self._measured[k] += 1
            self._curve[k] = max(self._curve[k] + move * part, 1e-9)
        self._follow(min(parts), max(parts))

    def _follow(self, first: int, last: int) -> None:
        """Let the other knots follow those just measured. Twice the tokens take as long, at least, and at
        most twice as long."""
        curve = self._curve
        if last > first:
            curve[last] = min(max(curve[last], curve[first]), 2 * curve[first])
        for i in range(first - 1, -1, -1):
            drift = DRIFT if self._measured[i] else 1.0
            value = curve[i] + drift * (curve[i + 1] / GROWTH - curve[i])
            curve[i] = min(max(value, 0.5 * curve[i + 1]), curve[i + 1])
        for i in range(last + 1, KNOTS):
            drift = DRIFT if self._measured[i] else 1.0
            value = curve[i] + drift * (curve[i - 1] * GROWTH - curve[i])
            curve[i] = min(max(value, curve[i - 1]), 2 * curve[i - 1])
