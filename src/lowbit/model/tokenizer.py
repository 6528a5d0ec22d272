"""Text to token ids and back, on the `tokenizers` library.

A `Tokenizer` adds to the library's what a language model needs besides: which ids end an answer, the chat
template and the special tokens that it names, and text that arrives token by token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import Tokenizer as Backend

from lowbit.errors import CheckpointError, RequestError
from lowbit.model import chat
from lowbit.model.detokenizer import Detokenizer, TextStream, decode
from lowbit.model.gpt2_tokenizer import MERGES, VOCABULARY, gpt2_backend
from lowbit.model.json_file import read_json

MAX_TOKENIZER_BYTES = 1 << 28
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

T = TypeVar("T")


class Tokenizer:
    """One model's tokenizer.

    eos_ids: every id that ends an answer; bos_id: the id that opens a text, or None.
    chat_template: Jinja text, or None for a model that was not trained to chat.
    special_tokens: the strings that the template may name (bos_token, eos_token, ...).
    """

    def __init__(
        self,
        backend: Backend,
        eos_ids: Iterable[int] = (),
        bos_id: int | None = None,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ):
        self._backend = backend
        self._detokenizer = Detokenizer(backend)
        self.eos_ids = tuple(dict.fromkeys(eos_ids))
        self.bos_id = bos_id
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens or {})

    @property
    def vocab_size(self) -> int:
        """Ids that the tokenizer knows; a model may have more rows for padding."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of `text`. Special tokens that stand in the text become their ids; `add_special` adds
        those that the model expects around a text (such as the one that begins it)."""
        if not isinstance(text, str):
            raise RequestError(
                f"encode: received {type(text).__name__}, text must be a str; decode bytes first"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"encode: character {error.start} is half of a surrogate pair, not text; remove it"
            ) from error
        return guarded(
            lambda: self._backend.encode(text, add_special_tokens=add_special).ids,
            lambda problem: RequestError(f"encode: {problem}"),
        )

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD, ids beyond the vocabulary nothing."""
        return decode(self._detokenizer, ids, skip_special)

    def stream(self, skip_special: bool = True, continuing: bool = False) -> TextStream:
        """Text as tokens arrive: `push(id)` gives what is complete, `flush()` the rest.

        The pieces joined equal `decode` of all ids. With `continuing` the tokens follow other text, so the
        first word keeps the leading space that SentencePiece models give it."""
        return TextStream(self._detokenizer, skip_special, continuing)

    def token(self, token_id: int) -> str | None:
        """The vocabulary entry with this id, as the tokenizer spells it."""
        return self._backend.id_to_token(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text; nothing for an id that the vocabulary does not have."""
        return self._detokenizer.token_bytes(token_id)

    def is_special(self, token_id: int) -> bool:
        """Whether the token marks structure (<|im_end|>) and is no part of a text."""
        return self._detokenizer.is_special(token_id)

    def token_id(self, token: str) -> int | None:
        """The id of a vocabulary entry such as "<|im_end|>"."""
        return self._backend.token_to_id(token)

    def apply_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The text that stands for `messages`; encode it with add_special=False, it holds all tokens.

        Raises RequestError when the model has no chat template or the template refuses the messages."""
        if self.chat_template is None:
            raise RequestError("chat: this model has no chat template; give the prompt as it is (--raw)")
        return chat.render_chat(
            self.chat_template, messages, add_generation_prompt, self.special_tokens, **variables
        )

    def state(self) -> str:
        """What tokenizer.json holds."""
        return self._backend.to_str()

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, from which `load_tokenizer` makes an equal one."""
        self._backend.save(str(folder / "tokenizer.json"), pretty=False)
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **self.special_tokens}
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        text = json.dumps(config, ensure_ascii=False, indent=2)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def guarded(action: Callable[[], T], make_error: Callable[[str], Exception]) -> T:
    """Run `action` of the tokenizers library, turning its failures into the error that `make_error` gives.

    The library raises plain Exception, and a Rust panic arrives as a BaseException of its own."""
    try:
        return action()
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise make_error(str(error)[:300]) from error


def load_tokenizer(folder: Path, eos_ids: Sequence[int] = (), bos_id: int | None = None) -> Tokenizer:
    """The tokenizer of a transformers-style directory.

    Reads tokenizer.json, or vocab.json and merges.txt of GPT-2's kind (truncation and padding that it may ask
    for are switched off: nothing of a prompt is lost), tokenizer_config.json, special_tokens_map.json and
    chat_template.jinja / .json. `eos_ids` and `bos_id` come from the model's own configuration; the
    tokenizer's end token is added to them.
    Raises CheckpointError when a file is missing or damaged.
    """
    config = read_json(folder / "tokenizer_config.json", missing={})
    special = {
        **_special_tokens(read_json(folder / "special_tokens_map.json", missing={})),
        **_special_tokens(config),
    }
    path = folder / "tokenizer.json"
    if not path.is_file() and all((folder / name).is_file() for name in (VOCABULARY, MERGES)):
        backend = gpt2_backend(folder, config, special)
    else:
        backend = _read_backend(path)
    backend.no_truncation()
    backend.no_padding()
    ends = list(eos_ids)
    end = backend.token_to_id(special["eos_token"]) if "eos_token" in special else None
    if end is not None:
        ends.append(end)
    if bos_id is None and "bos_token" in special:
        bos_id = backend.token_to_id(special["bos_token"])
    return Tokenizer(backend, ends, bos_id, _chat_template(folder, config), special)


def _read_backend(path: Path) -> Backend:
    """tokenizer.json, checked."""
    try:
        size = path.stat().st_size
        if size > MAX_TOKENIZER_BYTES:
            raise CheckpointError(
                f"open {path}: {size} bytes, {MAX_TOKENIZER_BYTES} are allowed; it is damaged"
            )
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(
            f"open {path}: {error.strerror}; lowbit needs tokenizer.json: convert the tokenizer with "
            "transformers' save_pretrained, or copy it beside the weights"
        ) from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"open {path}: not UTF-8 at byte {error.start}; fetch it again") from error
    return guarded(
        lambda: Backend.from_str(text),
        lambda problem: CheckpointError(
            f"open {path}: not a valid tokenizer.json ({problem}); fetch it again"
        ),
    )


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The named tokens, which are stored as text or as {"content": text, ...}."""
    found: dict[str, str] = {}
    for name in SPECIAL_NAMES:
        value = config.get(name)
        if isinstance(value, Mapping):
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, chat_template.json or the entry of tokenizer_config.json, in this order."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            if path.stat().st_size > 4 * chat.MAX_TEMPLATE_CHARACTERS:
                raise CheckpointError(f"open {path}: {path.stat().st_size} bytes is too large for a template")
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"open {path}: {error}; repair or remove it") from error
    template = read_json(folder / "chat_template.json", missing={}).get("chat_template") or config.get(
        "chat_template"
    )
    if isinstance(template, list):  # several named ones
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, Mapping)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise CheckpointError(
            f"open {folder}: chat_template is a {type(template).__name__}, not text; repair it"
        )
    return template
