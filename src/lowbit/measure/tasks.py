"""Accuracy on tasks, by lm-evaluation-harness: its requests, its metrics, its standard errors.

A task comes by its name in the harness, which fetches data from the hub, or from files of a folder (see
task_files.py), which needs no network.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lowbit.engine import LanguageModel
from lowbit.errors import RequestError, UnsupportedError
from lowbit.measure.task_files import TASK_FILES, Document, find_file

# The text after which an answer of gsm8k is over, and how its number is found: as the harness's own task.
_GSM8K_UNTIL = ["Question:", "</s>", "<|im_end|>"]
_GSM8K_FILTERS = {
    "strict-match": {"function": "regex", "regex_pattern": r"#### (\-?[0-9\.\,]+)"},
    "flexible-extract": {
        "function": "regex",
        "group_select": -1,
        "regex_pattern": r"(-?[$0-9.,]{2,})|(-?[0-9]+)",
    },
}


def evaluate_tasks(
    model: LanguageModel,
    tasks: Sequence[str],
    folder: Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    chat: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Ask and judge `tasks`.

    folder: where task files lie; None: the harness's own tasks, which it fetches.
    limit: only the first so many documents of each task.
    shots: examples before each question; None: what the task says. chat: in the model's chat template.
    Returns `tasks`: name -> {"metrics": {name: {"value", "standard_error"}}, "documents", "protocol",
    "source"}, and `seconds`, `scored_tokens`, `generated_tokens`.
    Raises UnsupportedError without the harness, RequestError for tasks that cannot be asked.
    """
    try:
        from lm_eval.evaluator import simple_evaluate

        from lowbit.measure.harness import HarnessModel
    except ImportError as error:
        raise UnsupportedError(
            f"eval --tasks: lm-evaluation-harness is not installed ({error}); pip install 'lowbit[eval]'"
        ) from error
    if not tasks:
        raise RequestError(f"eval --tasks: no task named; for example {', '.join(TASK_FILES)}")
    if limit is not None and limit < 1:
        raise RequestError(f"eval --tasks: limit={limit}; use at least 1 document")
    if chat and not model.has_chat_template:
        raise RequestError("eval --chat: this model has no chat template")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    names = list(dict.fromkeys(tasks))
    asked: list[Any] = list(names) if folder is None else [_local(name, folder) for name in names]
    harness = HarnessModel(model, progress)
    started = time.perf_counter()
    try:
        found = simple_evaluate(
            harness,
            tasks=asked,
            num_fewshot=shots,
            limit=limit,
            log_samples=False,
            apply_chat_template=chat,
            bootstrap_iters=1000,
        )
    except (KeyError, OSError, ConnectionError, ValueError) as error:
        where = "the hub" if folder is None else str(folder)
        hint = "; --task-data reads files of a folder instead" if folder is None else ""
        raise RequestError(f"eval --tasks: {', '.join(names)} from {where}: {error}{hint}") from error
    assert found is not None
    return {
        "tasks": {name: _summary(name, found, folder) for name in sorted(found["results"])},
        "seconds": time.perf_counter() - started,
        "scored_tokens": harness.scored_tokens,
        "generated_tokens": harness.generated_tokens,
    }


def _summary(name: str, found: dict[str, Any], folder: Path | None) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    row = found["results"][name]
    for key, value in row.items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = row.get(f"{metric}_stderr,{kind}")
        label = metric if kind == "none" else f"{metric} ({kind})"
        metrics[label] = {
            "value": float(value),
            "standard_error": float(error) if isinstance(error, (int, float)) else None,
        }
    count = found["n-samples"].get(name, {})
    shots = found["n-shot"].get(name, 0)
    return {
        "metrics": metrics,
        "documents": count.get("effective"),
        "of": count.get("original"),
        "protocol": TASK_FILES[name].protocol if folder else f"lm-eval, {shots} examples",
        "source": str(find_file(folder, name)) if folder else "lm-eval",
    }


def _local(name: str, folder: Path) -> Any:
    """The harness's task over the documents of a file."""
    from lm_eval.api.task import ConfigurableTask

    path = find_file(folder, name)
    kind = TASK_FILES[name].kind
    config: dict[str, Any] = {
        "task": name,
        "test_split": "test",
        "custom_dataset": _Documents(name, path),
        "target_delimiter": " ",
        "num_fewshot": 0,
    }
    if kind == "problems":
        config |= _problems(folder)
    else:
        config |= {"output_type": "multiple_choice", "doc_to_target": "gold", "doc_to_choice": "choices"}
        config |= {"doc_to_text": _context, "metric_list": [_mean("acc"), _mean("acc_norm")]}
    if kind == "contexts":  # in the harness's words: several inputs, one target
        config |= {"doc_to_text": _gold, "doc_to_target": _continuation, "doc_to_choice": _contexts}
        config["metric_list"] = [_mean("acc")]
    return ConfigurableTask(config=config)


def _problems(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = {
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": _GSM8K_UNTIL, "do_sample": False, "temperature": 0.0},
        "metric_list": [
            {
                **_mean("exact_match"),
                "ignore_case": True,
                "ignore_punctuation": False,
                "regexes_to_ignore": [",", r"\$", "(?s).*#### ", r"\.$"],
            }
        ],
        "filter_list": [
            {"name": label, "filter": [rule, {"function": "take_first"}]}
            for label, rule in _GSM8K_FILTERS.items()
        ],
    }
    if list(folder.glob("gsm8k*train*.jsonl*")):
        config |= {"training_split": "train", "fewshot_split": "train", "num_fewshot": 5}
    return config


def _mean(metric: str) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


def _context(doc: Document) -> str:
    return str(doc["context"])


def _gold(doc: Document) -> int:
    return int(doc["gold"])


def _contexts(doc: Document) -> list[str]:
    return list(doc["contexts"])


def _continuation(doc: Document) -> str:
    return str(doc["continuation"])


class _Documents:
    """What the harness calls for a task's data."""

    def __init__(self, name: str, path: Path) -> None:
        self._name, self._path = name, path

    def __call__(self, **ignored: Any) -> dict[str, Any]:
        from datasets import Dataset

        read = TASK_FILES[self._name].read
        splits = {"test": Dataset.from_list(list(read(self._path)))}
        train = sorted(self._path.parent.glob("gsm8k*train*.jsonl*")) if self._name == "gsm8k" else []
        if train:
            splits["train"] = Dataset.from_list(list(read(train[0])))
        return splits
