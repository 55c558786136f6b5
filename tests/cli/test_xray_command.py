"""--xray and --against as commands: what is shown, and what is refused before any work."""

from __future__ import annotations

import base64
import json
import re

import numpy as np
import pytest
import torch

from minillama.cli.xray_page import MOST_TOKENS
from minillama.formats.checkpoint import write_checkpoint
from minillama.formats.huggingface import write_huggingface
from models import tiny_llama

TEXT = ("--prompt", "one day", "--temperature", "0")


def data_of(command, name="page.html"):
    """The data of a page."""
    page = (command.folder / name).read_text(encoding="utf-8")
    return page, json.loads(re.search(r'<script id="data" type="application/json">(.*)</script>', page)[1])


def other(command, name="other.pt", seed=5, **changes):
    model = tiny_llama(seed, **{"vocab_size": 512, "max_seq_len": 64} | changes)
    write_checkpoint(command.folder / name, model.state_dict(), model.config)
    return name


def test_a_text_is_shown_and_printed_as_without_the_page(command):
    plain = command("generate", *TEXT)[1]
    code, out, err = command("generate", *TEXT, "--xray", "page.html")
    page, data = data_of(command)
    assert code == 0 and out == plain and "wrote page.html" in err
    assert data["prompt"] == len(data["tokens"]) - 5 and data["settings"]["temperature"] == 0.0
    assert data["answers"][:-1] == data["tokens"][1:] or "<" in "".join(data["tokens"])
    assert "part-7" not in page


def test_of_a_long_text_the_first_tokens_are_shown(command):
    code, _, err = command("generate", *TEXT, "--max_new_tokens", "75", "--xray", "page.html")
    assert code == 0 and "notice: --xray shows the first 64 of 7" in err, "the model's context is 64"
    assert len(data_of(command)[1]["tokens"]) == 64 <= MOST_TOKENS


@pytest.mark.parametrize("kind", ["checkpoint", "folder"])
def test_a_second_model_may_have_any_format(command, kind):
    name = other(command, norm="rmsnorm", causal=True)
    first = other(command, "first.pt", norm="rmsnorm", causal=True)
    if kind == "folder":
        model = tiny_llama(5, vocab_size=512, max_seq_len=64, norm="rmsnorm", causal=True)
        name = "folder"
        (command.folder / name).mkdir()
        write_huggingface(command.folder / name, model.config, model.state_dict(), 1, 2)
    more = ("--pretrained-model-path", first, "--xray", "page.html", "--against", name)
    code, _, err = command("generate", *TEXT, *more)
    page, data = data_of(command)
    assert code == 0, err
    assert data["other"]["model"] == name and "No difference is above 0.1 %" in page


@pytest.mark.parametrize(
    "changes, what",
    [({"n_layers": 3}, "n_layers 3, the first model 2"), ({"causal": True}, "causal True, the first model False")],
)
def test_another_kind_of_model_is_refused_before_a_token_is_written(command, changes, what):
    code, out, err = command("generate", *TEXT, "--xray", "page.html", "--against", other(command, **changes))
    assert (code, out) == (2, "") and what in err and not (command.folder / "page.html").exists()


def test_classifiers_are_compared_by_their_own_heads(command):
    for seed, more in (("1", []), ("2", [])):
        assert command("finetune", "--seed", seed, "--run_dir", f"run{seed}", *more)[0] == 0
    sentence = ("--prompt", "one good day")
    pages = ("--xray", "page.html", "--against", "run2/best.pt")
    code, _, err = command("classify", "--finetuned", "run1/best.pt", *sentence, *pages)
    page, data = data_of(command)
    assert code == 0 and data["kind"] == "classes" and "run2/best.pt" in page, err
    code, out, _ = command("classify", "--finetuned", "run2/best.pt", *sentence, "--json")
    said = json.loads(out)["probabilities"]
    last = data["other"]["lens"]["texts"][-1][-1]
    assert last == sorted(said, key=said.get, reverse=True), "the other's own answer"
    code, _, err = command(
        "classify", "--finetuned", "run1/best.pt", *sentence, "--xray", "page.html", "--against", "model.pt"
    )
    assert code == 0 and "Its stream is read by the classifier of best.pt" in data_of(command)[0], err


def test_of_a_classifier_of_the_mean_the_page_has_each_tokens_logits(command):
    assert command("finetune", "--pooling", "mean", "--run_dir", "run")[0] == 0
    asked = ("classify", "--finetuned", "run/best.pt", "--prompt", "one good day", "--dtype", "fp32")
    code, out, _ = command(*asked, "--json")
    by_last, _ = command(*asked, "--json", "--pooling", "last_token")[1:]
    assert code == 0 and out != by_last, "the run's pooling is taken"
    code, _, err = command(*asked, "--xray", "page.html")
    assert code == 0, err
    page, data = data_of(command)
    said = json.loads(out)
    shown = ", ".join(f"{name} {p:.3f}" for name, p in sorted(said["probabilities"].items(), key=lambda one: -one[1]))
    assert f"from the mean over all tokens: {shown}." in " ".join(page.split())
    assert set(data["answers"]) == {shown.split()[0]} and "Only the last token decides" not in page
    stored = np.frombuffer(base64.b64decode(data["logits"]["data"]), data["logits"]["kind"])
    logits = torch.tensor(stored.reshape(len(data["tokens"]), -1) * data["logits"]["scale"]).mean(0)
    assert dict(zip(data["vocabulary"], logits.softmax(-1).tolist(), strict=True)) == pytest.approx(
        said["probabilities"], abs=1e-4
    )


def test_of_two_classifiers_each_answers_by_its_own_pooling(command):
    for pooling in ("mean", "last_token"):
        assert command("finetune", "--pooling", pooling, "--run_dir", pooling)[0] == 0
    asked = ("--prompt", "one good day", "--dtype", "fp32", "--json")
    said = json.loads(command("classify", "--finetuned", "mean/best.pt", *asked)[1])["probabilities"]
    words = ", ".join(f"{name} {p:.3f}" for name, p in sorted(said.items(), key=lambda one: -one[1]))
    for first, second, answers in (
        ("mean", "last_token", "at its last token"),
        ("last_token", "mean", f"from the mean over all tokens: {words}"),
    ):
        shown = (*asked[:-1], "--xray", "page.html", "--against", f"{second}/best.pt")
        code, _, err = command("classify", "--finetuned", f"{first}/best.pt", *shown)
        page, data = data_of(command)
        assert code == 0 and data["other"]["answers"] == answers, err
        assert ("All tokens decide" in page) == (first == "mean") == ("linear head on the mean of all tokens" in err)


def test_a_prompt_head_does_not_read_the_mean(command_of_words):
    command = command_of_words
    assert command("finetune", "--head", "prompt", "--run_dir", "run")[0] == 0
    asked = ("classify", "--finetuned", "run/best.pt", "--prompt", "good", "--pooling", "mean")
    code, out, err = command(*asked)
    assert (code, out) == (2, "") and "a prompt is answered at its last token; leave it out" in err


def test_zero_shot_shows_its_first_sentence_before_the_work(command_of_words, monkeypatch):
    command = command_of_words

    def work(*_):
        assert (command.folder / "page.html").exists()
        done.append("work")

    done: list[str] = []
    with monkeypatch.context() as patched:
        patched.setattr("minillama.cli.classifiers.predict", work)
        code, _, err = command("prompt", "--xray", "page.html")
    assert code == 0 and "wrote page.html" in err and done == ["work"], err
    code, _, err = command("prompt", "--xray", "page.html")
    assert code == 0 and "wrote page.html" in err, err
    assert "Is" in "".join(data_of(command)[1]["tokens"])
    (command.folder / "page.html").unlink()
    code, out, _ = command("prompt", "--xray", "page.html", "--against", other(command, n_layers=3))
    assert (code, out) == (2, "")


@pytest.mark.parametrize(
    "more, message",
    [
        (["--xray", ".html"], "the page's name must end in .html"),
        (["--xray", "page.html", "--against", ""], "--against has no name"),
        (["--xray", "none/page.html"], "there is no folder none"),
        (["--xray", "page.html", "--prompt", "a b c " * 80], "--xray shows at most 128 tokens"),
    ],
)
def test_nonsense_is_told_before_any_work(command, more, message):
    before = command.files()
    code, out, err = command("generate", *TEXT, *more)
    assert (code, out) == (2, "") and message in err.splitlines()[-1] and command.files() == before
