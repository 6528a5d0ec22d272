"""Text from ids: streams equal whole decodes for any ids, and the library's decode where bytes are valid."""

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models

from lowbit.errors import UnsupportedError
from lowbit.model.detokenizer import Detokenizer, TextStream, byte_alphabet, decode


def byte_level():
    """256 bytes, some longer pieces (one cuts a character in two) and special tokens."""
    alphabet = {byte: character for character, byte in byte_alphabet().items()}
    pieces = ["Hello", " world", "日", "é"]
    pieces = ["".join(alphabet[byte] for byte in piece.encode()) for piece in pieces]
    pieces += [
        "".join(alphabet[byte] for byte in "🦙".encode()[:2]),
        "".join(alphabet[b] for b in "🦙".encode()[2:]),
    ]
    tokens = [*alphabet.values(), *(p for p in pieces if p not in alphabet.values())]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>", special=True)])
    backend.add_tokens([AddedToken("<tool🔧>", special=False)])
    return backend


def sentencepiece(strip=True):
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁Hello", "lo", "▁▁", "日", "<0xZZ>"]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    return backend


def metaspace():
    tokens = ["▁Hello", "▁", "wor", "ld▁x"]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    backend.decoder = decoders.Metaspace()
    return backend


def words():
    return Tokenizer(models.WordLevel({"one": 0, "two": 1, "[UNK]": 2}, "[UNK]"))


KINDS = {"byte level": byte_level, "sentencepiece": sentencepiece, "metaspace": metaspace, "words": words}


def streamed(detokenizer, ids, **options):
    stream = TextStream(detokenizer, **options)
    pieces = [stream.push(i) for i in ids]
    return pieces, "".join(pieces) + stream.flush()


def test_alphabet_is_the_librarys():
    from tokenizers.pre_tokenizers import ByteLevel

    assert set(byte_alphabet()) == set(ByteLevel.alphabet())
    assert sorted(byte_alphabet().values()) == list(range(256))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [True, False])
def test_stream_equals_decode_on_random_ids(kind, skip, rng):
    backend = KINDS[kind]()
    detokenizer = Detokenizer(backend)
    size = backend.get_vocab_size()
    for length in (0, 1, 2, 5, 30, 200):
        ids = rng.integers(0, size + 3, length).tolist()  # a few beyond the vocabulary
        _, text = streamed(detokenizer, ids, skip_special=skip)
        assert text == decode(detokenizer, ids, skip)
        if kind in ("byte level", "metaspace", "words"):
            known = [i for i in ids if i < size]
            assert text == backend.decode(known, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", ["byte level", "sentencepiece"])
def test_every_character_arrives_whole(kind):
    """Bytes one token at a time: nothing is shown before its character is complete, and then all of it."""
    backend = KINDS[kind]()
    detokenizer = Detokenizer(backend)
    text = "aé日🦙ﬁ\u0301"
    if kind == "byte level":
        alphabet = {byte: character for character, byte in byte_alphabet().items()}
        ids = [backend.token_to_id(alphabet[byte]) for byte in text.encode()]
    else:
        ids = [backend.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
        assert backend.decode(ids) == text
    pieces, whole = streamed(detokenizer, ids)
    assert whole == text and "\ufffd" not in "".join(pieces)
    assert [piece for piece in pieces if piece] == list(text)


def test_incomplete_bytes_wait_and_then_show_as_replacement():
    backend = byte_level()
    detokenizer = Detokenizer(backend)
    first = max(i for i in range(backend.get_vocab_size()) if len(backend.id_to_token(i)) == 2) - 1
    second = first + 1
    stream = TextStream(detokenizer)
    assert stream.push(first) == "" and stream.push(second) == "🦙" and stream.flush() == ""
    assert stream.push(first) == "" and stream.flush() == "\ufffd" and stream.flush() == ""


def test_leading_space():
    backend = sentencepiece()
    detokenizer = Detokenizer(backend)
    hello, lo, double, start = (backend.token_to_id(t) for t in ("▁Hello", "lo", "▁▁", "<s>"))
    assert decode(detokenizer, [hello, hello]) == "Hello Hello" == backend.decode([hello, hello])
    assert decode(detokenizer, [start, hello]) == "Hello" == backend.decode([start, hello])
    assert decode(detokenizer, [double, lo]) == " lo" == backend.decode([double, lo])
    assert decode(detokenizer, [hello, lo], continuing=True) == " Hellolo"
    assert decode(Detokenizer(sentencepiece(strip=False)), [hello]) == " Hello"
    assert decode(detokenizer, [start, hello], skip_special=False) == "<s> Hello"
    assert decode(detokenizer, [backend.token_to_id("<0xZZ>")]) == "<0xZZ>"


def test_unknown_decoder_is_named():
    backend = words()
    backend.decoder = decoders.WordPiece()
    with pytest.raises(UnsupportedError, match=r'decoder \{"type": "WordPiece"'):
        Detokenizer(backend)
    backend.decoder = decoders.Sequence([decoders.Fuse()] * 40)
    with pytest.raises(UnsupportedError, match="more than 16 steps"):
        Detokenizer(backend)


@pytest.mark.parametrize("name", ["tokenizers/smollm2.tokenizer.json", "weights/stories15M/tokenizer.json"])
def test_real_vocabularies(shared_data, name, rng):
    backend = Tokenizer.from_file(str(shared_data(name)))
    detokenizer = Detokenizer(backend)
    ids = rng.integers(0, backend.get_vocab_size(), 3000).tolist()
    _, text = streamed(detokenizer, ids)
    assert text == decode(detokenizer, ids)
    if "smollm2" in name:
        assert text == backend.decode(ids)
    wiki = shared_data("text/wiki.test.raw").read_text()[:30_000]
    encoded = backend.encode(wiki, add_special_tokens=False).ids
    assert streamed(detokenizer, encoded)[1] == backend.decode(encoded)
    assert backend.decode(encoded).lstrip() == wiki.lstrip()
