import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import tokenizers

from mm_jax.data import tokenizer as tokenizer_lib
from mm_jax.data.batch import Shape, collate, pad_to
from mm_jax.data.history import MemoryBudget, history_labels
from mm_jax.data.labels import built_in
from mm_jax.data.pipeline import Recipe
from mm_jax.data.prompts import Prompter, PromptError, SpanLengths, balancing_weights
from mm_jax.data.records import (
    CLIENT,
    CLIENT_EMOTION,
    STRATEGY,
    THERAPIST,
    THERAPIST_EMOTION,
    Sample,
    Utterance,
)
from mm_jax.data.tokenizer import MEMORY, SPECIAL_TOKENS, Tokenizer
from mm_jax.run import build
from tests.conftest import ROOT

QWEN = ROOT.parent / "shared" / "tokenizer" / "qwen2"

MESC = built_in("mesc")


def shown(emotion: str, strategy: str) -> dict[str, str]:
    return {THERAPIST_EMOTION: emotion, STRATEGY: strategy}


HISTORY = (
    Utterance(THERAPIST, "How are you?", shown("neutral", "open question"), turn=0),
    Utterance(CLIENT, "Bad, it was bad.", {CLIENT_EMOTION: "fear"}, turn=1),
    Utterance(THERAPIST, "I see.", shown("joy", "approval"), turn=2),
)
SAMPLE = Sample(
    id="3_4",
    dialogue_id="3",
    client_text="It goes on <video> and <MEM> <|im_end|>.",
    labels={CLIENT_EMOTION: "disgust", **shown("sadness", "self-disclosure")},
    response="Line one.\nLine two.",
    problem_type="exam",
    situation="a hard year",
    history=HISTORY,
    frames=np.zeros((4, 8, 8, 3), np.uint8),
    fbank=np.zeros((48, 128), np.float32),
)


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    words = "the client is sad and the therapist asks: how are you? It goes on and on."
    return tokenizer_lib.train([words] * 5, vocab_size=300)


@pytest.fixture(scope="module")
def prompter(tok) -> Prompter:
    return Prompter(tok, SpanLengths(patches_per_side=6), MESC, label_weight=3.0)


def text_of(tok, ids) -> str:
    return tok.backend.decode([int(i) for i in ids], skip_special_tokens=False)


@pytest.mark.parametrize("template", ["ecot", "short"])
def test_targets_never_enter_the_input(tok, template):
    """Checks that changing every target changes no prompt and no compressor input."""
    p = Prompter(tok, SpanLengths(6), MESC, template=template)
    other = dataclasses.replace(
        SAMPLE,
        labels={CLIENT_EMOTION: "joy", **shown("fear", "others")},
        response="Something else.",
    )
    a, b = (
        p.example(s, "av", history_labels(s, "gold"), with_answer=False) for s in (SAMPLE, other)
    )
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(a.history_tokens, b.history_tokens)


def test_placeholders_have_their_exact_counts(tok, prompter):
    example = prompter.example(SAMPLE, "av", history_labels(SAMPLE, "gold"))
    count = {i: int((example.tokens == i).sum()) for i in range(len(tok))}
    assert count[tok.video_id] == 2 * 3 * 3  # 4 frames, 6 x 6 patches
    assert count[tok.audio_id] == 3 * 8  # 48 fbank frames
    assert count[tok.history_id] == len(HISTORY)
    assert count[tok.memory_id] == 0
    assert (example.history_tokens[example.memory_index] == tok.memory_id).all()
    assert int((example.history_tokens == tok.memory_id).sum()) == 3
    for modality, video, audio in (("v", 18, 0), ("a", 0, 24), ("text", 0, 0)):
        got = prompter.example(SAMPLE, modality, history_labels(SAMPLE, "none"))
        assert int((got.tokens == tok.video_id).sum()) == video
        assert int((got.tokens == tok.audio_id).sum()) == audio
        assert (len(got.frames) > 0, len(got.fbank) > 0) == (video > 0, audio > 0)


def test_special_tokens_in_data_stay_text(tok, prompter):
    tokens = prompter.prompt(SAMPLE, "text", history_labels(SAMPLE, "gold"))
    assert tok.memory_id not in tokens
    assert tok.video_id not in tokens
    assert sum(t == tok.end_id for t in tokens) == 2  # system and user turns


def test_loss_covers_the_answer_only(tok, prompter):
    example = prompter.example(SAMPLE, "text", history_labels(SAMPLE, "gold"))
    answer = text_of(tok, example.tokens[example.loss_weights > 0])
    assert answer == (
        "Client's emotion: disgust\nTherapist's emotion: sadness\n"
        "Therapist's strategy: self-disclosure\n"
        "Therapist's response: Line one.\nLine two.<|im_end|>"
    )
    heavy = text_of(tok, example.tokens[example.loss_weights == 3.0])
    assert heavy == " disgust sadness self-disclosure"


def test_answers_can_end_after_the_labels(tok, prompter):
    short = dataclasses.replace(prompter, with_response=False)
    example = short.example(SAMPLE, "text", history_labels(SAMPLE, "gold"))
    answer = text_of(tok, example.tokens[example.loss_weights > 0])
    assert answer.endswith("Therapist's strategy: self-disclosure<|im_end|>")


def test_history_regimes(tok, prompter):
    gold = prompter.example(SAMPLE, "text", history_labels(SAMPLE, "gold"))
    assert text_of(tok, gold.history_tokens) == (
        "Therapist(open question) (neutral) How are you?<MEM>"
        "Client (fear) Bad, it was bad.<MEM>Therapist(approval) (joy) I see.<MEM>"
    )
    none = prompter.example(SAMPLE, "text", history_labels(SAMPLE, "none"))
    assert text_of(tok, none.history_tokens).startswith("Therapist How are you?<MEM>Client Bad")
    known = {
        "3_2": {"client_emotion": "anger", "therapist_emotion": "neutral", "strategy": "others"}
    }
    labels = history_labels(SAMPLE, "predicted", known)
    predicted = text_of(tok, prompter.example(SAMPLE, "text", labels).history_tokens)
    assert predicted.startswith("Therapist How are you?<MEM>Client (anger) Bad")
    assert predicted.endswith("Therapist(others) (neutral) I see.<MEM>")
    with pytest.raises(ValueError, match="needs the predictions"):
        history_labels(SAMPLE, "predicted")


def test_previous_labels_follow_the_regime_newest_last(tok):
    earlier = Utterance(CLIENT, "No.", {CLIENT_EMOTION: "anger"})
    sample = dataclasses.replace(SAMPLE, history=(earlier, *HISTORY))
    shown = {}
    for regime in ("gold", "none"):
        for count in (1, 2):
            p = Prompter(tok, SpanLengths(6), MESC, template="short", previous_labels=count)
            labels = history_labels(sample, regime)
            shown[regime, count] = text_of(tok, p.prompt(sample, "text", labels))
    rest = "\nTherapist's emotion: joy\nTherapist's strategy: approval\nAnswer:"
    assert f"Before:\nClient's emotion: fear{rest}" in shown["gold", 1]
    assert "Before:\nClient's emotion: anger, fear" in shown["gold", 2]
    assert "Before:" not in shown["none", 1] + shown["none", 2]


def test_too_long_is_refused_never_cut(tok):
    p = Prompter(tok, SpanLengths(6), MESC, max_length=50)
    with pytest.raises(PromptError, match="too long: sample 3_4 has"):
        p.example(SAMPLE, "av", history_labels(SAMPLE, "gold"))
    with pytest.raises(ValueError, match="does not fit"):
        pad_to(np.zeros(5), 4)


def test_reconstruction_target_is_the_history_text(tok, prompter):
    example = prompter.reconstruction(SAMPLE, history_labels(SAMPLE, "none"))
    target = text_of(tok, example.tokens[example.loss_weights > 0])
    assert target == (
        "1: Therapist How are you?\n2: Client Bad, it was bad.\n3: Therapist I see.<|im_end|>"
    )
    prompt = text_of(tok, example.tokens[example.loss_weights == 0])
    assert "1:<history>2:<history>3:<history>" in prompt


def test_reconstruction_of_labels_alone_from_the_middle_of_a_conversation(tok, prompter):
    own = dataclasses.replace(prompter, with_response=False, budget=MemoryBudget(1, 2))
    example = own.reconstruction(SAMPLE, history_labels(SAMPLE, "gold"), first=9)
    target = text_of(tok, example.tokens[example.loss_weights > 0])
    assert target == (
        "10: Therapist(open question) (neutral)\n11: Client (fear)\n"
        "12: Therapist(approval) (joy)<|im_end|>"
    )
    prompt = text_of(tok, example.tokens[example.loss_weights == 0])
    assert "10:<history>12:<history>" in prompt
    second = Recipe(unit="history", utterances=1).build(prompter, SAMPLE, 1, "text", hide=True)
    target = text_of(tok, second.tokens[second.loss_weights > 0])
    assert target == "2: Client Bad, it was bad.<|im_end|>"


def test_collate_pads_to_a_shape_with_masks(tok, prompter):
    long = prompter.example(SAMPLE, "av", history_labels(SAMPLE, "gold"))
    short = prompter.example(dataclasses.replace(SAMPLE, history=()), "text", [])
    batch = collate([long, short], tok.pad_id, Shape(1500, 4, 64, 96, 4))
    assert batch.fbank.shape == (2, 64, 128)
    assert batch.memory_index.shape == (2, 4)
    assert batch.mask.sum(axis=1).tolist() == [len(long.tokens), len(short.tokens)]
    assert batch.fbank_frames.tolist() == [48, 0]
    assert batch.frames.shape == (2, 4, 8, 8, 3)
    text_only = collate([short], tok.pad_id)
    assert text_only.frames.shape[1] == text_only.fbank.shape[1] == 0
    assert text_only.history_tokens.shape[1] == text_only.memory_index.shape[1] == 0


def test_tokenizer_folder_round_trip(tok, tmp_path):
    from transformers import AutoTokenizer

    tok.save(tmp_path / "t")
    again = Tokenizer.load(tmp_path / "t")
    text = f"the client is sad{MEMORY}"
    assert again.encode(text) == tok.encode(text)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "t")
    assert theirs(text, add_special_tokens=False)["input_ids"] == tok.encode(text)
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)


LLAMA3 = (
    "{{ bos_token }}{{ strftime_now('%d %b %Y') }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim }}"
    "{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% elif m['role'] == 'assistant' %}"
    "{{ m['content'] + eos_token }}{% else %}{{ raise_exception('Only user and assistant') }}"
    "{% endif %}{% endfor %}"
)
CHATS = {
    "llama3": (
        LLAMA3,
        ["<|begin|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end|>"],
        "<|begin|>26 Jul 2024<|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nU<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ["<|eot_id|>", "<|end|>"],
    ),
    "qwen3": (
        QWEN3,
        ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|end|>"],
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
        "<think>\n\n</think>\n\n",
        ["<|im_end|>", "<|end|>"],
    ),
    "mistral": (
        MISTRAL,
        ["<|begin|>", "[INST]", "[/INST]", "<|end|>"],
        "<|begin|>[INST] S\n\nU [/INST]",
        ["<|end|>"],
    ),
}


def foreign_tokenizer(folder, template, added, **settings) -> None:
    """Writes a tokenizer as another family releases it: no token of ours."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["the client is sad"] * 50, trainer)
    backend.add_special_tokens([t for t in added if "think" not in t])
    backend.add_tokens([t for t in added if "think" in t])
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    known = {"bos_token": "<|begin|>"} if "<|begin|>" in added else {}
    values = {"eos_token": "<|end|>", **known, "chat_template": template, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    end = backend.token_to_id("<|end|>")
    # The ids of one file are not lost where the other names none.
    stops = [{}, {"eos_token_id": [end]}]
    names = ["config.json", "generation_config.json"]
    if known:
        names.reverse()
    for name, content in zip(names, stops, strict=True):
        (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize("family", CHATS)
def test_turns_are_written_by_the_tokenizers_own_template(tmp_path, family):
    """Checks the prompt's text, that it survives saving, and that no text becomes a token."""
    template, added, expected, stops = CHATS[family]
    foreign_tokenizer(tmp_path / "theirs", template, added)
    tok = Tokenizer.load(tmp_path / "theirs")
    user = tok.encode_data("U")
    tok.save(tmp_path / "ours")
    for one in (tok, Tokenizer.load(tmp_path / "ours")):
        assert text_of(one, one.prompt("S", user)) == expected
        assert [one.backend.id_to_token(i) for i in one.stop_ids] == stops
        assert one.stop_ids[0] == one.end_id
        for text in (*added, *SPECIAL_TOKENS, f"a{added[0]}{added[1]}b"):
            assert one.added_ids.isdisjoint(one.encode_data(text)), text
            assert one.decode(one.encode_data(text)) == text
    assert tok.encode("the client") != tok.encode(" the client")  # no space is added before pieces
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tmp_path / "ours")
    messages = [{"role": "user", "content": "U"}]
    rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered.count("U") == 1
    assert rendered.endswith(expected.split("U")[-1])  # for Qwen3 without thoughts, as in training
    assert ("26 Jul 2024" in rendered) == (family == "llama3")  # and not today's date
    assert theirs.eos_token == stops[0]


@pytest.mark.parametrize("added", [True, False])
def test_tokenizers_without_a_template_get_chatml(tmp_path, added):
    """Checks that what ends and begins a text for the model still does."""
    special = ["<|begin|>", "<|end|>"]
    foreign_tokenizer(tmp_path / "base", None, special, add_bos_token=added)
    tok = Tokenizer.load(tmp_path / "base")
    bos = [tok.backend.token_to_id("<|begin|>")]
    assert tok.bos_ids == (bos if added else [])
    ids = tok.prompt("S", tok.encode_data("U"))
    assert (ids[:1] == bos) == added
    ids = ids[added:]
    assert [tok.backend.id_to_token(i) for i in tok.stop_ids] == ["<|im_end|>", "<|end|>"]
    expected = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
    assert text_of(tok, ids) == f"{expected}<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('never') }}", "cannot be rendered: never"),
        ("{{ messages[-1]['content'] }}{{ messages[0]['content'] }}", "in this order"),
        ("{% if %}", "cannot be rendered"),
        ("{{ tools|length }}", "cannot be rendered"),
        (
            "{{ messages[0]['content'] }}{{ messages[0]['content'] }}{{ messages[-1]['content'] }}",
            "once and in this order",
        ),
        ([{"name": "tools", "template": "x"}], "none of its chat templates"),
    ],
)
def test_templates_that_cannot_be_split_are_refused(tmp_path, template, message):
    foreign_tokenizer(tmp_path / "t", template, ["<|end|>"])
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(tmp_path / "t")


@pytest.mark.skipif(not QWEN.is_dir(), reason="needs the real Qwen2 tokenizer")
def test_qwen2_ids_are_those_of_the_released_model():
    tok = Tokenizer.load(QWEN)
    assert tok.memory_id == 151646
    assert len(tok) == 151650


def test_data_package_never_imports_jax():
    """Checks imports, as a reader that imports jax takes GPU memory. (grain does if it can.)"""
    code = (
        "import sys; sys.modules.update(jax=None, torch=None)\n"
        "import mm_jax.data.pipeline, mm_jax.data.batch\n"
        "import mm_jax.data.datasets.mesc.mesc_dataset_builder\n"
        "import mm_jax.data.datasets.dfew.dfew_dataset_builder\n"
        "import mm_jax.data.datasets.synthetic.synthetic_dataset_builder\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_balanced_labels_weigh_one_on_average():
    weights = balancing_weights(["a"] * 16 + ["b"] * 4 + ["", "c"])
    assert weights["b"] / weights["a"] == pytest.approx(2)
    assert weights["c"] / weights["a"] == pytest.approx(4)
    assert 16 * weights["a"] + 4 * weights["b"] + weights["c"] == pytest.approx(21)


def test_balance_weighs_the_label_tokens_alone(prompter):
    label = SAMPLE.target(CLIENT_EMOTION)
    balanced = dataclasses.replace(prompter, balance={CLIENT_EMOTION: {label: 2.0}})
    (ids, plain), (same, heavy) = prompter.answer(SAMPLE), balanced.answer(SAMPLE)
    assert ids == same
    changed = [i for i, (a, b) in enumerate(zip(plain, heavy, strict=True)) if a != b]
    lead = len(prompter.lead_ids(MESC[CLIENT_EMOTION].field, first=True))
    assert changed == list(range(lead, lead + len(prompter.label_ids(label))))
    assert {heavy[i] / plain[i] for i in changed} == {2.0}


def test_memory_budget(tok, prompter):
    sample, labels = history_sample(5), [{CLIENT_EMOTION: "joy"}] * 5
    for vectors, utterances, count in ((1, 1, 5), (3, 1, 15), (1, 2, 3), (2, 5, 2), (1, 9, 1)):
        own = dataclasses.replace(prompter, budget=MemoryBudget(vectors, utterances))
        example = own.example(sample, "text", labels)
        assert (example.tokens == tok.history_id).sum() == count
        assert len(example.memory_index) == count
        assert (example.history_tokens[example.memory_index] == tok.memory_id).all()
        assert (example.history_tokens == tok.memory_id).sum() == count
        # However many vectors there are, the recalled text is the same; its captions weigh
        # label_weight.
        recalled = own.reconstruction(sample, labels)
        target = recalled.tokens[recalled.loss_weights > 0]
        plain = prompter.reconstruction(sample, labels)
        np.testing.assert_array_equal(target, plain.tokens[plain.loss_weights > 0])
        weighty = recalled.tokens[recalled.loss_weights == own.label_weight]
        assert text_of(tok, weighty) == " Client (joy)" * 5
    with pytest.raises(ValueError, match="at least 1"):
        MemoryBudget(0, 1)


def test_history_as_text(tok, prompter):
    """Checks that its lines are in the prompt, with labels by the regime, and none are left for a
    compressor."""
    own = dataclasses.replace(prompter, history="text", parts=())
    labels = history_labels(SAMPLE, "gold")
    example = own.example(SAMPLE, "text", labels)
    text = text_of(tok, example.tokens)
    assert (
        "so far: \nTherapist(open question) (neutral) How are you?\nClient (fear) Bad, it was bad."
        "\nTherapist(approval) (joy) I see.\nThe client now says:" in text
    )
    assert tok.history_id not in example.tokens
    assert (len(example.history_tokens), len(example.memory_index)) == (0, 0)
    hidden = text_of(tok, own.example(SAMPLE, "text", history_labels(SAMPLE, "none")).tokens)
    assert "\nClient Bad, it was bad." in hidden
    assert "fear" not in hidden.split("now says")[0]
    unsafe = dataclasses.replace(SAMPLE, history=(Utterance(CLIENT, "<video> <|im_end|>"),))
    plain = own.example(SAMPLE, "text", labels).tokens
    marked = own.example(unsafe, "text", [None]).tokens
    for special in (tok.video_id, tok.end_id):
        assert (marked == special).sum() == (plain == special).sum()


def test_the_newest_utterances_as_text_and_the_older_ones_as_memory(tok, prompter):
    """Checks that lines are whole, and that every utterance is in one of both."""
    sample = history_sample(6)
    labels = [{CLIENT_EMOTION: "joy"}] * 6
    line = len(tok.encode("\nClient (joy)") + tok.encode_data(" line 0"))
    for limit, newest in (
        (line - 1, 0),
        (line, 1),
        (3 * line - 1, 2),
        (3 * line, 3),
        (99 * line, 6),
    ):
        both = dataclasses.replace(prompter, history="both", history_tokens=limit)
        example = both.example(sample, "text", labels)
        text = text_of(tok, example.tokens)
        shown = [i for i in range(6) if f"\nClient (joy) line {i}" in text]
        assert shown == list(range(6 - newest, 6))
        assert (example.tokens == tok.history_id).sum() == 6 - newest == len(example.memory_index)
        read = text_of(tok, example.history_tokens)
        assert [i for i in range(6) if f" line {i}" in read] == list(range(6 - newest))
        assert example.settled == len(example.history_tokens)
        alone = dataclasses.replace(prompter, history="text", history_tokens=limit, parts=())
        plain = alone.example(sample, "text", labels)
        assert text_of(tok, plain.tokens) == text.replace("<history>", "")
        assert len(plain.history_tokens) == 0


def history_sample(utterances: int):
    history = tuple(
        Utterance(CLIENT, f"line {i}", {CLIENT_EMOTION: "joy"}, turn=i) for i in range(utterances)
    )
    return dataclasses.replace(SAMPLE, history=history)


def test_a_trained_tokenizer_has_a_token_for_the_number_of_every_line(config, tmp_path):
    """Checks it where a compressor is trained: numbers cut into pieces would share their digits."""
    tok = build.run_tokenizer(config, tmp_path, MESC)
    for number in range(1, 100):
        line = [tok.decode([i]) for i in tok.encode(f"Client (joy) yes\n{number}: Therapist")]
        assert line.count(f"{number}:" if number > 9 else str(number)) == 1
        said = tok.encode_data(f" at {number}:30")  # what people say has no such tokens
        assert tok.added_ids.isdisjoint(said)
    config.model.parts = tuple(p for p in config.model.parts if p != "compressor")
    other = build.run_tokenizer(config, tmp_path / "other", MESC)
    assert len(other.encode("97")) == 2
