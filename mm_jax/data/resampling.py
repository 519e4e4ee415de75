"""Resizes pictures (Pillow) and resamples sound (librosa's soxr).

Exported folders hold `resampling_mm_jax.py` in its place, which computes the same in numpy alone.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from mm_jax.data.fbank import SAMPLE_RATE


def resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resizes uint8[h, w, 3] to uint8[height, width, 3] by Pillow's bicubic filter."""
    picture = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(picture)


def resample(wave: np.ndarray, rate: int) -> np.ndarray:
    """Resamples float32[samples] from `rate` Hz to 16 kHz."""
    if rate == SAMPLE_RATE:
        return wave
    import librosa  # slow to import

    return librosa.resample(wave, orig_sr=rate, target_sr=SAMPLE_RATE)
