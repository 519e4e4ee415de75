"""The items on which annotators are trained and qualified."""

from __future__ import annotations

from mm_jax.evaluation.agreement import CRITERIA

# Replies of clearly different quality, with the expected answer for each criterion.
TRAINING = (
    (
        ["Therapist: How was the week?", "Client: My cat died on Monday. I keep looking for her."],
        [
            "Cats are cheap, buy another one.",
            "I am so sorry. You keep looking for her, as if she might still come in. Would it help "
            "to tell me about her?",
            "Week the was how cat Monday is is.",
        ],
        "BBBBB",
    ),
    (
        ["Client: I failed the exam again and I haven't told my parents."],
        [
            "It hurts to fail twice, and keeping it to yourself must weigh on you too. Shall we "
            "think about how you could tell them?",
            "You failed because you are lazy.",
            "Exam exam parents told the.",
        ],
        "AAAAA",
    ),
    (
        ["Client: Since the fight my sister does not answer. I think I was unfair to her."],
        [
            "Sister fight not does answer does.",
            "Sisters always come back, forget it.",
            "You miss her, and you wonder whether you hurt her. What would you want to say if she "
            "picked up, and could you write it to her?",
        ],
        "CCCCC",
    ),
    (
        ["Client: I can't sleep since the accident. I see the lights every night."],
        [
            "Just close your eyes.",
            "I night sleep lights the can't.",
            "Seeing those lights night after night sounds frightening and exhausting. We could "
            "look for something that helps you settle before bed; what have you tried?",
        ],
        "CCCCC",
    ),
    (
        ["Client: They promoted Jan instead of me. After all these years."],
        [
            "After so many years that must feel like a slap, as if your work went unseen. Would "
            "you like to plan how to ask your boss what was missing?",
            "Jan years years promoted promoted.",
            "Well, Jan is simply better than you.",
        ],
        "AAAAA",
    ),
)


def training_items() -> list[dict]:
    items = []
    for i, (lines, replies, answers) in enumerate(TRAINING, 1):
        context = [dict(zip(("speaker", "text"), x.split(": ", 1), strict=True)) for x in lines]
        expected = dict(zip(CRITERIA, answers, strict=True))
        items.append(
            {"id": f"training_{i}", "context": context, "replies": replies, "expected": expected}
        )
    return items
