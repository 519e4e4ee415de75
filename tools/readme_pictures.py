"""Draws README's pictures into docs/images/: the network, a run's report, the page of a running
server; light and dark.

python tools/readme_pictures.py --report demo/run/report.html
python tools/readme_pictures.py --server http://127.0.0.1:8000 --clip demo/data/.../clips/1_2.mp4

Report and page are photographed by Chromium; without them only the network is drawn.
"""

from __future__ import annotations

import argparse
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from PIL import Image

from mm_jax.evaluation.report.figures import DARK, LIGHT
from tools.browser import open_browser, write_devices

IMAGES = ROOT / "docs" / "images"
SCHEMES = {"light": LIGHT, "dark": DARK}
# text: (x, y, colour); columns: inputs, encoders, projectors, language model, outputs.
WIDTH, HEIGHT = 2.15, 0.82
BOXES = {
    "video": (0, 3, "C5"),
    "voice": (0, 2, "C5"),
    "words": (0, 1, "C5"),
    "dialogue history": (0, 0, "C5"),
    "SigLIP": (1, 3, "C0"),
    "BEATs": (1, 2, "C0"),
    "Mamba\ncompressor": (1, 0, "C3"),
    "STC connector": (2, 3, "C1"),
    "audio projector": (2, 2, "C1"),
    "one vector\nper utterance": (2, 0, "C3"),
    "client's emotion": (4, 3, "C2"),
    "therapist's\nemotion": (4, 2, "C2"),
    "strategy": (4, 1, "C2"),
    "reply": (4, 0, "C2"),
}
ARROWS = [
    ("video", "SigLIP"),
    ("voice", "BEATs"),
    ("dialogue history", "Mamba\ncompressor"),
    ("SigLIP", "STC connector"),
    ("BEATs", "audio projector"),
    ("Mamba\ncompressor", "one vector\nper utterance"),
]
SAID = ("I had to move, and I know nobody here.", "It is hard to fall asleep, too.")
SPACING = 2.75
MODEL = 3  # the column of the language model


def network() -> plt.Figure:
    """Draws the network: what goes in, its parts, what comes out."""
    fig, ax = plt.subplots(figsize=(11, 3.6))

    def box(text: str, x: float, y: float, colour: str, height: float = HEIGHT) -> None:
        ax.add_patch(
            FancyBboxPatch(
                (x * SPACING, y),
                WIDTH,
                height,
                boxstyle="round,pad=0.02,rounding_size=0.12",
                facecolor=colour,
                alpha=0.22,
                edgecolor="none",
            )
        )
        middle = (x * SPACING + WIDTH / 2, y + height / 2)
        ax.text(*middle, text, ha="center", va="center", fontsize=10.5)

    def arrow(start: tuple[float, float], end: tuple[float, float]) -> None:
        style = dict(arrowstyle="-|>", mutation_scale=12, linewidth=1.3)
        ax.add_patch(FancyArrowPatch(start, end, color=plt.rcParams["axes.edgecolor"], **style))

    for text, (x, y, colour) in BOXES.items():
        box(text, x, y, colour)
    box("Qwen2\nlanguage model", MODEL, 0, "C0", 3 + HEIGHT)
    for start, end in ARROWS:
        (x0, y0, _), (x1, y1, _) = BOXES[start], BOXES[end]
        arrow((x0 * SPACING + WIDTH + 0.04, y0 + 0.41), (x1 * SPACING - 0.04, y1 + 0.41))
    last = {y: x for x, y, _ in BOXES.values() if x < MODEL}  # of every row, the last before it
    for y, x in last.items():
        arrow((x * SPACING + WIDTH + 0.04, y + 0.41), (MODEL * SPACING - 0.04, y + 0.41))
        arrow((MODEL * SPACING + WIDTH + 0.04, y + 0.41), (4 * SPACING - 0.04, y + 0.41))
    ax.set_xlim(-0.1, 4 * SPACING + WIDTH + 0.1)
    ax.set_ylim(-0.1, 3 + HEIGHT + 0.1)
    ax.set_aspect("equal")
    ax.axis("off")
    return fig


def photograph(report: pathlib.Path, scheme: str, out: pathlib.Path) -> None:
    """Takes a picture of a report's first page."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("--report: expected Chromium or Chrome on PATH")
    with tempfile.TemporaryDirectory() as folder:
        shot = pathlib.Path(folder) / "shot.png"
        dark = ["--force-dark-mode"] if scheme == "dark" else []
        subprocess.run(
            [
                browser,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
                f"--user-data-dir={folder}/profile",
                *dark,
                "--window-size=1280,1010",
                f"--screenshot={shot}",
                report.resolve().as_uri(),
            ],
            check=True,
            capture_output=True,
        )
        Image.open(shot).convert("RGB").quantize(128).save(out, optimize=True)


def talk(url: str, clip: pathlib.Path) -> None:
    """Photographs the page after two turns, one of them recorded with a clip as the camera."""

    def until(script: str) -> None:
        while not driver.execute_script(f"return Boolean({script})"):
            time.sleep(0.05)

    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        driver = open_browser(folder / "profile", write_devices(clip, folder), (1280, 860))
        try:
            driver.get(url)
            until("state.about")
            driver.execute_script("state.consent = true; setMode('video')")
            until("document.querySelector('#preview').videoWidth")
            for count, words in enumerate(SAID):
                if count:
                    driver.execute_script("startRecording()")
                    time.sleep(3)
                    driver.execute_script("stopRecording(true)")
                    until("state.clip")
                driver.execute_script("document.querySelector('#text').value = arguments[0]", words)
                driver.execute_script("send()")
                until(
                    f"!state.busy && document.querySelectorAll('.turn').length == {2 * count + 2}"
                )
            for scheme in SCHEMES:
                driver.execute_script(
                    "document.documentElement.dataset.theme = arguments[0]", scheme
                )
                shot = folder / "shot.png"
                driver.save_screenshot(str(shot))
                picture = Image.open(shot).convert("RGB").quantize(128)
                picture.save(IMAGES / f"page-{scheme}.png", optimize=True)
        finally:
            driver.quit()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", type=pathlib.Path, help="report.html of a run")
    parser.add_argument("--server", help="address of a running server")
    parser.add_argument("--clip", type=pathlib.Path, help="what its page's camera sees")
    args = parser.parse_args(argv)
    if args.server:
        talk(args.server, args.clip)
    IMAGES.mkdir(exist_ok=True)
    for scheme, settings in SCHEMES.items():
        with plt.rc_context(settings):
            network().savefig(IMAGES / f"network-{scheme}.png", dpi=130, bbox_inches="tight")
            plt.close("all")
        if args.report:
            photograph(args.report, scheme, IMAGES / f"report-{scheme}.png")
    print(*sorted(IMAGES.glob("*.png")), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
