from mm_jax.data.records import (
    CLIENT,
    CLIENT_EMOTION,
    STRATEGY,
    THERAPIST,
    THERAPIST_EMOTION,
    Dialogue,
    Utterance,
    dialogue_samples,
    labelling_sample_id,
    majority,
    merge_turns,
)


def dialogue():
    say = [
        (THERAPIST, "hello", {THERAPIST_EMOTION: "neutral", STRATEGY: "communication skills"}),
        (CLIENT, "a", {CLIENT_EMOTION: "anger"}),
        (CLIENT, "b", {CLIENT_EMOTION: "joy"}),
        (THERAPIST, "c", {THERAPIST_EMOTION: "neutral", STRATEGY: "approval"}),
        (THERAPIST, "d", {THERAPIST_EMOTION: "joy", STRATEGY: "restatement"}),
        (CLIENT, "e", {CLIENT_EMOTION: "fear"}),
        (THERAPIST, "f", {THERAPIST_EMOTION: "neutral", STRATEGY: "others"}),
        (CLIENT, "g", {CLIENT_EMOTION: "joy"}),
    ]
    return Dialogue("7", tuple(Utterance(*said) for said in say))


def test_turns_and_samples():
    spans = merge_turns(dialogue().utterances)
    assert [(s.first, s.last) for s in spans] == [(0, 0), (1, 2), (3, 4), (5, 5), (6, 6), (7, 7)]
    first, second = dialogue_samples(dialogue())  # an opening therapist or last client turn is none
    assert first.client_text == "a b"
    assert first.response == "c d"
    # In a tie, the label seen first.
    assert first.labels == {
        CLIENT_EMOTION: "anger",
        THERAPIST_EMOTION: "neutral",
        STRATEGY: "approval",
    }
    assert [u.text for u in first.history] == ["hello"]
    assert [u.text for u in second.history] == ["hello", "a", "b", "c", "d"]
    assert second.id == "7_4"


def test_majority_ignores_unknown_and_breaks_ties_by_order():
    assert majority(["", "x", "y", "y"]) == "y"
    assert majority(["x", "y"]) == "x"
    assert majority([]) == ""


def test_history_utterances_name_the_sample_that_predicts_them():
    _, second = dialogue_samples(dialogue())
    owners = [labelling_sample_id("7", u) for u in second.history]
    # The opening therapist turn (turn 0) is predicted by no sample; turns 1 and 2 by sample 7_2.
    assert owners == ["7_0", "7_2", "7_2", "7_2", "7_2"]
