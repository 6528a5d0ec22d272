"""Tasks through lm-evaluation-harness: our log-likelihoods are those of transformers, verdicts follow."""

import json

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install lm_eval")

import lowbit
from lowbit.engine.sequence import new_cache
from lowbit.errors import RequestError
from lowbit.measure.harness import HarnessModel
from lowbit.measure.tasks import evaluate_tasks


class _Request:
    def __init__(self, *args):
        self.args = args


@pytest.fixture(scope="module")
def model(tiny_model):
    return lowbit.load(tiny_model, activations="int16")


def _naive(model, tokens, start):
    """One pass over all tokens, nothing shared."""
    logits = np.asarray(
        model.decoder.logits(
            np.asarray(tokens, np.int32), [new_cache(model.decoder, len(tokens))], [len(tokens)], all=True
        ),
        np.float64,
    )[start - 1 : -1]
    logits -= logits.max(axis=1, keepdims=True)
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    wanted = np.asarray(tokens[start:])
    greedy = bool((logits.argmax(axis=1) == wanted).all())
    return logs[np.arange(len(wanted)), wanted].sum(), greedy


def test_log_likelihoods_do_not_depend_on_what_was_asked_before(model):
    pairs = [
        ("The cat sat on the", " mat."),
        ("The cat sat on the", " hat, and"),
        ("The cat sat", " on the mat."),
        ("A", "B"),
        ("", "no context"),
        ("The cat sat on the", " mat."),
        ("trailing space ", "moves"),
    ]
    harness = HarnessModel(model)
    together = harness.loglikelihood([_Request(*pair) for pair in pairs])
    alone = [HarnessModel(model).loglikelihood([_Request(*pair)])[0] for pair in pairs]
    assert together == alone
    for (context, continuation), (value, greedy) in zip(pairs, together):
        tokens = model.encode(context + continuation)
        start = len(model.encode(context.rstrip()))
        if not context:
            tokens, start = [harness.prefix_token_id, *tokens], 1
        expected, likeliest = _naive(model, tokens, start)
        assert value == pytest.approx(expected, abs=1e-3)
        assert greedy == likeliest


def test_a_greedy_continuation_is_known_as_such(model):
    ids = model.encode("Once upon a time")
    told = model.generate_ids(ids, lowbit.SamplingParameters(max_tokens=5, ignore_eos=True))
    harness = HarnessModel(model)
    ((_, greedy),) = harness._loglikelihood_tokens([(None, ids, told)])
    assert greedy
    told[3] = (told[3] + 1) % 250
    ((_, greedy),) = harness._loglikelihood_tokens([(None, ids, told)])
    assert not greedy


def test_rolling_predicts_every_token_once(model):
    text = "All the world's a stage, and all the men and women merely players. " * 5
    harness = HarnessModel(model)
    (total,) = harness.loglikelihood_rolling([_Request(text)])
    assert harness.scored_tokens == len(model.encode(text, add_special=False)) > model.context
    assert total < 0


def test_generation_ends_before_the_stop_text(model):
    whole = model.generate("Hello", max_tokens=24).text
    stop = whole[4:6]
    harness = HarnessModel(model)
    wanted = {"until": [stop], "max_gen_toks": 24, "do_sample": False, "temperature": 0.0}
    texts = harness.generate_until([_Request("Hello", wanted), _Request("Good day", {"max_gen_toks": 3})])
    assert texts[0] == whole[: whole.index(stop)]
    assert texts[1] == model.generate("Good day", max_tokens=3).text
    with pytest.raises(RequestError, match="num_beams"):
        harness.generate_until([_Request("Hello", {"num_beams": 4})])


def test_nothing_is_cut_to_fit(model):
    with pytest.raises(RequestError, match="tokens and the context holds"):
        HarnessModel(model).loglikelihood([_Request("x" * 200, "y")])


def _write_tasks(folder):
    rows = []
    for document in range(12):
        for index in range(2):
            request = {"context": f"Question {document}:", "continuation": f" {'ab'[index] * (index + 1)}"}
            rows.append({"doc_id": document, "idx": index, "label": document % 2, "request": request})
    (folder / "piqa.requests.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for row in rows:
        row["request"] = {"context": f"so {'AB'[row['idx']]}nn", "continuation": " went."}
    (folder / "winogrande.requests.jsonl").write_text("\n".join(map(json.dumps, rows)))
    problem = {"question": "What is 1 + 1?", "answer": "1 + 1 = 2\n#### 2"}
    (folder / "gsm8k_test.jsonl").write_text(json.dumps(problem) + "\n")


def test_accuracy_is_the_share_of_right_choices(model, tmp_path):
    _write_tasks(tmp_path)
    found = evaluate_tasks(model, ["piqa", "winogrande", "gsm8k"], tmp_path)
    harness = HarnessModel(model)
    right = right_by_length = 0
    for document in range(12):
        pairs = [_Request(f"Question {document}:", f" {text}") for text in ("a", "bb")]
        scores = [score for score, _ in harness.loglikelihood(pairs)]
        right += int(np.argmax(scores)) == document % 2
        right_by_length += int(np.argmax([scores[0] / 1, scores[1] / 2])) == document % 2
    metrics = found["tasks"]["piqa"]["metrics"]
    assert metrics["acc"]["value"] == pytest.approx(right / 12)
    assert metrics["acc_norm"]["value"] == pytest.approx(right_by_length / 12)
    share = right / 12
    assert metrics["acc"]["standard_error"] == pytest.approx((share * (1 - share) / 11) ** 0.5)
    assert found["tasks"]["winogrande"]["documents"] == 12
    assert found["tasks"]["gsm8k"]["metrics"]["exact_match (strict-match)"]["value"] in (0.0, 1.0)
    assert found["scored_tokens"] > 0 and found["generated_tokens"] > 0


def test_as_transformers_under_the_same_harness(model, tiny_model):
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="needs accelerate")
    theirs = huggingface.HFLM(
        pretrained=str(tiny_model), batch_size=1, dtype="float32", device="cpu", add_bos_token=False
    )
    pairs = [_Request("The cat sat on the", " mat."), _Request("", "alone"), _Request("so ", "what")]
    ours = HarnessModel(model).loglikelihood(pairs)
    for (value, greedy), (expected, likeliest) in zip(ours, theirs.loglikelihood(pairs, disable_tqdm=True)):
        assert value == pytest.approx(expected, abs=5e-3)
        assert greedy == likeliest
