"""Damage of single matrices: measured as by hand, estimated as the formulas say, gradients as by autograd."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from lowbit.compress.blocks import Streams  # noqa: E402
from lowbit.compress.network import Network  # noqa: E402
from lowbit.compress.salience import salience, salient_rows  # noqa: E402
from lowbit.compress.sensitivity import Item, estimated, measured, together  # noqa: E402
from lowbit.errors import RequestError  # noqa: E402
from lowbit.formats import parse_format  # noqa: E402
from lowbit.model import torch_executor as executor  # noqa: E402
from lowbit.model.checkpoint import open_checkpoint  # noqa: E402
from lowbit.model.reference import reference_logits  # noqa: E402
from lowbit.model.tensors import EMBEDDING, groups  # noqa: E402
from lowbit.quantize import round_to_nearest  # noqa: E402
from lowbit.quantize.methods import parse_method  # noqa: E402

torch.set_num_threads(1)  # these products are too small to share
TOKENS = np.random.default_rng(0).integers(0, 256, (4, 12))
FORMATS = tuple(parse_format(name) for name in ("int2-g32", "int4-g32"))


@pytest.fixture(scope="module")
def checkpoint(tiny_model):
    with open_checkpoint(tiny_model) as opened:
        yield opened


def nearest(weight, format, statistics):
    return round_to_nearest(weight, format)


def items_of(checkpoint, formats=FORMATS):
    names = [name for group in groups(checkpoint.config, 0) for name in group]
    return [Item(layer, (name,), formats) for layer in range(checkpoint.config.n_layers) for name in names]


def divergence(checkpoint, changes):
    """Mean over windows and positions of KL(original, changed), by the NumPy reference in float64."""
    weights = {name: checkpoint.read(name) for name in checkpoint.names()}
    total = 0.0
    for window in TOKENS:
        logs = []
        for used in (weights, weights | changes):
            z = reference_logits(checkpoint.config, used, window.tolist()).astype(np.float64)
            z -= z.max(axis=1, keepdims=True)
            logs.append(z - np.log(np.exp(z).sum(axis=1, keepdims=True)))
        total += (np.exp(logs[0]) * (logs[0] - logs[1])).sum(axis=1).mean()
    return total / len(TOKENS)


def changed(checkpoint, item, format):
    return {t: round_to_nearest(checkpoint.read(t), format).dequantize() for t in item.tensors}


def test_measured_is_the_divergence_of_one_changed_item(checkpoint):
    items = [
        Item(1, ("mlp.gate_proj", "mlp.up_proj"), FORMATS[:1]),
        Item(None, (EMBEDDING,), FORMATS),
        Item(0, ("self_attn.v_proj",), FORMATS),
    ]
    told = []
    found = measured(checkpoint, TOKENS, items, nearest, progress=lambda *now: told.append(now))
    assert told[-1][:2] == (5, 5) and len(told) == 5
    assert found[0, 1] == np.inf
    for row, item in enumerate(items):
        for column, format in enumerate(item.formats):
            expected = divergence(checkpoint, changed(checkpoint, item, format))
            assert expected > 1e-5
            assert found[row, column] == pytest.approx(expected, rel=1e-3)
            one = together(checkpoint, TOKENS, [item], [column], nearest)
            assert one == pytest.approx(expected, rel=1e-3)


def test_memory_changes_nothing(checkpoint):
    items = items_of(checkpoint)
    whole = measured(checkpoint, TOKENS, items, nearest)
    np.testing.assert_allclose(measured(checkpoint, TOKENS, items, nearest, live_bytes=1), whole, rtol=1e-6)
    np.testing.assert_allclose(
        measured(checkpoint, TOKENS, items[::-1], nearest, live_bytes=1), whole[::-1], rtol=1e-6
    )


def test_all_changes_together_are_nearly_the_sum(checkpoint):
    items = items_of(checkpoint, (parse_format("int6-g32"),))
    single = measured(checkpoint, TOKENS, items, nearest)
    both = together(checkpoint, TOKENS, items, [0] * len(items), nearest)
    expected = divergence(
        checkpoint, {k: v for item in items for k, v in changed(checkpoint, item, item.formats[0]).items()}
    )
    assert both == pytest.approx(expected, rel=1e-2)
    assert both == pytest.approx(single.sum(), rel=0.25)


def test_calibrated_methods_see_the_statistics_of_their_layer(checkpoint):
    seen = []
    method = parse_method("gptq")

    def quantize(weight, format, statistics):
        seen.append(statistics)
        return method(weight, format, statistics)

    item = Item(1, ("self_attn.o_proj",), FORMATS[:1])
    found = measured(checkpoint, TOKENS, [item], quantize, statistics=TOKENS)
    streams = Streams(checkpoint.config, checkpoint.read(EMBEDDING), TOKENS)
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        weights = {n.removeprefix(prefix): checkpoint.read(n) for n in checkpoint.names() if prefix in n}
        expected = streams.watch(layer, weights)["self_attn.o_proj"]
        streams.advance(layer, weights)
    np.testing.assert_allclose(seen[0].hessian, expected.hessian, rtol=1e-5)
    weight = checkpoint.read(item.tensors[0])
    by_hand = {item.tensors[0]: method(weight, FORMATS[0], expected).dequantize()}
    assert found[0, 0] == pytest.approx(divergence(checkpoint, by_hand), rel=1e-2)


def test_a_group_that_does_not_fit_is_infinite(checkpoint):
    items = [Item(0, ("mlp.down_proj",), (parse_format("int4-g96"), parse_format("int4-g128")))]
    for found in (
        measured(checkpoint, TOKENS, items, nearest),
        estimated(checkpoint, TOKENS, items, nearest, "fisher"),
    ):
        assert found[0, 0] == np.inf and 0 < found[0, 1] < np.inf


def gradients(checkpoint, labels):
    """The gradient of every weight by one graph through the whole model, for window 0."""
    config = checkpoint.config
    weights = {n: torch.from_numpy(checkpoint.read(n)).requires_grad_() for n in checkpoint.names()}
    turn = executor.rotation(config, TOKENS.shape[1])
    x = executor.embed(config, weights[EMBEDDING], torch.from_numpy(TOKENS[:1]))
    for layer in range(config.n_layers):
        prefix = f"model.layers.{layer}."
        part = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        x = executor.block(config, layer, part, x, turn)
    z = executor.logits(config, weights["model.norm.weight"], weights[EMBEDDING], x)[0]
    if labels is None:
        loss = torch.nn.functional.cross_entropy(z[:-1], torch.from_numpy(TOKENS[0, 1:]))
    else:
        loss = torch.nn.functional.cross_entropy(z, labels(z), reduction="sum")
    loss.backward()
    return {n: w.grad.numpy() for n, w in weights.items()}


@pytest.mark.parametrize("labels", ["text", "model"])
def test_layerwise_gradients_are_those_of_the_whole_graph(checkpoint, labels):
    def drawn(z):
        generator = torch.Generator().manual_seed(5)
        return torch.multinomial(z.detach().softmax(-1), 1, generator=generator)[:, 0]

    expected = gradients(checkpoint, None if labels == "text" else drawn)
    found = {}

    def visit(layer, name, weight, inputs, gradient):
        product = sum(g.T @ x for x, g in zip(inputs, gradient, strict=True))
        found[f"model.layers.{layer}.{name}.weight"] = product.numpy()

    Network(checkpoint, TOKENS[:1]).backward(visit, labels, seed=5)
    assert len(found) == 14
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], atol=1e-4 * np.abs(expected[name]).max())


def test_estimates_are_their_formulas(checkpoint):
    items = items_of(checkpoint, FORMATS[:1])
    streams = Streams(checkpoint.config, checkpoint.read(EMBEDDING), TOKENS)
    weights = {n[15:]: checkpoint.read(n) for n in checkpoint.names() if n.startswith("model.layers.0.")}
    hessian = streams.watch(0, weights)["mlp.down_proj"].hessian
    number = next(i for i, item in enumerate(items) if item.names == ("mlp.down_proj",) and item.layer == 0)
    weight = weights["mlp.down_proj.weight"]
    error = round_to_nearest(weight, FORMATS[0]).dequantize() - weight
    output = estimated(checkpoint, TOKENS, items, nearest, "output")
    assert output[number, 0] == pytest.approx(np.vdot(error @ hessian, error), rel=1e-4)
    caught = {}

    def visit(layer, name, weight, inputs, gradient):
        caught[layer, name] = torch.cat(gradient).numpy().astype(np.float64)

    Network(checkpoint, TOKENS).backward(visit, "model")
    trace = np.square(caught[0, "mlp.down_proj"]).sum() / TOKENS.size * np.trace(hessian)
    hawq = estimated(checkpoint, TOKENS, items, nearest, "hawq")
    expected = 0.5 * trace / weight.size * np.square(error).sum()
    assert hawq[number, 0] == pytest.approx(expected, rel=1e-4)


def test_the_fisher_estimate_is_near_what_is_measured(checkpoint):
    """For small errors it is the divergence to second order, up to the draw of labels and cross terms."""
    items = items_of(checkpoint, (parse_format("int5-g32"),))
    tokens = np.random.default_rng(1).integers(0, 256, (24, 16))
    ratio = estimated(checkpoint, tokens, items, nearest, "fisher") / measured(
        checkpoint, tokens, items, nearest
    )
    assert 0.8 < np.exp(np.log(ratio).mean()) < 1.25
    assert ratio.min() > 0.5 and ratio.max() < 2


def test_salience_is_its_formula_and_rows_are_ranked_over_all_matrices(checkpoint):
    def coarse(tensor, weight):
        return round_to_nearest(weight, FORMATS[0])

    found = salience(checkpoint, TOKENS[:1], coarse)
    by_graph = gradients(checkpoint, None)
    for tensor in ("model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        weight = checkpoint.read(tensor)
        step = ((coarse(tensor, weight).dequantize() - weight) * by_graph[tensor]).sum(axis=1)
        np.testing.assert_allclose(found[tensor], np.abs(step + step**2 / 2), rtol=1e-2, atol=1e-7)
    rows = salient_rows(found, 0.1)
    count = sum(map(len, found.values()))
    assert sum(map(len, rows.values())) == count // 10
    least = min(found[name][r].min() for name, r in rows.items() if len(r))
    most = max(np.delete(found[name], r).max() for name, r in rows.items() if len(r) < len(found[name]))
    assert least >= most
    assert len({len(r) for r in rows.values()}) > 1  # not the same share of each
    assert not any(map(len, salient_rows(found, 0.0).values()))
    with pytest.raises(RequestError, match="fraction"):
        salient_rows(found, 1.5)


def test_windows_need_two_positions(checkpoint):
    with pytest.raises(RequestError, match="2 positions"):
        Network(checkpoint, TOKENS[:, :1])
