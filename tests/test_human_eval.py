"""Tests human evaluation: the page in a browser, imports, shares and agreement by hand."""

import csv
import io
import json
import pathlib
import shutil

import numpy as np
import pytest

from mm_jax.data.datasets.common import SampleSource
from mm_jax.evaluation import agreement
from mm_jax.evaluation.agreement import AND, CRITERIA, TIE, Vote
from tools import human_eval
from tools.annotation.formats import write_page
from tools.annotation.training import training_items

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


def votes_of(annotator, choices):
    """Makes one vote per item on the first criterion."""
    return [Vote(annotator, f"i{k}", CRITERIA[0], c) for k, c in enumerate(choices)]


def test_adjudication_by_a_third_and_a_fourth():
    votes = [
        *votes_of("ann", "aaaab"),
        *votes_of("ben", "abbbb"),
        Vote("cid", "i1", CRITERIA[0], "b"),
        Vote("cid", "i2", CRITERIA[0], "c"),
        Vote("cid", "i3", CRITERIA[0], "c"),
        Vote("dee", "i2", CRITERIA[0], "c"),
        Vote("dee", "i3", CRITERIA[0], "d"),
    ]
    decided = agreement.adjudicate(votes, ["ann", "ben", "cid", "dee"])
    assert [decided[f"i{k}", CRITERIA[0]] for k in range(5)] == ["a", "b", "c", None, "b"]
    assert agreement.adjudicate(votes_of("ann", "a"), ["ann"]) == {("i0", CRITERIA[0]): None}


def test_shares_and_win_rates_have_wilson_intervals():
    decided = {(f"i{k}", CRITERIA[0]): c for k, c in enumerate(["a"] * 6 + ["b"] * 2 + [TIE] * 2)}
    decided["i99", CRITERIA[0]] = None
    own = agreement.best_of_shares(decided, ["a", "b"])[CRITERIA[0]]
    assert (own["a"]["mean"], own["b"]["mean"], own[TIE]["n"]) == (60, 20, 10)
    p, n, z = 0.6, 10, 1.959964
    middle, half = p + z**2 / 2 / n, z * np.sqrt(p * (1 - p) / n + z**2 / 4 / n**2)
    expected = [100 * (middle - half) / (1 + z**2 / n), 100 * (middle + half) / (1 + z**2 / n)]
    assert own["a"]["interval"] == pytest.approx(expected, abs=1e-3)
    (pair,) = agreement.win_rates(decided, ["a", "b"])[CRITERIA[0]]
    assert (pair["n"], pair["mean"]) == (8, 75)


def test_agreement_by_hand():
    """Computes the textbook table: 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no."""
    first = "y" * 25 + "n" * 25
    second = "y" * 20 + "n" * 5 + "y" * 10 + "n" * 15
    votes = [*votes_of("ann", first), *votes_of("ben", second)]
    found = agreement.agreement(votes, ("ann", "ben"))[CRITERIA[0]]
    assert found["cohen"] == {"n": 50, "kappa": pytest.approx(0.4)}
    # Two raters: Fleiss' kappa is Scott's pi, (0.7 - pe) / (1 - pe) with pe of the pooled shares.
    pe = 0.55**2 + 0.45**2
    assert found["fleiss"]["kappa"] == pytest.approx((0.7 - pe) / (1 - pe))
    # Krippendorff's alpha corrects it for the sample's size: 1 - (n - 1) / n (1 - pi), n = 100.
    pi = (0.7 - pe) / (1 - pe)
    assert found["krippendorff"]["alpha"] == pytest.approx(1 - 99 / 100 * (1 - pi))
    alike = [*votes_of("ann", "aaa"), *votes_of("ben", "aaa")]
    assert agreement.agreement(alike, ("ann", "ben"))["all"]["cohen"] == {"n": 3, "kappa": None}
    # Fleiss' kappa leaves out what not everybody voted on; alpha does not.
    more = [*votes, Vote("cid", "i0", CRITERIA[0], "y")]
    partly = agreement.agreement(more, ("ann", "ben"))[CRITERIA[0]]
    assert (partly["fleiss"]["n"], partly["krippendorff"]["n"]) == (1, 50)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Exports a study of two systems and four items, without a run."""
    folder = tmp_path_factory.mktemp("study")
    items = [
        {
            "id": f"item_{k:03d}",
            "context": [{"speaker": "Client", "text": f"</script><b>bold {k}</b> & all"}],
            "replies": [f"first {k}", f"second {k}"],
        }
        for k in (1, 2, 3, 4)
    ]
    write_page(folder / "annotation.html", "abc", items)
    orders = (["ours", "theirs"], ["theirs", "ours"]) * 2
    key = {
        "set": "abc",
        "date": "2026-01-01",
        "run": "ours",
        "split": "test",
        "seed": 0,
        "systems": {"ours": {"file": "a"}, "theirs": {"file": "b"}},
        "items": {
            item["id"]: {"sample": f"s{k}", "systems": order}
            for k, (item, order) in enumerate(zip(items, orders, strict=True))
        },
    }
    (folder / "key.json").write_text(json.dumps(key))
    return folder


def records(annotator, letters, training="right"):
    """Builds what the page writes: training answers, then one letter per criterion of an item."""
    rows = []
    for item in training_items():
        choices = item["expected"] if training == "right" else dict.fromkeys(CRITERIA, "A")
        rows.append({"item": item["id"], "training": True, "choices": choices})
    for k, letter in enumerate(letters, 1):
        name = f"item_{k:03d}"
        rows.append({"item": name, "training": False, "choices": dict.fromkeys(CRITERIA, letter)})
    common = {"set": "abc", "annotator": annotator, "seconds": 9, "qualification": 1.0}
    return [{**common, **r} for r in rows]


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def test_import_unblinds_and_report_counts(study, tmp_path, capsys):
    files = [
        write(tmp_path / "ann.jsonl", records("ann", "ABA=")),
        write(tmp_path / "ben.jsonl", records("ben", "ABBB")),
        write(tmp_path / "cid.jsonl", records("cid", "ABAA", training="wrong")),
    ]
    assert human_eval.main(["import", "--study", str(study), *files]) == 0
    assert "cid: 4 items, qualification kappa 0.00: NOT QUALIFIED" in capsys.readouterr().out
    assert human_eval.main(["report", "--study", str(study), "--pair", "ann", "ben"]) == 0
    found = json.loads((study / "report.json").read_text())
    overall = found["shares"]["Overall"]
    # item 1: A is ours, item 2: B is ours; items 3 and 4 stay open (cid does not count).
    assert (overall["ours"]["mean"], overall["ours"]["n"]) == (100, 2)
    assert found["open"] == 2 * len(CRITERIA)
    assert found["agreement"]["Overall"]["cohen"]["n"] == 4
    html = (study / "report.html").read_text()
    assert "not counted" in html
    assert human_eval.main(["report", "--study", str(study), "--pair", "ann", "ann"]) == 2
    assert "expected two annotators, got 'ann' twice" in capsys.readouterr().err
    assert human_eval.main(["report", "--study", str(study), "--pair", "ann", "cid"]) == 2
    assert "expected qualified annotators ['ann', 'ben'], got 'cid'" in capsys.readouterr().err


def test_imports_add_up_and_other_tools_can_be_used(study, tmp_path, capsys):
    """Checks that imports keep other annotators' votes; CSV and Label Studio count by name."""
    folder = shutil.copytree(study, tmp_path / "study")
    for name in ("votes.jsonl", "annotators.json"):
        (folder / name).unlink(missing_ok=True)
    ann = write(tmp_path / "ann.jsonl", records("ann", "ABAB"))
    assert human_eval.main(["import", "--study", str(folder), ann]) == 0
    lines = ["item,conversation,A,B," + ",".join(CRITERIA)]
    lines += [f"item_{k:03d},x,y,z,a,A,a,no difference,B" for k in (1, 2)]
    (tmp_path / "ben.csv").write_text("\n".join([*lines, "item_003,x,y,z,a,,,,"]) + "\n")
    result = [{"from_name": c, "value": {"choices": ["B"]}} for c in CRITERIA]
    tasks = [{"data": {"id": "item_004"}, "annotations": [{"completed_by": 7, "result": result}]}]
    (tmp_path / "export.json").write_text(json.dumps(tasks))
    more = [str(tmp_path / "ben.csv"), str(tmp_path / "export.json"), "--qualified", "ben"]
    assert human_eval.main(["import", "--study", str(folder), *more]) == 0
    assert "1 items are not finished and not counted" in capsys.readouterr().out
    people = json.loads((folder / "annotators.json").read_text())["annotators"]
    assert {n: (p["items"], p["qualified"]) for n, p in people.items()} == {
        "ann": (4, True),
        "ben": (2, True),
        "7": (1, False),
    }
    votes = [json.loads(x) for x in (folder / "votes.jsonl").read_text().splitlines()]
    own = [v["choice"] for v in votes if (v["annotator"], v["item"]) == ("ben", "item_002")]
    assert own == ["theirs", "theirs", "theirs", TIE, "ours"]
    assert sum(v["annotator"] == "ann" for v in votes) == 4 * len(CRITERIA)
    (tmp_path / "bad.json").write_text('{"a": 1}')
    assert human_eval.main(["import", "--study", str(folder), str(tmp_path / "bad.json")]) == 2
    assert "not an export of Label Studio" in capsys.readouterr().err


def test_nothing_sent_out_tells_whose_a_reply_is(run, tmp_path):
    """Checks that neither names nor order do: no seed gives key.json's order from the items."""
    rows = []
    config = json.loads((run / "config.json").read_text())
    samples = list(SampleSource(config["data"]["folder"], "test", light=True))
    for s in samples:
        gold = {t: s.target(t) for t in ("client_emotion", "therapist_emotion", "strategy")}
        rows.append(
            {
                "id": s.id,
                "label_space": "mesc",
                "status": "ok",
                "modality": "text",
                "modality_asked": "text",
                "history_labels": "gold",
                "gold": {**gold, "response": s.response},
                "predicted": {**gold, "response": f"=reply to {s.id}"},
            }
        )
    write(run / "predictions.jsonl", rows)
    out = tmp_path / "study"
    arguments = ["export", "--checkpoint", str(run), "--gold", "--out", str(out), "--limit", "9"]
    assert human_eval.main(arguments) == 0
    key = json.loads((out / "key.json").read_text())
    dialogues = [i["sample"].split("_")[0] for i in key["items"].values()]
    assert len(set(dialogues)) == len(dialogues)  # no context holds another item's gold reply
    sent = {p.name: p.read_text() for p in out.iterdir() if p.name != "key.json"}
    for name, text in sent.items():
        for word in ("gold reply", str(key["seed"]), run.name + '"'):
            assert word not in text, (name, word)
    assert key["seed"] > 2**32  # not to be guessed by trying
    assert "'=reply to" in sent["items.csv"]  # no formula
    replies = [dict(r, predicted=r["predicted"] | {"response": f"other {r['id']}"}) for r in rows]
    other = pathlib.Path(write(tmp_path / "other.jsonl", replies))
    arguments = ["export", "--checkpoint", str(run), "--others", str(other), "--seed=1"]
    orders = []
    for name in ("first", "second"):
        assert human_eval.main([*arguments, "--out", str(tmp_path / name)]) == 0
        key = json.loads((tmp_path / name / "key.json").read_text())
        orders.append([tuple(i["systems"]) for i in key["items"].values()])
    assert orders[0] == orders[1]  # a seed that is given gives the same order
    assert len(orders[0]) == len(samples)
    assert len(set(orders[0])) == 2  # now one first, now the other


def test_identical_replies_are_merged_and_tie(run, tmp_path, capsys):
    source = SampleSource(json.loads((run / "config.json").read_text())["data"]["folder"], "test")
    ids = [s.id for s in source]
    base = {"label_space": "mesc", "status": "ok", "modality": "text", "modality_asked": "text"}
    base |= {"history_labels": "gold", "gold": {}}
    files = {"predictions.jsonl": ["a", "a", "a"], "second.jsonl": ["a", "b", "a"]}
    files["third.jsonl"] = ["a", "b", "c"]
    for name, replies in files.items():
        rows = [
            {**base, "id": i, "predicted": {"response": reply}}
            for i, reply in zip(ids, replies, strict=False)
        ]
        write(run / name, rows)
    (tmp_path / "clips").mkdir()
    for name in ids[:3]:
        (tmp_path / "clips" / f"{name}.MP4").write_bytes(name.encode())
    study = tmp_path / "study"
    arguments = ["export", "--checkpoint", str(run), "--out", str(study), "--others"]
    arguments += [str(run / "second.jsonl"), str(run / "third.jsonl")]
    assert human_eval.main([*arguments, f"--clips={tmp_path / 'clips'}"]) == 0
    warning = capsys.readouterr().err
    assert "3 items have identical replies" in warning
    assert "1 items have nothing to choose" in warning
    key = json.loads((study / "key.json").read_text())
    sizes = {item["sample"]: len(item["systems"]) for item in key["items"].values()}
    assert sizes == {ids[0]: 1, ids[1]: 2, ids[2]: 2}
    page = (study / "annotation.html").read_text()
    names = {item["sample"]: name for name, item in key["items"].items()}
    assert names[ids[0]] not in page
    assert f'"clip": "clips/{names[ids[1]]}.mp4"' in page
    assert (study / "clips" / f"{names[ids[1]]}.mp4").read_bytes() == ids[1].encode()
    assert not (study / "clips" / f"{names[ids[0]]}.mp4").exists()
    # Both annotators choose what two systems said.
    for who in ("ann", "ben"):
        rows = [r for r in records(who, "") if r["training"]]
        for name in (names[ids[1]], names[ids[2]]):
            place = next(i for i, s in enumerate(key["items"][name]["systems"]) if AND in s)
            choices = dict.fromkeys(CRITERIA, chr(65 + place))
            rows.append(rows[0] | {"item": name, "training": False, "choices": choices})
        path = write(tmp_path / f"{who}.jsonl", [r | {"set": key["set"]} for r in rows])
        assert human_eval.main(["import", "--study", str(study), path]) == 0
    assert human_eval.main(["report", "--study", str(study)]) == 0
    found = json.loads((study / "report.json").read_text())
    first, second, third = run.name, "second", "third"
    own = found["shares"]["Overall"]
    assert found["open"] == 0
    assert [round(own[s]["mean"], 1) for s in (first, second, third)] == [16.7, 33.3, 16.7]
    assert own[TIE]["mean"] == pytest.approx(100 / 3)
    rates = {(p["a"], p["b"]): (p["n"], p["mean"]) for p in found["win_rates"]["Overall"]}
    assert rates == {(first, second): (1, 0), (first, third): (2, 50), (second, third): (1, 100)}
    assert "In 1 items all replies were the same" in (study / "report.html").read_text()


@pytest.mark.parametrize(
    ("encoding", "mark", "suffix"),
    [("utf-8-sig", ";", ".csv"), ("cp1252", ";", ".CSV"), ("utf-16", "\t", ".csv")],
)
def test_spreadsheets_save_the_csv_in_their_own_ways(study, tmp_path, encoding, mark, suffix):
    folder = shutil.copytree(study, tmp_path / "study")
    rows = [["item", "conversation", "A", "B", *CRITERIA]]
    rows += [["item_001", "Client: café\nTherapist: so", "y\u0085", "z", *["a"] * len(CRITERIA)]]
    text = io.StringIO()
    csv.writer(text, delimiter=mark).writerows(rows)
    path = tmp_path / f"zoé{suffix}"
    path.write_bytes(text.getvalue().replace("\u0085", "").encode(encoding))
    arguments = ["import", "--study", str(folder), str(path), "--qualified", "zoé"]
    assert human_eval.main(arguments) == 0
    people = json.loads((folder / "annotators.json").read_text())["annotators"]
    assert people["zoé"]["items"] == 1


def test_tasks_that_a_label_studio_annotator_skipped_are_no_votes(study, tmp_path):
    folder = shutil.copytree(study, tmp_path / "study")
    result = [{"from_name": c, "value": {"choices": ["B"]}} for c in CRITERIA]
    who = {"id": 7, "email": "eve@example.org"}
    tasks = [
        {
            "data": {"id": f"item_00{k}"},
            "annotations": [{"completed_by": who, "result": result, **x}],
        }
        for k, x in ((1, {"was_cancelled": True}), (2, {"was_cancelled": False}))
    ]
    path = tmp_path / "export.json"
    path.write_text(json.dumps(tasks))
    assert human_eval.main(["import", "--study", str(folder), str(path)]) == 0
    people = json.loads((folder / "annotators.json").read_text())["annotators"]
    assert people["eve@example.org"]["items"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(set="other"), "line 6: annotates set other, this study is abc"),
        (lambda r: r.update(item="item_009"), "line 6: no item 'item_009' in this study"),
        (lambda r: r["choices"].update(Overall="C"), "got 'Overall': 'C'"),
        (lambda r: r.update(item="item_002"), "line 7: ann has item_002 twice"),
        (lambda r: r.update(choices=None), "line 6: missing or of another type: ['choices']"),
        (lambda r: r.update(seconds="9"), "line 6: seconds: expected a number, got '9'"),
    ],
)
def test_import_names_what_is_wrong(study, tmp_path, capsys, change, message):
    rows = records("ann", "AAAA")
    change(rows[5])
    before = {p.name: p.read_bytes() for p in study.iterdir()}
    path = write(tmp_path / "ann.jsonl", rows)
    assert human_eval.main(["import", "--study", str(study), path]) == 2
    assert message in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in study.iterdir()} == before  # nothing half-written


@pytest.fixture
def browser(tmp_path):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}",
    ):
        options.add_argument(flag)
    driver = webdriver.Chrome(
        options=options,
        service=webdriver.ChromeService(shutil.which("chromedriver")),
    )
    driver.execute_cdp_cmd(
        "Browser.setDownloadBehavior",
        {"behavior": "allow", "downloadPath": str(tmp_path), "eventsEnabled": True},
    )
    yield driver
    driver.quit()


@pytest.mark.skipif(
    not (BROWSER and shutil.which("chromedriver")), reason="needs Chromium and ChromeDriver"
)
def test_the_page_by_keyboard_in_a_browser(study, tmp_path, browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    def press(keys):
        browser.find_element(By.TAG_NAME, "body").send_keys(keys)

    def text():
        return browser.find_element(By.TAG_NAME, "main").text

    browser.get((study / "annotation.html").as_uri())
    assert "Content warning" in text()
    browser.find_element(By.ID, "name").send_keys("ann" + Keys.ENTER)
    wrong = "1" * len(CRITERIA)
    training = training_items()
    for _ in training:
        assert browser.find_element(By.ID, "next").text == "Still to choose: " + ", ".join(CRITERIA)
        press(wrong)
        press(Keys.ARROW_RIGHT)
    assert "Cohen's kappa 0.00, below 0.4" in text()
    browser.find_element(By.ID, "go").click()
    for item in training:
        press("".join(str(ord(item["expected"][c]) - 64) for c in CRITERIA))
        press(Keys.ARROW_RIGHT)
    assert "Cohen's kappa 1.00." in text()
    browser.find_element(By.ID, "go").click()
    assert "Item 1 of 4" in text()
    assert "</script><b>bold" in text()  # quoted as text
    press("12")
    browser.refresh()  # what was done is kept
    browser.find_element(By.ID, "name").send_keys("ann" + Keys.ENTER)
    press(Keys.ARROW_DOWN * 2 + "021" + Keys.ARROW_RIGHT)
    for _ in range(3):
        press("3")  # no third reply: ignored
        press("2" * len(CRITERIA) + Keys.ARROW_RIGHT)
    assert "Thank you" in text()
    browser.find_element(By.ID, "download").click()
    path = tmp_path / "annotations_ann.jsonl"
    WebDriverWait(browser, 10).until(lambda _: path.is_file() and path.stat().st_size)
    rows = [json.loads(x) for x in path.read_text().splitlines()]
    assert len(rows) == len(training) + 4
    assert {r["attempts"] for r in rows} == {2}
    items = {r["item"]: list(r["choices"].values()) for r in rows if not r["training"]}
    assert sorted(items.values()) == sorted([["A", "B", "=", "B", "A"], *[["B"] * 5] * 3])
    assert human_eval.main(["import", "--study", str(study), str(path)]) == 0
