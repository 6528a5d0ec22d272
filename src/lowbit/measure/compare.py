"""How far the predictions of models are from those of a reference: KL divergence, agreement, perplexity.

The text is cut into windows as for perplexity. At every position of a window the reference and each model
give logits over the whole vocabulary; with p and q their softmax, the divergence is
KL(p || q) = sum over tokens of p (log p - log q), in nats, and the mean over positions is reported. It sees
every change of the distribution, where perplexity sees only the text's own token, so a thousand tokens tell
as much as a hundred thousand do of perplexity. Sums are in float64; a model compared with itself gives 0.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from lowbit.engine import LanguageModel
from lowbit.engine.sequence import native_step, new_cache
from lowbit.errors import RequestError, UnsupportedError
from lowbit.measure.perplexity import DEFAULT_CONTEXT, safe_exp

CHUNK_BYTES = (
    48 << 20
)  # held at a time: the reference's probabilities in float64, one model's logits in float32
ROWS_BYTES = 1 << 20  # of float64 values that one step of the arithmetic takes: they stay in the cache
BLOCK = 64  # positions whose mean counts as one independent sample of the divergence


@dataclass(frozen=True)
class Comparison:
    """What one model has lost.

    kl_nats_per_token: mean of KL(reference || model) over all positions
    kl_standard_error: of that mean, from the spread of means over 64 positions in a row, since
        neighbours are alike; NaN with fewer than two such blocks
    kl_99: nats that 99% of the positions stay under
    top1_agreement: share of positions where both find the same token likeliest
    perplexity: of the model on the text; the first token of a window is not scored
    """

    kl_nats_per_token: float
    kl_standard_error: float
    kl_99: float
    top1_agreement: float
    perplexity: float


@dataclass(frozen=True)
class ComparisonResult:
    """models: in the order given; tokens: positions compared."""

    models: list[Comparison]
    reference_perplexity: float
    tokens: int
    context: int
    windows: int
    seconds: float


def compare(
    reference: LanguageModel,
    models: Sequence[LanguageModel],
    text: str | Sequence[int],
    context: int | None = None,
    max_tokens: int | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> ComparisonResult:
    """Compare each of `models` with `reference` on `text` (or token ids).

    context: tokens of a window; None: 2048 or the least that one of them holds.
    max_tokens: only the first so many tokens of the text.
    progress: called with (windows done, windows, largest mean divergence so far) after each window.
    Raises RequestError for models whose vocabularies or tokenizers differ.
    """
    everyone = [reference, *models]
    size = context if context is not None else min(DEFAULT_CONTEXT, *(m.context for m in everyone))
    if not 2 <= size <= min(m.context for m in everyone):
        least = min(m.context for m in everyone)
        raise RequestError(
            f"compare: context={size} is outside 2 to {least}, what the models hold; choose one in it"
        )
    ids = _tokens(reference, models, text, max_tokens)
    windows = len(ids) // size
    if windows == 0:
        raise RequestError(
            f"compare: the text has {len(ids)} tokens, less than one window of {size}; "
            f"give a longer text or a shorter context (--context {max(2, len(ids))})"
        )
    started = time.perf_counter()
    caches = [new_cache(model.decoder, size) for model in everyone]
    tallies = [_Tally() for _ in models]
    reference_nll = 0.0
    for i in range(windows):
        for cache in caches:
            cache.truncate(0)
        window = ids[i * size : (i + 1) * size]
        for begin, end in _chunks(size, reference.config.vocab_size):
            targets = window[begin + 1 : end + 1]  # one fewer at the end of the window
            original, probabilities = _score_reference(
                _logits(reference, window[begin:end], caches[0]), targets
            )
            reference_nll -= original.log_likelihood
            for model, cache, tally in zip(models, caches[1:], tallies):
                logits = _logits(model, window[begin:end], cache)
                tally.add(original, _score(logits, targets, probabilities))
                del logits  # before the next model's come
        if progress:
            progress(i + 1, windows, max((tally.mean() for tally in tallies), default=0.0))
    scored = windows * (size - 1)
    return ComparisonResult(
        [tally.result(scored) for tally in tallies],
        safe_exp(reference_nll / scored),
        windows * size,
        size,
        windows,
        time.perf_counter() - started,
    )


def _tokens(
    reference: LanguageModel,
    models: Sequence[LanguageModel],
    text: str | Sequence[int],
    max_tokens: int | None,
) -> np.ndarray:
    """int32 ids of the text, which all tokenizers must agree on."""
    if max_tokens is not None and max_tokens < 2:
        raise RequestError(f"compare: max_tokens={max_tokens} leaves nothing to score; give at least 2")
    wanted = reference.config.vocab_size
    for number, model in enumerate(models, 1):
        if model.config.vocab_size != wanted:
            raise RequestError(
                f"compare: model {number} has a vocabulary of {model.config.vocab_size} tokens and the "
                f"reference one of {wanted}; compare quantizations of one and the same model"
            )
    ids = np.asarray(reference.encode(text, add_special=False), np.int32)
    if isinstance(text, str):
        for number, model in enumerate(models, 1):
            if model.tokenizer is None:
                continue
            other = np.asarray(model.encode(text, add_special=False), np.int32)
            if not np.array_equal(ids, other):
                raise RequestError(
                    f"compare: the tokenizers of model {number} and the reference cut the text differently "
                    f"({len(other)} and {len(ids)} tokens); compare quantizations of one and the same model"
                )
    return ids[:max_tokens]


def _chunks(size: int, vocab_size: int) -> Iterator[tuple[int, int]]:
    """Positions of a window whose logits are held at a time."""
    step = max(1, CHUNK_BYTES // (12 * vocab_size))
    for begin in range(0, size, step):
        yield begin, min(begin + step, size)


def _logits(model: LanguageModel, tokens: np.ndarray, cache: object) -> np.ndarray:
    """float32 [tokens, vocab_size] of all positions of `tokens`, which are appended to the cache."""
    with native_step("compare"):
        return model.decoder.logits(tokens, [cache], [len(tokens)], all=True)


def _rows(logits: np.ndarray) -> Iterator[slice]:
    step = max(1, ROWS_BYTES // (8 * logits.shape[1]))
    for begin in range(0, len(logits), step):
        yield slice(begin, begin + step)


@dataclass(frozen=True)
class _Scored:
    """What is kept of logits [tokens, vocab]; float64 [tokens] unless said otherwise.

    top: int64, the likeliest token; peak: its logit
    log_total: log of the sum of exp(logit - peak)
    mean: of logit - peak, weighed with the reference's probabilities; zeros where there are none
    log_likelihood: float, sum of the log-probabilities of the tokens that follow
    """

    top: np.ndarray
    peak: np.ndarray
    log_total: np.ndarray
    mean: np.ndarray
    log_likelihood: float


def _score(logits: np.ndarray, targets: np.ndarray, probabilities: np.ndarray | None) -> _Scored:
    """One pass over float32 logits in parts that stay in the cache."""
    top = logits.argmax(axis=1)
    peak = logits[np.arange(len(top)), top].astype(np.float64)
    log_total, mean = np.empty(len(top)), np.zeros(len(top))
    for rows in _rows(logits):
        shifted = np.subtract(logits[rows], peak[rows, None], dtype=np.float64)
        if probabilities is not None:
            mean[rows] = np.einsum("tv,tv->t", probabilities[rows], shifted)
        log_total[rows] = np.log(np.exp(shifted, out=shifted).sum(axis=1))
    if not np.isfinite(log_total).all():
        raise UnsupportedError(
            "compare: logits are not finite; the weights overflow in this format or with these "
            "activations: try --activations int16, or another format"
        )
    count = len(targets)
    chosen = logits[np.arange(count), targets] - peak[:count]
    return _Scored(top, peak, log_total, mean, float(np.sum(chosen - log_total[:count])))


def _score_reference(logits: np.ndarray, targets: np.ndarray) -> tuple[_Scored, np.ndarray]:
    """The same of the reference, and its probabilities, float64 [tokens, vocab]."""
    scored = _score(logits, targets, None)
    probabilities = np.empty(logits.shape)
    for rows in _rows(logits):
        shifted = np.subtract(logits[rows], scored.peak[rows, None], dtype=np.float64)
        np.exp(shifted - scored.log_total[rows, None], out=probabilities[rows])
        scored.mean[rows] = np.einsum("tv,tv->t", probabilities[rows], shifted)
    return scored, probabilities


@dataclass
class _Tally:
    """What has been seen of one model."""

    divergences: list[np.ndarray] = field(default_factory=list)
    agreed: int = 0
    nll: float = 0.0

    def add(self, original: _Scored, scored: _Scored) -> None:
        # sum p (log p - log q), where log p = logit - peak - log_total; exactly 0 for the same logits.
        self.divergences.append((original.mean - scored.mean) - (original.log_total - scored.log_total))
        self.agreed += int(np.count_nonzero(original.top == scored.top))
        self.nll -= scored.log_likelihood

    def mean(self) -> float:
        return float(np.mean(np.concatenate(self.divergences)))

    def result(self, scored: int) -> Comparison:
        found = np.concatenate(self.divergences)
        blocks = found[: len(found) // BLOCK * BLOCK].reshape(-1, BLOCK).mean(axis=1)
        error = float(blocks.std(ddof=1) / len(blocks) ** 0.5) if len(blocks) > 1 else float("nan")
        return Comparison(
            kl_nats_per_token=float(found.mean()),
            kl_standard_error=error,
            kl_99=float(np.quantile(found, 0.99)),
            top1_agreement=self.agreed / len(found),
            perplexity=safe_exp(self.nll / scored),
        )
