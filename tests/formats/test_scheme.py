"""Scheme: short forms, defaults, which format a tensor gets, JSON."""

import json

import pytest

from lowbit.errors import FormatError, UnsupportedError
from lowbit.formats import Format, Scheme, parse_format

INT4 = Format.integer(4)


@pytest.mark.parametrize(
    ("text", "weights", "activations", "kv_bits"),
    [
        ("int4-g64", "int4-g64", "int8", 8),
        ("w4a8kv16", "int4-g64", "int8", 16),
        ("w4a8kv8", "int4-g64", "int8", 8),
        ("w4a8kv4", "int4-g64", "int8", 4),
        ("w3a16kv2", "int3-g64", "int16", 2),
        ("w4a16", "int4-g64", "int16", 16),
        ("w4a16kv8", "int4-g64", "int16", 8),
        ("W8A8", "int8-g64", "int8", 8),
        ("w16a16kv16", "fp16", "int16", 16),
        ("mxfp4", "mxfp4", "int8", 8),
    ],
)
def test_parse(text, weights, activations, kv_bits):
    scheme = Scheme.parse(text)
    assert (scheme.weights.name, scheme.activations, scheme.kv_bits) == (weights, activations, kv_bits)
    assert Scheme.parse(scheme) is scheme


@pytest.mark.parametrize(
    ("weights", "embedding"),
    [
        ("int4-g64", "int6-g32"),
        ("ternary", "int6-g32"),
        ("int7-g64", "int6-g32"),
        ("bcq3-g128", "int6-g32"),
        ("int8-g64", "int8-g32"),
        ("mxfp8_e4m3", "int8-g32"),
        ("bf16", "bf16"),
        ("fp32", "fp32"),
    ],
)
def test_default_embedding(weights, embedding):
    scheme = Scheme(parse_format(weights))
    assert scheme.embedding == parse_format(embedding)
    assert scheme.format_for("model.embed_tokens.weight") == parse_format(embedding)
    assert scheme.format_for("lm_head.weight") == parse_format(embedding)
    assert scheme.format_for("model.layers.0.self_attn.q_proj.weight") == parse_format(weights)


def test_first_pattern_wins():
    scheme = Scheme.parse(
        {
            "weights": "int4-g64",
            "layers": {
                "model.layers.0.mlp.*": "int8-g64",
                "*.mlp.*": "int3-g64",
                "lm_head.*": "fp16",
                "model.layers.[12].self_attn.*": Format.codebook([0, 1, 5], name="mine"),
            },
        }
    )
    assert scheme.format_for("model.layers.0.mlp.up_proj.weight").name == "int8-g64"
    assert scheme.format_for("model.layers.1.mlp.up_proj.weight").name == "int3-g64"
    assert scheme.format_for("model.layers.2.self_attn.q_proj.weight").name == "mine"
    assert scheme.format_for("model.layers.3.self_attn.q_proj.weight").name == "int4-g64"
    assert scheme.format_for("lm_head.weight").name == "fp16"
    assert scheme.format_for("model.embed_tokens.weight").name == "int6-g32"
    assert Scheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme


def test_json_of_a_plain_scheme():
    scheme = Scheme.parse("w4a16")
    assert scheme.to_dict() == {
        "weights": "int4-g64",
        "embedding": "int6-g32",
        "activations": "int16",
        "kv_bits": 16,
        "layers": {},
    }
    assert Scheme.from_dict(scheme.to_dict()) == scheme
    assert hash(scheme) == hash(Scheme.parse("w4a16")) and scheme != Scheme.parse("w4a8")


def test_layers_are_copied():
    layers = {"a": INT4}
    scheme = Scheme(INT4, layers=layers)
    layers["b"] = INT4
    assert set(scheme.layers) == {"a"}


@pytest.mark.parametrize("value", ["w4a8kv3", {"weights": "int4", "kv_bits": 5}])
def test_unsupported_cache_says_what_is_supported(value):
    with pytest.raises(UnsupportedError, match="use one of 2, 4, 8, 16"):
        Scheme.parse(value)


@pytest.mark.parametrize("value", ["w4a4", "w4a32", {"weights": "int4", "activations": "fp8"}])
def test_unsupported_activations(value):
    with pytest.raises(UnsupportedError, match="int8, int16"):
        Scheme.parse(value)


def test_unsupported_weights():
    with pytest.raises(UnsupportedError, match="w1 to w8 or w16"):
        Scheme.parse("w12a8")


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ({}, "weights"),
        ({"weights": "int4", "weihgts": "int8"}, "weihgts"),
        ({"weights": "int4", "layers": ["x"]}, "layers"),
        ({"weights": "int4", "layers": {"x": 3}}, "format"),
        ({"weights": "int99"}, "int"),
        ("nonsense", "did you mean|lowbit formats"),
    ],
)
def test_bad_schemes(value, word):
    with pytest.raises(FormatError, match=word):
        Scheme.parse(value)


def test_names_stand_for_formats():
    scheme = Scheme("int4-g64", embedding="int8-g32", layers={"*.down_proj.weight": "nf4-g64"})  # type: ignore[arg-type]
    parsed = {"weights": "int4-g64", "embedding": "int8-g32", "layers": {"*.down_proj.weight": "nf4-g64"}}
    assert scheme == Scheme.parse(parsed)
    with pytest.raises(FormatError, match="bits=99"):
        Scheme("int99")  # type: ignore[arg-type]


def test_wrong_types():
    with pytest.raises(FormatError, match="its name"):
        Scheme(4)  # type: ignore[arg-type]
    with pytest.raises(FormatError, match="embedding"):
        Scheme(INT4, embedding=4)  # type: ignore[arg-type]
    with pytest.raises(FormatError, match="layers"):
        Scheme(INT4, layers={"a": 4})  # type: ignore[dict-item]
