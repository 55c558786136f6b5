"""A class, judged in earnest: Canvas's zip of zips, an interruption, and the same command once more."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import zipfile
from functools import partial

import pytest

import grade
from conftest import ROOT
from minillama.cli.grading_report import hints_of
from minillama.grading.judge import RIGHT, STOPPED, Judgement, Verdict

RULE = "reshape_for_broadcast(table, pairs))"


@pytest.mark.skipif(os.name != "posix", reason="it needs Unix's signals and limits")
def test_an_interrupted_class_goes_on_where_it_was(tmp_path):
    rope = (ROOT / "rope.py").read_text(encoding="utf-8")
    assert rope.count(RULE) == 1
    texts = {"ann": rope, "bob": rope.replace(RULE, RULE[:-1] + ".conj())"), "cleo": "def broken(:\n"}
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for i, (name, text) in enumerate(texts.items()):
            raw = io.BytesIO()
            with zipfile.ZipFile(raw, "w") as inner:
                inner.writestr("hw/rope.py", text)
            archive.writestr(f"{name}_{i}_{i}_hw.zip", raw.getvalue())
        archive.writestr("dan_7_7_hw.zip", b"no zip")
    page = tmp_path / "class.html"
    command = [sys.executable, "grade.py", str(tmp_path / "all.zip"), "--parts", "rope", "--report", str(page)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a job in the background ignores Ctrl-C
    with subprocess.Popen(command, cwd=ROOT, preexec_fn=heard, **pipes) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().startswith("1/4 ann: 12/12 (")
        process.send_signal(signal.SIGINT)
        assert "interrupted after 1 of 4; the same command goes on" in process.stderr.read()
    assert process.returncode == 130 and not page.exists()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"1 of 4 were judged before: taken over from {page}.part"
    assert lines[1] == "1/4 ann: 12/12 (judged before)"
    assert lines[2].startswith("2/4 bob: 0/12, not rope (") and " left)" in lines[2]
    assert lines[3].startswith("3/4 cleo: 0/12, not rope (") and " left)" not in lines[3]
    assert lines[4].startswith("4/4 dan: not judged: dan_7_7_hw.zip: the zip cannot be read")
    text = page.read_text(encoding="utf-8")
    assert "both signs of the sine are reversed" in text and "rope.py does not load: SyntaxError" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.zip", "class.html"]


@pytest.mark.skipif(os.name != "posix", reason="it needs Unix's signals and limits")
@pytest.mark.parametrize("error, code", [(KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 2)])
def test_what_was_judged_is_kept_until_the_results_are_written(tmp_path, monkeypatch, capsys, error, code):
    for name in ("ann", "bob"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rope.py").write_text("def broken(:\n", encoding="utf-8")
    page = tmp_path / "class.html"
    arguments = [str(tmp_path / "ann"), str(tmp_path / "bob"), "--parts", "rope", "--report", str(page)]

    def fails(*_):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(grade, "write_results", fails)
        assert grade.main(arguments) == code
    err = capsys.readouterr().err
    assert "Traceback" not in err and err.splitlines()[-1].startswith("grade.py: ") and not page.exists()
    assert grade.main(arguments) == 1
    assert "2 of 2 were judged before" in capsys.readouterr().out
    assert page.exists() and not (tmp_path / "class.html.part").exists()


def test_parts_of_which_the_same_is_said_stand_together():
    stopped = [Verdict(part, 0, 8, STOPPED, "Stopped while llama.py was loading.") for part in ("norm", "block")]
    one = Judgement("ann", "edition fall2025, seed 0", (*stopped, Verdict("rope", 12, 12, RIGHT)))
    assert hints_of(one) == [("norm, block", STOPPED, "Stopped while llama.py was loading.")]
