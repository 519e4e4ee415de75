"""Loads an exported folder in a fresh environment, as a colleague without mm_jax would."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version

import pytest

from mm_jax.__main__ import main
from tests.support.media import write_video

pytestmark = pytest.mark.slow
NEEDED = ("torch", "transformers", "safetensors", "av")


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Makes an environment that holds NEEDED and what these depend on."""
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    wanted = [f"{name}=={version(name).partition('+')[0]}" for name in NEEDED]
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
    return python


def test_the_cards_lines_answer_about_a_clip_as_predict_does(run, python, tmp_path, capsys):
    folder, clip = tmp_path / "exported", write_video(tmp_path / "clip.mp4", frames=20, sound=0.8)
    arguments = ["export", "--from", str(run), "--layout", "transformers", "--out", str(folder)]
    assert main(arguments) == 0
    card = (folder / "README.md").read_text()
    (lines,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    script = tmp_path / "lines.py"
    script.write_text(f"{lines}\nimport json\nprint(json.dumps(answer))\n")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "HF_", "XLA"))}
    env = {**clean, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [python, script], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    text = re.search(r'    text="(.*)",', lines)[1]
    said = re.search(r'"text": "(.*)"}\]', lines)[1]
    (tmp_path / "history.txt").write_text(f"Therapist: {said}\n")
    own = ["--video", str(clip), "--text", text, "--history", str(tmp_path / "history.txt")]
    capsys.readouterr()
    assert main(["predict", "--checkpoint", str(run), *own, "--json"]) == 0
    ours = json.loads(capsys.readouterr().out)
    assert theirs["predicted"] | {"response": theirs["response"]} == ours["predicted"]
    for task, shares in ours["probabilities"].items():
        for label, p in shares.items():
            assert abs(theirs["probabilities"][task][label] - p) < 1e-4
