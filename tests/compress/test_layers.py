"""Layer by layer with any method: results, resuming after a kill, refusals."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from lowbit.compress import quantize_checkpoint  # noqa: E402
from lowbit.compress.blocks import walk_blocks  # noqa: E402
from lowbit.compress.parts import Parts  # noqa: E402
from lowbit.errors import CheckpointError, FormatError, RequestError  # noqa: E402
from lowbit.formats import Scheme, parse_format  # noqa: E402
from lowbit.model.checkpoint import open_checkpoint  # noqa: E402
from lowbit.model.reference import reference_logits  # noqa: E402
from lowbit.packed import RowsTerm  # noqa: E402
from lowbit.quantize import round_to_nearest  # noqa: E402
from lowbit.quantize.methods import parse_method  # noqa: E402

TOKENS = np.random.default_rng(0).integers(0, 200, (4, 32))
INT3 = Scheme(parse_format("int3-g32"), embedding=parse_format("fp32"))
FILES = ("model.safetensors", "lowbit.json", "config.json")


def same(a, b):
    return all((a / file).read_bytes() == (b / file).read_bytes() for file in FILES)


def test_the_result_is_that_of_the_method_on_what_the_walk_saw(tiny_model, tmp_path):
    report = quantize_checkpoint(tiny_model, INT3, tmp_path / "out", method="gptq", calibration=TOKENS)
    gptq = parse_method("gptq")
    with open_checkpoint(tiny_model) as source, open_checkpoint(tmp_path / "out") as result:
        expected = dict(
            walk_blocks(
                source, TOKENS, lambda name, weight, seen: gptq(weight, parse_format("int3-g32"), seen)
            )
        )
        assert sorted(result.names()) == sorted(source.names())
        for name, matrix in expected.items():
            np.testing.assert_array_equal(result.read(name), matrix.dequantize())
            plain = round_to_nearest(source.read(name), parse_format("int3-g32")).dequantize()
            assert not np.array_equal(result.read(name), plain)
        for name in set(source.names()) - set(expected):
            np.testing.assert_array_equal(result.read(name), source.read(name))
    errors = [layer["relative_output_error"] for layer in report["layers"] if "mlp" in layer["name"]]
    assert len(errors) == 6 and 0 < min(errors) < max(errors) < 0.1
    assert report["method"] == "gptq" and report["calibration_tokens"] == TOKENS.size
    details = json.loads((tmp_path / "out" / "lowbit.json").read_text())
    assert details["method"] == "gptq" and details["calibration"]["windows"] == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_text_and_its_windows(tiny_model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 20)
    arguments = {"method": "gptq", "calibration": text, "samples": 4, "length": 32}
    report = quantize_checkpoint(tiny_model, INT3, tmp_path / "a", **arguments)
    assert report["calibration_tokens"] == 128
    quantize_checkpoint(tiny_model, INT3, tmp_path / "b", **arguments)
    assert same(tmp_path / "a", tmp_path / "b")
    quantize_checkpoint(tiny_model, INT3, tmp_path / "c", **arguments, seed=1)
    assert not same(tmp_path / "a", tmp_path / "c")
    assert (
        quantize_checkpoint(tiny_model, INT3, tmp_path / "d", method="gptq")["calibration_tokens"]
        == 128 * 128
    )


@pytest.mark.parametrize(
    "layer", ["model.layers.0.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"]
)
def test_an_interrupted_run_is_finished_with_the_same_result(layer, tiny_model, tmp_path):
    arguments = {"method": "gptq", "calibration": TOKENS}
    quantize_checkpoint(tiny_model, INT3, tmp_path / "whole", **arguments)

    def stop(done, total, name):
        if name == layer:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(tiny_model, INT3, tmp_path / "out", progress=stop, **arguments)
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.unfinished").is_dir()
    seen = []
    quantize_checkpoint(tiny_model, INT3, tmp_path / "out", progress=lambda *a: seen.append(a), **arguments)
    assert same(tmp_path / "whole", tmp_path / "out")
    assert not (tmp_path / ".out.unfinished").exists()
    assert seen[-1][0] == seen[-1][1]


def test_a_killed_process_can_be_finished(tiny_model, tmp_path):
    np.save(tmp_path / "tokens.npy", TOKENS)
    code = (
        "import sys, time, numpy as np\n"
        "from lowbit.compress import quantize_checkpoint\n"
        "from lowbit.formats import Scheme, parse_format\n"
        "def wait(done, total, name):\n"
        "    if name.startswith('model.layers.1.'): print('there', flush=True); time.sleep(60)\n"
        "scheme = Scheme(parse_format('int3-g32'), embedding=parse_format('fp32'))\n"
        "quantize_checkpoint(sys.argv[1], scheme, sys.argv[2], method='gptq', progress=wait,\n"
        "                    calibration=np.load(sys.argv[3]))\n"
    )
    out = tmp_path / "out"
    child = subprocess.Popen(
        [sys.executable, "-c", code, tiny_model, out, tmp_path / "tokens.npy"], stdout=subprocess.PIPE
    )
    assert child.stdout.readline() == b"there\n"
    with pytest.raises(CheckpointError, match="another process is writing"):
        quantize_checkpoint(tiny_model, INT3, out, method="gptq", calibration=TOKENS)
    child.send_signal(signal.SIGKILL)
    child.wait()
    started = time.perf_counter()
    quantize_checkpoint(tiny_model, INT3, out, method="gptq", calibration=TOKENS)
    assert time.perf_counter() - started < 60
    quantize_checkpoint(tiny_model, INT3, tmp_path / "whole", method="gptq", calibration=TOKENS)
    assert same(tmp_path / "whole", out)


def test_an_unfinished_run_of_another_request_is_not_mixed_in(tiny_model, tmp_path):
    def stop(done, total, name):
        if name.startswith("model.layers.1."):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(
            tiny_model, INT3, tmp_path / "out", method="gptq", calibration=TOKENS, progress=stop
        )
    other = {"method": "gptq", "calibration": TOKENS[:2]}
    with pytest.raises(CheckpointError, match=r"another calibration; .*--restart"):
        quantize_checkpoint(tiny_model, INT3, tmp_path / "out", **other)
    with pytest.raises(CheckpointError, match=r"another calibration, method"):
        quantize_checkpoint(
            tiny_model, INT3, tmp_path / "out", method="gptq:damping=0.1", calibration=TOKENS[:2]
        )
    quantize_checkpoint(tiny_model, INT3, tmp_path / "out", restart=True, **other)
    quantize_checkpoint(tiny_model, INT3, tmp_path / "whole", **other)
    assert same(tmp_path / "whole", tmp_path / "out")


def test_a_full_disk_keeps_what_is_finished(tiny_model, tmp_path):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the parts fit, the whole does not
    try:
        with pytest.raises(CheckpointError, match="free space"):
            quantize_checkpoint(tiny_model, INT3, tmp_path / "out", method="gptq", calibration=TOKENS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "out").exists()
    parts = sorted(file.name for file in (tmp_path / ".out.unfinished").glob("*.safetensors"))
    assert parts == ["around.safetensors", "layer-00000.safetensors", "layer-00001.safetensors"]
    quantize_checkpoint(tiny_model, INT3, tmp_path / "out", method="gptq", calibration=TOKENS)
    assert not (tmp_path / ".out.unfinished").exists()


def test_parts_come_back_as_they_were(tmp_path):
    matrix = round_to_nearest(np.eye(64, dtype=np.float32), parse_format("nf4-g32"))
    vector = np.arange(5, dtype=np.float32)
    with Parts(tmp_path / "out", {"a": (1, 2)}) as parts:
        assert not parts.finished("x")
        parts.write("x", {"m": matrix, "v": vector}, {"m": {"e": 0.5}})
    with Parts(tmp_path / "out", {"a": [1, 2]}) as parts:
        assert parts.finished("x")
        tensors, report = parts.read("x")
        np.testing.assert_array_equal(tensors["m"].dequantize(), matrix.dequantize())
        np.testing.assert_array_equal(tensors["v"], vector)
        assert report == {"m": {"e": 0.5}}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "gptqq"}, RequestError, "unknown"),
        ({"method": "x+gptq"}, RequestError, "folds: awq"),
        ({"method": "awq+hadamard+gptq"}, RequestError, r"comes first: hadamard\+awq\+gptq"),
        ({"method": "awq+"}, RequestError, "unknown"),
        ({"method": "smoothquant:beta=1"}, RequestError, "alpha=0.5"),
        ({"method": "rtn", "calibration": TOKENS}, RequestError, "leave calibration away"),
        ({"method": "gptq", "calibration": TOKENS * 1000}, RequestError, "token ids are"),
        ({"method": "gptq", "calibration": TOKENS[0]}, RequestError, "windows, positions"),
        ({"method": "gptq", "calibration": "no such file"}, RequestError, "no such file"),
        ({"method": "gptq", "calibration": ["too short"]}, RequestError, "--samples 1 --length"),
        ({"method": "gptq", "length": 4096}, RequestError, "the model holds 128"),
        (
            {"method": "gptq", "calibration": ["It was the best of times. " * 99], "samples": 99},
            RequestError,
            "99",
        ),
    ],
)
def test_bad_requests_leave_nothing(arguments, error, message, tiny_model, tmp_path):
    with pytest.raises(error, match=message):
        quantize_checkpoint(tiny_model, INT3, tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"   \n", b"a\0b" * 99, b"\xff\xfe" * 99])
def test_files_that_are_no_text(content, tiny_model, tmp_path):
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(RequestError, match=r"calibrate: .*(empty|UTF-8|NUL)"):
        quantize_checkpoint(tiny_model, INT3, tmp_path / "out", method="gptq", calibration=tmp_path / "text")


def test_a_format_that_the_method_refuses_names_the_tensor(silent_model, tmp_path):
    scheme = Scheme(parse_format("int4-g48"), embedding=parse_format("fp32"))
    with pytest.raises(FormatError, match=r"quantize model\.layers\.0\."):
        quantize_checkpoint(silent_model, scheme, tmp_path / "out", method="gptq", calibration=TOKENS)
    with pytest.raises(RequestError, match="no tokenizer"):
        quantize_checkpoint(silent_model, INT3, tmp_path / "out", method="gptq")
    report = quantize_checkpoint(silent_model, "bf16", tmp_path / "out", method="gptq", calibration=TOKENS)
    assert {layer["format"] for layer in report["layers"]} == {"bf16"}


@pytest.mark.parametrize(
    "fold", ["smoothquant:alpha=0.3", "llmfp4", "smoothquant+awq", "ksort", "hadamard:seed=1+smoothquant"]
)
def test_folds_leave_the_function_of_the_model(fold, base_model, tmp_path):
    fine = Scheme(parse_format("fp32"), embedding=parse_format("fp32"))
    given = {} if fold == "ksort" else {"calibration": TOKENS}
    report = quantize_checkpoint(base_model, fine, tmp_path / "out", method=fold, **given)
    assert report["method"] == f"{fold}+rtn"
    ids = list(range(40, 60))
    with open_checkpoint(base_model) as source, open_checkpoint(tmp_path / "out") as result:
        logits = [
            reference_logits(c.config, {name: c.read(name) for name in c.names()}, ids)
            for c in (source, result)
        ]
        assert any(not np.array_equal(source.read(name), result.read(name)) for name in source.names())
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-4 * np.abs(logits[0]).max())


def test_folds_and_methods_together(base_model, tmp_path):
    errors = {}
    for method in ("rtn", "smoothquant+rtn", "awq", "awq+gptq", "gptq"):
        given = {} if method == "rtn" else {"calibration": TOKENS}
        quantize_checkpoint(base_model, INT3, tmp_path / method, method=method, **given)
        with open_checkpoint(base_model) as source, open_checkpoint(tmp_path / method) as result:
            pair = [
                reference_logits(c.config, {n: c.read(n) for n in c.names()}, list(TOKENS[0]))
                for c in (source, result)
            ]
        errors[method] = np.square(pair[0] - pair[1]).mean()
    assert errors["gptq"] < errors["rtn"] and errors["awq+gptq"] < errors["rtn"]
    assert errors["awq"] != errors["awq+gptq"]


def test_mixllm_gives_a_share_of_all_rows_more_bits(base_model, tmp_path):
    method, given = "gptq+mixllm:fraction=0.2,samples=2", {"calibration": TOKENS}
    report = quantize_checkpoint(base_model, INT3, tmp_path / "mixed", method=method, **given)
    assert report["method"] == method
    quantize_checkpoint(base_model, INT3, tmp_path / "plain", method="gptq", **given)
    refined = total = 0
    errors = []
    with (
        open_checkpoint(base_model) as source,
        open_checkpoint(tmp_path / "mixed") as mixed,
        open_checkpoint(tmp_path / "plain") as plain,
    ):
        for name in source.names():
            if not name.endswith("proj.weight"):
                continue
            term = mixed.matrix(name).terms[-1]
            rows = term.rows if isinstance(term, RowsTerm) else np.zeros(0, int)
            refined, total = refined + len(rows), total + len(source.read(name))
            if "layers.0.self_attn.q_proj" in name:  # nothing before it differs
                others = np.delete(np.arange(64), rows)
                np.testing.assert_array_equal(mixed.read(name)[others], plain.read(name)[others])
            if len(rows):
                weight = source.read(name)[rows]
                assert np.square(mixed.read(name)[rows] - weight).sum() < 0.1 * np.square(weight).sum()
        assert refined == int(0.2 * total)
        weights = {c: {n: c.read(n) for n in c.names()} for c in (source, mixed, plain)}
        logits = [reference_logits(source.config, w, list(TOKENS[0])) for w in weights.values()]
        errors = [np.square(z - logits[0]).mean() for z in logits[1:]]
    assert errors[0] < 0.8 * errors[1]
    again = quantize_checkpoint(base_model, INT3, tmp_path / "again", method="mixllm:samples=2", **given)
    assert again["method"] == "rtn+mixllm:samples=2"
    for bad, message in (("mixllm:fraction=2", "0 to 1"), ("mixllm+gptq", "cannot stand before")):
        with pytest.raises(RequestError, match=message):
            quantize_checkpoint(base_model, INT3, tmp_path / "bad", method=bad, **given)
    from lowbit.engine import load

    assert load(tmp_path / "mixed").generate("ab", max_tokens=4).text is not None
