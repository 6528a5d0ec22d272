"""The parts of a benchmark run, with the programs replaced by their answers, and the table's verdicts."""

import json
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import context  # noqa: E402
import models  # noqa: E402
import part_kernels  # noqa: E402
import part_model  # noqa: E402
import part_speed  # noqa: E402
import process  # noqa: E402
import random_llama  # noqa: E402
import report  # noqa: E402
import sections  # noqa: E402
import targets  # noqa: E402
from peers import llama_cpp, openvino_peer  # noqa: E402

sys.path.remove(str(BENCH))

TINY = random_llama.Shape(layers=2, hidden=64, intermediate=96, heads=4, kv_heads=2, vocab=300)


class FakePeer:
    """llama.cpp, or OpenVINO: always as fast as `speeds` says."""

    def __init__(self, prefill=1000.0, decode=100.0):
        self.speeds = {"prefill": [prefill - 100, prefill, prefill + 100], "decode": [decode]}

    def speed(self, model, threads, **options):
        return self.speeds

    def quantize(self, source, output, kind, threads):
        return random_llama.write(output, TINY)

    def export(self, source, output, kind):
        output.mkdir(parents=True, exist_ok=True)
        (output / "openvino_model.bin").write_bytes(bytes(70))
        return output


def fake_lowbit(prefill, decode, bound=0.9):
    """`lowbit bench`: half as fast with AVX2, two thirds with a long prompt."""

    def answer(verb, *arguments, isa=None):
        assert verb == "bench"
        slower = (0.5 if isa == "avx2" else 1) * (2 / 3 if str(targets.LONG_PROMPT) in arguments else 1)
        told = {"prefill_tokens_per_second": prefill * slower, "decode_tokens_per_second": decode * slower}
        return {**told, "isa": "any", "decode_bound_fraction": bound, "prefill_bound_fraction": bound}

    return answer


@pytest.fixture
def make_bench(tmp_path, monkeypatch):
    """make_bench(peer, openvino) -> Bench on a tiny model, with lowbit's directories made beforehand."""
    pytest.importorskip("gguf")
    path = random_llama.write(tmp_path / "tiny.gguf", TINY)
    monkeypatch.setattr(models, "source_gguf", lambda name, cache, say: path)
    text = tmp_path / "text.txt"
    text.write_text("some text")
    schemes = {targets.SCHEME, *targets.WIDTHS.values()}
    made = {(name, scheme): path for name in (targets.SMALL, targets.LARGE) for scheme in schemes}

    def make(peer=None, openvino=None):
        missing = {} if peer else {"llama.cpp": "no compiler", targets.OPENVINO: "no network"}
        return context.Bench(
            cache=tmp_path,
            peer=peer,
            threads=(2, 1),
            rounds=3,
            text=text,
            tokens=1000,
            say=lambda text: None,
            made=dict(made),
            avx2=peer,
            openvino=openvino,
            missing=missing,
        )

    return make


def verdicts(rows):
    return {row["measure"]: row["passed"] for row in rows}


@pytest.mark.parametrize("scale, good", [(1.0, True), (0.999, False)])
def test_small_model_is_judged_by_ratios_and_bounds(make_bench, monkeypatch, scale, good):
    ratios = targets.SPEED_RATIOS[targets.SMALL][2]
    monkeypatch.setattr(
        process,
        "lowbit_json",
        fake_lowbit(1000 * ratios["prefill"] * scale, 100 * ratios["decode"] * scale, 0.6),
    )
    openvino = FakePeer(prefill=1000 * ratios["prefill"] / targets.OPENVINO_PREFILL[targets.SMALL])
    rows, data = part_speed.small_section(make_bench(FakePeer(), openvino))
    found = verdicts(rows)
    assert found[f"SmolLM2 decode, 2 threads, against {targets.THEIRS}"] is good
    assert found[f"SmolLM2 prefill, 2 threads, against {targets.THEIRS}"] is good
    assert found["SmolLM2 prefill, 2 threads, against OpenVINO int8"] is good
    assert found["SmolLM2 decode, 2 threads, of the bound"] is False  # 60% of 70%
    assert found["SmolLM2 prefill, 2 threads, of the bound"] is True
    assert found[f"SmolLM2 decode, 1 thread, against {targets.THEIRS}"] is True
    assert [entry["threads"] for entry in data] == [2, 1]
    assert set(data[0]["contestants"]) == {
        targets.OURS, targets.THEIRS, targets.SAME_FILE, "OpenVINO int8", "OpenVINO int4",
    }  # fmt: skip
    assert data[0]["weight_bytes"]["OpenVINO int8"] == 70
    assert len(data[0]["contestants"][targets.THEIRS]["decode"]["values"]) == 3


def test_without_other_programs_rows_say_why(make_bench, monkeypatch):
    monkeypatch.setattr(process, "lowbit_json", fake_lowbit(1000.0, 100.0))
    for section in (part_speed.small_section, part_speed.large_section, part_speed.avx2_section):
        rows, data = section(make_bench())
        against = [row for row in rows if "against" in row["measure"]]
        assert against and all(row["passed"] is None and row["value"] is None for row in against)
        assert {row["note"] for row in against} == {
            "no compiler",
            "no network",
        } or section is part_speed.avx2_section
        assert all(label.startswith("lowbit") for entry in data for label in entry["contestants"])


def test_large_model_at_every_width(make_bench, monkeypatch):
    monkeypatch.setattr(process, "lowbit_json", fake_lowbit(2400.0, 150.0, 0.8))
    rows, data = part_speed.large_section(make_bench(FakePeer(), FakePeer(prefill=1000.0)))
    found = verdicts(rows)
    assert found["1.1B decode, 2 threads, at 8, 4, 3 and 2 bits, of the bound"] is False
    assert found["1.1B decode, 2 threads, at 1.6 bits, of the bound"] is True
    assert found["1.1B prefill 512, 2 threads, at 8, 4, 3, 2 and 1.6 bits, of the int8 peak"] is True
    reached = {}
    for width, kind in targets.DECODE_RATIOS:
        measure = (
            f"1.1B decode at {width} bits ({targets.WIDTHS[width]}), 2 threads, against llama.cpp {kind}"
        )
        reached[kind] = found[measure]
    missed = {"Q3_K_M", "TQ2_0", "TQ1_0"}
    assert reached == {kind: kind not in missed for _, kind in targets.DECODE_RATIOS}
    four = "1.1B prefill 512 at 4 bits, 2 threads, against"
    assert found[f"{four} {targets.THEIRS}"] is False
    assert found[f"{four} llama.cpp's best type (Q8_0)"] is True
    assert found["1.1B prefill, 2 threads, against OpenVINO int8"] is True
    assert set(data[0]["by_width"]) == set(targets.WIDTHS) and "by_width" not in data[1]
    json.dumps(data)


def test_avx2_and_long_prompts(make_bench, monkeypatch):
    monkeypatch.setattr(process, "lowbit_json", fake_lowbit(2400.0, 230.0))
    rows, _ = part_speed.avx2_section(make_bench(FakePeer()))
    assert [(row["value"], row["passed"]) for row in rows] == [(1.15, False), (1.2, True)] * 2
    rows, data = part_speed.long_section(make_bench())
    assert rows[0]["passed"] and rows[0]["value"] == pytest.approx(200 / 3)
    assert "1600 against 2400" in rows[0]["note"] and set(data) == {"512", str(targets.LONG_PROMPT)}


def product(fmt, batch, bandwidth, peak, rate=1.0):
    rates = {"tokens_per_second": rate, "bytes_per_second": 1.0, "multiply_adds_per_second": 1.0}
    fractions = {"bandwidth_fraction": bandwidth, "peak_fraction": peak, "bound_fraction": 1.0}
    return {"format": fmt, "batch": batch, "kernel": "any", **rates, **fractions}


def test_products_are_judged_by_the_worst_width(make_bench, monkeypatch):
    found = [product(f, 1, 0.95, 0.1) for f in targets.KERNEL_FORMATS.values()]
    found += [product(f, 512, 0.1, 0.85) for f in targets.KERNEL_FORMATS.values()]
    asked = []

    def answer(*arguments):
        asked.append(arguments)
        return {"kernels": found}

    monkeypatch.setattr(process, "lowbit_json", answer)
    rows, data = part_kernels.kernels_section(make_bench())
    assert [row["passed"] for row in rows] == [True, True, True] and data["kernels"] is found
    assert asked[0][:2] == ("bench", "kernels") and targets.KERNEL_SHAPE in asked[0]
    found[4]["bandwidth_fraction"] = 0.89  # 3 bits
    found[7]["bandwidth_fraction"] = 0.76  # 1 bit
    found[8]["peak_fraction"] = 0.79  # 8 bits
    rows, _ = part_kernels.kernels_section(make_bench())
    assert [row["passed"] for row in rows] == [False, True, False]
    assert rows[0]["value"] == pytest.approx(89) and "3: 89%" in rows[0]["note"]


def test_a_hole_in_the_curve_is_seen(make_bench, monkeypatch):
    rates = {1: 10.0, 2: 15.0, 4: 14.0, 8: 30.0}
    found = [product(f, b, 1, 1, rate) for f in targets.CURVE_FORMATS for b, rate in rates.items()]
    monkeypatch.setattr(process, "lowbit_json", lambda *arguments: {"kernels": found})
    (row,), _ = part_kernels.curve_section(make_bench())
    assert (
        row["passed"] is False
        and row["value"] == pytest.approx(100 * 14 / 15)
        and "at 4 tokens" in row["note"]
    )
    found = [product(f, b, 1, 1, float(b)) for f in targets.CURVE_FORMATS for b in rates]
    (row,), _ = part_kernels.curve_section(make_bench())
    assert row["passed"] is True and row["note"] == "never falls"


def test_accuracy_section_judges_the_reference(make_bench, monkeypatch):
    tie = {"is_second_best": True, "reference_gap": 0.02}
    setting = {"perplexity": 20.0, "relative_difference": -0.0005, "greedy_equal": 18}
    found = {"prompts": 20, "reference_perplexity": 20.01}
    found["int16"] = {**setting, "greedy_differences": [tie, tie]}
    found["int8"] = {**setting, "relative_difference": 0.02, "greedy_differences": []}
    monkeypatch.setattr(part_model.quality, "reference", lambda *arguments: found)
    bench = make_bench()
    rows, data = part_model.accuracy_section(bench)
    assert [r["passed"] for r in rows] == [True, False, True] and data is found
    found["int16"]["greedy_differences"] = [tie, {**tie, "reference_gap": 2.0}]
    assert part_model.accuracy_section(bench)[0][2]["passed"] is False
    found["int16"].update(greedy_equal=17, greedy_differences=[tie] * 3)
    assert part_model.accuracy_section(bench)[0][2]["passed"] is False
    monkeypatch.setattr(part_model.quality, "reference", lambda *arguments: None)
    assert part_model.accuracy_section(bench)[0][0]["passed"] is None


def test_every_part_has_a_heading():
    assert set(sections.HEADINGS) == set(sections.SECTIONS) >= set(sections.NEEDS)
    headings = list(dict.fromkeys(sections.HEADINGS.values()))
    grouped = [
        h
        for i, h in enumerate(sections.HEADINGS.values())
        if i == 0 or h != list(sections.HEADINGS.values())[i - 1]
    ]
    assert headings == grouped  # each stands once


def test_rows_show_their_target():
    row = targets.at_least("x", 1.5, "x", 1.2)
    assert (
        row["target"] == ">= 1.2x"
        and row["passed"]
        and targets.at_least("x", 1.1, "x", 1.2)["passed"] is False
    )
    assert targets.at_least("f", None, "%", 90, why_not="none")["note"] == "none"
    row = targets.fraction("f", {"8": 0.95, "4": 0.9}, 0.9)
    assert (
        row["passed"] and row["value"] == 90 and row["note"] == "8: 95%, 4: 90%" and row["target"] == ">= 90%"
    )
    assert targets.fraction("f", {}, 0.9)["passed"] is None


def test_directories_are_made_again_when_their_writer_changes(tmp_path, monkeypatch):
    source, calls = tmp_path / "a.gguf", []
    source.write_bytes(b"1")

    def quantize(verb, source, scheme, *options):
        calls.append((scheme, options[: options.index("--output")]))
        Path(options[options.index("--output") + 1]).mkdir(parents=True, exist_ok=True)
        return {}

    monkeypatch.setattr(process, "lowbit_json", quantize)
    make = lambda *options: models.cached_directory("m", source, "int4", options, tmp_path, lambda t: None)  # noqa: E731
    path = make()
    assert path == make() == tmp_path / "models" / "m.int4" and len(calls) == 1
    make("--search", "minmax")
    source.write_bytes(b"22")
    make()
    assert calls == [("int4", ()), ("int4", ("--search", "minmax")), ("int4", ())]


def test_builds_of_llama_cpp_differ_by_options():
    native, avx2 = (llama_cpp.VARIANTS[name] for name in ("native", "avx2"))
    assert llama_cpp._key("g++", native.options) != llama_cpp._key("g++", avx2.options)
    assert "-DGGML_AVX512=OFF" in avx2.options and "-DGGML_NATIVE=ON" in native.options


def test_openvino_answers_in_its_last_line(tmp_path, monkeypatch):
    peer = openvino_peer.OpenVino(Path(sys.executable))
    worker = tmp_path / "worker.py"
    worker.write_text("import sys\nprint('noise')\nprint('{\"perplexity\": 3.5}')\n")
    monkeypatch.setattr(openvino_peer, "WORKER", worker)
    assert peer.perplexity(tmp_path, tmp_path / "w.npy", 2) == 3.5
    worker.write_text("import sys\nsys.exit('broken')\n")
    with pytest.raises(llama_cpp.PeerError, match="broken"):
        peer.speed(tmp_path, 2, prompt=1, generate=1, repetitions=1)
    assert report.peer_name(peer.describe()).startswith("OpenVINO GenAI 20")
