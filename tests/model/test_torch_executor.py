"""The torch executor against transformers and the NumPy reference, family by family."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from lowbit.errors import RequestError  # noqa: E402
from lowbit.model import torch_executor as executor  # noqa: E402
from lowbit.model.checkpoint import open_checkpoint  # noqa: E402
from lowbit.model.reference import reference_logits  # noqa: E402
from lowbit.model.tensors import (  # noqa: E402
    EMBEDDING,
    FINAL_NORM,
    FINAL_NORM_BIAS,
    HEAD,
    POSITIONS,
    groups,
)

from ..compress import networks  # noqa: E402
from . import tiny_models  # noqa: E402


@pytest.fixture(scope="module", params=tiny_models.CASES, ids=str)
def saved(request, tmp_path_factory):
    model = tiny_models.build(tiny_models.CASES[request.param])
    return model, tiny_models.save(model, tmp_path_factory.mktemp(request.param))


def run(config, weights, ids, hook=None, attend=None):
    """Logits [batch, positions, vocab] of token ids [batch, positions], through every block."""
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in weights.items()}
    turn = executor.rotation(config, ids.shape[1])
    x = executor.embed(config, tensors[EMBEDDING], torch.from_numpy(ids), tensors.get(POSITIONS))
    for layer in range(config.n_layers):
        prefix = f"model.layers.{layer}."
        part = {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
        x = executor.block(config, layer, part, x, turn, hook, attend)
    head = tensors[EMBEDDING if config.tied else HEAD]
    return executor.logits(config, tensors[FINAL_NORM], head, x, tensors.get(FINAL_NORM_BIAS)).numpy()


def test_logits_of_every_family(saved):
    model, folder = saved
    with open_checkpoint(folder) as checkpoint:
        config = checkpoint.config
        weights = {name: checkpoint.read(name) for name in checkpoint.names()}
    ids = np.stack([tiny_models.token_ids(24), tiny_models.token_ids(24)[::-1]]).astype(np.int64)
    seen = {}

    def watch(name, x):
        seen.setdefault(name, x.shape[-1])

    ours = run(config, weights, ids, watch)
    for row, tokens in zip(ours, ids, strict=True):
        theirs = tiny_models.logits(model, list(tokens))
        assert np.abs(theirs).max() > 1e-3
        np.testing.assert_allclose(row, theirs, atol=1e-5 * np.abs(theirs).max(), rtol=0)
        reference = reference_logits(config, weights, list(tokens))
        np.testing.assert_allclose(row, reference, atol=1e-5 * np.abs(reference).max(), rtol=0)
    layers = range(config.n_layers)
    named = {name: layer for layer in layers for group in groups(config, layer) for name in group}
    assert seen.keys() == named.keys()
    if not config.n_experts:
        assert list(seen) == list(named)
    for name, width in seen.items():
        assert weights[f"model.layers.{named[name]}.{name}.weight"].shape[1] == width


def test_a_hook_can_replace_inputs_and_attention(saved):
    _, folder = saved
    with open_checkpoint(folder) as checkpoint:
        config = checkpoint.config
        weights = {name: checkpoint.read(name) for name in checkpoint.names()}
    ids = np.array([tiny_models.token_ids(8)], np.int64)
    plain = run(config, weights, ids)
    doubled = {
        name: weight / 2 if name.endswith("up_proj.weight") else weight for name, weight in weights.items()
    }
    again = run(config, doubled, ids, lambda name, x: 2 * x if name.endswith("up_proj") else None)
    np.testing.assert_array_equal(again, plain)
    np.testing.assert_array_equal(run(config, weights, ids, attend=executor.attention), plain)
    silent = run(config, weights, ids, attend=lambda q, k, v, *_: torch.zeros(*q.shape[:2], q[0, 0].numel()))
    assert np.abs(silent - plain).max() > 1e-3 * np.abs(plain).max()


@pytest.mark.parametrize("ids", [[[]], [1, 2], [[-1]], [[5]]])
def test_bad_tokens(ids):
    with pytest.raises(RequestError):
        config = networks.network("llama")[0]
        executor.embed(config, torch.zeros(5, 4), torch.tensor(ids, dtype=torch.long))
