"""vocab.json and merges.txt: GPT-2's own vocabulary against llama.cpp's vectors and transformers."""

from __future__ import annotations

import json

import pytest

from lowbit.errors import CheckpointError
from lowbit.model.detokenizer import byte_alphabet
from lowbit.model.gguf_file import GGUFFile
from lowbit.model.tokenizer import load_tokenizer

TEXTS = ["Hello, world!", " two  spaces\n\n", "don't 12345 na\u00efve \U0001f680", "", "<s>a</s>b", "\ta\r\n"]


@pytest.fixture
def gpt2(shared_data, tmp_path_factory):
    """A folder with GPT-2's two files, made of its GGUF vocabulary."""
    with GGUFFile(shared_data("tokenizers/ggml-vocab-gpt-2.gguf")) as file:
        metadata = file.metadata
    folder = tmp_path_factory.mktemp("gpt2")
    tokens, merges = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.merges"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return folder


def configured(folder, tmp_path, **settings):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


def test_published_vectors(gpt2, shared_data):
    tokenizer = load_tokenizer(gpt2)
    name = "tokenizers/ggml-vocab-gpt-2.gguf"
    texts = shared_data(f"{name}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    ids = shared_data(f"{name}.out").read_text().split("\n")
    assert len(texts) == len(ids) >= 40
    for text, line in zip(texts, ids):
        assert tokenizer.encode(text) == [int(number) for number in line.split()], text
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_as_transformers_has_them(gpt2, tmp_path):
    """OPT's settings: a token in front of every text, and special ones cut out of it."""
    transformers = pytest.importorskip("transformers")
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    folder = configured(gpt2, tmp_path, **special, add_bos_token=True, add_prefix_space=False)
    ours = load_tokenizer(folder, eos_ids=[2])
    theirs = transformers.GPT2Tokenizer.from_pretrained(folder, **special, add_bos_token=True)
    begin = theirs.convert_tokens_to_ids("</s>")
    assert ours.bos_id == begin and ours.eos_ids == (2, begin)
    for text in TEXTS:
        wanted = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special=False) == wanted, text
        assert ours.encode(text) == [begin, *wanted]


def write(folder, tokens=None, merges="a b\n"):
    vocabulary = tokens if tokens is not None else {t: i for i, t in enumerate([*byte_alphabet(), "ab"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text(merges)
    return folder


def test_a_tokenizer_json_comes_first(tmp_path):
    assert load_tokenizer(write(tmp_path)).encode("ab") == [256]
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "tokens, merges, words",
    [
        ({}, "", "an id of its own"),
        ({"a": 0, "b": 0}, "", "an id of its own"),
        ({"a": "x"}, "", "an id of its own"),
        ({"a": 1 << 60}, "", "an id of its own"),
        (None, "a c\n", "line 1 joins 'a c'"),
        (None, "#version: 0.2\na  b\n", "line 2 joins"),
    ],
)
def test_damaged_files(tmp_path, tokens, merges, words):
    with pytest.raises(CheckpointError, match=words):
        load_tokenizer(write(tmp_path, tokens, merges))


def test_merges_that_are_not_text(tmp_path):
    write(tmp_path)
    (tmp_path / "merges.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="fetch it again"):
        load_tokenizer(tmp_path)
