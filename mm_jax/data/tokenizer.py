"""Loads Hugging Face tokenizers with their chat format, and trains byte-level BPE ones."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Sequence

import tokenizers

from mm_jax.config.files import read_json, read_text

MEMORY, VIDEO, AUDIO, HISTORY = "<MEM>", "<video>", "<audio>", "<history>"
SPECIAL_TOKENS = (MEMORY, VIDEO, AUDIO, HISTORY)
TURN_START, TURN_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
# The turns of tokenizers that have no template of their own.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)
# How Qwen2 cuts text into words: transformers does so for every folder of `model_type: qwen2`.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's names of such ways.
LLAMA_CPP = {"qwen2": WORDS, "llama-bpe": WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")}


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


@dataclasses.dataclass(frozen=True)
class Chat:
    """How a tokenizer's chat template writes one exchange: the texts around its contents.

    A prompt is before_system, the system's text, before_user, the user's text, after_user (which
    opens the reply). The reply ends with the token `end`, or any of `stops`. `bos` and `pad` are
    tokens ("": none, and `end`).
    """

    template: str = CHAT_TEMPLATE
    before_system: str = f"{TURN_START}system\n"
    before_user: str = f"{TURN_END}\n{TURN_START}user\n"
    after_user: str = f"{TURN_END}\n{TURN_START}assistant\n"
    end: str = TURN_END
    stops: tuple[str, ...] = ()
    bos: str = ""
    pad: str = END_OF_TEXT


class Tokenizer:
    """A fast tokenizer with the turns of its chat and the four placeholders of spec section 2.

    `<MEM> <video> <audio> <history>`, and ChatML's tokens where there is no chat template, are
    appended to the vocabulary if it lacks them (Qwen2 has 151,646 tokens, so `<MEM>` is 151646).
    """

    def __init__(self, backend: tokenizers.Tokenizer, chat: Chat | None = None):
        self.backend, self.chat = backend, chat or Chat()
        chatml = [t for t in CHAT_TOKENS if t in (self.chat.template + self.chat.pad)]
        wanted = [t for t in (*chatml, *SPECIAL_TOKENS) if backend.token_to_id(t) is None]
        backend.add_special_tokens(wanted)
        self.memory_id, self.video_id, self.audio_id, self.history_id = (
            backend.token_to_id(t) for t in SPECIAL_TOKENS
        )
        added = {i: t.content for i, t in backend.get_added_tokens_decoder().items()}
        self.added_texts = set(added.values())
        self.added = added_tokens(self.added_texts)
        self.added_ids = {i for i, t in added.items() if len(t) > 1 and t.strip()}
        # Rows that the compressor's table needs: its input holds no media placeholders.
        placeholders = {self.video_id, self.audio_id, self.history_id}
        ids = backend.get_vocab(with_added_tokens=True).values()
        self.text_rows = 1 + max(i for i in ids if i not in placeholders)
        self.end_id = backend.token_to_id(self.chat.end)
        self.stop_ids = (self.end_id, *map(backend.token_to_id, self.chat.stops))
        self.pad_id = backend.token_to_id(self.chat.pad or self.chat.end)
        # What stands before a text that is no chat, as before a prompt.
        begins = bool(self.chat.bos) and self.chat.before_system.startswith(self.chat.bos)
        self.bos_ids = [backend.token_to_id(self.chat.bos)] if begins else []

    @classmethod
    def load(cls, source: str | pathlib.Path) -> Tokenizer:
        """Reads a Hugging Face tokenizer folder, a GGUF file, or a folder that `save` wrote.

        Raises ValueError or FileNotFoundError.
        """
        source = pathlib.Path(source)
        path, settings = source / "tokenizer.json", {}
        if path.is_file():
            try:
                backend = tokenizers.Tokenizer.from_file(str(path))
            except Exception as error:  # the library raises nothing narrower
                raise ValueError(f"tokenizer: {path} cannot be read: {error}") from error
            settings = read_settings(source)
            if "mm_jax" in settings:
                own = {**settings["mm_jax"], "template": settings["chat_template"]}
                return cls(backend, Chat(**{**own, "stops": tuple(own["stops"])}))
        else:
            backend, settings = read_with_transformers(source)
        backend = without_added_space(backend)
        return cls(backend, read_chat(backend, settings, str(source)))

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes a folder that `transformers.AutoTokenizer` loads too."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        own = dataclasses.asdict(self.chat)
        template = own.pop("template")
        special = [t for t in CHAT_TOKENS[1:] if t in template]
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.chat.end,
            "pad_token": self.chat.pad or self.chat.end,
            "additional_special_tokens": [*special, *SPECIAL_TOKENS],
            "clean_up_tokenization_spaces": False,
            "chat_template": template,
            "mm_jax": own,
        }
        if self.chat.bos:
            config["bos_token"] = self.chat.bos
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))

    def __len__(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Returns token ids, with special tokens parsed: only for our own templates."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_data(self, text: str) -> list[int]:
        """Returns the token ids of text from data, in which all added tokens are ordinary text."""
        pieces = plain_pieces(text, self.added)
        ids = [i for piece in pieces for i in self.encode(piece)]
        if self.added_ids.isdisjoint(ids):
            return ids
        # A token that only the normalised text spells, such as one in full-width letters.
        return [i for letter in text for i in self.encode(letter)]

    def prompt(self, system: str, user: Sequence[int]) -> list[int]:
        """Returns the ids of a prompt that ends with the opening of the assistant's turn."""
        head = self.encode(f"{self.chat.before_system}{system}{self.chat.before_user}")
        return [*head, *user, *self.encode(self.chat.after_user)]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of the ids without special tokens."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)


def read_settings(folder: pathlib.Path) -> dict:
    """Reads a folder's tokenizer_config.json, with the template and the stop ids of other files."""
    settings = {}
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            found = read_json(folder / name).get("eos_token_id")
            settings |= {} if found is None else {"stop_ids": found}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            settings.update(read_json(folder / name))
    if (folder / "chat_template.jinja").is_file():
        settings["chat_template"] = read_text(folder / "chat_template.jinja")
    return settings


def read_with_transformers(source: pathlib.Path) -> tuple[tokenizers.Tokenizer, dict]:
    """Reads a GGUF file's tokenizer, or a folder of an older format."""
    from transformers import AutoTokenizer  # heavy; only sources without tokenizer.json

    if source.suffix == ".gguf" and source.is_file():
        loaded, settings = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name), {}
    elif (source / "tokenizer_config.json").is_file():
        loaded, settings = AutoTokenizer.from_pretrained(source), read_settings(source)
    else:
        raise FileNotFoundError(
            f"tokenizer: {source} has no tokenizer.json or tokenizer_config.json, and is no GGUF "
            "file"
        )
    names = ("bos_token", "eos_token", "pad_token", "chat_template")
    settings |= {n: getattr(loaded, n) for n in names if getattr(loaded, n) is not None}
    settings.setdefault("stop_ids", loaded.eos_token_id)
    settings.setdefault("add_bos_token", bool(getattr(loaded, "add_bos_token", False)))
    return loaded.backend_tokenizer, settings


def without_added_space(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Turns off the space that some tokenizers put before every text: prompts come in pieces."""
    spec = json.loads(backend.to_str())
    before = json.dumps(spec)
    for name in ("normalizer", "pre_tokenizer"):
        part = spec[name] or {}
        inside = part.get("normalizers") or part.get("pretokenizers") or [part]
        kept = [step for step in inside if step.get("type") != "Prepend"]
        for step in kept:
            if step.get("type") == "Metaspace":
                step["prepend_scheme"] = "never"
            if step.get("add_prefix_space"):
                step["add_prefix_space"] = False
        if len(kept) < len(inside):
            spec[name] = {"type": "Sequence", "normalizers": kept}
    after = json.dumps(spec)
    return backend if after == before else tokenizers.Tokenizer.from_str(after)


PLACES = ("@@system@@", "@@user@@", "@@reply@@")


def read_chat(backend: tokenizers.Tokenizer, settings: dict, source: str) -> Chat:
    """Renders a tokenizer's chat template once, and splits it around the contents.

    Without a template the turns are ChatML. Raises ValueError for one that cannot be split.
    """

    def special(name: str) -> str:
        token = settings.get(name) or ""
        token = token.get("content", "") if isinstance(token, dict) else token
        return token if backend.token_to_id(token) is not None else ""

    stops = settings.get("stop_ids")
    stops = stops if isinstance(stops, list) else [stops]
    texts = [backend.id_to_token(i) for i in stops if isinstance(i, int)]
    bos, pad = special("bos_token"), special("pad_token")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name
        template = {t["name"]: t["template"] for t in template}
    if isinstance(template, dict):
        if "default" not in template:
            raise ValueError(f"{source}: none of its chat templates {list(template)} is default")
        template = template["default"]
    if template is None:
        # Where the tokenizer itself begins every text with a token, so does a prompt.
        first = bos if settings.get("add_bos_token") or begins_with(backend, bos) else ""
        own = Chat()
        eos = [t for t in (special("eos_token"), *texts) if t]
        return dataclasses.replace(
            own,
            template=f"{{{{ {json.dumps(first)} }}}}{own.template}" if first else own.template,
            before_system=first + own.before_system,
            stops=unique(eos, own.end),
            bos=bos,
            pad=pad or own.pad,
        )
    template = settled(template)
    render = renderer(backend, template, special)
    system, user, reply = PLACES
    try:
        try:
            messages = [("system", system), ("user", user)]
            prompt = render(messages, opened=True)
        except Exception:  # it knows no system
            messages = [("user", f"{system}\n\n{user}")]
            prompt = render(messages, opened=True)
        whole = render([*messages, ("assistant", reply)], opened=False)
    except Exception as error:  # a template can raise anything
        raise ValueError(f"{source}: its chat template cannot be rendered: {error}") from error
    counts = [prompt.count(system), prompt.count(user), whole.count(reply)]
    if counts != [1, 1, 1] or prompt.find(system) > prompt.find(user):
        raise ValueError(
            f"{source}: its chat template does not write the system's and the user's text once "
            f"and in this order: {prompt!r}"
        )
    before_system, rest = prompt.split(system)
    before_user, after_user = rest.split(user)
    added = backend.get_added_tokens_decoder().values()
    closing = added_tokens(t.content for t in added).search(whole.split(reply)[1])
    end = closing.group() if closing else special("eos_token")
    if not end:
        raise ValueError(f"{source}: no token ends a reply, and there is no eos_token")
    return Chat(
        template,
        before_system,
        before_user,
        after_user,
        end,
        unique(texts, end),
        bos,
        pad,
    )


DAY = datetime.date(2024, 7, 26)  # what Llama 3's template writes where it knows no date


def settled(template: str) -> str:
    """Settles what a template leaves open, so that others render what training saw: no thoughts,
    and one day's date instead of today's."""
    if "strftime_now" in template:
        formats = dict.fromkeys(re.findall(r"""strftime_now\(\s*["']([^"']+)["']""", template))
        texts = json.dumps({f: DAY.strftime(f) for f in formats})
        macro = f"{{%- macro strftime_now(format) -%}}{{{{ {texts}[format] }}}}{{%- endmacro -%}}"
        template = macro + template
    if "enable_thinking" in template:
        template = f"{{%- set enable_thinking = false -%}}{template}"
    return template


def llama_cpp_name(spec: dict, source: str) -> str:
    """Returns llama.cpp's name for how a tokenizer.json cuts text into words. Raises ValueError."""
    part = spec.get("pre_tokenizer") or {}
    steps = part.get("pretokenizers", [part])
    if spec["model"]["type"] == "BPE" and not spec["model"].get("byte_fallback"):
        patterns = [step.get("pattern", {}).get("Regex") for step in steps]
        for name, pattern in LLAMA_CPP.items():
            if pattern in patterns:
                return name
        kinds = [step.get("type") for step in steps]
        if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
            return "smollm"
        if kinds == ["ByteLevel"] and steps[0]["use_regex"]:
            return "gpt-2"
    raise ValueError(
        f"{source}: a GGUF file can hold byte-level BPE that cuts words as GPT-2, SmolLM2, Qwen2 "
        f"or Llama 3 does; this tokenizer is {spec['model']['type']} with {part}"
    )


def unique(tokens: Iterable[str | None], end: str) -> tuple[str, ...]:
    """Returns the tokens other than `end`, each once."""
    return tuple(t for t in dict.fromkeys(tokens) if t and t != end)


def begins_with(backend: tokenizers.Tokenizer, token: str) -> bool:
    """Tells whether the tokenizer's own post-processor puts the token before every text."""
    return bool(token) and backend.encode("a").ids[:1] == [backend.token_to_id(token)]


def renderer(
    backend: tokenizers.Tokenizer, template: str, special: Callable[[str], str]
) -> Callable[..., str]:
    """Returns a function (messages of (role, content), opened) -> text."""
    from transformers import PreTrainedTokenizerFast  # heavy; only when a run is set up

    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    tokens = {name: special(name) for name in names if special(name)}
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)

    def render(messages: list[tuple[str, str]], opened: bool) -> str:
        return fast.apply_chat_template(
            [{"role": role, "content": content} for role, content in messages],
            chat_template=template,
            tokenize=False,
            add_generation_prompt=opened,
            enable_thinking=False,
        )

    return render


def train(texts: Iterable[str], vocab_size: int, whole: Sequence[str] = ()) -> Tokenizer:
    """Trains a byte-level BPE like Qwen2's, with ChatML tokens, on `texts` (only of train); the
    texts `whole`, where our own templates write them, are one token each."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.normalizer = tokenizers.normalizers.NFC()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS) - len(whole),
        min_frequency=2,
        special_tokens=list(CHAT_TOKENS),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in whole])
    return Tokenizer(backend)


def copy_or_train(
    source: str,
    target: pathlib.Path,
    texts: Iterable[str],
    vocab_size: int,
    whole: Sequence[str] = (),
) -> Tokenizer:
    """Returns the run's tokenizer in `target`, first copied from `source`, or trained if ""."""
    if (target / "tokenizer.json").is_file():
        return load(str(target))
    tokenizer = Tokenizer.load(source) if source else train(texts, vocab_size, whole)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer.save(partial)
    partial.rename(target)
    return tokenizer


@functools.lru_cache(maxsize=4)
def load(folder: str) -> Tokenizer:
    """Loads a tokenizer once per process (grain workers call this for every example)."""
    return Tokenizer.load(folder)
