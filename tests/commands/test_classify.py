"""--option classify: the same answers as the predictions of finetune and lora."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys

import pytest
import torch

from classifier import classifier_of
from conftest import ROOT
from minillama.cli import classifiers
from minillama.formats.checkpoint import read_fine_tuned
from minillama.text import labelled as labelling
from minillama.text.batches import tokenize_rows
from minillama.text.labelled import read_rows
from minillama.training.evaluation import class_log_probs
from programs import fine_tuned, outputs, run_with
from tokenizer import Tokenizer


@pytest.fixture
def command(command_of_words):
    return command_of_words


def classify(command, *more, **which):
    return run_with(command, "classify", *more, **which)


@pytest.fixture
def piped(monkeypatch):
    """Has the program read this, as from a pipe."""

    def pipe(content):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    return pipe


def sentences(path):
    return [line.partition(" ||| ")[2] for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("option, head", [("finetune", "linear"), ("finetune", "prompt"), ("lora", "linear")])
def test_it_says_of_dev_what_the_run_predicted(command, option, head):
    path = fine_tuned(command, option, head, "--max_sentence_len", "3")
    (command.folder / "model.pt").unlink()  # the base is not needed
    texts = sentences(command.folder / "dev.txt")
    (command.folder / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    code, out, err = classify(command, "--prompt_file", "texts.txt", "--json")
    assert code == 0, err
    said = [json.loads(line) for line in out.splitlines()]
    predicted = (command.folder / outputs(option)[0]).read_text(encoding="utf-8").splitlines()
    assert [f"{one['label']} ||| {one['sentence']}" for one in said] == predicted
    names = read_fine_tuned(path).label_names
    for one in said:
        assert list(one["probabilities"]) == names and sum(one["probabilities"].values()) == pytest.approx(1, abs=1e-6)
        assert one["class"] == names[one["label"]] == max(names, key=one["probabilities"].__getitem__)
    code, out, _ = classify(command, "--prompt_file", "texts.txt", "--batch_size", "2")
    assert code == 0
    shown = [f"{one['class']} {max(one['probabilities'].values()):.3f} ||| {one['sentence']}" for one in said]
    assert out.splitlines() == shown


def test_an_adapter_says_what_its_whole_model_says_while_its_base_is_there(command):
    path = fine_tuned(command, "lora", "linear", "--lora_targets", "all", "--lora_rank", "2")
    adapter = ["--to", "adapter", "--adapter", str(path), "--model_out", "small.pt"]
    code, _, err = command("convert", *adapter, "--pretrained-model-path", "model.pt")
    assert code == 0 and "classes     " in err, err
    assert os.path.getsize("small.pt") < os.path.getsize(path) / 2
    sentence = sentences(command.folder / "dev.txt")[0]
    said = [classify(command, "--prompt", sentence, "--json", "--finetuned", file) for file in (path, "small.pt")]
    assert said[0][0] == said[1][0] == 0, said
    assert said[0][1] == said[1][1]  # the same numbers

    (command.folder / "model.pt").rename(command.folder / "moved.pt")
    code, _, err = classify(command, "--prompt", sentence, "--finetuned", "small.pt")
    assert code == 2 and "small.pt is an adapter, and its base model 'model.pt' is missing" in err
    there = ["--finetuned", "small.pt", "--pretrained-model-path", "moved.pt"]
    assert classify(command, "--prompt", sentence, "--json", *there)[1] == said[0][1]
    other = torch.load(command.folder / "moved.pt", weights_only=True)
    other["model"]["norm.weight"] += 0.5
    torch.save(other, command.folder / "model.pt")
    code, _, err = classify(command, "--prompt", sentence, "--finetuned", "small.pt")
    assert code == 2 and "small.pt is an adapter of another model than model.pt" in err
    code, _, err = command("convert", *adapter, "--pretrained-model-path", "model.pt")
    assert code == 2 and "was trained on another model than model.pt" in err


@pytest.mark.parametrize(
    "labels", [{"1": "bad", "2": "good"}, {"neg": "bad", "pos": "good"}, {"01": "bad", "2": "good"}]
)
def test_a_label_is_the_label_files_and_a_number_where_it_is_one(command, labels):
    (command.folder / "names.json").write_text(json.dumps(labels), encoding="utf-8")
    known = list(labels)
    for split in ("train", "dev", "test"):
        path = command.folder / f"{split}.txt"
        path.write_text(re.sub(r"^[01]", lambda m: known[int(m[0])], path.read_text(), flags=re.M))
    fine_tuned(command)
    (command.folder / "texts.txt").write_text("\n".join(sentences(command.folder / "dev.txt")), encoding="utf-8")
    code, out, err = classify(command, "--prompt_file", "texts.txt", "--json")
    assert code == 0, err
    said = [json.loads(line) for line in out.splitlines()]
    predicted = (command.folder / outputs("finetune")[0]).read_text(encoding="utf-8").splitlines()
    assert [f"{one['label']} ||| {one['sentence']}" for one in said] == predicted
    assert {type(one["label"]) for one in said} <= ({int} if known == ["1", "2"] else {int, str})
    code, _, err = run_with(command, "wise_ft", "--alphas", "1", "--dev_out", "d.txt", "--test_out", "t.txt")
    assert code == 0, err
    assert (command.folder / "d.txt").read_text(encoding="utf-8").splitlines() == predicted


@pytest.mark.parametrize(
    "text, label", [("0", 0), ("12", 12), ("-1", -1), ("01", "01"), ("-0", "-0"), ("1.5", "1.5"), ("٣", "٣")]
)
def test_only_a_whole_number_as_one_is_written_is_a_number(text, label):
    assert labelling.json_label(text) == label and type(labelling.json_label(text)) is type(label)


def test_the_probabilities_are_those_of_the_sentence_alone(command):
    found = read_fine_tuned(fine_tuned(command))
    tokenizer = Tokenizer(tokenizer_model="tokenizer.model")
    model = classifier_of(found, tokenizer)
    (row,), _ = tokenize_rows(read_rows("dev.txt", ["a", "b"])[:1], tokenizer, 64)
    with torch.no_grad():
        expected = model(torch.tensor([row.ids])).exp()[0].tolist()
    code, out, err = classify(command, "--prompt", f"  {row.sentence}\n", "--json")
    assert code == 0, err
    assert list(json.loads(out)["probabilities"].values()) == pytest.approx(expected, abs=1e-6)


def test_it_works_in_another_folder_with_the_tokenizer_named(command, monkeypatch):
    fine_tuned(command)
    elsewhere = command.folder / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    code, _, err = classify(command, "--prompt", "x", finetuned="../run/best.pt")
    assert code == 2
    assert "../run/best.pt was trained with the tokenizer tokenizer.model, which is missing; name it with --tok" in err
    code, out, err = classify(command, "--prompt", "x", "--tokenizer", "../tokenizer.model", finetuned="../run/best.pt")
    assert code == 0 and out.endswith(" ||| x\n"), err


def test_what_ships_with_the_program_is_found_from_any_folder(command, monkeypatch):
    fine_tuned(command)
    monkeypatch.setattr(classifiers, "HERE", command.folder)
    (command.folder / "model.model").write_bytes((command.folder / "tokenizer.model").read_bytes())
    elsewhere = command.folder / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    code, out, err = classify(command, "--prompt", "x", finetuned="../run/best.pt")
    assert code == 0 and out.endswith(" ||| x\n"), err


def test_lines_of_a_data_file_and_line_breaks_within_a_sentence(command):
    fine_tuned(command)
    code, out, err = classify(command, "--prompt_file", "dev.txt")
    assert code == 0 and out.count("\n") == len((command.folder / "dev.txt").read_text().splitlines())
    assert "the labels of these lines are not read" in err
    gold = sentences(command.folder / "dev.txt")
    assert [line.partition(" ||| ")[2] for line in out.splitlines()] == gold
    (command.folder / "other.txt").write_text("x ||| a bad film\nplain\n", encoding="utf-8")
    code, out, err = classify(command, "--prompt_file", "other.txt")
    assert "1 of 2 sentences begin with a label" in err and out.splitlines()[0].endswith(" ||| x ||| a bad film")
    code, out, err = classify(command, "--prompt", "one\r\ntwo ||| three")
    assert code == 0 and out.partition(" ||| ")[2] == "one two ||| three\n" and "warning" not in err


def test_what_has_no_meaning_for_it_is_told_and_what_it_takes_from_the_run_is_not(command):
    fine_tuned(command, "finetune", "linear", "--max_sentence_len", "4", "--pooling", "last_column")
    code, _, err = classify(command, "--prompt", "x", "--label-names", "other.json", "--dev", "d.txt")
    assert code == 0
    assert [line.split()[1:] for line in err.splitlines() if line.startswith("ignored")] == [
        ["--dev,", "--label-names:", "no", "effect", "with", "--option", "classify"]
    ]


def test_the_courses_reading_is_repeated_with_the_runs_batches(command):
    more = ["--pooling", "last_column", "--batch_size", "3"]
    fine_tuned(command, "finetune", "prompt", *more, "--template", "So: {sentence} It ", "--label_words", "to,it")
    texts = sentences(command.folder / "dev.txt")
    (command.folder / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    code, out, err = classify(command, "--prompt_file", "texts.txt", "--json")
    assert code == 0 and "a result depends on the other sentences of its batch" in err
    said = [json.loads(line) for line in out.splitlines()]
    predicted = (command.folder / outputs("finetune")[0]).read_text(encoding="utf-8").splitlines()
    assert [f"{one['label']} ||| {one['sentence']}" for one in said] == predicted
    other = classify(command, "--prompt_file", "texts.txt", "--json", "--batch_size", "1")[1]
    assert [json.loads(line)["probabilities"] for line in other.splitlines()] != [one["probabilities"] for one in said]


def test_the_precision_and_the_batches_are_those_asked_for(command, monkeypatch):
    fine_tuned(command, "finetune", "linear", "--batch_size", "3")
    seen = []

    def spied(model, rows, batch_size, **settings):
        seen.append((batch_size, settings["dtype"], settings["bucketed"]))
        return class_log_probs(model, rows, batch_size, **settings)

    monkeypatch.setattr("minillama.training.evaluation.class_log_probs", spied)
    assert classify(command, "--prompt", "x", "--dtype", "bf16")[0] == 0
    assert classify(command, "--prompt", "x", "--batch_size", "2")[0] == 0
    assert seen == [(3, torch.bfloat16, True), (2, torch.float32, True)]


def test_ctrl_c_stops_an_answer_and_not_the_loop(command, piped, monkeypatch):
    fine_tuned(command)
    piped(b"one\ntwo\n")
    answers = iter([KeyboardInterrupt, None])

    def interrupted(*more, **settings):
        if (stop := next(answers)) is not None:
            raise stop
        return class_log_probs(*more, **settings)

    monkeypatch.setattr("minillama.training.evaluation.class_log_probs", interrupted)
    code, out, err = classify(command, "--interactive")
    assert code == 0 and out.endswith(" ||| two\n") and out.count("\n") == 1 and "stopped" in err


@pytest.mark.parametrize("redirected", ["2>&-", pytest.param("2>/dev/null", marks=pytest.mark.slow)])
def test_without_stderr_stdout_holds_the_answers_alone(command, redirected):
    fine_tuned(command)
    (command.folder / "texts.txt").write_text("one\ntwo caf\u00e9\n", encoding="utf-8")
    words = f"{ROOT / 'run_llama.py'} --option classify --finetuned run/best.pt --prompt_file texts.txt --json"
    environ = os.environ | {"PYTHONIOENCODING": "ascii"}
    ran = subprocess.run(
        f'exec "{sys.executable}" {words} {redirected}',
        shell=True,
        cwd=command.folder,
        env=environ,
        capture_output=True,
    )
    assert ran.returncode == 0
    assert [json.loads(line)["sentence"] for line in ran.stdout.decode("ascii").splitlines()] == [
        "one",
        "two caf\u00e9",
    ]


def test_sentences_are_typed_one_by_one_and_a_bad_one_ends_nothing(command, piped):
    fine_tuned(command)
    piped(b"so it was\n\n\xff\nthe end\n")
    code, out, err = classify(command, "--interactive", "--json")
    assert code == 0, err
    assert [json.loads(line)["sentence"] for line in out.splitlines()] == ["so it was", "the end"]
    assert "Ctrl-D" in err


def test_a_word_ends_the_typing(command, piped):
    fine_tuned(command)
    piped(b"so it was\nquit\nthe end\n")
    code, out, err = classify(command, "--interactive", "--json")
    assert code == 0 and [json.loads(line)["sentence"] for line in out.splitlines()] == ["so it was"]
    assert "Ctrl-D ends, and so does the line quit, exit or :q" in err


@pytest.mark.parametrize(
    "more, message",
    [
        ([], "--option classify needs a sentence: --prompt TEXT"),
        (["--prompt", " "], "--prompt is empty; give a sentence"),
        (["--prompt", "x", "--interactive"], "leave out --prompt"),
        (["--prompt_file", "texts.txt"], "texts.txt: no such file of prompts (one per line)"),
        (["--prompt", "x", "--num_samples", "2"], "--num_samples belongs to --option generate"),
        (["--prompt", "x", "--norm", "rmsnorm"], "the model keeps the --norm and --attention of its fine-tuning"),
        (["--prompt", "x", "--template", "{sentence} it"], "--template belongs to --option prompt"),
        (["--prompt", "x", "--adapter", "a.pt"], "--adapter is for commands that run or convert a model"),
        (["--prompt", "x", "--finetuned", ""], "--option classify needs --finetuned"),
        (["--prompt", "x", "--finetuned", "model.pt"], "model.pt is not a fine-tuned classifier"),
    ],
)
def test_what_cannot_be_classified_is_refused_in_one_line(command, more, message):
    code, out, err = classify(command, *more, finetuned="model.pt")
    assert code == 2 and out == ""
    assert message in err and err.count("\n") == 1
