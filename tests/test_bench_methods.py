"""The comparison of methods under bench/: its cases, its bookkeeping and its page. Nothing is timed here."""

import sys
from pathlib import Path

import numpy as np
import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import method_cases  # noqa: E402
import method_page  # noqa: E402
import method_rounded  # noqa: E402
import method_run  # noqa: E402
import method_texts  # noqa: E402
import methods  # noqa: E402
from method_cases import Case  # noqa: E402
from peers import toolkits  # noqa: E402

sys.path.remove(str(BENCH))


def measured(kl):
    return {"kl_nats_per_token": kl, "kl_standard_error": 0.001, "top1_agreement": 0.9, "perplexity": 3.1}


def row(method, format, width, bits, kl, **more):
    found = {"key": f"{method}@{format}", "method": method, "format": format, "width": width}
    found |= {"bits_per_weight": bits, "seconds": 1.5, "peak_rss_bytes": 2e8}
    return found | {"sampled": measured(kl) | {"reference_perplexity": 2.9}} | more


RESULT = {
    "date": "2026-01-02T03:04:05Z",
    "commit": "0123456789abcdef",
    "modified": False,
    "machine": {"cpu": "a CPU", "cpus": 2, "compiler": "a compiler"},
    "missing": {"hqq": "no network"},
    "quick": False,
    "models": {
        "stories15M": {
            "rows": [
                row("rtn", "int3-g32", "3", 3.5, 0.5),
                row("gptq", "int3-g32", "3", 3.5, 0.2),
                row("rtn", "int4-g32", "4", 4.5, 0.1, peer="hqq", key="hqq rtn@int4-g32"),
                {
                    "key": "gptq@bcq3",
                    "method": "gptq",
                    "format": "bcq3",
                    "width": "3",
                    "refused": "one term only",
                },
            ],
            "texts": {"sampled": ["s.txt", 16384, 256]},
            "calibration": ["c.txt", 64, 256],
            "embedding": "fp16",
            "seconds": 10.0,
        }
    },
}


def test_every_method_is_in_the_table():
    from lowbit.compress.folds import FOLDS
    from lowbit.compress.refinements import REFINEMENTS
    from lowbit.compress.views import VIEWS
    from lowbit.formats import parse_format
    from lowbit.quantize.methods import METHODS

    cases = method_cases.stories_cases()
    assert len({case.key for case in cases}) == len(cases)
    named = {case.method.partition(":")[0] for case in cases}
    assert {*METHODS, *FOLDS, *VIEWS} <= named | method_cases.ELSEWHERE
    known = {*METHODS, *FOLDS, *VIEWS}
    assert {part for key in method_cases.OWN for part in key.split("+")} <= {*known, *REFINEMENTS}
    for case in (*cases, *method_cases.smollm_cases()):
        assert case.width in method_cases.WIDTHS
        if case.format != "auto":
            parse_format(case.format)


def test_chosen_cases():
    cases = [Case("4", "rtn", "int4-g32"), Case("3", "gptq", "int3-g32")]
    assert method_cases.chosen(cases, None) == cases
    assert method_cases.chosen(cases, ["gptq@*", "none@x"]) == cases[1:]


def test_page_ranks_by_divergence_and_keeps_the_rest(tmp_path):
    text = method_page.markdown(RESULT)
    assert text.index("| gptq | int3-g32 | 3.50 | - | 0.2000 ± 0.0010") < text.index("| rtn | int3-g32")
    assert "| KL | same top" in text and "| KL | KL, more |" in method_page.markdown(
        {
            **RESULT,
            "models": {
                "s": {
                    **RESULT["models"]["stories15M"],
                    "texts": {"sampled": ["s", 1, 1], "more": ["m", 1, 1]},
                }
            },
        }
    )
    assert "hqq: rtn" in text and "`gptq@bcq3`: one term only" in text and "Without hqq: no network" in text
    assert "`gptq@int3-g32` with 0.2000 at 3.50 bits, which loses 40% of what that loses" in text
    assert "hqq `rtn` int4-g32: 0.1000, 3.100 at 4.50 bits" in text and "loses more: `gptq@int3-g32`" in text
    assert "perplexity of 2.9000" in text and "commit 0123456789ab on a CPU" in text
    page = f"before\n{method_page.BEGIN}\nold\n{method_page.END}\nafter\n"
    (tmp_path / "methods.md").write_text(page)
    said = []
    assert method_page.render(RESULT, tmp_path, said.append) == 0
    new = (tmp_path / "methods.md").read_text()
    assert new.startswith("before\n") and new.endswith("\nafter\n") and "old" not in new and text in new
    assert method_page.render(RESULT, tmp_path / "none", said.append) == 1
    with pytest.raises(method_page.ReportError, match="once each"):
        method_page.insert("no markers", "text")


def test_findings_name_what_loses_to_rounding():
    found = RESULT["models"]["stories15M"]
    rows = [
        *found["rows"],
        row("smoothquant", "int3-g32", "3", 3.5, 0.6),
        row("x", "int3-g32", "3", 3.5, 0.501),
    ]
    text = "\n".join(method_page.method_findings.findings({**found, "rows": rows}, "sampled"))
    assert "- `smoothquant@int3-g32` 0.6000, rounded to nearest 0.5000: it moves" in text
    assert "`x@int3-g32`" not in text  # within the error


def test_findings_compare_at_equal_bits_and_bytes():
    found = {
        **RESULT["models"]["stories15M"],
        "rows": [
            row("rtn", "int3-row", "3", 3.0, 0.9, size_bytes=30),
            row("gptq", "int3-row", "3", 3.0, 0.6, size_bytes=30),
            row("gptq", "int3-g32", "3", 3.5, 0.4, size_bytes=35),
            row("rtn", "auto --bits 3.0", "3", 2.99, 0.5, size_bytes=30),
            row("ptqtp", "trit2-g96", "3", 4.0, 1.4, size_bytes=40),
            row("awq", "int3-g32", "3", 3.5, 0.401, peer="p", key="p awq@int3-g32"),
            row("imatrix", "Q3", "3", 3.5, 0.3, peer="llama.cpp", key="llama.cpp Q3", size_bytes=33),
        ],
    }
    found["rows"][-1]["sampled"]["perplexity"] = 3.05
    text = "\n".join(method_page.method_findings.findings(found, "sampled"))
    # No more bits than the budget: int3-g32 does not count, though it is better.
    assert "`rtn@auto --bits 3.0` with 0.5000 at 2.99 bits, which loses less beside the best in one" in text
    assert "no more bits, `gptq@int3-row` with 0.6000 at 3.00 bits; in one format by the same method" in text
    assert "- `ptqtp@trit2-g96` 1.4000, rounded to nearest (`int3-row`) 0.9000: " in text
    assert "the best here at no more bits loses as much within the error: `gptq@int3-g32`" in text
    assert "llama.cpp `imatrix` Q3: perplexity 3.050, divergence 0.3000, 0.0 MB; here not lower" in text


def test_docs_have_the_markers():
    page = (BENCH.parent / "docs" / "methods.md").read_text(encoding="utf-8")
    assert method_page.insert(page, "x").count("x")


def test_merging_replaces_rows_and_keeps_the_others():
    new = {**RESULT, "models": {"stories15M": {**RESULT["models"]["stories15M"]}}}
    new["models"]["stories15M"]["rows"] = [
        row("gptq", "int3-g32", "3", 3.5, 0.15),
        row("x", "y", "2", 2, 1.0),
    ]
    found = methods.merged(RESULT, new)["models"]["stories15M"]["rows"]
    assert [r["key"] for r in found] == [
        *(r["key"] for r in RESULT["models"]["stories15M"]["rows"]),
        "x@y",
    ]
    assert found[1]["sampled"]["kl_nats_per_token"] == 0.15


def test_a_signal_keeps_what_was_measured():
    def source():
        yield {"key": "a"}
        raise KeyboardInterrupt

    rows = []
    assert methods.collect(source(), rows) and rows == [{"key": "a"}]
    assert not methods.collect(iter([{"key": "b"}]), rows) and len(rows) == 2


@pytest.fixture
def subject(tmp_path):
    sys.path.insert(0, str(Path(__file__).parent))
    import tiny_checkpoint

    sys.path.remove(str(Path(__file__).parent))
    source = tiny_checkpoint.write_tiny_llama(tmp_path / "tiny")
    text = tmp_path / "text.txt"
    text.write_text("The sea is wide, and the night is long. " * 20)
    return method_run.Subject("tiny", source, {"sea": (text, 128, 64)}, (text, 2, 64), "fp16")


def test_a_run(subject, tmp_path):
    """A method, a better one and a refusal, through quantize and compare."""
    cases = [Case("2", "rtn", "int2-g32"), Case("8", "rtn", "int8-g32"), Case("4", "rtn", "int4-g48")]
    rows = list(method_run.run_cases(subject, cases, tmp_path, lambda text: None))
    coarse, fine, refused = rows
    assert coarse["sea"]["kl_nats_per_token"] > 10 * fine["sea"]["kl_nats_per_token"] > 0
    assert coarse["bits_per_weight"] == pytest.approx(2.5, abs=0.05)
    assert coarse["model_bits_per_weight"] > coarse["bits_per_weight"]
    assert coarse["peak_rss_bytes"] > 2**20 and coarse["seconds"] > 0
    assert "sea" not in refused and "not a multiple of group_size=48" in refused["refused"]
    assert not list(tmp_path.glob("tiny-*"))


def test_texts_keep_what_matters(tmp_path):
    sys.path.insert(0, str(Path(__file__).parent))
    import tiny_checkpoint

    sys.path.remove(str(Path(__file__).parent))
    ids = [[5, 1, 104, 105, 1, 33], [1]]
    tokenizer = tiny_checkpoint._tokenizer()
    assert method_texts._text(tokenizer, [1, *ids[0][2:]], 1) == "<s>hi<s>!"
    long = tmp_path / "long.txt"
    long.write_text("first line\nsecond line\nthird line\n")
    assert method_texts.cut(long, 3, 20, tmp_path).read_text() == "second line\n"
    assert method_texts.cut(long, 0, 10, tmp_path).read_text() == "first line"


def test_toolkits_are_pinned_and_known_to_the_worker():
    worker = (BENCH / "peers" / "weights_worker.py").read_text(encoding="utf-8")
    for name, method, widths in toolkits.RUNS:
        assert name in toolkits.PACKAGES and f'"{name}": ' in worker and method and widths
    assert all("==" in package for packages in toolkits.PACKAGES.values() for package in packages)


def test_a_toolkit_that_cannot_be_had_is_named(monkeypatch, tmp_path):
    def build(name, cache, say):
        raise toolkits.PeerError(f"{name}: no network")

    monkeypatch.setattr(toolkits, "build", build)
    missing = {}
    windows = tmp_path / "w.npy"
    np.save(windows, np.zeros((1, 4), np.int64))
    found = toolkits.rows(tmp_path, windows, tmp_path, missing, None, lambda text: None)
    assert found == ([], {}) and set(missing) == set(toolkits.PACKAGES) and "no network" in missing["hqq"]


def test_every_activation_and_cache_method_is_in_the_table():
    from lowbit.compress.folds import FOLDS
    from lowbit.compress.views import VIEWS
    from lowbit.quantize.activations import ACTIVATIONS
    from lowbit.quantize.kv import KV_METHODS
    from lowbit.quantize.methods import parse_options

    tables = {"activations": ACTIVATIONS, "cache": KV_METHODS}
    named = {kind: set() for kind in tables}
    for kind, before, method in method_rounded.cases():
        name, _, rest = method.partition(":")
        named[kind].add(name)
        parse_options(name, rest, tables[kind][name].options())
        assert not before or before.partition(":")[0] in {*FOLDS, *VIEWS}
    assert all(named[kind] == set(table) for kind, table in tables.items())


def test_the_page_has_activations_and_caches():
    rng = np.random.default_rng(0)
    exact, other = (method_rounded._log_probabilities(rng.standard_normal((2, 5, 7))) for _ in range(2))
    assert method_rounded.divergence(exact, exact) == {"kl_nats_per_token": 0, "top1_agreement": 1}
    told = method_rounded.divergence(exact, other)
    by_hand = (np.exp(exact, dtype=np.float64) * (exact - other)).sum(-1).mean()
    assert told["kl_nats_per_token"] == pytest.approx(by_hand, rel=1e-5)
    rounded = [
        {"kind": "activations", "method": "token:bits=4", "bits": 4.06, **told},
        {"kind": "activations", "method": "token:bits=8", "bits": 8.06, **told, "kl_nats_per_token": 0.001},
        {"kind": "cache", "method": "kivi", "bits": 5.0, **told},
    ]
    model = RESULT["models"]["stories15M"] | {"rounded": rounded}
    page = method_page.markdown(RESULT | {"models": {"stories15M": model}})
    assert page.index("token:bits=8") < page.index("token:bits=4") < page.index("| kivi | 5.00 |")
    assert "Activations and caches" not in method_page.markdown(RESULT)
