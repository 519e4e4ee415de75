"""Loads Hugging Face tokenizers, and trains byte-level BPE ones on a train split."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterable, Sequence

import tokenizers

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

MEMORY, VIDEO, AUDIO, HISTORY = "<MEM>", "<video>", "<audio>", "<history>"
SPECIAL_TOKENS = (MEMORY, VIDEO, AUDIO, HISTORY)
TURN_START, TURN_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
# The same turns as `prompts` writes, for libraries that render chats themselves.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)


def added_tokens(tokens: Iterable[str]) -> re.Pattern:
    """Compiles the pattern of a tokenizer's added tokens (special, or such as `<tool_call>`)."""
    able = sorted((t for t in tokens if len(t) > 1 and t.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, able)) or r"(?!)")


def plain_pieces(text: str, added: re.Pattern) -> list[str]:
    """Cuts text inside every added token, so that each piece encodes as ordinary text."""
    pieces, start = [], 0
    while match := added.search(text, start):
        pieces.append(text[start : match.start() + 1])
        start = match.start() + 1
    return [*pieces, text[start:]]


class Tokenizer:
    """A fast tokenizer with ChatML turns and the four placeholders of spec section 2.

    `<MEM> <video> <audio> <history>` are appended to the vocabulary if the folder lacks them
    (Qwen2 has 151,646 tokens, so `<MEM>` is 151646).
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        self.backend = backend
        missing = [t for t in (*CHAT_TOKENS, *SPECIAL_TOKENS) if backend.token_to_id(t) is None]
        lacking_chat = [t for t in missing if t in CHAT_TOKENS]
        if lacking_chat:
            raise ValueError(
                f"tokenizer: expected ChatML tokens {list(CHAT_TOKENS)}, missing {lacking_chat}; "
                "use a Qwen2 tokenizer folder or train one with `tokenizer.train`"
            )
        backend.add_special_tokens(missing)
        self.memory_id, self.video_id, self.audio_id, self.history_id = (
            backend.token_to_id(t) for t in SPECIAL_TOKENS
        )
        self.added = added_tokens(t.content for t in backend.get_added_tokens_decoder().values())
        # Rows that the compressor's table needs: its input holds no media placeholders.
        placeholders = {self.video_id, self.audio_id, self.history_id}
        ids = backend.get_vocab(with_added_tokens=True).values()
        self.text_rows = 1 + max(i for i in ids if i not in placeholders)
        self.end_id = backend.token_to_id(TURN_END)
        self.pad_id = backend.token_to_id(END_OF_TEXT)

    @classmethod
    def load(cls, folder: str | pathlib.Path) -> Tokenizer:
        """Reads a Hugging Face tokenizer folder (older formats through transformers)."""
        folder = pathlib.Path(folder)
        path = folder / "tokenizer.json"
        if path.is_file():
            try:
                backend = tokenizers.Tokenizer.from_file(str(path))
            except Exception as error:  # the library raises nothing narrower
                raise ValueError(f"tokenizer: {path} cannot be read: {error}") from error
            return cls(backend)
        if not (folder / "tokenizer_config.json").is_file():
            raise FileNotFoundError(
                f"tokenizer: {folder} has no tokenizer.json or tokenizer_config.json"
            )
        from transformers import AutoTokenizer  # heavy; only folders without tokenizer.json

        return cls(AutoTokenizer.from_pretrained(folder).backend_tokenizer)

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes a folder that `transformers.AutoTokenizer` loads too."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": TURN_END,
            "pad_token": END_OF_TEXT,
            "additional_special_tokens": [TURN_START, TURN_END, *SPECIAL_TOKENS],
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))

    def __len__(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Returns token ids, with special tokens parsed: only for our own templates."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_data(self, text: str) -> list[int]:
        """Returns the token ids of text from data, in which all added tokens are ordinary text."""
        pieces = plain_pieces(text, self.added)
        return [i for piece in pieces for i in self.encode(piece)]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of the ids without special tokens."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE with ChatML tokens on `texts` (use only the train split)."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.normalizer = tokenizers.normalizers.NFC()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        min_frequency=2,
        special_tokens=list(CHAT_TOKENS),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend)


def copy_or_train(
    source: str, target: pathlib.Path, texts: Iterable[str], vocab_size: int
) -> Tokenizer:
    """Returns the run's tokenizer in `target`, first copied from `source`, or trained if ""."""
    if (target / "tokenizer.json").is_file():
        return load(str(target))
    tokenizer = Tokenizer.load(source) if source else train(texts, vocab_size)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer.save(partial)
    partial.rename(target)
    return tokenizer


@functools.lru_cache(maxsize=4)
def load(folder: str) -> Tokenizer:
    """Loads a tokenizer once per process (grain workers call this for every example)."""
    return Tokenizer.load(folder)
