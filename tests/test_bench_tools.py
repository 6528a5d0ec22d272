"""The tools under bench/: what they read, compute and write. No timing and no peer is needed here."""

import json
import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import machine  # noqa: E402
import models  # noqa: E402
import process  # noqa: E402
import random_llama  # noqa: E402
import report  # noqa: E402
import run  # noqa: E402
import sections  # noqa: E402
import speed  # noqa: E402
import spread  # noqa: E402
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
    assert models.kv_bytes({"n_layers": 30, "n_kv_heads": 3, "head_dim": 64}, tokens=1) == 23040


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
        "peer": None,
        "peer_missing": "no network",
        "rounds": 5,
        "busy_cpus": 0.02,
        "rows": [
            sections.row("decode", 1.2345, "x", ">= 1.2x", True),
            sections.row("memory", 71.0, "MB", "<= 60 MB", False, "peak"),
            sections.row("prefill", None, "x", ">= 1.8x", None),
        ],
        "sections": {
            "smollm2-135m": [{**entry, "contestants": {"lowbit int4-g32": figures}}],
            "start": {"median": 0.3},
        },
    }


def test_markdown_has_every_row_and_its_origin():
    text = report.markdown(result())
    assert "| decode | >= 1.2x | 1.23x | yes |" in text
    assert "| memory | <= 60 MB | 71.00 MB | no |" in text
    assert "| prefill | >= 1.8x | not measured | - |" in text
    assert "2050 (2000 to 2100) | 305.0 (300.0 to 310.0) | 91% |" in text
    assert "2025-01-31" in text and "0123456789ab" in text and "A CPU" in text and "no network" in text


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
    (tmp_path / "z.json").write_text(json.dumps({"date": "2025-01-01T00:00:00Z"}))
    (tmp_path / "a.json").write_text(json.dumps({"date": "2025-02-01T00:00:00Z"}))
    assert report.newest(tmp_path).name == "a.json"


def test_terminal_table_prints(capsys):
    report.print_table(result())
    out = capsys.readouterr().out
    assert "1.23x" in out and "lowbit" in out


def test_result_name_and_machine():
    assert machine.result_name("2025-01-31T10:00:00Z", "AMD EPYC (tm)") == "2025-01-31-amd-epyc-tm.json"
    assert 0 <= machine.busy_cpus(0.05) <= 1.5 * (os.cpu_count() or 1)
    found = machine.describe()
    assert found["cpus"] >= 1 and found["cpu"]
    json.dumps(found)


def test_options():
    options = run.parse(["--quick", "--only", "start", "--only", "memory", "--no-peers"])
    assert options.only == ["start", "memory"] and options.quick and options.no_peers
    assert run.find_peer(False) == (None, "switched off by --no-peers")
    assert run.parse(["--render"]).render == ""


# Sections, with the programs replaced by their answers


def make_bench(tmp_path, peer):
    path = random_llama.write(tmp_path / "tiny.gguf", TINY)
    text = tmp_path / "text.txt"
    text.write_text("some text")
    made = {"smollm2-135m": path}
    return sections.Bench(tmp_path, peer, (2, 1), 3, text, 1000, lambda text: None, made)


class FakePeer:
    def speed(self, model, threads, **options):
        return {"prefill": [900.0, 1000.0, 1100.0], "decode": [100.0]}

    def quantize(self, source, output, kind, threads):
        return random_llama.write(output, TINY)


def fake_lowbit(prefill, decode):
    def answer(verb, *arguments):
        assert verb == "bench"
        return {"prefill_tokens_per_second": prefill, "decode_tokens_per_second": decode, "isa": "any"}

    return answer


@pytest.mark.parametrize(
    "prefill, decode, verdicts", [(1800.0, 120.0, [True, True]), (1799.0, 119.0, [False, False])]
)
def test_speed_section_judges_ratios(tmp_path, monkeypatch, prefill, decode, verdicts):
    pytest.importorskip("gguf")
    monkeypatch.setattr(process, "lowbit_json", fake_lowbit(prefill, decode))
    monkeypatch.setattr(models, "source_gguf", lambda name, cache, say: tmp_path / "tiny.gguf")
    bench = make_bench(tmp_path, FakePeer())
    rows, data = sections.speed_section(bench, "smollm2-135m")
    assert [r["passed"] for r in rows] == verdicts * 2
    assert [r["measure"] for r in rows[::2]] == [
        "smollm2-135m decode, 2 threads",
        "smollm2-135m decode, 1 thread",
    ]
    assert data[0]["ratios"]["prefill"]["median"] == prefill / 1000
    assert set(data[0]["contestants"]) == {sections.OURS, sections.THEIRS, sections.SAME_FILE}
    assert len(data[1]["contestants"][sections.THEIRS]["decode"]["values"]) == 3


def test_speed_section_without_a_peer_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "lowbit_json", fake_lowbit(1000.0, 100.0))
    rows, data = sections.speed_section(make_bench(tmp_path, None), "smollm2-135m")
    assert all(r["passed"] is None and "not measured" in r["note"] for r in rows) and len(rows) == 4
    assert set(data[0]["contestants"]) == {sections.OURS}


def test_accuracy_section_judges_the_reference(tmp_path, monkeypatch):
    tie = {"is_second_best": True, "reference_gap": 0.02}
    setting = {"perplexity": 20.0, "relative_difference": -0.0005, "greedy_equal": 18}
    found = {"prompts": 20, "reference_perplexity": 20.01}
    found["int16"] = {**setting, "greedy_differences": [tie, tie]}
    found["int8"] = {**setting, "relative_difference": 0.02, "greedy_differences": []}
    monkeypatch.setattr(models, "source_gguf", lambda name, cache, say: tmp_path / "tiny.gguf")
    monkeypatch.setattr(sections.quality, "reference", lambda *arguments: found)
    bench = make_bench(tmp_path, None)
    rows, data = sections.accuracy_section(bench)
    assert [r["passed"] for r in rows] == [True, False, True] and data is found
    found["int16"]["greedy_differences"] = [tie, {**tie, "reference_gap": 2.0}]
    assert sections.accuracy_section(bench)[0][2]["passed"] is False
    found["int16"].update(greedy_equal=17, greedy_differences=[tie] * 3)
    assert sections.accuracy_section(bench)[0][2]["passed"] is False
    monkeypatch.setattr(sections.quality, "reference", lambda *arguments: None)
    assert sections.accuracy_section(bench)[0][0]["passed"] is None


def test_figures_have_three_digits_and_a_unit():
    shown = [report.figure(v, u) for v, u in [(1.4321, "x"), (0.3119, "s"), (82.0, "MB"), (18, "of 20")]]
    assert shown == ["1.43x", "0.312 s", "82.00 MB", "18 of 20"]
    assert report.figure(-0.0512, "%") == "-0.051%" and report.figure(None, "x") == "not measured"
