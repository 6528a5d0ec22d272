"""The decoder of a GPU, under Triton's interpreter, against the NumPy reference: every family, any batch."""

from dataclasses import replace

import numpy as np
import pytest

from lowbit.errors import RequestError
from lowbit.model.checkpoint import open_checkpoint
from lowbit.model.reference import reference_logits
from lowbit.packed import FloatTerm, PackedMatrix, pack_values
from lowbit.quantize import quantize_array

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install torch")
pytest.importorskip("triton", reason="needs Triton: pip install triton")

from lowbit.kernels.triton.device import interpreted  # noqa: E402  # after the skips
from lowbit.model.cuda_executor import CudaDecoder  # noqa: E402

from . import tiny_models  # noqa: E402

DEVICE = "cpu" if interpreted() else "cuda"
TOLERANCE = 2e-4  # of the range of the logits: float32 sums in another order, through three layers


def matrix_of(weight):
    return PackedMatrix(*weight.shape, (FloatTerm("fp32", pack_values(np.ascontiguousarray(weight))),))


def read_all(folder):
    with open_checkpoint(folder) as checkpoint:
        return checkpoint.config, {name: checkpoint.read(name) for name in checkpoint.names()}


def decoder_of(config, weights, **settings):
    """The decoder, and the float weights that it computes with."""
    vectors = {n: w for n, w in weights.items() if w.ndim == 1 or "embed_positions" in n}
    matrices = {n: matrix_of(w) for n, w in weights.items() if n not in vectors}
    return CudaDecoder(config, matrices, vectors, DEVICE, **{"context": 32, "dtype": "fp32", **settings})


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    model = tiny_models.build(tiny_models.CASES["llama"])
    return read_all(tiny_models.save(model, tmp_path_factory.mktemp("llama")))


def close(found, expected, tolerance=TOLERANCE):
    atol = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(found.cpu().numpy(), expected, atol=atol, rtol=0)


@pytest.mark.parametrize("name", tiny_models.CASES)
def test_every_family_equals_the_reference(name, tmp_path):
    config, weights = read_all(tiny_models.save(tiny_models.build(tiny_models.CASES[name]), tmp_path))
    ids = np.random.default_rng(1).integers(3, config.vocab_size, 12)
    decoder = decoder_of(config, weights)
    close(decoder.step([(0, ids)]), reference_logits(config, weights, ids, context=32))


def test_chunks_and_batches_change_nothing(llama):
    config, weights = llama
    rng = np.random.default_rng(2)
    first, second = rng.integers(3, 270, 21), rng.integers(3, 270, 18)
    decoder = decoder_of(config, weights, sequences=3)
    whole = decoder.step([(2, first)])
    parts = [decoder.step([(0, first[:5])])]
    together = decoder.step([(1, second), (0, first[5:20])])
    last = decoder.step([(0, first[20:])])
    close(torch.cat([*parts, together[18:], last]), whole.cpu().numpy(), 2e-6)  # torch's exp of a tail
    decoder.reset(0)
    close(decoder.step([(0, second)]), together[:18].cpu().numpy(), 2e-6)


def test_quantized_weights(llama):
    config, weights = llama
    matrices = {n: quantize_array(w, "int4-g32") for n, w in weights.items() if w.ndim == 2}
    vectors = {n: w for n, w in weights.items() if w.ndim == 1}
    decoder = CudaDecoder(config, matrices, vectors, DEVICE, context=32, dtype="fp32")
    ids = np.arange(5, 17)
    decoded = vectors | {n: m.dequantize() for n, m in matrices.items()}
    close(decoder.step([(0, ids)]), reference_logits(config, decoded, ids, context=32))


def test_bad_requests(llama):
    config, weights = llama
    decoder = decoder_of(config, weights)
    for batch, message in (
        ([], "one sequence or more"),
        ([(0, [1]), (0, [2])], "each of them once"),
        ([(1, [1])], "sequences are 0 to 0"),
        ([(0, [])], "a token at least"),
        ([(0, [270])], "0 to 269"),
        ([(0, [1] * 33)], "the context is 32"),
    ):
        with pytest.raises(RequestError, match=message):
            decoder.step(batch)
    with pytest.raises(RequestError, match="dtype='int8'"):
        decoder_of(config, weights, dtype="int8")
    with pytest.raises(RequestError, match=r"no matrix lm_head\.weight"):
        decoder_of(replace(config, tied=False), {n: w for n, w in weights.items() if "lm_head" not in n})
