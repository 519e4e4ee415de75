"""Tools that report on a run: what they count, and what they refuse."""

from mm_jax.evaluation.reconstruction import label_hits, reconstruction_metrics
from tools import compressor_report


def test_labels_are_counted_line_by_line():
    gold = "Client (joy) hello\nTherapist(approval) (neutral) fine\nClient (anger) no\nClient plain"
    same = label_hits(gold, gold)
    assert (same["emotions", "right"], same["emotions", "all"]) == (3, 3)
    assert (same["strategies", "right"], same["strategies", "all"]) == (1, 1)
    other = "Client (joy) x\nTherapist(advisement) (neutral) y"  # a wrong strategy, a line short
    found = label_hits(gold, other)
    assert (found["emotions", "right"], found["emotions", "all"]) == (2, 3)
    assert (found["strategies", "right"], found["strategies", "all"]) == (0, 1)
    metrics = reconstruction_metrics([(gold, gold), (gold, other)])
    assert metrics["emotions"] == 5 / 6
    assert metrics["strategies"] == 1 / 2
    assert 0.5 < metrics["rouge_l"] < 1


def test_a_folder_that_is_no_run_is_refused_in_one_line(tmp_path, capsys):
    assert compressor_report.main(["--checkpoint", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: no config at")
