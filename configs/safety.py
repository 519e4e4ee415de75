"""Says what is shown in place of a reply, by locale: `--safety=configs/safety.py:LOCALE`.

The screens know English alone; the texts may be in any language. Copy this file to change them:
what is put in must be true where it is shown, so check every number.
"""

from mm_jax.config.errors import require

# In place of a reply to words of danger; {danger} names it in English.
CRISIS = {
    "en": (
        "These words speak of danger ({danger}). This is a research model, not a person, and no "
        "help in a crisis. In an emergency call 112 (Europe), 911 (US, Canada) or your local "
        "number. In the US and Canada call or text 988; in the UK and Ireland the Samaritans, "
        "116 123; in Australia Lifeline, 13 11 14; elsewhere see https://findahelpline.com."
    ),
    "de": (
        "Diese Worte klingen nach Gefahr. Dies ist ein Forschungsmodell, kein Mensch, und keine "
        "Hilfe in einer Krise. Im Notfall rufen Sie den Notruf 112. Menschen, die zuhören, finden "
        "Sie unter https://www.telefonseelsorge.de, https://www.143.ch (Schweiz) und "
        "https://findahelpline.com."
    ),
}
# In place of what a reply must not say; {fault} names it in English.
REPLACED = {
    "en": (
        "[This reply is not shown: it {fault}. This is a research model, not a person and not a "
        "therapist; for questions of health please ask a professional.]"
    ),
    "de": (
        "[Diese Antwort wird nicht gezeigt ({fault}). Dies ist ein Forschungsmodell, kein Mensch "
        "und kein Therapeut; mit Fragen zur Gesundheit wenden Sie sich bitte an Fachleute.]"
    ),
}
# Shown before the first words.
NOTICE = {
    "en": (
        "You are talking to a machine: a research model, not a person, not a therapist and no help "
        "in a crisis."
    ),
    "de": (
        "Sie sprechen mit einer Maschine: einem Forschungsmodell, keinem Menschen, keinem "
        "Therapeuten und keiner Hilfe in einer Krise."
    ),
}


def get_texts(arg: str = "") -> dict[str, str]:
    locale = arg or "en"
    require(
        locale in CRISIS, f"safety: expected a locale of {', '.join(sorted(CRISIS))}, got {arg!r}"
    )
    return {"crisis": CRISIS[locale], "replaced": REPLACED[locale], "notice": NOTICE[locale]}
