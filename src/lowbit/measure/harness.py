"""A model of ours under lm-evaluation-harness, so that tasks are asked and judged as everywhere else.

The harness builds the requests and computes accuracies with their standard errors; this file only answers:
log-likelihoods of continuations, of whole texts, and generated text. Requests are taken in the order of their
tokens, and what two neighbours share (the examples of a few-shot prompt, the context of several choices) is
computed once. Nothing is cut to fit: a request longer than the context is an error, as in the rest of lowbit.
Source: https://github.com/EleutherAI/lm-evaluation-harness, docs/model_guide.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM

from lowbit.engine import LanguageModel, SamplingParameters
from lowbit.engine.engine import Engine
from lowbit.engine.sequence import PREFILL_CHUNK, native_step, new_cache
from lowbit.errors import RequestError

Progress = Callable[[int, int], None]  # requests done, requests in all
# What tasks may ask of a generation, besides `until`; another key could change the answer, so it is refused.
_GENERATION_KEYS = frozenset(
    (
        "until",
        "max_gen_toks",
        "max_tokens",
        "max_new_tokens",
        "do_sample",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
    )
)
_DEFAULT_GENERATED = 256


class HarnessModel(TemplateLM):
    """model: what `lowbit.load` gives, with a tokenizer. progress: called after every request."""

    def __init__(self, model: LanguageModel, progress: Progress | None = None) -> None:
        super().__init__()
        if model.tokenizer is None:
            raise RequestError(
                "eval --tasks: the model has no tokenizer, and tasks are text; add tokenizer.json"
            )
        self.model = model
        self.tokenizer = model.tokenizer
        self._progress = progress or (lambda done, total: None)
        self._cache = new_cache(model.decoder, model.context)
        self._held: list[int] = []  # the tokens whose keys and values the cache holds
        self.scored_tokens = 0
        self.generated_tokens = 0

    @property
    def eot_token_id(self) -> int:
        ids = sorted(self.model.eos_ids)
        if not ids:
            raise RequestError(
                "eval --tasks: the model names no end-of-text token, which empty contexts need"
            )
        return ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: the beginning-of-text token, or else end-of-text."""
        return self.model.config.bos_ids[0] if self.model.config.bos_ids else self.eot_token_id

    @property
    def max_length(self) -> int:
        return self.model.context

    @property
    def max_gen_toks(self) -> int:
        return _DEFAULT_GENERATED

    @property
    def tokenizer_name(self) -> str:
        return str(self.model.model.path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None and self._begins(string):  # a chat template writes the token itself
            add_special_tokens = False
        return self.model.encode(string, add_special=add_special_tokens is not False)

    def _begins(self, string: str) -> bool:
        ids = self.model.config.bos_ids
        text = self.tokenizer.token(ids[0]) if ids else None
        return bool(text) and string.startswith(text or "")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.tokenizer.apply_chat(list(chat_history), add_generation_prompt=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.tokenizer.chat_template if chat_template else None

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)  # `progress` shows how far it is

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: requests[i][1] + requests[i][2])
        for done, i in enumerate(order, 1):
            _, context, continuation = requests[i]
            scores, greedy = self._score(context + continuation, len(context))
            answers[i] = float(np.sum(scores, dtype=np.float64)), greedy
            self._progress(done, len(requests))
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Each text by itself in windows of the context less one (the last token of a window is appended
        like the others), every token predicted once."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        totals = []
        for done, request in enumerate(requests, 1):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length - 1, 1)
            total = 0.0
            for context, continuation in map(make_disjoint_window, windows):
                scores, _ = self._score(list(context) + list(continuation), len(context))
                total += float(np.sum(scores, dtype=np.float64))
            totals.append(total)
            self._progress(done, len(requests))
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts up to, without, the first of `until`; several at once, each as if alone."""
        texts = [""] * len(requests)
        with Engine(self.model) as engine:
            at = done = 0
            while at < len(requests):  # neighbours that ask for the same are one batch
                wanted = requests[at].args[1]
                end = at + 1
                while end < len(requests) and requests[end].args[1] == wanted:
                    end += 1
                prompts = [self.tok_encode(request.args[0]) for request in requests[at:end]]
                for index, generation in engine.batch(prompts, self._parameters(wanted)):
                    texts[at + index] = generation.text
                    self.generated_tokens += generation.generated_tokens
                    done += 1
                    self._progress(done, len(requests))
                at = end
        return texts

    def _parameters(self, wanted: Mapping[str, Any]) -> SamplingParameters:
        unknown = sorted(set(wanted) - _GENERATION_KEYS)
        if unknown:
            raise RequestError(
                f"eval --tasks: the task asks to generate with {', '.join(unknown)}; lowbit knows "
                f"{', '.join(sorted(_GENERATION_KEYS))}"
            )
        until = wanted.get("until") or []
        stop = [until] if isinstance(until, str) else list(until)
        limits = (wanted.get(key) for key in ("max_gen_toks", "max_new_tokens", "max_tokens"))
        sampled = bool(wanted.get("do_sample", wanted.get("temperature")))
        return SamplingParameters(
            max_tokens=int(next((n for n in limits if n is not None), self.max_gen_toks)),
            temperature=float(wanted.get("temperature") or 1.0) if sampled else 0.0,
            top_p=float(wanted.get("top_p", 1.0)),
            top_k=int(wanted.get("top_k", 0)),
            min_p=float(wanted.get("min_p", 0.0)),
            stop=tuple(text for text in stop if text),
        )

    def _score(self, tokens: list[int], start: int) -> tuple[np.ndarray, bool]:
        """Natural logs of the probabilities of tokens[start:], and whether each was the likeliest.

        start: at least 1. The log-likelihoods do not depend on what the cache held before.
        """
        if len(tokens) > self.model.context:
            raise RequestError(
                f"eval --tasks: a request has {len(tokens)} tokens and the context holds "
                f"{self.model.context}; raise --context, or leave the task out: requests are never shortened"
            )
        if start >= len(tokens):
            return np.zeros(0, np.float32), True
        limit, common = min(len(self._held), start - 1), 0
        while common < limit and self._held[common] == tokens[common]:
            common += 1
        common = self._cache.truncate(common)
        del self._held[common:]
        for first in range(common, start - 1, PREFILL_CHUNK):
            self._append(tokens[first : min(first + PREFILL_CHUNK, start - 1)], -1)
        run = self._append(tokens[start - 1 :], 1)
        self.scored_tokens += len(tokens) - start
        likeliest = [top[0][0] for top in run.score_tops]
        return run.scores, likeliest == tokens[start:]

    def _append(self, tokens: list[int], scores: int) -> Any:
        """One native step; the last token of the cache is the last of `tokens`."""
        with native_step("eval"):
            (run,) = self.model.decoder.step(
                np.asarray(tokens, np.int32), [self._cache], [len(tokens)], [None], scores=[scores]
            )
        if run.failed:
            raise RequestError(
                "eval --tasks: the logits are not finite; try --activations int16, or another format"
            )
        self._held += tokens
        return run
