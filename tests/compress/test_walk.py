"""Quantizing a whole checkpoint: what comes out, what is reported, and that errors leave nothing."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lowbit.compress import quantize_checkpoint
from lowbit.errors import CheckpointError, FormatError
from lowbit.formats import FORMATS, Format, Scheme, parse_format
from lowbit.model.checkpoint import open_checkpoint
from lowbit.quantize import round_to_nearest

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def changed(tiny_model, tmp_path):
    """Return a function that copies the tiny model with some tensors replaced."""

    def change(**tensors):
        folder = tmp_path / "changed"
        shutil.copytree(tiny_model, folder)
        weights = load_file(folder / "model.safetensors")
        save_file(weights | tensors, folder / "model.safetensors")
        return folder

    return change


def test_every_tensor_arrives(tiny_model, tmp_path):
    scheme = Scheme(
        parse_format("int4-g32"),
        layers={"*.down_proj.weight": parse_format("int8-g64"), "*.v_proj.*": parse_format("nf4-g64")},
    )
    report = quantize_checkpoint(tiny_model, scheme, tmp_path / "out")
    with open_checkpoint(tiny_model) as source, open_checkpoint(tmp_path / "out") as result:
        assert result.kind == "lowbit"
        assert sorted(result.names()) == sorted(source.names())
        assert result.config.vocab_size == source.config.vocab_size
        for name in source.names():
            weight = source.read(name)
            if weight.ndim == 1:
                np.testing.assert_array_equal(result.read(name), weight)
                continue
            format = scheme.format_for(name)
            assert result.matrix(name).format_name == format.name
            np.testing.assert_array_equal(result.read(name), round_to_nearest(weight, format).dequantize())
        formats = {layer["name"]: layer["format"] for layer in report["layers"]}
        assert formats["model.embed_tokens.weight"] == "int6-g32"
        assert formats["model.layers.1.mlp.down_proj.weight"] == "int8-g64"
        assert formats["model.layers.1.self_attn.v_proj.weight"] == "nf4-g64"
        assert formats[Q_PROJ] == "int4-g32"


def test_the_report_is_true(tiny_model, tmp_path):
    calls = []
    report = quantize_checkpoint(
        tiny_model, "int4-g32", tmp_path / "out", progress=lambda *step: calls.append(step)
    )
    assert set(report) == {
        "output",
        "method",
        "bits_per_weight",
        "seconds",
        "peak_rss_bytes",
        "calibration_tokens",
        "layers",
    }
    assert report["output"] == str(tmp_path / "out")
    assert report["seconds"] > 0 and report["peak_rss_bytes"] > 1 << 20
    json.dumps(report)
    with open_checkpoint(tiny_model) as source, open_checkpoint(tmp_path / "out") as result:
        stored = weights = 0
        for layer in report["layers"]:
            matrix, weight = result.matrix(layer["name"]), source.read(layer["name"])
            assert layer["shape"] == list(weight.shape)
            assert layer["bits_per_weight"] == pytest.approx(matrix.bits_per_weight)
            error = np.square(matrix.dequantize() - weight).sum() / np.square(weight).sum()
            assert layer["relative_squared_error"] == pytest.approx(error, rel=1e-3)
            stored, weights = stored + 8 * matrix.nbytes, weights + weight.size
        assert report["bits_per_weight"] == pytest.approx(stored / weights)
        assert len(calls) == len(source.names())
    done = [step[0] for step in calls]
    assert done == sorted(done) and done[-1] == calls[0][1]


def test_the_directory_is_one_that_others_recognise(tiny_model, tmp_path):
    out = tmp_path / "out"
    quantize_checkpoint(tiny_model, "w4a16kv16", out)
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["quantization_config"]["quant_method"] == "lowbit"
    assert config["quantization_config"]["scheme"]["activations"] == "int16"
    details = json.loads((out / "lowbit.json").read_text())
    assert (details["version"], details["format"], details["method"]) == (1, "lowbit", "rtn")
    assert details["source"] == tiny_model.name and "/" not in details["source"]
    assert Scheme.from_dict(details["scheme"]) == Scheme.parse("w4a16kv16")
    assert (out / "tokenizer.json").read_bytes() == (tiny_model / "tokenizer.json").read_bytes()
    assert {file.name for file in out.iterdir()} == {
        "config.json",
        "lowbit.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_the_same_input_gives_the_same_bytes(tiny_model, tmp_path):
    for name in ("a", "b"):
        quantize_checkpoint(tiny_model, "int3-g32", tmp_path / name)
    for file in ("model.safetensors", "lowbit.json", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize(
    "name", [n for n, f in FORMATS.items() if f.group_size in (0, 16, 32, 64) and not f.coded]
)
def test_every_format_that_fits_goes_through(name, base_model, tmp_path):
    report = quantize_checkpoint(base_model, Scheme(FORMATS[name], embedding=FORMATS[name]), tmp_path / "out")
    with open_checkpoint(tmp_path / "out") as result:
        assert np.isfinite(result.read(Q_PROJ)).all()
    assert all(layer["relative_squared_error"] < 0.5 for layer in report["layers"])


def test_coded_weights_are_those_of_the_source(base_model, tmp_path):
    with pytest.raises(FormatError, match=r"is no bfloat16, so it cannot be kept; take bf16, which rounds"):
        quantize_checkpoint(base_model, "df11", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    quantize_checkpoint(base_model, "bf16", tmp_path / "rounded")
    report = quantize_checkpoint(tmp_path / "rounded", "df11", tmp_path / "out")
    with open_checkpoint(tmp_path / "out") as result, open_checkpoint(tmp_path / "rounded") as source:
        for layer in report["layers"]:
            np.testing.assert_array_equal(result.read(layer["name"]), source.read(layer["name"]))
            assert layer["relative_squared_error"] == 0 and layer["format"] == "df11"


def test_codebooks_of_the_user_survive(base_model, tmp_path):
    format = Format.codebook([-2.0, -0.7, 0.1, 1.0, 3.0], group_size=32)
    quantize_checkpoint(base_model, Scheme(format, embedding=format), tmp_path / "out")
    details = json.loads((tmp_path / "out" / "lowbit.json").read_text())
    assert Scheme.from_dict(details["scheme"]).weights == format
    with open_checkpoint(tmp_path / "out") as result, open_checkpoint(base_model) as source:
        expected = round_to_nearest(source.read(Q_PROJ), format).dequantize()
        np.testing.assert_array_equal(result.read(Q_PROJ), expected)


def test_a_lowbit_model_can_be_quantized_again(base_model, tmp_path):
    quantize_checkpoint(base_model, "int8-g32", tmp_path / "eight")
    report = quantize_checkpoint(tmp_path / "eight", "int4-g32", tmp_path / "four")
    assert report["bits_per_weight"] < 8
    with pytest.raises(CheckpointError, match="force"):
        quantize_checkpoint(tmp_path / "eight", "int4-g32", tmp_path / "four")
    quantize_checkpoint(tmp_path / "four", "int4-g32", tmp_path / "four", force=True)  # onto itself
    with open_checkpoint(tmp_path / "four") as again:
        assert again.matrix(Q_PROJ).format_name == "int4-g32"


def test_no_tokenizer_is_no_obstacle(silent_model, tmp_path):
    quantize_checkpoint(silent_model, "int4-g32", tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_a_group_size_that_does_not_divide_names_tensor_and_remedy(tiny_model, tmp_path):
    message = r"quantize model\.embed_tokens\.weight to int6-g48: in_features=64 is not a multiple of "
    with pytest.raises(FormatError, match=message + r"group_size=48; use -g32 or -g64, or -row"):
        quantize_checkpoint(
            tiny_model, Scheme(FORMATS["int4-g64"], parse_format("int6-g48")), tmp_path / "out"
        )
    with pytest.raises(FormatError, match=r"layers\.0\..*\.weight to int4-g128: .*use -g64, or -row"):
        quantize_checkpoint(tiny_model, "int4-g128", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_name_tensor_and_place(value, changed, tmp_path):
    weight = np.ones((64, 64), np.float32)
    weight[5, 6] = value
    source = changed(**{Q_PROJ: weight})
    with pytest.raises(FormatError, match=rf"quantize {Q_PROJ}: weight\[5, 6\] is {value}"):
        quantize_checkpoint(source, "int4-g32", tmp_path / "out")
    norm = np.full(64, value, np.float32)
    shutil.rmtree(source)
    source = changed(**{"model.norm.weight": norm})
    with pytest.raises(FormatError, match=r"quantize model\.norm\.weight"):
        quantize_checkpoint(source, "int4-g32", tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["changed"]


def test_a_full_disk_leaves_nothing_behind(tiny_model, tmp_path):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, hard))
    try:
        with pytest.raises(CheckpointError, match="nothing was left behind"):
            quantize_checkpoint(tiny_model, "int4-g32", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing_behind(tiny_model, tmp_path):
    def stop(done, total, name):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(tiny_model, "int4-g32", tmp_path / "out", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_real_model_loses_little(shared_data, tmp_path):
    report = quantize_checkpoint(shared_data("weights/stories15M"), "int4-g32", tmp_path / "out")
    errors = [layer["relative_squared_error"] for layer in report["layers"] if layer["format"] == "int4-g32"]
    assert len(errors) == 42 and max(errors) < 0.009
