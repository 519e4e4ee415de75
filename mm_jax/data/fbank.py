"""Computes Kaldi-compatible log-mel filter banks in numpy, as BEATs needs them (spec section 3)."""

from __future__ import annotations

import functools
from fractions import Fraction

import numpy as np

SAMPLE_RATE = 16_000
NUM_MEL_BINS = 128
WINDOW = 400  # samples: 25 ms
SHIFT = 160  # samples: 10 ms
FFT_SIZE = 512
LOW_HZ = 20.0
PREEMPHASIS = 0.97
PATCH_FRAMES = 16  # BEATs' patch length in time
ENERGY_FLOOR = float(np.finfo(np.float32).eps)
# The shortest sound that gives one whole BEATs patch.
MIN_SAMPLES = WINDOW + (PATCH_FRAMES - 1) * SHIFT


def num_fbank_frames(num_samples: int) -> int:
    """Counts the frames of `num_samples` samples at 16 kHz (Kaldi's snip_edges)."""
    return 0 if num_samples < WINDOW else 1 + (num_samples - WINDOW) // SHIFT


@functools.cache
def povey_window() -> np.ndarray:
    """Returns float64[400]: a Hann window to the power 0.85."""
    n = np.arange(WINDOW)
    return (0.5 - 0.5 * np.cos(2 * np.pi * n / (WINDOW - 1))) ** 0.85


@functools.cache
def mel_banks() -> np.ndarray:
    """Returns float32[128, 256]: triangular filters on Kaldi's mel scale, none at the Nyquist bin.

    Computed in float32 as in torchaudio: rounding moves the weights of narrow filters by 1e-5.
    """

    def mel(hz):
        ratio = np.float32(1.0) + np.asarray(hz, np.float32) / np.float32(700)
        return np.float32(1127.0) * np.log(ratio, dtype=np.float64).astype(np.float32)

    low, high = (1127.0 * np.log(1.0 + hz / 700.0) for hz in (LOW_HZ, SAMPLE_RATE / 2))
    delta = np.float32((high - low) / (NUM_MEL_BINS + 1))
    left, centre, right = (
        np.float32(low) + np.arange(i, NUM_MEL_BINS + i, dtype=np.float32)[:, None] * delta
        for i in range(3)
    )
    bins = mel(np.arange(FFT_SIZE // 2) * (SAMPLE_RATE / FFT_SIZE))[None]
    rising, falling = (bins - left) / (centre - left), (right - bins) / (right - centre)
    return np.maximum(np.float32(0), np.minimum(rising, falling))


def fbank(waveform: np.ndarray) -> np.ndarray:
    """Computes the log-mel energies of a mono 16 kHz waveform in [-1, 1].

    Takes float[samples], returns float32[frames, 128] (natural log of power; silence is
    log(1.19e-7) = -15.94). Options: 25 ms / 10 ms frames, povey window, pre-emphasis 0.97, DC
    removed, snip edges, no dither (spec section 3). Computed in float64.
    """
    if waveform.ndim != 1:
        raise ValueError(f"fbank: expected a mono waveform float[samples], got {waveform.shape}")
    frames = num_fbank_frames(len(waveform))
    if frames == 0:
        return np.zeros((0, NUM_MEL_BINS), np.float32)
    scaled = np.asarray(waveform, np.float64) * 2**15
    windows = np.lib.stride_tricks.sliding_window_view(scaled, WINDOW)[::SHIFT][:frames]
    windows = windows - windows.mean(axis=1, keepdims=True)
    previous = np.concatenate([windows[:, :1], windows[:, :-1]], axis=1)
    windows = (windows - PREEMPHASIS * previous) * povey_window()
    spectrum = np.fft.rfft(windows, FFT_SIZE)[:, :-1]
    power = spectrum.real**2 + spectrum.imag**2
    return np.log(np.maximum(power @ mel_banks().T.astype(np.float64), ENERGY_FLOOR)).astype(
        np.float32
    )


def spread_clips(
    seconds: float, num_clips: int = 8, clip_seconds: float = 2.0
) -> list[tuple[Fraction, Fraction]]:
    """Lists start and end in seconds of evenly spread clips of a sound.

    As in the released code, clips overlap or repeat if the sound is shorter than
    `num_clips * clip_seconds`, and an end may lie beyond the sound. Its sampler takes the length as
    a double and goes on in exact fractions of it.
    """
    step = Fraction(max(seconds - clip_seconds, 0.0)) / num_clips
    return [(i * step, i * step + Fraction(clip_seconds)) for i in range(num_clips)]


def clip_ranges(
    num_samples: int, num_clips: int = 8, clip_seconds: float = 2.0
) -> list[tuple[int, int]]:
    """Lists first and last + 1 sample of the `spread_clips` of a sound at 16 kHz, truncated.

    The second clip of 116,800 samples (7.3 s, whose double is a little less) begins at 10,599.
    """
    clips = spread_clips(num_samples / SAMPLE_RATE, num_clips, clip_seconds)
    return [(int(start * SAMPLE_RATE), int(end * SAMPLE_RATE)) for start, end in clips]


def take_clips(waveform: np.ndarray, num_clips: int, clip_seconds: float = 2.0) -> np.ndarray:
    """Joins evenly spread clips of a waveform: at most num_clips * clip_seconds long."""
    ranges = clip_ranges(len(waveform), num_clips, clip_seconds)
    return np.concatenate([waveform[a:b] for a, b in ranges])


def released_waveform(waveform: np.ndarray, of_video: bool, seconds: float = 30.0) -> np.ndarray:
    """Returns the released code's input: 8 clips of 2 s of a video's sound, zero-padded to 30 s."""
    sound = take_clips(waveform, num_clips=8) if of_video else waveform
    length = int(seconds * SAMPLE_RATE)
    return np.pad(sound[:length], (0, max(0, length - len(sound))))
