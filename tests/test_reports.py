"""Tests tools that report on a run: what they count, and what they refuse."""

import numpy as np

from mm_jax.data.labels import built_in
from mm_jax.generation.reconstruction import label_hits, reconstruction_metrics, whole_runs
from tools import compressor_report

MESC = built_in("mesc")


def test_labels_are_counted_by_the_numbers_of_the_lines():
    lines = ["Client (joy) hello", "Therapist(approval) (neutral) fine", "Client (anger) no"]
    gold = "\n".join(f"{i}: {line}" for i, line in enumerate((*lines, "Client plain"), 8))
    same = label_hits(gold, gold, MESC)
    assert (same["emotions", "right"], same["emotions", "all"]) == (3, 3)
    assert (same["strategies", "right"], same["strategies", "all"]) == (1, 1)
    # A wrong strategy, a line without a number, and one left out.
    other = "8: Client (joy) x\n9: Therapist(advisement) (neutral) y\nClient (anger) no"
    found = label_hits(gold, other, MESC)
    assert (found["emotions", "right"], found["emotions", "all"]) == (2, 3)
    assert (found["strategies", "right"], found["strategies", "all"]) == (0, 1)
    # Lines may be out of order; where a number occurs twice, the first line counts.
    shuffled = "\n".join((*gold.split("\n")[::-1], "8: Client (fear) z"))
    assert label_hits(gold, shuffled, MESC) == same
    metrics = reconstruction_metrics([(gold, gold), (gold, other)], MESC)
    assert metrics["emotions"] == 5 / 6
    assert metrics["strategies"] == 1 / 2
    assert 0.5 < metrics["rouge_l"] < 1
    # Other words in brackets are text.
    sighs = "8: Client (sighs) oh\n9: Client (joy) (laughs) ah"
    found = label_hits(sighs, sighs, MESC)
    assert (found["emotions", "right"], found["emotions", "all"]) == (1, 1)
    # Line numbers do not count as recovered words.
    assert reconstruction_metrics([("1: Client a", "1: x")], MESC)["rouge_l"] == 0


def test_bad_arguments_are_refused_in_one_line(tmp_path, trained, capsys):
    def refusal(folder, *more) -> str:
        assert compressor_report.main(["--checkpoint", str(folder), *more]) == 2
        return capsys.readouterr().err

    assert refusal(tmp_path).startswith("error: no config at")
    assert "--utterances: expected at least 0, got -1" in refusal(trained, "--utterances=-1")
    assert "--limit: expected at least 2" in refusal(trained, "--limit=1")
    missing = tmp_path / "none" / "found.json"
    assert f"--json: no folder for {missing}" in refusal(trained, f"--json={missing}")
    (tmp_path / "config.json").write_text("{")
    assert "config.json: not JSON" in refusal(tmp_path)
    assert "has no finished compressor stage" in refusal(trained)


def test_whole_runs_are_hit_from_end_to_end():
    def bits(*rows):
        return np.array([[c == "1" for c in row] for row in rows])

    mask = bits("0110011", "1101000")
    assert whole_runs(mask, mask) == (4, 4)
    assert whole_runs(mask, ~mask) == (0, 4)
    assert whole_runs(mask, bits("1111101", "1011111")) == (2, 4)  # two half, two whole
    assert whole_runs(bits("000"), bits("111")) == (0, 0)
