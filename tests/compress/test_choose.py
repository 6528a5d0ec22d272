"""Auto becomes a Scheme that meets its budget to the byte, and mixes better than any one format."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("scipy")

from lowbit.compress import quantize_checkpoint  # noqa: E402
from lowbit.compress.calibration import windows  # noqa: E402
from lowbit.compress.choose import resolve_auto  # noqa: E402
from lowbit.compress.sensitivity import Item, together  # noqa: E402
from lowbit.errors import FormatError, RequestError  # noqa: E402
from lowbit.formats import parse_format  # noqa: E402
from lowbit.formats.auto import Auto  # noqa: E402
from lowbit.model.checkpoint import open_checkpoint  # noqa: E402
from lowbit.model.tensors import GROUPS  # noqa: E402
from lowbit.packed import TensorFile  # noqa: E402
from lowbit.quantize import round_to_nearest  # noqa: E402

torch.set_num_threads(1)
TOKENS = np.random.default_rng(0).integers(0, 256, (4, 12))
CHOICES = "int2-g32,int3-g32,int4-g32,int8-g32"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def checkpoint(tiny_model):
    with open_checkpoint(tiny_model) as opened:
        yield opened


def weights_of(checkpoint, names):
    return sum(int(np.prod(checkpoint.shape(name))) for name in names)


@pytest.mark.parametrize("sensitivity", ["fisher", "kl", "hawq", "output"])
def test_bits_are_met_and_used(checkpoint, sensitivity):
    told = []
    auto = Auto(bits=3.4, choices=CHOICES, sensitivity=sensitivity)
    scheme, report = resolve_auto(auto, checkpoint, TOKENS, progress=lambda *now: told.append(now))
    assert told[-1][0] == told[-1][1]
    matrices = [n for n in checkpoint.names() if n.endswith("proj.weight")]
    assert [t for item in report["items"] for t in item["tensors"]] == [
        f"model.layers.{layer}.{part}.weight" for layer in range(2) for group in GROUPS for part in group
    ]
    size = sum(item["bytes"][item["format"]] for item in report["items"])
    bits = 8 * size / weights_of(checkpoint, matrices)
    assert bits == report["bits_per_weight"] and 3.3 < bits <= 3.4
    assert len({item["format"] for item in report["items"]}) > 1
    for item in report["items"]:
        assert all(scheme.format_for(tensor).name == item["format"] for tensor in item["tensors"])
        value = item["sensitivity"]
        assert value["int2-g32"] > value["int4-g32"] > value["int8-g32"] > 0
    chosen = sum(item["sensitivity"][item["format"]] for item in report["items"])
    assert report["predicted_kl"] == (None if sensitivity == "output" else pytest.approx(chosen))
    assert report["achieved_kl"] > 0 and report["optimal"]


def test_bytes_are_those_of_the_file(checkpoint, tmp_path):
    auto = Auto(bytes=62_000, choices=CHOICES, embedding="int3-g32,int4-g32,int8-g32")
    scheme, report = resolve_auto(auto, checkpoint, TOKENS)
    assert report["bytes"] <= 62_000
    assert report["items"][-1]["tensors"] == [EMBEDDING]
    quantize_checkpoint(checkpoint.path, scheme, tmp_path / "out")
    file = TensorFile(tmp_path / "out" / "model.safetensors")
    assert report["bytes"] == sum(file.array(name).nbytes for name in file.names())
    assert scheme.format_for(EMBEDDING).name == report["items"][-1]["format"]
    # a larger budget is spent too, and does less damage
    _, more = resolve_auto(Auto(bytes="80kB", choices=CHOICES, embedding=auto.embedding), checkpoint, TOKENS)
    assert 62_000 < more["bytes"] <= 80_000 and more["achieved_kl"] < report["achieved_kl"]


@pytest.mark.parametrize("unit, count", [("matrix", 14), ("group", 8), ("layer", 2)])
def test_matrices_may_take_one_format_together(checkpoint, unit, count):
    auto = Auto(bits=3.6, choices=CHOICES, together=unit)
    _, report = resolve_auto(auto, checkpoint, TOKENS)
    assert len(report["items"]) == count and report["bits_per_weight"] <= 3.6


def test_what_cannot_be_met_names_the_nearest(checkpoint):
    with pytest.raises(FormatError, match=r"smallest choices take 2\.\d+; give --bits (2\.\d+)") as caught:
        resolve_auto(Auto(bits=2.0, choices=CHOICES), checkpoint, TOKENS)
    nearest = float(str(caught.value).split("--bits ")[1].split()[0])
    _, report = resolve_auto(Auto(bits=nearest, choices=CHOICES), checkpoint, TOKENS)
    assert report["bits_per_weight"] <= nearest
    with pytest.raises(FormatError, match="give --bytes") as caught:
        resolve_auto(Auto(bytes=1000, choices=CHOICES), checkpoint, TOKENS)
    least = int(str(caught.value).split("--bytes ")[1].split(",")[0])
    assert resolve_auto(Auto(bytes=least, choices=CHOICES), checkpoint, TOKENS)[1]["bytes"] == least
    with pytest.raises(FormatError, match=r"none of int4-g96 fits model\.layers\.0"):
        resolve_auto(Auto(bits=5, choices="int4-g96"), checkpoint, TOKENS)
    with pytest.raises(FormatError, match="embedding format int4-g96 does not fit"):
        resolve_auto(Auto(bits=5, choices=CHOICES, embedding="int4-g96"), checkpoint, TOKENS)


def test_measured_seconds_are_a_limit(checkpoint):
    shapes = {checkpoint.shape(n) for n in checkpoint.names() if n.endswith("proj.weight")}
    # 4 bits are fast, 2 and 3 slow
    table = {
        (name, *shape): shape[0] * shape[1] * (1e-9 if name == "int4-g32" else 4e-9)
        for name in CHOICES.split(",")
        for shape in shapes
    }
    free = resolve_auto(Auto(bits=4.0, choices=CHOICES), checkpoint, TOKENS)[1]
    assert free["seconds"] == 0  # not limited, not counted
    weights = weights_of(checkpoint, [n for n in checkpoint.names() if n.endswith("proj.weight")])
    auto = Auto(bits=4.0, choices=CHOICES, seconds=2.2e-9 * weights, timings=table)
    report = resolve_auto(auto, checkpoint, TOKENS)[1]
    assert 0 < report["seconds"] <= auto.seconds and report["bits_per_weight"] <= 4.0
    fast = sum(item["format"] == "int4-g32" for item in report["items"])
    assert fast > sum(item["format"] == "int4-g32" for item in free["items"])
    with pytest.raises(RequestError, match=r"no product of int2-g32 .*--formats int2-g32 --shapes"):
        resolve_auto(Auto(bits=4.0, choices=CHOICES, seconds=1, timings={}), checkpoint, TOKENS)
    with pytest.raises(FormatError, match="seconds"):
        resolve_auto(Auto(bits=4.0, choices=CHOICES, seconds=1e-9, timings=table), checkpoint, TOKENS)


def test_methods_that_calibrate_measure_with_what_they_make(checkpoint):
    auto = Auto(bits=3.4, choices="int2-g32,int4-g32,fp16", sensitivity="kl", together="layer")
    report = resolve_auto(auto, checkpoint, TOKENS, "gptq")[1]
    nearest = resolve_auto(auto, checkpoint, TOKENS, "rtn")[1]
    for ours, theirs in zip(report["items"], nearest["items"], strict=True):
        assert ours["sensitivity"]["int2-g32"] < theirs["sensitivity"]["int2-g32"]
        assert ours["sensitivity"]["fp16"] == pytest.approx(theirs["sensitivity"]["fp16"], rel=1e-6)


def test_a_mixture_beats_one_format_at_its_size(shared_data):
    """stories15M at the bits of int3-row, judged on text that chose nothing."""
    with open_checkpoint(shared_data("weights/stories15M")) as checkpoint:
        text = shared_data("text/tinystories_sample.txt").read_text(encoding="utf-8")
        tokens = windows(text, checkpoint.tokenizer(), 8, 96)
        row = parse_format("int3-row")
        auto = Auto(bits=3.05, choices="int2-g32-m4,int3-row,int3-g32-m4,int4-g32-m4", samples=4)
        _, report = resolve_auto(auto, checkpoint, tokens)
        assert report["bits_per_weight"] <= 3.05
        items = [
            Item(int(item["tensors"][0].split(".")[2]), (item["tensors"][0].split(".", 3)[3][:-7],), formats)
            for item in report["items"]
            for formats in [(row, parse_format(item["format"]))]
        ]
        rounded = lambda weight, format, seen: round_to_nearest(weight, format)  # noqa: E731
        uniform, mixed = (
            together(checkpoint, tokens[4:], items, [number] * len(items), rounded) for number in (0, 1)
        )
        assert mixed < 0.95 * uniform
