"""The tools under bench/: what they read, compute and write. No timing and no peer is needed here."""

import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import machine  # noqa: E402
import models  # noqa: E402
import pictures  # noqa: E402
import process  # noqa: E402
import random_llama  # noqa: E402
import report  # noqa: E402
import run  # noqa: E402
import speed  # noqa: E402
import spread  # noqa: E402
import targets  # noqa: E402
from peers import llama_cpp  # noqa: E402

sys.path.remove(str(BENCH))

TINY = random_llama.Shape(layers=2, hidden=64, intermediate=96, heads=4, kv_heads=2, vocab=300)


# Statistics


def test_summary_keeps_order_and_extremes():
    found = spread.summary([3.0, 1.0, 2.0])
    assert found == {"median": 2.0, "low": 1.0, "high": 3.0, "values": [3.0, 1.0, 2.0]}
    with pytest.raises(ValueError, match="no values"):
        spread.summary([])


def test_ratio_pairs_neighbours():
    found = spread.ratio([2.0, 4.0, 8.0], [1.0, 1.0, 4.0])
    assert found == {"median": 4.0, "low": 2.0, "high": 4.0}
    with pytest.raises(ValueError, match="one length"):
        spread.ratio([1.0], [1.0, 2.0])


def test_turns_interleave_and_drop_the_first_round():
    order = []

    def contestant(name, prefill):
        def measure(threads):
            order.append(name)
            return {"prefill": prefill + len(order), "decode": 1.0}

        return measure

    series = speed.take_turns({"a": contestant("a", 0), "b": contestant("b", 100)}, 1, 2, lambda text: None)
    assert order == ["a", "b"] * 3
    assert series == {
        "a": {"prefill": [3, 5], "decode": [1.0, 1.0]},
        "b": {"prefill": [104, 106], "decode": [1.0, 1.0]},
    }


# The peer


def test_llama_bench_output():
    text = json.dumps(
        [
            {"n_prompt": 512, "n_gen": 0, "samples_ts": [1846.58, 1850]},
            {"n_prompt": 0, "n_gen": 128, "samples_ts": [295.1]},
        ]
    )
    assert llama_cpp.parse_speed(text) == {"prefill": [1846.58, 1850.0], "decode": [295.1]}


def test_llama_perplexity_output():
    text = "[1]4.1,[2]5.2,\nFinal estimate: PPL = 21.3456 +/- 0.51234\n"
    assert llama_cpp.parse_perplexity(text) == 21.3456
    with pytest.raises(llama_cpp.PeerError, match="no final estimate"):
        llama_cpp.parse_perplexity("error: the text is too short")


def test_failing_tool_says_why():
    with pytest.raises(llama_cpp.PeerError, match=r"exit status 3: reason"):
        llama_cpp.run([sys.executable, "-c", "import sys; sys.stderr.write('reason'); sys.exit(3)"])


def test_damaged_source_is_refused(tmp_path):
    home = tmp_path / "peer"
    home.mkdir()
    (home / f"llama_cpp_python-{llama_cpp.VERSION}.tar.gz").write_bytes(b"not it")
    with pytest.raises(llama_cpp.PeerError, match="sha256"):
        llama_cpp._source(home, lambda text: None)


# Processes


def test_watch_measures_a_process():
    code = "import sys, time; sys.stdout.write('a'); sys.stdout.flush(); time.sleep(0.2); print('b')"
    finished = process.watch([sys.executable, "-c", code])
    assert finished.stdout == "ab\n"
    assert finished.first_byte_seconds < finished.seconds - 0.15


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_the_process_s_own_not_its_parent_s():
    held = np.ones(2**25)  # 256 MiB here must not show there
    told, peak = process.peak_rss("formats")
    assert told and 2**22 < peak < held.nbytes


def test_watch_of_a_silent_and_of_a_failing_process():
    assert process.watch([sys.executable, "-c", ""]).first_byte_seconds is None
    with pytest.raises(process.CommandError, match=r"exit status 5: broken"):
        process.watch([sys.executable, "-c", "import sys; print('broken', file=sys.stderr); sys.exit(5)"])


# Models


def test_random_llama_is_a_whole_gguf(tmp_path):
    gguf = pytest.importorskip("gguf")
    path = random_llama.write(tmp_path / "tiny.gguf", TINY)
    again = random_llama.write(tmp_path / "again.gguf", TINY)
    assert path.read_bytes() == again.read_bytes()
    assert not list(tmp_path.glob("*.partial"))
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert set(tensors) == {name for name, _ in TINY.tensors()}
    assert sum(int(t.n_elements) for t in reader.tensors) == TINY.parameters
    for name, shape in TINY.tensors():
        assert tuple(tensors[name].data.shape) == shape
    weight = np.asarray(tensors["blk.1.ffn_up.weight"].data, np.float32)
    assert abs(weight.std() / random_llama.DEVIATION - 1) < 0.05
    assert len(reader.get_field("tokenizer.ggml.tokens").data) == TINY.vocab
    assert models.weight_bytes(path) == sum(t.n_bytes for t in reader.tensors)


def test_vocabulary_is_taken_from_a_gguf(tmp_path):
    pytest.importorskip("gguf")
    first = random_llama.write(tmp_path / "first.gguf", TINY)
    assert random_llama.read_vocabulary(first) == random_llama.synthetic_vocabulary(TINY.vocab)
    other = random_llama.Shape(1, 64, 96, 4, 2, vocab=301)
    with pytest.raises(ValueError, match="300 tokens, but the model's vocabulary is 301"):
        random_llama.write(tmp_path / "other.gguf", other, vocabulary=first)


def test_billion_parameter_shape():
    assert random_llama.LLAMA_1B.parameters == 1_100_048_384


def test_weight_bytes_of_a_directory(tmp_path):
    header = {
        "__metadata__": {"a": "b"},
        "x": {"dtype": "U8", "shape": [40], "data_offsets": [0, 40]},
        "y": {"dtype": "F32", "shape": [2], "data_offsets": [64, 72]},
    }
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(72))
    assert models.weight_bytes(tmp_path) == 48


def test_kv_bytes_of_smollm2():
    sizes = {"n_layers": 30, "n_kv_heads": 3, "head_dim": 64}
    assert models.kv_bytes(sizes, tokens=1, bits=16) == 23040
    assert models.kv_bytes(sizes, tokens=1) == 30 * 3 * 140


# Reports


def result():
    figures = {
        "prefill": spread.summary([2000.0, 2100.0]),
        "decode": spread.summary([300.0, 310.0]),
        "decode_bound_fraction": spread.summary([0.9, 0.92]),
    }
    entry = {"model": "smollm2-135m", "threads": 2, "weight_bytes": {"lowbit int4-g32": 82_000_000}}
    return {
        "date": "2025-01-31T10:00:00Z",
        "commit": "0123456789abcdef",
        "modified": False,
        "machine": {
            "cpu": "A CPU",
            "cpu_model": "family 1",
            "cpus": 2,
            "system": "Linux 6",
            "compiler": "g++ 12",
        },
        "peers": [
            {"name": "llama.cpp", "commit": "fedcba9876543210", "variant": "native"},
            {"name": "OpenVINO GenAI", "packages": ["openvino-genai==1.2.3", "numpy==2"]},
        ],
        "missing": {"another": "no network"},
        "rounds": 5,
        "busy_cpus": 0.02,
        "rows": [
            {"heading": "Speed", **targets.row("decode", 1.2345, "x", ">= 1.2x", True)},
            {"heading": "Speed", **targets.row("memory", 71.0, "MB", "<= 60 MB", False, "peak")},
            {"heading": "Others", **targets.row("prefill", None, "x", ">= 1.8x", None)},
        ],
        "sections": {
            "smollm2-135m": [{**entry, "contestants": {"lowbit int4-g32": figures}}],
            "start": {"median": 0.3},
        },
    }


def test_markdown_has_every_row_and_its_origin():
    text = report.markdown(result())
    assert "| decode | >= 1.2x | 1.23x | yes |  |" in text
    assert "| memory | <= 60 MB | 71.0 MB | no | peak |" in text
    assert "| prefill | >= 1.8x | not measured | - |  |" in text
    assert text.count("**Speed**") == text.count("**Others**") == 1
    assert "2050 (2000 to 2100) | 305.0 (300.0 to 310.0) | 91% |" in text
    assert "2025-01-31" in text and "0123456789ab" in text and "A CPU" in text
    assert "Against llama.cpp fedcba987654 (native), OpenVINO GenAI 1.2.3." in text
    assert "Without another: no network." in text


def test_tables_by_width_and_by_format():
    figures = {
        phase: {"median": value, "low": value, "high": value}
        for phase, value in (
            ("prefill", 900.0),
            ("decode", 120.4),
            ("prefill_bound_fraction", 0.81),
            ("decode_bound_fraction", 0.925),
        )
    }
    entry = {"model": "llama-1.1b", "threads": 2, "weight_bytes": {"lowbit int4": 6e8, "other": 7e8}}
    entry["contestants"] = {"lowbit int4": figures, "other": {p: figures[p] for p in ("prefill", "decode")}}
    kernel = {"format": "int4", "bits_per_weight": 4.25, "out_features": 64, "in_features": 32, "threads": 2}
    kernel |= {"bytes_per_second": 5e10, "bandwidth_fraction": 0.91}
    kernel |= {"multiply_adds_per_second": 9e11, "peak_fraction": 0.83}
    kernels = [{**kernel, "batch": 1, "kernel": "gemv"}, {**kernel, "batch": 512, "kernel": "gemm"}]
    parts = {"llama-1.1b": [{**entry, "by_width": {"4": "lowbit int4"}}], "kernels": {"kernels": kernels}}
    text = report.markdown({**result(), "sections": parts})
    assert "| 4 | int4 | 600 | 120 | 92% | 900 | 81% |" in text
    assert "| int4 | 4.25 | 50.0 | 91% | 900 | 83% | gemv, gemm |" in text
    assert "Single products, 64 x 32, 2 threads" in text
    assert "| llama-1.1b | 2 | other | 700.0 |" in text


def test_pictures_are_drawn_from_a_result(tmp_path, monkeypatch):
    said, drawn = [], []
    monkeypatch.setattr(pictures.plot, "check", lambda path: None)
    monkeypatch.setattr(pictures.plot, "draw_kernels", lambda found, path: drawn.append((found, path)))
    parts = {"sections": {"kernels": {"kernels": [1]}, "curve": None, "start": {"median": 1}}}
    assert pictures.draw(parts, tmp_path, said.append) == [tmp_path / "kernels-by-width.png"]
    assert drawn == [({"kernels": [1]}, str(tmp_path / "kernels-by-width.png"))] and not said
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert pictures.draw(parts, tmp_path, said.append) == [] and "lowbit[plot]" in said[0]


def test_a_busy_machine_is_told():
    assert "Not a valid" not in report.caption(result())
    assert "Not a valid measurement" in report.caption({**result(), "busy_cpus": 1.5})


def test_render_replaces_only_what_is_between_the_markers():
    page = f"# Title\n\n{report.BEGIN}\nold\n{report.END}\n\nend \\1\n"
    shown = report.render(page, result())
    assert shown.startswith(f"# Title\n\n{report.BEGIN}\nMeasured") and shown.endswith("\n\nend \\1\n")
    assert "old" not in shown
    assert report.render(shown, result()) == shown


@pytest.mark.parametrize("page", ["", report.BEGIN, f"{report.END}{report.BEGIN}", f"{report.BEGIN}x" * 2])
def test_render_refuses_a_page_without_its_place(page):
    with pytest.raises(report.ReportError, match="must hold"):
        report.render(page, result())


def test_newest_result_goes_by_date_inside(tmp_path):
    with pytest.raises(report.ReportError, match="no result"):
        report.newest(tmp_path)
    (tmp_path / "z.json").write_text(json.dumps({"date": "2025-01-01T00:00:00Z", "rows": []}))
    (tmp_path / "a.json").write_text(json.dumps({"date": "2025-02-01T00:00:00Z", "rows": []}))
    (tmp_path / "methods.json").write_text(json.dumps({"date": "2025-03-01T00:00:00Z"}))  # of another tool
    assert report.newest(tmp_path).name == "a.json"


def test_terminal_table_prints(capsys):
    report.print_table(result())
    out = capsys.readouterr().out
    assert "1.23x" in out and "lowbit" in out


def test_result_name_and_machine():
    assert machine.result_name("2025-01-31T10:00:00Z", "AMD EPYC (tm)") == "2025-01-31-amd-epyc-tm.json"
    assert 0 <= machine.busy_cpus(0.05) < 1000
    found = machine.describe()
    assert found["cpus"] >= 1 and found["cpu"]
    json.dumps(found)


def test_options():
    options = run.parse(["--quick", "--only", "start", "--only", "memory", "--no-peers"])
    assert options.only == ["start", "memory"] and options.quick and options.no_peers
    bench = run.prepare(options)
    assert bench.peer is bench.avx2 is bench.openvino is None
    assert set(bench.missing.values()) == {"switched off by --no-peers"} and bench.rounds == 2
    bench = run.prepare(run.parse(["--only", "start"]))  # a part that needs no other program
    assert bench.peer is bench.avx2 is bench.openvino is None and not bench.missing
    assert run.peer_or_reason("it", lambda: llama_cpp.run(["false"]), bench.missing) is None
    assert "exit status 1" in bench.missing["it"]
    assert run.parse(["--render"]).render == ""


def test_figures_have_three_digits_and_a_unit():
    given = [(1.4321, "x"), (0.3119, "s"), (82.0, "MB"), (18, "of 20"), (91.27, "%"), (1234.5, "tokens/s")]
    shown = [report.figure(v, u) for v, u in given]
    assert shown == ["1.43x", "0.312 s", "82.0 MB", "18 of 20", "91.3%", "1234 tokens/s"]
    assert report.figure(-0.0512, "%") == "-0.051%" and report.figure(None, "x") == "not measured"
