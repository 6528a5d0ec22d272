"""Folds: the function of a layer stays, and what they are for falls."""

import numpy as np
import pytest

pytest.importorskip("torch")

from lowbit.compress.folds import FOLDS, groups
from lowbit.errors import FormatError
from lowbit.formats import parse_format
from lowbit.model.reference import reference_logits
from lowbit.quantize import awq as search
from lowbit.quantize.round_to_nearest import round_to_nearest

from . import networks

MATRICES = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]


def seen(weights):
    """Statistics of every group of a layer, of made inputs."""
    leaders = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    leaders += ["mlp.router", *(f"mlp.experts.{expert}.down_proj" for expert in range(5))]
    return {
        name: networks.statistics(networks.inputs(weights[f"{name}.weight"].shape[1], seed=i))
        for i, name in enumerate(leaders)
        if f"{name}.weight" in weights
    }


def formats(name):
    return dict.fromkeys(MATRICES, parse_format(name))


def fold_last(name, config, weights, **options):
    """Fold the last layer in place and return its factors."""
    prefix = f"model.layers.{config.n_layers - 1}."
    part = {key[len(prefix) :]: w for key, w in weights.items() if key.startswith(prefix)}
    names = set(part)
    matrices = [key.removesuffix(".weight") for key, w in part.items() if w.ndim == 2]
    to = dict.fromkeys(matrices, parse_format("int3-g32"))
    factors = FOLDS[name].apply(config, part, seen(part), to, **options)
    assert set(part) == names
    weights.update({prefix + key: w for key, w in part.items()})
    return factors


@pytest.mark.parametrize("case", networks.CASES)
@pytest.mark.parametrize("name", FOLDS)
def test_the_function_stays(name, case, monkeypatch):
    monkeypatch.setattr(search, "STEPS", 2)  # any factors will do
    config, weights = networks.network(case)
    tokens = networks.tiny_models.token_ids(20)
    before = reference_logits(config, weights, tokens)
    factors = fold_last(name, config, weights)
    sparse = config.sparse(config.n_layers - 1)
    assert {group.leader for group in groups(config, sparse)} <= set(factors)
    assert all(s.max() / s.min() > 1.2 for s in factors.values())  # something was moved, in every group
    after = reference_logits(config, weights, tokens)
    np.testing.assert_allclose(after, before, atol=2e-5 * np.abs(before).max(), rtol=0)


def test_what_can_move_in_each_family():
    """GELU and norms of outputs let less move; ReLU without a gate lets all."""

    def leaders(case):
        return {group.leader.rpartition(".")[2] for group in groups(networks.network(case)[0])}

    everything = {"q_proj", "o_proj", "gate_proj", "down_proj"}
    for case in ("llama", "gemma2", "gemma3", "phi3", "bitnet"):
        assert leaders(case) == everything
    assert leaders("olmo2") == {"o_proj", "down_proj"}
    assert leaders("gpt2") == leaders("neox") == leaders("opt-no-biases") == {"q_proj", "o_proj", "up_proj"}
    assert leaders("opt") == {"q_proj", "o_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("name", FOLDS)
@pytest.mark.parametrize("case", ["llama-biases", "bitnet"])
def test_factors_divide_the_input(name, case, monkeypatch):
    """What a matrix reads is 1 / s of what it read, so that products of rounded weights use it."""
    monkeypatch.setattr(search, "STEPS", 2)
    config, weights = networks.network(case)
    prefix = f"model.layers.{config.n_layers - 1}."
    before = {n: weights[f"{prefix}{n}.weight"].copy() for n in MATRICES}
    factors = fold_last(name, config, weights)
    for group in groups(config):
        for matrix in group.matrices:
            after = weights[f"{prefix}{matrix}.weight"]
            ratio = after / before[matrix] / factors[group.leader]
            # A matrix whose rows took another group's factors differs by a factor per row.
            np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1], ratio.shape), rtol=1e-4)


@pytest.mark.parametrize("case", ["llama", "bitnet"])
def test_awq_is_never_worse_on_its_own_loss(case, monkeypatch):
    monkeypatch.setattr(search, "STEPS", 5)
    config, weights = networks.network(case)
    prefix = "model.layers.0."
    part = {key[len(prefix) :]: w for key, w in weights.items() if key.startswith(prefix)}
    watched = seen(part)

    def losses(weights, factors=None):
        found = {}
        for group in groups(config):
            hessian = watched[group.leader].hessian
            s = 1 if factors is None else factors[group.leader]
            found[group.leader] = 0.0
            for name in group.matrices:
                w = weights[f"{name}.weight"]
                rest = (w - round_to_nearest(w, parse_format("int3-g32")).dequantize()) / s
                found[group.leader] += float(np.vdot(rest @ hessian, rest))
        return found

    before = losses(part)
    factors = FOLDS["awq"].apply(config, part, watched, formats("int3-g32"))
    # Rows of up and v were divided by the factors of down and o: compare what comes out of them whole.
    rows = {"mlp.gate_proj", "self_attn.q_proj"} if not config.sub_norm else set()
    after = losses(part, factors)
    for leader in before:
        if leader not in rows:
            assert after[leader] < 0.8 * before[leader]


def test_smoothquant_balances():
    """Inputs and columns get the same largest magnitude at alpha 0.5; at 1 the inputs become even."""
    for alpha in (0.5, 1.0):
        config, weights = networks.network("llama")
        part = {k.removeprefix("model.layers.0."): w for k, w in weights.items()}
        watched = seen(part)
        s = FOLDS["smoothquant"].apply(config, part, watched, formats("int8-row"), alpha=alpha)[
            "mlp.down_proj"
        ]
        x, columns = watched["mlp.down_proj"].largest / s, np.abs(part["mlp.down_proj.weight"]).max(0)
        np.testing.assert_allclose(x, columns if alpha == 0.5 else 1, rtol=1e-5)


def test_llmfp4_factors_are_powers_of_two():
    config, weights = networks.network("llama")
    factors = fold_last("llmfp4", config, weights, reach=2)
    for s in factors.values():
        assert set(np.log2(s)) <= {0.0, -1.0, -2.0} and len(set(s)) > 1


def test_silent_channels_and_bad_statistics():
    config, weights = networks.network("llama")
    part = {k.removeprefix("model.layers.0."): w for k, w in weights.items()}
    watched = seen(part)
    silent = {
        name: networks.statistics(np.zeros((4, len(s.largest)), np.float32)) for name, s in watched.items()
    }
    for fold in FOLDS.values():
        factors = fold.apply(config, part, silent, formats("int4-g32"))
        assert all((s == 1).all() for s in factors.values())
    watched["mlp.down_proj"] = watched["self_attn.q_proj"]
    with pytest.raises(FormatError, match="down_proj"):
        FOLDS["smoothquant"].apply(config, part, watched, formats("int4-g32"))
