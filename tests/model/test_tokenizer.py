"""Tokenizers of directories: against transformers, without truncation, and clear errors for damage."""

import json
import shutil

import pytest

from lowbit.errors import CheckpointError, RequestError
from lowbit.model.tokenizer import Tokenizer, load_tokenizer

TEXTS = [
    "",
    "Hello world",
    "  leading and trailing  ",
    "tabs\tand\nlines\r\n\r\n",
    "<|im_start|>user\nhi<|im_end|>",
    "Ünïcödé 日本語 🦙🚀 \u200d",
    "1234567890",
    "x" * 3000,
]


@pytest.fixture
def smollm2(shared_data, tmp_path):
    """A directory with SmolLM2's tokenizer and template."""
    shutil.copy(shared_data("tokenizers/smollm2.tokenizer.json"), tmp_path / "tokenizer.json")
    shutil.copy(shared_data("tokenizers/smollm2.chat_template.jinja"), tmp_path / "chat_template.jinja")
    config = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.fixture
def tiny(tmp_path):
    """A directory with a tokenizer of three words."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    backend = Backend(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2, "</s>": 3}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_equals_transformers(smollm2):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(smollm2 / "tokenizer.json"))
    ours = load_tokenizer(smollm2, eos_ids=(0,))
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert ours.decode(ids, skip_special=False) == theirs.decode(ids, clean_up_tokenization_spaces=False)
    assert ours.eos_ids == (0, 2) and ours.bos_id == 1
    assert ours.token_id("<|im_end|>") == 2 and ours.token(2) == "<|im_end|>" and ours.token(10**9) is None


def test_special_tokens_around(shared_data):
    tokenizer = load_tokenizer(shared_data("weights/stories15M/config.json").parent, eos_ids=(2,), bos_id=1)
    assert tokenizer.encode("Hello")[0] == 1
    assert tokenizer.encode("Hello", add_special=False)[0] != 1
    assert tokenizer.decode(tokenizer.encode("Once upon a time")) == "Once upon a time"
    assert tokenizer.eos_ids == (2,) and tokenizer.vocab_size == 32000


def test_no_truncation_and_no_padding(tiny):
    stored = json.loads((tiny / "tokenizer.json").read_text())
    stored["truncation"] = {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    stored["padding"] = {
        "strategy": {"Fixed": 6}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 2, "pad_type_id": 0, "pad_token": "[UNK]",
    }  # fmt: skip
    (tiny / "tokenizer.json").write_text(json.dumps(stored))
    assert load_tokenizer(tiny).encode("a b a b") == [0, 1, 0, 1]


def test_chat_template_sources(tiny):
    def template():
        return load_tokenizer(tiny).chat_template

    assert template() is None
    (tiny / "tokenizer_config.json").write_text(json.dumps({"chat_template": "one"}))
    assert template() == "one"
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "two"}]
    (tiny / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert template() == "two"
    (tiny / "chat_template.json").write_text(json.dumps({"chat_template": "three"}))
    assert template() == "three"
    (tiny / "chat_template.jinja").write_text("four")
    assert template() == "four"


def test_saved_and_loaded_again(smollm2, tmp_path):
    first = load_tokenizer(smollm2)
    folder = tmp_path / "saved"
    folder.mkdir()
    first.save(folder)
    again = load_tokenizer(folder)
    for text in TEXTS:
        assert again.encode(text) == first.encode(text)
    messages = [{"role": "user", "content": "hi"}]
    assert again.apply_chat(messages) == first.apply_chat(messages)
    assert again.eos_ids == first.eos_ids and again.bos_id == first.bos_id


def test_requests_that_cannot_be_met(tiny):
    tokenizer = load_tokenizer(tiny)
    with pytest.raises(RequestError, match="half of a surrogate pair"):
        tokenizer.encode("a \ud800 b")
    with pytest.raises(RequestError, match="no chat template"):
        tokenizer.apply_chat([{"role": "user", "content": "x"}])
    assert tokenizer.decode([-5, 2**40, 1]) == "b"


def test_damage_is_named(tiny):
    path = tiny / "tokenizer.json"
    whole = path.read_text()
    for text, message in (
        ("{", "not a valid tokenizer.json"),
        ("[" * 100_000, "not a valid tokenizer.json"),
        ('{"version": "1.0"}', "not a valid tokenizer.json"),
        (whole.replace("WordLevel", "Wordlevel"), "not a valid tokenizer.json"),
    ):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            load_tokenizer(tiny)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="not UTF-8"):
        load_tokenizer(tiny)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"lowbit needs tokenizer\.json"):
        load_tokenizer(tiny)
    path.write_text(whole)
    for name, text, message in (
        ("tokenizer_config.json", "[]", "holds a list"),
        ("tokenizer_config.json", "[" * 100_000, "nested too deeply"),
        ("tokenizer_config.json", '{"chat_template": 5}', "chat_template is a int"),
        ("special_tokens_map.json", "{'a': 1}", "not JSON"),
    ):
        (tiny / name).write_text(text)
        with pytest.raises(CheckpointError, match=message):
            load_tokenizer(tiny)
        (tiny / name).unlink()
    assert isinstance(load_tokenizer(tiny), Tokenizer)
