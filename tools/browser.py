"""Drives Chromium with a camera and a microphone that play a clip; for tests and pictures."""

from __future__ import annotations

import pathlib
import shutil

import av

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


def write_devices(clip: pathlib.Path, folder: pathlib.Path) -> list[str]:
    """Writes a clip's pictures and sound as Chromium's fake devices read them; returns the options
    that name them."""
    camera, microphone = folder / "camera.mjpeg", folder / "microphone.wav"
    with av.open(str(clip)) as source, av.open(str(camera), "w") as out:
        stream = out.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuvj420p"
        for frame in source.decode(video=0):
            out.mux(stream.encode(frame.reformat(320, 240, "yuvj420p")))
        out.mux(stream.encode())
    with av.open(str(clip)) as source, av.open(str(microphone), "w") as out:
        stream = out.add_stream("pcm_s16le", rate=48_000, layout="mono")
        resampler = av.AudioResampler("s16", "mono", 48_000)
        for frame in source.decode(audio=0):
            for part in resampler.resample(frame):
                part.pts = None
                out.mux(stream.encode(part))
    return [
        "--use-fake-ui-for-media-stream",
        "--use-fake-device-for-media-stream",
        f"--use-file-for-fake-video-capture={camera}",
        f"--use-file-for-fake-audio-capture={microphone}",
    ]


def open_browser(profile: pathlib.Path, options: list[str], size: tuple[int, int] = (1280, 900)):
    """Starts Chromium without a window; `quit` ends it."""
    from selenium import webdriver

    found = webdriver.ChromeOptions()
    found.binary_location = BROWSER
    width, height = size
    for option in (
        "--headless=new",
        "--no-sandbox",
        "--hide-scrollbars",
        f"--window-size={width},{height}",
        f"--user-data-dir={profile}",
        *options,
    ):
        found.add_argument(option)
    found.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(found, webdriver.ChromeService(shutil.which("chromedriver")))
