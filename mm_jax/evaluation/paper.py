"""Holds the paper's results (spec section 5), shown next to ours; all scores in percent."""

# system: (T1, T2, T3, BLEU-2, ROUGE-L, BERTScore); a pair is (accuracy, weighted-F1).
MESC_TEST = {
    "MultiMood SFT": ((56.38, 55.81), (99.11, 99.11), (36.78, 34.32), 4.58, 13.47, 85.71),
    "MultiMood SFT+Compressor": (
        (53.75, 51.75),
        (99.33, 99.00),
        (39.29, 36.25),
        5.26,
        15.34,
        85.81,
    ),
    "MultiMood SFT+GRPO": ((58.60, 57.78), (99.33, 99.00), (42.81, 39.65), 6.18, 17.86, 86.80),
    "MultiMood SFT+Compressor+GRPO": (
        (55.94, 55.33),
        (99.11, 99.11),
        (38.10, 34.58),
        5.42,
        15.83,
        86.00,
    ),
    "SMES": ((54.60, 46.80), (96.10, 64.00), (49.00, 20.20), 5.13, 15.42, 86.80),
    "MMDFN": ((58.13, 55.86), None, None, None, None, None),
    "GPT-4o (text)": ((38.98, 43.56), (72.46, 83.60), (24.88, 26.26), 2.30, 9.20, 84.31),
    "Qwen2-7B SFT": ((41.83, 37.16), (99.33, 99.00), (37.43, 33.52), 4.68, 13.20, 85.61),
    "VideoLLaMA2-72B": ((55.06, 55.68), (97.36, 98.10), (25.77, 26.09), 3.55, 13.77, 85.37),
}
# system: recalls (hap, sad, neu, ang, sur, dis, fea), UAR, WAR.
DFEW = {
    "MultiMood": ((96.31, 93.68, 89.45, 88.82, 81.68, 78.38, 85.19), 85.94, 89.89),
    "EmotionLLaMA": (None, 64.21, 77.06),
    "S2D": (None, 61.82, 76.03),
}
