"""Whatever the input, parsers and readers give a value or the error they name (hypothesis)."""

import csv
import io
import json
import pathlib
import tempfile

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mm_jax.config.errors import ConfigError
from mm_jax.config.files import read_text, well_formed
from mm_jax.config.load import overridden
from mm_jax.config.schema import Config
from mm_jax.data.answers import cut_at_fields, format_answer, parse_answer
from mm_jax.data.conversation import parse_history
from mm_jax.data.datasets.common import DataError
from mm_jax.data.datasets.dfew.dfew_dataset_builder import read_labels
from mm_jax.data.labels import built_in
from mm_jax.data.tokenizer import Tokenizer, added_tokens, plain_pieces, train
from mm_jax.evaluation.agreement import CRITERIA
from mm_jax.evaluation.judges import VERDICTS, parse_verdict
from mm_jax.evaluation.predictions import parse_row
from mm_jax.evaluation.screen import screen_client
from mm_jax.rewards.calls import CallError
from mm_jax.rewards.chat import retry_after
from mm_jax.rewards.judge import DIMENSIONS, parse_ratings, parse_released
from tools.annotation.formats import read_annotations

settings.register_profile(
    "mm_jax",
    deadline=None,
    max_examples=150,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("mm_jax")

# Text with lone surrogates, marks of other line ends, and what the formats are made of.
TEXT = st.text(st.characters(), max_size=60) | st.sampled_from(
    ["\ufeffClient: hi", "a\u2028b", "\x85", "\x0b", "\ud800", "<|im_end|>", "Client:", "None", "{"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


def dumps(value):
    return json.dumps(value)


SPACES = (built_in("mesc"), built_in("dfew"))
MESC = SPACES[0]
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "speaker": st.sampled_from(["Client", "therapist", "Doctor"]) | JSON,
        "text": JSON,
        "emotion": st.sampled_from(["Fear", "joy"]) | JSON,
        "strategy": JSON,
    },
)


@given(TEXT | st.lists(TEXT).map("\n".join) | st.lists(ENTRY | JSON, max_size=4).map(dumps))
@example("Therapist: Hello.\nClient: I am\ntired\u2028today.")
@example('[{"speaker": "Client", "text": null}]')
@example("[" * 100_000)
def test_history(text):
    try:
        found = parse_history(text, MESC)
    except ConfigError as error:
        assert str(error)
        return
    for utterance in found:
        assert utterance.text not in ("None", "nan")
        utterance.text.encode()  # no lone surrogate is left


def test_wrapped_and_odd_lines_of_a_history_are_read():
    found = parse_history(
        "Therapist: Hello,\n  how are you?\n\nClient: So\u2028so.\x0b\x85Fine", MESC
    )
    assert [u.text for u in found] == ["Hello, how are you?", "So\u2028so.\x0b\x85Fine"]
    with pytest.raises(ConfigError, match="entry 0: text: expected text, got None"):
        parse_history('[{"speaker": "Client", "text": null}]', MESC)
    with pytest.raises(ConfigError, match="line 1: expected 'Client: "):
        parse_history("hello", MESC)


@given(st.binary(max_size=80) | TEXT.map(lambda t: t.encode("utf-16", "replace")))
@example("café".encode("cp1252"))
@example("\ufeffa;b".encode())
@example(b"\x00\x01")
def test_text_files(data):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "x.txt"
        path.write_bytes(data)
        try:
            text = read_text(path)
        except ConfigError as error:
            assert "not a text file" in str(error) or "damaged UTF-8" in str(error)
            return
        assert "\r" not in text
        assert "\0" not in text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252"])
def test_text_files_in_the_encodings_people_save(tmp_path, encoding):
    (tmp_path / "a").write_bytes("Zoé: “ja”\r\nnein\r".encode(encoding))
    assert read_text(tmp_path / "a") == "Zoé: “ja”\nnein\n"


LINES = st.lists(
    st.sampled_from(["Client's emotion: joy", "client’s Emotion: SAD!", "Therapist's strategy:"])
    | st.just("Therapist's response: I hear you.\nTherapist's strategy: approval")
    | TEXT,
    max_size=5,
).map("\n".join)


@given(LINES, st.sampled_from(SPACES))
def test_answers(text, space):
    parsed = parse_answer(text, space)
    for task, label in parsed.labels.items():
        assert label == "" or label in space[task].labels
    assert len(cut_at_fields(parsed.response, space)) <= len(parsed.response)
    if parsed.status == "ok":
        again = parse_answer(format_answer(parsed.labels, parsed.response, space), space)
        assert again.labels == parsed.labels


def test_a_reply_ends_where_another_field_begins():
    assert cut_at_fields("I hear you.\nTherapist's strategy: approval", MESC) == "I hear you."
    assert cut_at_fields("Therapist's response: a", MESC) == ""
    asked = "What is the client's emotion?"
    assert cut_at_fields(asked, MESC) == asked


@given(TEXT, st.sampled_from([task for space in SPACES for task in space.tasks]))
def test_labels(text, task):
    assert task.normalise(text) in ("", *task.labels)
    for label in task.labels:
        assert task.normalise(f" **{label.upper()}**. ") == label


RATINGS = st.dictionaries(st.sampled_from([*DIMENSIONS, "safety", "x"]), JSON, max_size=9)


@given(TEXT | RATINGS.map(dumps) | st.tuples(TEXT, RATINGS.map(dumps), TEXT).map("".join))
def test_judge_answers(text):
    for parse in (parse_ratings, parse_released):
        try:
            found = parse(text)
        except CallError as error:
            assert error.reason == "unparseable"
        else:
            assert list(found) == list(DIMENSIONS)
            assert all(isinstance(v, int) for v in found.values())
    try:
        assert parse_verdict(text) in VERDICTS
    except CallError as error:
        assert error.reason == "unparseable"


@given(TEXT)
def test_headers_and_screens_take_any_text(text):
    wait = retry_after(text)
    assert wait is None or wait >= 0
    assert isinstance(screen_client(text), str)
    well_formed(text).encode()


ROW = st.fixed_dictionaries(
    {
        "id": st.just("a") | JSON,
        "label_space": st.just("mesc") | JSON,
        "status": st.just("ok") | JSON,
        "modality": st.just("text") | JSON,
        "modality_asked": st.just("av") | JSON,
        "history_labels": st.just("gold") | JSON,
        "gold": st.just({"strategy": "approval"}) | JSON,
        "predicted": st.just({"strategy": "approval"}) | JSON,
    },
    optional={
        "cue": JSON,
        "turn": JSON,
        "finished": JSON,
        "probabilities": JSON
        | st.dictionaries(
            st.sampled_from(["strategy", "client_emotion"]),
            st.dictionaries(st.sampled_from(["approval", "joy"]), JSON, max_size=2),
        ),
    },
)


@given(TEXT | JSON.map(dumps) | ROW.map(dumps))
@example("[" * 100_000)
def test_predictions(text):
    try:
        row = parse_row(text, "p.jsonl line 1")
    except ConfigError as error:
        assert str(error).startswith("p.jsonl line 1: ")
        return
    assert all(isinstance(v, str) for v in row.predicted.values())
    for task in row.probabilities or {}:
        total = sum(row.distribution(task).values())
        assert total == 0 or abs(total - 1) < 0.06


KEY = {"set": "s", "items": {"item_001": {"sample": "a", "systems": ["x", "y"]}}}
CELL = st.sampled_from(["item_001", "a", "B", "no difference", ""]) | TEXT


@st.composite
def tables(draw):
    file = io.StringIO()
    writer = csv.writer(file, delimiter=draw(st.sampled_from(",;\t")))
    writer.writerow(draw(st.just(["item", "A", *CRITERIA]) | st.lists(CELL, max_size=4)))
    for row in draw(st.lists(st.lists(CELL, max_size=8), max_size=4)):
        writer.writerow([well_formed(cell) for cell in row])
    return file.getvalue()


@given(tables() | TEXT | JSON.map(dumps), st.sampled_from([".csv", ".CSV", ".json", ".jsonl"]))
def test_items(text, suffix):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / f"ann{suffix}"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            finished, unfinished = read_annotations(path, KEY, {})
        except ConfigError as error:
            assert str(path) in str(error)
            return
        assert unfinished >= 0
        assert all(set(r["choices"]) == set(CRITERIA) for r in finished)


@given(st.lists(st.tuples(CELL | st.sampled_from("1234567"), CELL), max_size=4))
def test_label_files(rows):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "set_1.csv"
        lines = ["video_name,label", *(",".join(map(well_formed, row)) for row in rows)]
        path.write_text("\n".join(lines), encoding="utf-8")
        try:
            found = read_labels(path)
        except (ConfigError, DataError) as error:
            assert str(path) in str(error)
        else:
            assert found


KEYS = st.sampled_from(
    ["seed", "stages", "data.label_space", "stage.sft.steps", "model.llm.x", "reward.judge.model"]
)


@given(st.lists(st.tuples(KEYS | TEXT, TEXT | JSON.map(dumps)).map("=".join), max_size=3))
def test_config_overrides(overrides):
    try:
        assert isinstance(overridden(Config(), overrides), Config)
    except ConfigError as error:
        assert str(error)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    made = train(["Client: hello there, how are you?"] * 50, 400)
    made.backend.add_tokens(["<tool_call>"])
    made.backend.add_special_tokens(["<|vision_start|>"])
    return Tokenizer(made.backend)


TOKENS = ["<|im_end|>", "<tool_call>", "<|vision_start|>", "<MEM>", "<video>", "<|im_", "end|>"]


@given(st.lists(st.sampled_from(TOKENS) | TEXT, max_size=6).map("".join).map(well_formed))
@example("<tool_call>hi<|vision_start|>")
def test_no_text_becomes_a_special_token(tokenizer, text):
    ids = tokenizer.encode_data(text)
    added = set(tokenizer.backend.get_added_tokens_decoder())
    assert not added & set(ids)
    pattern = added_tokens(TOKENS[:5])
    assert "".join(plain_pieces(text, pattern)) == text
    assert not any(pattern.search(piece) for piece in plain_pieces(text, pattern))


def test_damaged_utf8_is_not_taken_for_another_encoding(tmp_path):
    data = "I’m fine — café\n".encode() + b"\xe9\n"
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(ConfigError, match=f"damaged UTF-8: byte 0xe9 at {len(data) - 2} of"):
        read_text(tmp_path / "a")
