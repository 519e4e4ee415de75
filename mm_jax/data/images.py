"""Samples frames from image files, such as DFEW's."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mm_jax.data.fbank import NUM_MEL_BINS
from mm_jax.data.media import Media, MediaSpec, prepare_frame, uniform_frame_indices


def open_image(path: pathlib.Path) -> np.ndarray:
    """Returns uint8[h, w, 3], turned as the camera was held."""
    with Image.open(path) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def load_images(paths: Sequence[pathlib.Path], spec: MediaSpec) -> Media:
    """Samples frames from image files in order, without sound; never raises for a bad file."""
    index = uniform_frame_indices(spec.num_frames, len(paths))
    frames, status = np.zeros((0, spec.image_size, spec.image_size, 3), np.uint8), "ok"
    try:
        images = [open_image(paths[i]) for i in index]
        frames = np.stack([prepare_frame(image, spec.image_size) for image in images])
    except (OSError, UnidentifiedImageError):
        status = "corrupt"
    bank = np.zeros((0, NUM_MEL_BINS), np.float32)
    return Media(frames, bank, status, "no audio stream", ())
