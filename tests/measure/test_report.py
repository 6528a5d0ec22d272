"""The page is well-formed, self-contained, escaped, and shows what it was given."""

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

import lowbit
from lowbit.errors import RequestError
from lowbit.measure.report import html, weight_histograms, write_report
from lowbit.measure.svg import Point, Series, chart, histogram, pareto
from lowbit.quantize.histogram import channel_histogram

EVIL = """<script>alert("1")</script>&'"""


def parse(page):
    """The tree of a page, which must be XML beside its first line."""
    first, rest = page.split("\n", 1)
    assert first == "<!DOCTYPE html>"
    return ElementTree.fromstring(rest)


def model(name, bits, kl, perplexity=10.0):
    return {
        "model": name,
        "bits_per_weight": bits,
        "size_bytes": 10**6,
        "kl_nats_per_token": kl,
        "kl_standard_error": 0.001,
        "top1_agreement": 0.9,
        "perplexity": perplexity,
    }


COMPARISON = {
    "reference": {"model": "whole", "perplexity": 9.0},
    "models": [model("a", 4.5, 0.02), model("b", 3.5, 0.2), model("c", 4.6, 0.5), model("d", 16, 0.0)],
    "tokens": 1000,
    "context": 256,
    "seconds": 2.5,
    "text": "t.txt",
}


@pytest.fixture(scope="module")
def report(tiny_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "small"
    told = lowbit.quantize(tiny_model, "int3-g32", out)
    return told, weight_histograms(tiny_model, out)


def test_quantize_report(report, tmp_path):
    told, histograms = report
    for layer in told["layers"]:
        layer["input_histogram"] = channel_histogram(np.arange(64.0))
    page = tmp_path / "page.html"
    write_report(page, {**told, "histograms": histograms, "comparison": COMPARISON})
    text = page.read_text(encoding="utf-8")
    tree = parse(text)
    assert not re.search(r"<script|<link|<img|src=|url\(|https?://(?!www\.w3\.org/2000/svg)", text)
    for heading in ("Error of each matrix", "Bits of each matrix", "Weights", "Activations", "All matrices"):
        assert f"<h2>{heading}</h2>" in text
    # A point for each matrix of a layer, in the two charts; names and errors of all in the table.
    inside = [layer for layer in told["layers"] if ".layers." in layer["name"]]
    titles = [t.text for t in tree.iter("{http://www.w3.org/2000/svg}title")]
    for layer in inside:
        assert sum(t.startswith(layer["name"] + " (int3-g32)") for t in titles) == 2
    cells = [cell.text for cell in tree.iter("td")]
    for layer in told["layers"]:
        assert layer["name"] in cells and f"{layer['relative_squared_error']:.3g}" in cells
    assert not list(tmp_path.glob(".*"))


def test_histograms_count_every_weight(report):
    told, histograms = report
    kinds = {entry["name"]: entry for entry in histograms}
    assert {"q_proj", "down_proj", "embed_tokens"} <= set(kinds)
    wanted = sum(np.prod(layer["shape"]) for layer in told["layers"] if "q_proj" in layer["name"])
    for key in ("original", "quantized"):
        assert sum(kinds["q_proj"][key]) == wanted
    assert kinds["q_proj"]["original"] != kinds["q_proj"]["quantized"]


def test_channel_histogram():
    found = channel_histogram(np.array([0.0, 1.0, 1.2, 8.0, 1e30]))
    counts = found["counts"]
    assert (found["low"], found["high"], len(counts), sum(counts)) == (-16, 16, 64, 5)
    assert counts[0] == 1 and counts[32] == 2 and counts[38] == 1 and counts[63] == 1


def test_comparison_page():
    text = html(COMPARISON)
    tree = parse(text)
    lines = [e.get("points") for e in tree.iter("{http://www.w3.org/2000/svg}polyline")]
    assert len(lines[0].split()) == 3  # b, a and d; c is beaten by a
    assert "0.20000 ± 0.00100" in text and "90.00%" in text


@pytest.mark.parametrize("where", ["title", "output", "method", "name", "format", "model", "reference"])
def test_everything_is_escaped(report, where):
    told, histograms = report
    layer = {**told["layers"][1]}
    data = {**told, "layers": [layer], "histograms": [{**histograms[0]}], "comparison": {**COMPARISON}}
    if where in ("title", "output", "method"):
        data[where] = EVIL
    elif where == "model":
        data["comparison"]["models"] = [model(EVIL, 4, 0.1)]
    elif where == "reference":
        data["comparison"]["reference"] = {"model": EVIL}
    else:
        layer[where] = EVIL
        data["histograms"][0]["name"] = EVIL
    text = html(data)
    parse(text)
    assert "<script" not in text and "&lt;script&gt;" in text


def test_refusals(tmp_path):
    with pytest.raises(RequestError, match="neither layers nor models"):
        html({"seconds": 1.0})
    with pytest.raises(RequestError, match="choose another file"):
        write_report(tmp_path / "none" / "page.html", COMPARISON)


def test_pareto_is_the_brute_force_front():
    rng = np.random.default_rng(3)
    points = [Point(float(x), float(y)) for x, y in rng.integers(0, 12, (40, 2))]
    unbeaten = {
        (p.x, p.y)
        for p in points
        if not any(q.x <= p.x and q.y <= p.y and (q.x, q.y) != (p.x, p.y) for q in points)
    }
    front = pareto(points)
    assert [(p.x, p.y) for p in front] == sorted(unbeaten)


@pytest.mark.parametrize(
    "values",
    [[0.0], [0.0, 0.0], [3.0], [0.0, 1e-9, 5.0], [float("nan"), 2.0], [-1.0, 2.0], [1e-300, 1e300], []],
)
@pytest.mark.parametrize("log_y", [False, True])
def test_charts_of_odd_values(values, log_y):
    text = chart([Series("s", [Point(i, v, "p") for i, v in enumerate(values)])], "x", "y", log_y, names=True)
    tree = ElementTree.fromstring(f"<div>{text}</div>")
    circles = list(tree.iter("{http://www.w3.org/2000/svg}circle"))
    assert len(circles) == sum(np.isfinite(values))
    for circle in circles:
        assert 0 <= float(circle.get("cx")) <= 760 and 0 <= float(circle.get("cy")) <= 340


def test_histogram_of_nothing():
    ElementTree.fromstring(f"<div>{histogram([('a', [0, 0])], -1, 1, 'x')}</div>")


def test_higher_values_are_higher_and_later_ones_further_right():
    text = chart([Series("s", [Point(1, 10), Point(2, 100), Point(3, 1000)])], "x", "y", log_y=True)
    places = [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', text)]
    assert places[0][0] < places[1][0] < places[2][0] and places[0][1] > places[1][1] > places[2][1]
    steps = np.diff([y for _, y in places])
    assert steps[0] == pytest.approx(steps[1], abs=0.11)  # equal factors, equal steps
