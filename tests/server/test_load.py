"""The load generator and lm-eval against a real server with a small random model."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import lowbit
from lowbit.cli import main
from lowbit.engine.sequence import new_cache
from lowbit.measure import load
from lowbit.measure.load_client import Endpoint
from lowbit.measure.load_plan import Span, uniform


def run(server, requests, **options):
    target, prompts = load.prepare(Endpoint.parse(server.url), **options.pop("how", {}))
    return load.run(target, prompts, requests, **options)


@pytest.mark.parametrize("chat", [False, True])
def test_lengths_come_out_as_planned(server, chat):
    requests = uniform(12, Span(30, 30), Span(3, 9), seed=1)
    result = run(server, requests, concurrency=5, how={"chat": chat})
    assert result["failures"] == {} and result["completed"] == 12
    assert result["tokens_counted_by"] == "usage"
    assert result["answer_tokens"] == sum(request.answer_tokens for request in requests)
    assert abs(result["prompt_tokens"] - 360) < 12 * 8  # words are of several tokens here


def test_clients_that_leave_leave_nothing_behind(server):
    result = run(server, uniform(40, Span(10, 30), Span(15, 20), seed=2), concurrency=10, abandon=1.0)
    assert result["failures"] == {} and result["left"] > 0

    def settled():
        engine = server.engine()
        busy = engine["running"] + engine["waiting"]
        return not busy and engine["kv_blocks_used"] == engine["kv_blocks_cached"]

    server.until(settled, "an engine without requests and without their blocks")


def test_a_model_is_served_meanwhile(server, tiny_model, capsys, monkeypatch):
    root = Path(sys.modules["lowbit"].__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", str(root))
    few = ("--requests", "2", "--prompt-tokens", "20", "--answer-tokens", "6", "--json")
    assert main(["bench", "serve", str(tiny_model), *few]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["completed"] == 2 and found["answer_tokens"] == 12 and found["model"] == "tiny"
    assert main(["bench", "serve", str(root), *few]) == 2
    assert "`lowbit serve` ended" in capsys.readouterr().err


DOCUMENTS = [
    {"question": "Is water wet?", "choices": [" yes", " no"], "answer": 0},
    {"question": "Two and two", "choices": [" four", " five"], "answer": 1},
    {"question": "A cat", "choices": [" sat", " flew"], "answer": 0},
]
TASK = """\
task: choices
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: choices
target_delimiter: ""
metric_list:
  - metric: acc
"""


def test_lm_eval_sees_the_log_probabilities_of_the_model(server, tiny_model, tmp_path):
    program = shutil.which("lm_eval")
    if program is None:
        pytest.skip("lm_eval is not installed; pip install 'lm-eval[api]' transformers")
    data = tmp_path / "documents.jsonl"
    data.write_text("\n".join(map(json.dumps, DOCUMENTS)))
    (tmp_path / "choices.yaml").write_text(TASK.format(data=data))
    url = f"base_url={server.url}/v1/completions"
    how = f"model=tiny,{url},num_concurrent=3,tokenized_requests=False,tokenizer={tiny_model}"
    command = [program, "--model", "local-completions", "--model_args", how, "--tasks", "choices"]
    command += ["--include_path", tmp_path, "--output_path", tmp_path / "out", "--log_samples"]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=offline, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    entries = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(entries) == len(DOCUMENTS)
    model = lowbit.load(tiny_model, threads=1)
    for entry in entries:
        document = DOCUMENTS[entry["doc_id"]]
        for choice, ((logprob, _),) in zip(document["choices"], entry["resps"]):
            expected = log_probability(model, document["question"], choice)
            assert abs(float(logprob) - expected) < 1e-3 * len(choice)


def log_probability(model, prompt, continuation):
    """Natural log-probability of `continuation` behind `prompt`, one token after another."""
    ids, start = model.encode(prompt + continuation), len(model.encode(prompt))
    total = 0.0
    for at in range(start, len(ids)):
        (logits,) = model.decoder.logits(ids[:at], [new_cache(model.decoder, at)], [at]).astype(float)
        total += logits[ids[at]] - np.logaddexp.reduce(logits)
    return total
