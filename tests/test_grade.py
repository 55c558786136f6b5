"""grade.py: what it accepts, prints and writes."""

from __future__ import annotations

import json
import shutil
import stat
import zipfile

import pytest

import grade
from conftest import ROOT
from minillama.grading import judge as judging
from minillama.grading.hand_ins import BadHandIn, hand_ins, unpack
from minillama.grading.judge import RIGHT, WRONG, Judgement, Verdict
from minillama.grading.kit_setups import PARTS
from minillama.grading.mistakes import MISTAKES

MODULES = ("config.py", "rope.py", "lora.py", "optimizer.py", "llama.py", "classifier.py", "tokenizer.py")


@pytest.fixture
def own(tmp_path):
    """A hand-in with our own modules."""
    folder = tmp_path / "own"
    folder.mkdir()
    for name in MODULES:
        shutil.copyfile(ROOT / name, folder / name)
    return folder


def judged(folder, assignment, limits, name, progress):
    """A verdict without running anything: AdamW is wrong in folders that say so."""
    wrong = "wrong" in (folder / "optimizer.py").read_text()
    verdicts = [Verdict(part, points, points, RIGHT) for part, points in assignment.points.items()]
    if wrong:
        more = {"mistakes": ("adamw.decay_first",), "formula": "p -= ..."}
        verdicts[7] = Verdict("adamw", 0, 12, WRONG, "The decay comes first.", "optimizer.py, AdamW.step", **more)
    return Judgement(name, assignment.title, tuple(verdicts), 1.0)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(judging, "judge", judged)


@pytest.fixture
def group(tmp_path):
    """A class: two folders, a zip of Canvas, and a broken zip."""
    top = tmp_path / "class"
    for name, text in (("ann", "right"), ("bob", "wrong")):
        (top / name).mkdir(parents=True)
        (top / name / "optimizer.py").write_text(f"# {text}\n")
    with zipfile.ZipFile(top / "smithjo_LATE_123_456_hw1.zip", "w") as archive:
        archive.writestr("hw1/optimizer.py", "# wrong\n")
        archive.writestr("__MACOSX/hw1/._optimizer.py", "x")
        archive.writestr("hw1/model.pt", "x")
    (top / "eve.zip").write_bytes(b"PK no zip")
    return top


def test_a_single_hand_in_gets_a_table_with_hints(quick, group, capsys):
    assert grade.main([str(group / "bob")]) == 1
    out = capsys.readouterr().out
    assert "adamw         0/12  wrong" in out and "The decay comes first. (optimizer.py, AdamW.step) Right: p -=" in out
    assert "total       88/100" in out
    assert grade.main([str(group / "bob"), "--hints", "area"]) == 1
    out = capsys.readouterr().out
    assert "look at optimizer.py, AdamW.step" in out and "decay" not in out
    assert grade.main([str(group / "bob"), "--hints", "none"]) == 1
    assert "optimizer.py" not in capsys.readouterr().out
    assert grade.main([str(group / "ann")]) == 0


def test_gradescopes_results(quick, group, tmp_path):
    assert grade.main([str(group / "bob"), "--json", str(tmp_path / "results.json")]) == 1
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["score"] == 88 and len(results["tests"]) == 11
    test = results["tests"][7]
    assert (test["name"], test["score"], test["max_score"], test["status"]) == ("AdamW", 0, 12, "failed")
    assert test["output"].startswith("wrong: The decay comes first.")


def test_a_class_gets_a_line_each_and_a_page(quick, group, tmp_path, capsys):
    page = tmp_path / "class.html"
    assert grade.main([str(group), "--report", str(page)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1/4 ann: 100/100 (1 s; about 2 s left)"
    assert lines[1] == "2/4 bob: 88/100, not adamw (1 s; about 1 s left)"
    assert lines[2].startswith("3/4 eve: not judged: eve.zip: the zip cannot be read")
    assert lines[3] == "4/4 smithjo: 88/100, not adamw (1 s)"
    text = page.read_text()
    assert "smithjo" in text and "Known mistakes, the most frequent first." in text
    assert not list(tmp_path.glob("*.part"))


def test_an_interrupted_class_goes_on(quick, group, tmp_path, monkeypatch, capsys):
    page = tmp_path / "class.html"
    seen = []

    def interrupted(folder, *more):
        seen.append(folder.name)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return judged(folder, *more)

    monkeypatch.setattr(judging, "judge", interrupted)
    assert grade.main([str(group), "--report", str(page)]) == 130
    assert "interrupted after 1 of 4; the same command goes on" in capsys.readouterr().err
    assert not page.exists()
    assert grade.main([str(group), "--report", str(page)]) == 1
    out = capsys.readouterr().out
    assert out.startswith(f"1 of 4 were judged before: taken over from {page}.part\n1/4 ann: 100/100 (judged before)\n")
    assert "2/4 bob: 88/100, not adamw (1 s; about 1 s left)" in out
    assert seen == ["ann", "bob", "bob", "hw1"]
    (group / "ann" / "optimizer.py").write_text("# wrong\n")  # a changed hand-in is judged again
    assert grade.main([str(group), "--report", str(page)]) == 1
    out = capsys.readouterr().out
    assert "1/4 ann: 88/100, not adamw (1 s; about 2 s left)" in out and "judged before" not in out


def test_the_remaining_time_is_told_in_minutes_if_it_is_long():
    one = Judgement("ann", "edition fall2025, seed 0", (Verdict("norm", 8, 8, RIGHT),), 41.7)
    assert grade.summary(one, left=89.0) == "8/8 (42 s; about 89 s left)"
    assert grade.summary(one, left=1200.0) == "8/8 (42 s; about 20 min left)"
    assert grade.summary(one) == "8/8 (42 s)"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], "nothing: there is no such folder or zip"),
        (["EMPTY"], "it holds none of llama.py"),
        (["EMPTY", "--edition", "2023"], "invalid choice: '2023'"),
        (["EMPTY", "--parts", "norm,foo"], "--parts 'foo': the parts of fall2025 are norm, rope"),
        (["EMPTY", "--parts", "lora", "--edition", "2024"], "--parts 'lora': the parts of 2024 are"),
        (["EMPTY", "--report", "no/such/place.html"], "it must name a file in a folder that exists"),
        (["EMPTY", "--seed", "-1"], "'-1' is not allowed"),
        (["EMPTY", "--json", "one.json", "--report", "one.json"], "--json and --report are both one.json"),
    ],
)
def test_wrong_arguments_give_one_line_and_exit_code_2(tmp_path, capsys, arguments, words):
    arguments = [str(tmp_path) if argument == "EMPTY" else argument for argument in arguments]
    with pytest.raises(SystemExit, match="2"):
        grade.main(arguments)
    error = capsys.readouterr().err
    assert error.startswith("grade.py: error: ") and words in error and error.count("\n") == 1


@pytest.mark.parametrize("name", ["../evil.py", "/tmp/evil.py", "a\\..\\evil.py", "C:/evil.py"])
def test_a_zip_that_leads_outside_is_refused(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr(name, "x")
    with pytest.raises(BadHandIn, match="leads outside its folder"):
        unpack(tmp_path / "bad.zip", tmp_path / "out")
    assert not (tmp_path / "evil.py").exists()


def test_links_and_bombs_in_zips(tmp_path):
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as archive:
        link = zipfile.ZipInfo("llama.py")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("rope.py", "x = 1")
    out = unpack(tmp_path / "link.zip", tmp_path / "link")
    assert [path.name for path in out.iterdir()] == ["rope.py"]
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(30):
            archive.writestr(f"{i}.py", bytes(8 << 20))
    with pytest.raises(BadHandIn, match="unpacks to more than 200 MB"):
        unpack(tmp_path / "bomb.zip", tmp_path / "bomb")


def test_a_zip_of_one_student_may_hold_one_folder(tmp_path):
    with zipfile.ZipFile(tmp_path / "ann.zip", "w") as archive:
        archive.writestr("ann/llama.py", "x = 1")
    (into := tmp_path / "into").mkdir()
    [(name, folder, problem)] = hand_ins(tmp_path / "ann.zip", into)
    assert (name, folder.name, problem) == ("ann", "ann", "")


def test_two_parts_of_our_own_modules_are_right(own, capsys):
    assert grade.main([str(own), "--parts", "norm,adamw"]) == 0
    assert "total        20/20" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("edition", PARTS)
def test_our_own_modules_get_all_points(own, capsys, edition):
    assert grade.main([str(own), "--edition", edition]) == 0, capsys.readouterr().out
    assert "total       100/100" in capsys.readouterr().out


@pytest.mark.slow
def test_early_mistakes_are_named_and_the_rest_is_judged(own, capsys):
    for name, before, after in (
        ("llama.py", "weight, bias, self.eps)", "weight, bias, 1e-5)"),
        ("rope.py", "reshape_for_broadcast(table, pairs))", "reshape_for_broadcast(table, pairs).conj())"),
        ("optimizer.py", 'keep = 1 - group["lr"] * group["weight_decay"]', "keep = 1.0"),
    ):
        text = (own / name).read_text()
        assert text.count(before) == 1
        (own / name).write_text(text.replace(before, after))
    assert grade.main([str(own)]) == 1
    out = capsys.readouterr().out
    for part, name in (("norm", "eps_1e5"), ("rope", "wrong_sign"), ("adamw", "decay_first")):
        assert MISTAKES[f"{part}.{name}"].sentence in out
    assert "total       68/100" in out
