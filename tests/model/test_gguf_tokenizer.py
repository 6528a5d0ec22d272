"""Tokenizers from GGUF metadata: llama.cpp's published vectors, tokenizer.json of the same model, and an
independent SentencePiece encoder."""

import heapq
import os
import time
from pathlib import Path

import numpy as np
import pytest

from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.model.gguf_file import GGUFFile
from lowbit.model.gguf_tokenizer import SPLITTINGS, gguf_eos_ids, gguf_tokenizer

VECTORS = ["ggml-vocab-gpt-2.gguf", "ggml-vocab-llama-spm.gguf", "ggml-vocab-phi-3.gguf"]
ODD_TEXTS = [
    "",
    " ",
    "   \n\n \t x  y   ",
    "don't I'LL we've 12345 3.14",
    "naïve café — ümläut ﬁ",
    "日本語のテキスト 中文 한국어",
    "👩‍👩‍👧‍👦 🏳️‍🌈 \U0001f9d1\U0001f3fd",
    "a\u200bb\u00a0c\ufeffd",
    "def f(x):\n\treturn x  # ok\r\n",
    "<|im_start|>user\nhi<|im_end|>",
    "<s></s><unk>",
    "½ Ⅷ ٣ ௧ ²",
]


def metadata_of(path):
    with GGUFFile(path) as file:
        return file.metadata


@pytest.mark.parametrize("name", VECTORS)
def test_published_vectors(shared_data, name):
    """llama.cpp's own test: each text with its ids, and the text again from the ids."""
    path = shared_data(f"tokenizers/{name}")
    tokenizer = gguf_tokenizer(metadata_of(path), name)
    texts = shared_data(f"tokenizers/{name}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    ids = shared_data(f"tokenizers/{name}.out").read_text().split("\n")
    assert len(texts) == len(ids) >= 40
    for text, line in zip(texts, ids):
        wanted = [int(number) for number in line.split()]
        assert tokenizer.encode(text, add_special=False) == wanted, text
        assert tokenizer.decode(wanted) == text


@pytest.mark.parametrize("name", ["mpt", "command-r", "refact", "starcoder", "llama-bpe", "qwen2"])
def test_vectors_of_other_splittings(name):
    """Those that llama.cpp's sources bring, where `make bench` has fetched them."""
    root = Path(os.environ.get("LOWBIT_PEERS", Path(__file__).parents[2] / ".cache" / "peers"))
    found = sorted(root.glob(f"llama.cpp-*/source/*/vendor/llama.cpp/models/ggml-vocab-{name}.gguf"))
    if not found:
        pytest.skip(f"llama.cpp's vectors are not in {root}: `make bench` fetches them, or set LOWBIT_PEERS")
    tokenizer = gguf_tokenizer(metadata_of(found[-1]), name)
    texts = Path(f"{found[-1]}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    ids = Path(f"{found[-1]}.out").read_text().split("\n")
    for text, line in zip(texts, ids, strict=True):
        assert tokenizer.encode(text, add_special=False) == [int(number) for number in line.split()], text


def test_neox_without_a_name_is_not_the_default(shared_data):
    """Its old files do not say how text is split; it is GPT-2's way, in composed characters."""
    metadata = metadata_of(shared_data("tokenizers/ggml-vocab-gpt-neox.gguf"))
    assert "tokenizer.ggml.pre" not in metadata
    tokenizer = gguf_tokenizer(metadata, "neox")
    named = gguf_tokenizer({**metadata, "tokenizer.ggml.pre": "mpt"}, "neox")
    other = gguf_tokenizer({**metadata, "tokenizer.ggml.pre": "default"}, "neox")
    text = "It's 1234567, isn't it? e\u0301 ++ ==="
    assert tokenizer.encode(text) == named.encode(text) != other.encode(text)
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == "\u00e9"


def test_words_of_gpt_4o():
    """gpt-oss: cases and contractions stay with their word, digits go in threes."""
    from tokenizers import Regex, pre_tokenizers

    splits = pre_tokenizers.Split(Regex(SPLITTINGS["gpt-4o"].patterns[0]), behavior="isolated")
    text = "Don't HELLOWorld 12345/ok\r\n  \tx I'LL"
    words = [word for word, _ in splits.pre_tokenize_str(text)]
    assert words == ["Don't", " HELLOWorld", " ", "123", "45", "/ok", "\r\n", "  ", "\tx", " I'LL"]


def sentencepiece(tokens, scores, text, prefix="\u2581"):
    """SentencePiece's own procedure, written plainly: join the best-scoring neighbours, leftmost first among
    equals, until none is a piece; what is no piece falls into bytes."""
    ids = {token: i for i, token in enumerate(tokens)}
    symbols = list(prefix + text.replace(" ", "\u2581"))
    following = [*range(1, len(symbols)), -1]
    before = list(range(-1, len(symbols) - 1))
    queue = []

    def offer(left):
        right = following[left]
        if right >= 0 and symbols[left] + symbols[right] in ids:
            joint = symbols[left] + symbols[right]
            heapq.heappush(queue, (-scores[ids[joint]], left, joint))

    for i in range(len(symbols)):
        offer(i)
    while queue:
        _, left, joint = heapq.heappop(queue)
        right = following[left] if symbols[left] is not None else -1
        if right < 0 or symbols[left] + symbols[right] != joint:
            continue
        symbols[left], symbols[right] = joint, None
        following[left] = following[right]
        if following[left] >= 0:
            before[following[left]] = left
        if before[left] >= 0:
            offer(before[left])
        offer(left)
    result = []
    for symbol in symbols:
        if symbol in ids:
            result.append(ids[symbol])
        elif symbol is not None:
            result += [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return result


def test_llama_is_sentencepiece(shared_data):
    metadata = metadata_of(shared_data("tokenizers/ggml-vocab-llama-spm.gguf"))
    tokenizer = gguf_tokenizer(metadata, "llama")
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    texts = [text for text in ODD_TEXTS[1:] if "<" not in text]
    texts += shared_data("text/wiki.test.raw").read_text()[:25_000].split("\n")
    texts += shared_data("text/code.utf8").read_text()[:10_000].split("\n")
    texts = [text for text in texts if text]
    for text in texts:
        assert tokenizer.encode(text, add_special=False) == sentencepiece(tokens, scores, text), text


def test_gemma_puts_no_space_before_a_text(shared_data):
    """SentencePiece without the prefix, and runs of spaces that its makers defined as tokens."""
    metadata = metadata_of(shared_data("tokenizers/ggml-vocab-llama-spm.gguf"))
    tokens, kinds = list(metadata["tokenizer.ggml.tokens"]), metadata["tokenizer.ggml.token_type"].copy()
    scores = metadata["tokenizer.ggml.scores"].copy()
    run = tokens.index("\u2581" * 4)
    tokens[run], kinds[run], scores[run] = " " * 4, 4, -1000.0  # as the converter writes what users defined
    gemma = {
        **metadata,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": False,
    }
    tokenizer = gguf_tokenizer(gemma, "gemma")
    texts = [text for text in ODD_TEXTS[1:] if "<" not in text]
    texts += shared_data("text/wiki.test.raw").read_text()[:20_000].split("\n")
    texts += shared_data("text/code.utf8").read_text()[:10_000].split("\n")
    for text in filter(None, texts):
        wanted = []
        for number, piece in enumerate(text.split(" " * 4)):
            wanted += [run] * (number > 0)
            wanted += sentencepiece(tokens, scores, piece, prefix="") if piece else []
        assert tokenizer.encode(text, add_special=False) == wanted, text
        assert tokenizer.decode(wanted) == text


def test_smollm2_equals_its_tokenizer_json(shared_data):
    """SmolLM2's tokenizer, rebuilt from the parts that its GGUF stores, against its own tokenizer.json."""
    import json

    from tokenizers import Tokenizer as Backend

    from lowbit.model.tokenizer import Tokenizer

    source = shared_data("tokenizers/smollm2.tokenizer.json")
    stored = json.loads(source.read_text())
    vocabulary = stored["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.get)
    special = {token["id"] for token in stored["added_tokens"]}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in stored["model"]["merges"]]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": np.array(
            [3 if i in special else 1 for i in range(len(tokens))], np.int32
        ),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{{ messages }}",
    }
    start = time.process_time()
    built = gguf_tokenizer(metadata, "smollm2")
    assert time.process_time() - start < 1.0  # 50 ms as a rule
    wanted = Tokenizer(Backend.from_file(str(source)))
    texts = list(ODD_TEXTS)
    for name in ("text/wiki.test.raw", "text/code.utf8", "text/c4.utf8"):
        texts.append(shared_data(name).read_text()[:80_000])
    for text in texts:
        ids = wanted.encode(text)
        assert built.encode(text) == ids
        assert built.decode(ids) == wanted.decode(ids)
    assert built.eos_ids == (2,) and built.bos_id == 1 and built.vocab_size == 49152
    assert built.chat_template == "{{ messages }}"
    assert built.special_tokens == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}


def bpe_metadata(**changes):
    """A vocabulary of the 256 bytes, two merges and two control tokens."""
    from lowbit.model.detokenizer import byte_alphabet

    tokens = [*byte_alphabet(), "ab", "abc", "<bos>", "<eos>"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": ["a b", "ab c"],
        "tokenizer.ggml.token_type": np.array([1] * 258 + [3, 3], np.int32),
        "tokenizer.ggml.bos_token_id": 258,
        "tokenizer.ggml.eos_token_id": 259,
    }
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return {key: value for key, value in metadata.items() if value is not None}


def test_flags_put_special_tokens_around(rng):
    plain = [256, 258 - 1][:0] + gguf_tokenizer(bpe_metadata(), "x").encode("abc")
    assert plain == [257]
    both = gguf_tokenizer(bpe_metadata(add_bos_token=True, add_eos_token=True), "x")
    assert both.encode("abc") == [258, 257, 259]
    assert both.encode("abc", add_special=False) == [257]
    assert gguf_tokenizer(bpe_metadata(pre="llama-bpe"), "x").encode("abc") == [258, 257]
    assert gguf_tokenizer(bpe_metadata(pre="llama-bpe", add_bos_token=False), "x").encode("abc") == [257]
    assert both.encode("<eos>abc<bos>", add_special=False) == [259, 257, 258]
    assert both.decode([258, 257, 259]) == "abc"
    assert both.decode([258, 257, 259], skip_special=False) == "<bos>abc<eos>"


def test_every_end_token():
    metadata = bpe_metadata(eot_token_id=257, eom_token_id=259)
    assert gguf_eos_ids(metadata) == (259, 257)
    assert gguf_tokenizer(metadata, "x").eos_ids == (259, 257)


@pytest.mark.parametrize("name", SPLITTINGS)
def test_every_splitting_keeps_the_text(name):
    """Whatever the words, the bytes of a text survive; the expressions compile and cut something."""
    tokenizer = gguf_tokenizer(bpe_metadata(pre=name, add_bos_token=False), "x")
    for text in ODD_TEXTS:
        if "<" not in text and "ﬁ" not in text:
            assert tokenizer.decode(tokenizer.encode(text)) == text


# Words that the published expressions cut these texts into: digits in ones, in threes or together; the
# contraction in any case; a line break with the punctuation before it.
WORDS = {
    "gpt-2": ("I'LL 12345 x", ["I", "'", "LL", " 12345", " x"]),
    "smollm": ("don't 123", ["don", "'t", " ", "1", "2", "3"]),
    "llama-bpe": ("I'LL 12345.\n x", ["I", "'LL", " ", "123", "45", ".\n", " x"]),
    "qwen2": ("I'LL 123.\n x", ["I", "'LL", " ", "1", "2", "3", ".\n", " x"]),
    "tekken": ("HelloWorld 12", ["Hello", "World", " ", "1", "2"]),
    "default": ("a+b 12345", ["a", "+", "b", " ", "123", "45"]),
}


@pytest.mark.parametrize("name", WORDS)
def test_words(name):
    tokenizer = gguf_tokenizer(bpe_metadata(pre=name), "x")
    text, words = WORDS[name]
    cut = [
        piece.replace("Ġ", " ").replace("Ċ", "\n")
        for piece, _ in tokenizer._backend.pre_tokenizer.pre_tokenize_str(text)
    ]
    assert cut == words


def test_user_defined_tokens_are_kept():
    metadata = bpe_metadata()
    metadata["tokenizer.ggml.token_type"][259] = 4
    tokenizer = gguf_tokenizer(metadata, "x")
    assert tokenizer.encode("a<eos>") == [tokenizer.token_id("a"), 259]
    assert tokenizer.decode([259]) == "<eos>"


BAD = {
    "no tokens": ({"tokens": None}, "missing or empty"),
    "tokens not text": ({"tokens": np.arange(3)}, "not a list of strings"),
    "repeated token": ({"tokens": ["a", "b", "a"], "token_type": None}, "'a' twice"),
    "kinds": ({"token_type": np.ones(3, np.int32)}, "one number for each of the 260"),
    "bos": ({"bos_token_id": 260}, "bos_token_id is 260"),
    "eos not a number": ({"eos_token_id": "x"}, "eos_token_id is 'x'"),
    "merge of nothing": ({"merges": ["a zz"]}, "damaged"),
    "merge without a space": ({"merges": ["ab"]}, "damaged"),
    "scores": ({"model": "llama"}, "scores is missing"),
    "scores not finite": ({"model": "llama", "scores": np.full(260, np.nan)}, "not finite"),
}


@pytest.mark.parametrize("case", BAD)
def test_damage_is_named(case):
    changes, message = BAD[case]
    with pytest.raises(CheckpointError, match=message):
        gguf_tokenizer(bpe_metadata(**changes), "file.gguf")


def test_unknown_kinds_are_named():
    with pytest.raises(UnsupportedError, match=r"tokenizer\.ggml\.model is 'bert'"):
        gguf_tokenizer(bpe_metadata(model="bert"), "x")
    with pytest.raises(
        UnsupportedError, match=r"tokenizer\.ggml\.pre is 'klingon'; lowbit knows default, gpt-2"
    ):
        gguf_tokenizer(bpe_metadata(pre="klingon"), "x")
