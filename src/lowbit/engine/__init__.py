"""Requests in, tokens out."""

from lowbit.engine.chat import Conversation
from lowbit.engine.generate import Generation, LanguageModel, TextStream, load
from lowbit.engine.parameters import SamplingParameters
from lowbit.engine.sequence import TokenLogprob

__all__ = [
    "Conversation",
    "Generation",
    "LanguageModel",
    "SamplingParameters",
    "TextStream",
    "TokenLogprob",
    "load",
]
