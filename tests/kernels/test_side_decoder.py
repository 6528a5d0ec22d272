"""Matrices with sparse codes, outliers and low rank inside the decoder, where products share activations."""

from dataclasses import replace

import numpy as np
import pytest

from lowbit import _native
from lowbit.formats import parse_format
from lowbit.packed import GatheredTerm, PackedMatrix
from lowbit.quantize import low_rank, refine_rows, round_to_nearest, sparse, split_columns, split_entries

from .decoder_net import NETS, SPEC_FIELDS, make, random_tokens, reference
from .test_decoder_step import all_logits, difference

# Columns differ between matrices of one product (q, k, v) and agree in another (gate, up).
QUANTIZE = {
    "q": lambda w: split_columns(w, "int8-row", [3, 40]),
    "k": lambda w: split_columns(w, "int8-row", [5]),
    "v": lambda w: sparse(w, "int8-row", 0.5),
    "o": lambda w: low_rank(w, "int8-row", 5),
    "gate": lambda w: split_columns(w, "int8-row", [1, 2]),
    "up": lambda w: split_columns(w, "int8-row", [1, 2]),
    "down": lambda w: split_entries(w, "int8-row", 0.05),
    "embed": lambda w: sparse(w, "int8-row", 0.7),
    "head": lambda w: split_columns(w, "int8-row", [7], exclude=False),
}
OTHERS = QUANTIZE | {
    "q": lambda w: low_rank(w, "int8-row", 2),
    "k": lambda w: round_to_nearest(w, parse_format("fp16")),
    "v": lambda w: split_columns(w, "int8-row", [0, 47]),
    "up": lambda w: refine_rows(
        round_to_nearest(w, parse_format("int4-row")), w, np.arange(0, 80, 3), "int4-row"
    ),
    "gate": lambda w: sparse(w, "int4-row", "2:4"),
    "down": lambda w: split_columns(w, "int8-row", [79]),
}


def gathered(seed):
    """Codes over the inputs in a random order, which matrices of the same seed share."""

    def quantize(w):
        order = np.random.default_rng(seed).permutation(w.shape[1])
        codes = round_to_nearest(np.ascontiguousarray(w[:, order]), parse_format("int8-row")).terms[0]
        return PackedMatrix(*w.shape, (GatheredTerm(order.astype(np.uint32), codes),))

    return quantize


ORDERED = QUANTIZE | {
    "q": gathered(1),
    "k": gathered(1),
    "v": gathered(2),
    "o": gathered(3),
    "gate": gathered(4),
    "up": lambda w: round_to_nearest(w, parse_format("int8-row")),
    "down": gathered(5),
    "embed": gathered(6),
    "head": gathered(7),
}


def build(net, table):
    """(decoder, the network with the weights that its matrices hold, owners of the memory)"""
    spec = _native.DecoderSpec()
    for name in SPEC_FIELDS:
        setattr(spec, name, getattr(net, name))
    spec.attention_scale = net.head_dim**-0.5
    decoder, weights, kept = _native.Decoder(spec), dict(net.weights), []
    for name, x in net.weights.items():
        if x.ndim == 2:
            matrix = table[name.rsplit(".", 1)[-1]](x)
            kept.append(matrix)
            weights[name] = matrix.dequantize()
            decoder.set_matrix(name, matrix.native())
        else:
            decoder.set_vector(name, x)
    decoder.set_rope(net.inverse_frequencies(), net.factor, list(net.rope_layers))
    decoder.set_windows(list(net.windows))
    decoder.finish()
    return decoder, replace(net, weights=weights), kept


@pytest.mark.parametrize("table", [QUANTIZE, OTHERS, ORDERED], ids=["mixed", "others", "gathered"])
def test_logits_match_and_no_bit_depends_on_chunks_or_threads(table):
    net = make(replace(NETS["plain"], activation_bits=16))
    decoder, decoded, _kept = build(net, table)
    tokens = random_tokens(net, 120)
    whole = all_logits(decoder, tokens)
    assert difference(whole, reference(decoded, tokens)) < 2e-3
    assert difference(whole, reference(net, tokens)) > 2e-3  # the quantization itself is seen
    try:
        for threads, chunks in ((1, [1]), (2, [3, 1, 40, 60]), (3, [119, 1]), (3, [1, 2])):
            _native.set_threads(threads)
            assert np.array_equal(whole, all_logits(decoder, tokens, chunks)), (threads, chunks)
    finally:
        _native.set_threads(0)
