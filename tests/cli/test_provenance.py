"""Records of what prediction files were made from, and that a default output never replaces another data set's."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import threading
import time

import pytest

from minillama.cli import provenance
from minillama.cli.provenance import find_record, lock_predictions, same_sentences, sentences_in
from minillama.environment import project_commit
from minillama.formats.checkpoint import write_checkpoint
from minillama.training import evaluation
from models import tiny_llama
from programs import Program

SENTENCES = ["a bad film", "one good day", "so dull", "so fine"]
DEFAULT = "cfimdb-dev-prompting-output.txt"


def write_rows(path, sentences):
    path.write_text("".join(f"{i % 2} ||| {one}\n" for i, one in enumerate(sentences)), encoding="utf-8")


class Command(Program):
    """A folder with tiny data and a tiny model; runs prompt in it, or another option."""

    def __init__(self, folder, tokenizer, capsys):
        super().__init__(folder, capsys)
        for split in ("train", "dev", "test"):
            write_rows(folder / f"{split}.txt", SENTENCES)
        (folder / "names.json").write_text('["bad", "good"]', encoding="utf-8")
        (folder / "model.model").write_bytes(tokenizer.read_bytes())
        model = tiny_llama(vocab_size=512, max_seq_len=64, causal=True)
        write_checkpoint(folder / "model.pt", model.state_dict(), model.config)

    def classify(self, option="prompt", *more):
        splits = [word for split in ("train", "dev", "test") for word in (f"--{split}", f"{split}.txt")]
        model = ["--pretrained-model-path", "model.pt", "--label-names", "names.json", "--epochs", "1"]
        return self("--option", option, *splits, *model, *more)

    def record(self, name, folder="."):
        return find_record(self.folder / folder, name, (self.folder / folder / name).read_bytes())


@pytest.fixture
def command(asset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    return Command(tmp_path, asset("stories260K/tok512.model"), capsys)


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


# Records


def test_a_prediction_file_has_a_record_of_what_it_was_made_from(command):
    code, out, _ = command.classify("prompt", "--seed", "7")
    assert code == 0
    record = json.loads((command.folder / "runs" / "predictions" / f"{DEFAULT}.json").read_text(encoding="utf-8"))
    assert record["file"] == DEFAULT and record["sha256"] == sha256(command.folder / DEFAULT)
    assert (record["option"], record["seed"], record["label_names"]) == ("prompt", 7, "names.json")
    assert (record["checkpoint"], record["checkpoint_sha256"]) == ("model.pt", sha256(command.folder / "model.pt"))
    assert (record["data"], record["rows"], record["data_sha256"]) == (
        "dev.txt",
        4,
        sha256(command.folder / "dev.txt"),
    )
    assert f"dev accuracy {record['accuracy']:.3f}, macro-F1 {record['macro_f1']:.3f}" in out
    assert not (record["model_substituted"] or record["data_substituted"] or record["bundled_model"])
    assert "seed" in record["typed"] and "batch_size" not in record["typed"]
    assert record["options"]["batch_size"] == 8 and record["commit"] == project_commit() and record["time"][4] == "-"


def test_a_record_is_found_by_content_under_any_name_and_by_nothing_else(command):
    assert command.classify()[0] == 0
    shutil.copy(command.folder / DEFAULT, command.folder / "mine.txt")
    assert command.record("mine.txt") == command.record(DEFAULT) is not None
    with (command.folder / "mine.txt").open("a", encoding="utf-8") as file:
        file.write("1 ||| added by hand\n")
    assert command.record("mine.txt") is None
    (command.folder / "runs" / "predictions" / "other.json").write_text("[]", encoding="utf-8")
    assert command.record(DEFAULT) is not None


def test_a_renamed_file_keeps_its_record_when_its_name_is_used_again(command):
    assert command.classify()[0] == 0
    os.replace(DEFAULT, "first.txt")
    write_rows(command.folder / "dev.txt", SENTENCES[:3])
    assert command.classify()[0] == 0
    assert command.record("first.txt")["rows"] == 4 and command.record(DEFAULT)["rows"] == 3


def test_files_of_one_content_have_each_their_record(command):
    (command.folder / "a").mkdir()
    outs = ["--dev_out", "a/x-dev-prompting-output.txt", "--test_out", "a/x-test-prompting-output.txt"]
    assert command.classify("prompt", *outs)[0] == 0  # dev and test have the same rows
    assert command.record("x-dev-prompting-output.txt", "a")["data"] == "dev.txt"
    assert command.record("x-test-prompting-output.txt", "a")["data"] == "test.txt"


def test_labels_without_gold_have_no_scores_in_the_record(command):
    (command.folder / "dev.txt").write_text("0 ||| a\n0 ||| b\n", encoding="utf-8")
    assert command.classify()[0] == 0
    assert command.record(DEFAULT)["accuracy"] is None and command.record(DEFAULT)["macro_f1"] is None


def test_what_was_substituted_is_in_the_record(command, monkeypatch):
    write_checkpoint("bundled.pt", (model := tiny_llama(vocab_size=512, max_seq_len=64)).state_dict(), model.config)
    shutil.copy("model.model", "bundled.model")
    for module in ("minillama.cli.provenance", "minillama.cli.bundled"):
        monkeypatch.setattr(f"{module}.BUNDLED_MODEL", command.folder / "bundled.pt")
    assert command("--max_new_tokens", "2", "--prompt", "one")[0] == 0
    for temperature in (0, 1):
        record = command.record(f"generated-sentence-temp-{temperature}.txt")
        assert record["model_substituted"] and record["bundled_model"] and not record["data_substituted"]
        assert record["data"] is None and record["options"]["max_new_tokens"] == 2
        assert record["temperature"] == temperature
    shutil.copy("bundled.pt", "renamed.pt")
    assert command.classify("prompt", "--pretrained-model-path", "renamed.pt", "--tokenizer", "model.model")[0] == 0
    record = command.record(DEFAULT)
    assert record["bundled_model"] and not record["model_substituted"]
    monkeypatch.setattr("minillama.cli.bundled.HERE", command.folder)
    (command.folder / "data").mkdir()
    shutil.copy("names.json", "data/demo-label-mapping.json")
    for split in ("train", "dev", "test"):
        shutil.copy(f"{split}.txt", f"data/demo-{split}.txt")
    assert command("--option", "prompt")[0] == 0
    record = command.record("demo-dev-prompting-output.txt")
    assert record["model_substituted"] and record["data_substituted"] and record["data"] == "data/demo-dev.txt"


def test_predictions_of_a_fine_tuned_or_mixed_model_have_records(command):
    assert command.classify("lora", "--run_dir", "run")[0] == 0
    assert command.record("cfimdb-dev-lora-output.txt")["option"] == "lora"
    assert command("--option", "wise_ft", "--finetuned", "run/best.pt", "--alphas", "1", "--dev_out", "d.txt")[0] == 0
    record = command.record("d.txt")
    assert (record["option"], record["checkpoint"], record["data"]) == ("wise_ft", "run/best.pt", "dev.txt")
    assert record["checkpoint_sha256"] == sha256(command.folder / "run" / "best.pt")


def test_a_record_that_cannot_be_written_costs_no_predictions(command):
    (command.folder / "runs").write_text("a file", encoding="utf-8")
    code, out, err = command.classify()
    assert code == 0 and "warning: cfimdb-dev-prompting-output.txt has no record" in err and "dev accuracy" in out
    assert len((command.folder / DEFAULT).read_text(encoding="utf-8").splitlines()) == 4


def test_scores_are_told_even_if_the_predictions_cannot_be_written(command, monkeypatch):
    def fails(*_, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minillama.text.labelled.write_predictions", fails)
    code, out, err = command.classify()
    assert code == 2 and "No space left" in err and "dev accuracy" in out and "test accuracy" in out


# Default outputs


@pytest.mark.parametrize("option, kind", [("prompt", "prompting"), ("finetune", "finetuning"), ("lora", "lora")])
def test_a_default_output_never_replaces_predictions_of_other_rows(command, option, kind):
    for split in ("dev", "test"):
        path = command.folder / f"cfimdb-{split}-{kind}-output.txt"
        write_rows(path, SENTENCES)
        write_rows(command.folder / f"{split}.txt", [*SENTENCES[:3], "another"] if split == "test" else SENTENCES)
    before = command.files()
    code, out, err = command.classify(option)
    assert (code, out) == (2, "") and command.files() == before and not (command.folder / "runs").exists()
    assert err.splitlines()[-1] == (
        f"run_llama.py: error: cfimdb-test-{kind}-output.txt holds predictions for 4 rows, not for the 4 of test.txt; "
        "name another file with --test_out, or move this file"
    )
    assert command.classify(option, "--test_out", f"cfimdb-test-{kind}-output.txt")[0] == 0


def test_predictions_that_another_run_has_written_meanwhile_are_kept_too(command, monkeypatch):
    """Two runs at once on other data, both with the default outputs: the guard at the start sees neither's."""
    evaluate = evaluation.evaluate

    def while_another_writes(*arguments, **settings):
        write_rows(command.folder / "cfimdb-dev-prompting-output.txt", ["of", "another"])
        return evaluate(*arguments, **settings)

    monkeypatch.setattr(evaluation, "evaluate", while_another_writes)
    code, _, err = command.classify()
    kept, moved = "cfimdb-dev-prompting-output.txt", "2-cfimdb-dev-prompting-output.txt"
    assert (
        code == 0
        and f"warning: another run has written predictions for other data to {kept}; these go to {moved}" in err
    )
    assert sentences_in(".txt", (command.folder / kept).read_bytes()) == ["of", "another"]
    assert sentences_in(".txt", (command.folder / moved).read_bytes()) == SENTENCES
    assert command.record(moved)["file"] == moved


def test_a_file_and_its_record_are_of_one_run(tmp_path):
    """Two runs write one file: one waits until the other has both."""
    path, order = tmp_path / "output.txt", []

    def run(name):
        with lock_predictions(path):
            order.append(f"{name} begins")
            time.sleep(0.05)
            order.append(f"{name} ends")

    threads = [threading.Thread(target=run, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one[0] for one in order[::2]] == [one[0] for one in order[1::2]] and len(order) == 6


def test_the_data_of_what_would_be_lost_are_named(command):
    assert command.classify()[0] == 0
    (command.folder / "more").mkdir()
    write_rows(command.folder / "more" / "dev.txt", SENTENCES[:2])
    code, _, err = command.classify("prompt", "--dev", "more/dev.txt")
    assert code == 2 and f"{DEFAULT} holds predictions for 4 rows of dev.txt, not for the 2 of more/dev.txt" in err


def test_predictions_of_the_same_rows_are_written_over(command):
    write_rows(command.folder / DEFAULT, SENTENCES)
    for _ in range(2):
        assert command.classify()[0] == 0
    assert command.record(DEFAULT) is not None


@pytest.mark.parametrize("content", [b"\xff\xfe", b"my notes\n", b"1 ||| a bad film\nnotes\n"])
def test_a_file_that_holds_no_predictions_is_not_replaced_by_default(command, content):
    (command.folder / DEFAULT).write_bytes(content)
    code, _, err = command.classify()
    assert code == 2 and f"{DEFAULT} already exists and holds no predictions; name another" in err
    assert (command.folder / DEFAULT).read_bytes() == content


def test_default_answers_never_replace_those_to_other_prompts(command):
    lines = [json.dumps({"prompt": f"what is {i}", "answer": "good"}) + "\n" for i in range(3)]
    for split in ("train", "dev"):
        (command.folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    settings = ["--option", "sft", "--train", "train.jsonl", "--pretrained-model-path", "model.pt", "--epochs", "1"]
    settings += ["--model_out", "out.safetensors", "--max_new_tokens", "3"]
    for _ in range(2):
        assert command(*settings, "--dev", "dev.jsonl")[0] == 0
    assert command.record("sft-dev-answers.jsonl")["f1"] is not None
    (command.folder / "more.jsonl").write_text("".join(lines[:2]), encoding="utf-8")
    before = command.files()
    code, _, err = command(*settings, "--dev", "more.jsonl")
    assert code == 2 and "sft-dev-answers.jsonl holds predictions for 3 rows of dev.jsonl, not for the 2" in err
    assert command.files() == before


def test_the_courses_prompting_file_is_of_the_same_rows():
    asked = [f"{one} Is this movie bad or good? This movie is " for one in SENTENCES]
    assert same_sentences(asked, SENTENCES) and same_sentences(SENTENCES, SENTENCES)
    assert not same_sentences(SENTENCES[:3], SENTENCES) and not same_sentences(SENTENCES[::-1], SENTENCES)


# The commit


def test_the_commit_is_that_of_the_code_and_says_if_files_differ(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))  # as in a hook of another repository
    code = tmp_path / "repository" / "code"
    code.mkdir(parents=True)
    (code / "run_llama.py").write_text("1\n", encoding="utf-8")
    assert project_commit(code) is None  # in no repository
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", *identity, *words], cwd=code.parent, env=environment, capture_output=True)
        return done.stdout.decode().strip()

    git("init", "-q")
    (code.parent / "other.txt").write_text("1\n", encoding="utf-8")
    git("add", "other.txt")
    git("commit", "-qm", "first")
    assert project_commit(code) is None  # a copy in somebody else's repository
    git("add", ".")
    git("commit", "-qm", "second")
    head = git("rev-parse", "HEAD")
    (code / "untracked.txt").write_text("1\n", encoding="utf-8")
    assert len(head) == 40 and project_commit(code) == head
    (code / "run_llama.py").write_text("2\n", encoding="utf-8")
    assert project_commit(code) == f"{head}-dirty"
    monkeypatch.setenv("PATH", "")
    assert project_commit(code) is None  # no git


def test_a_checksum_is_of_a_file_alone(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert provenance.file_sha256(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()
    assert provenance.file_sha256(tmp_path) is provenance.file_sha256(tmp_path / "none") is None
