"""Resizes pictures and resamples sound in numpy, as training did by Pillow and librosa's soxr."""

import math

import numpy as np

from .fbank_mm_jax import SAMPLE_RATE

BITS = 22  # Pillow's fixed-point weights
CUTOFF = 0.95687182  # of the lower rate's half: soxr "HQ"'s, like the windows below
# Ratio 16 kHz / rate -> beta and half-length (in samples of the lower rate) of soxr's Kaiser
# window; other ratios are computed by soxr in stages that come close to the last one.
WINDOWS = {
    (2, 1): (13.04006, 97.25),
    (1, 2): (13.04006, 97.25),
    (1, 3): (13.04016, 96.83377),
    (2, 3): (13.04016, 96.83377),
    (1, 6): (13.71138, 101.50065),
}
OTHER_WINDOW = (15.9785, 109.67)


def bicubic_weights(size: int, new: int) -> np.ndarray:
    """Returns Pillow's weights float64[size, new] of a bicubic filter, times 2**BITS, rounded."""
    scale = size / new
    wide = max(scale, 1.0)
    weights = np.zeros((size, new))
    for i in range(new):
        centre = (i + 0.5) * scale
        first = max(int(centre - 2 * wide + 0.5), 0)
        last = min(int(centre + 2 * wide + 0.5), size)
        x = np.abs((np.arange(first, last) - centre + 0.5) / wide)
        near = (1.5 * x - 2.5) * x * x + 1
        far = ((-0.5 * x + 2.5) * x - 4) * x + 2
        row = np.where(x < 1, near, np.where(x < 2, far, 0.0))
        row = row / row.sum() * 2**BITS
        weights[first:last, i] = np.trunc(row + np.where(row < 0, -0.5, 0.5))
    return weights


def resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resizes uint8[h, w, 3] to uint8[height, width, 3], to the bit as Pillow's bicubic filter."""

    def along(rows: np.ndarray, new: int) -> np.ndarray:  # [a, size, 3] -> [a, new, 3]
        if rows.shape[1] == new:
            return rows
        sums = np.tensordot(rows.astype(np.float64), bicubic_weights(rows.shape[1], new), (1, 0))
        found = np.floor((sums + 2 ** (BITS - 1)) / 2**BITS)  # exact: integers below 2**53
        return np.clip(found, 0, 255).astype(np.uint8).transpose(0, 2, 1)

    return along(along(image, width).transpose(1, 0, 2), height).transpose(1, 0, 2)


def resample(wave: np.ndarray, rate: int) -> np.ndarray:
    """Resamples float32[samples] from `rate` Hz to 16 kHz.

    Within 1e-6 of soxr "HQ" at 8, 24, 32 and 48 kHz, and within 1e-3 on white noise at other rates
    (2e-2 at a sound's ends).
    """
    if rate == SAMPLE_RATE:
        return wave
    common = math.gcd(rate, SAMPLE_RATE)
    up, down = SAMPLE_RATE // common, rate // common
    beta, half = WINDOWS.get((up, down), OTHER_WINDOW)
    low = min(rate, SAMPLE_RATE)
    half *= rate / low  # input samples
    cutoff = CUTOFF * low / 2 / rate  # cycles per input sample
    reach = int(half) + 1
    count = math.floor(len(wave) * up / down + 0.5)
    out = np.zeros((-(-count // up), up))
    padded = np.pad(wave.astype(np.float64), (reach, reach + down + 1))
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1)
    for phase in range(up):  # every up-th output has the same weights
        first, rest = divmod(phase * down, up)
        t = rest / up - np.arange(-reach, reach + 1)
        inside = np.clip(1 - (t / half) ** 2, 0, None)
        taps = np.sinc(2 * cutoff * t) * np.i0(beta * np.sqrt(inside)) * (inside > 0)
        rows = windows[first::down][: len(out)]
        out[: len(rows), phase] = rows @ (taps / taps.sum())
    last = math.ceil(len(wave) * up / down)  # librosa fills up what soxr leaves out
    return np.pad(out.reshape(-1)[:count], (0, last - count)).astype(np.float32)
