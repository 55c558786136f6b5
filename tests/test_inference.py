"""Lists of texts in Python: continuations and classes are those of the command line."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

import run_llama
from classifier import LlamaEmbeddingClassifier, LlamaPromptClassifier
from conftest import ROOT
from llama import Llama, load_pretrained
from minillama.decoding.fast_llama import fast_model
from minillama.formats.checkpoint import read_fine_tuned, write_checkpoint
from minillama.inference import TextClassifier, complete, tokenizer_of
from models import tiny_llama
from tokenizer import Tokenizer

MODEL = ROOT / "data" / "mini-llama.safetensors"
PROMPTS = ["Once upon a time", "The film was", "I"]
NAMES = ["awful", "fine", "great"]


@pytest.fixture(scope="module")
def story() -> tuple[Llama, Tokenizer]:
    return load_pretrained(MODEL), Tokenizer(ROOT / "data" / "mini-llama.model")


def by_command(capsys, *arguments: str) -> list[dict]:
    assert run_llama.main([*arguments, "--pretrained-model-path", str(MODEL), "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


# complete


def test_greedy_continuations_are_those_of_the_command_line_in_any_batch(story, capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    arguments = ("--prompt_file", str(tmp_path / "prompts.txt"), "--temperature", "0", "--max_new_tokens", "12")
    wanted = [line["text"] for line in by_command(capsys, *arguments)]
    assert len(set(wanted)) == 3 and all(wanted)
    for size in (1, 2, 8):
        assert complete(*story, PROMPTS, 12, temperature=0.0, batch_size=size) == wanted


def test_draws_are_those_of_the_command_line_with_its_seed_and_filters(story, capsys):
    arguments = ("--prompt", PROMPTS[0], "--max_new_tokens", "12", "--temperature", "0.9", "--seed", "5")
    (wanted,) = by_command(capsys, *arguments, "--top_k", "30", "--min_p", "0.02", "--repetition_penalty", "1.2")
    drawn = {"top_k": 30, "min_p": 0.02, "repetition_penalty": 1.2, "seed": 5}
    assert complete(*story, PROMPTS[:1], 12, 0.9, **drawn) == [wanted["text"]]
    assert complete(*story, PROMPTS[:1], 12, 0.9, **drawn | {"seed": 6}) != [wanted["text"]]


def test_without_a_seed_torchs_generator_decides(story):
    torch.manual_seed(3)
    first, second = (complete(*story, PROMPTS[:1], 10) for _ in range(2))
    torch.manual_seed(3)
    assert complete(*story, PROMPTS[:1], 10) == first != second


def test_a_continuation_ends_before_a_stop_text(story):
    (whole,) = complete(*story, PROMPTS[:1], 40, temperature=0.0)
    before, _, _ = whole.partition(".")
    assert "." in whole and complete(*story, PROMPTS[:1], 40, temperature=0.0, stop=".") == [before]


def test_a_model_in_training_is_in_evaluation_mode_meanwhile(story):
    model, tokenizer = story
    noisy = load_pretrained(MODEL)
    for module in noisy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    noisy.train()
    assert complete(noisy, tokenizer, PROMPTS, 8, 0.0) == complete(model, tokenizer, PROMPTS, 8, 0.0)
    assert noisy.training and not model.training


def test_the_fast_form_of_a_model_gives_the_same(story):
    model, tokenizer = story
    fast = fast_model(load_pretrained(MODEL), rows=3)
    assert complete(fast, tokenizer, PROMPTS, 12, 0.0) == complete(model, tokenizer, PROMPTS, 12, 0.0)


@pytest.mark.parametrize(
    ("texts", "settings", "message"),
    [
        ("one", {}, r"texts is one string \('one'\); give a list"),
        (["one"], {"top_p": 1.5}, "top_p is 1.5; it must be above 0 and at most 1"),
        (["one"], {"top_k": 0}, "top_k is 0; it must be a whole number, 1 or more"),
        (["one"], {"epsilon": 1.0}, r"epsilon is 1.0; it must be in \[0, 1\)"),
        (["one"], {"temperature": -1.0}, "temperature is -1.0"),
        (["one"], {"stop": ["", "x"]}, "stop has an empty text"),
        (["one"], {"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_bad_settings_are_named(story, texts, settings, message):
    with pytest.raises(ValueError, match=message):
        complete(*story, texts, 3, **settings)


def test_another_models_tokenizer_is_refused(story):
    with pytest.raises(ValueError, match="gives ids that a model with a vocabulary of 64 does not have"):
        complete(tiny_llama(), story[1], PROMPTS, 3)


def test_a_text_beyond_the_context_is_warned_of(story):
    with pytest.warns(
        UserWarning, match=r"^\d+ tokens of prompt and 2 new ones exceed the model's context of 1024; it sees"
    ):
        complete(*story, ["word " * 1200], 2)


def test_no_texts_have_no_continuations(story):
    assert complete(*story, [], 3) == []


# TextClassifier


def fine_tuned(path, head: str, **options: object):
    """The file of a classifier with random weights."""
    torch.manual_seed(1)
    llama = load_pretrained(MODEL)
    config = SimpleNamespace(llama=llama, num_labels=3, hidden_dropout_prob=0.3, option="finetune")
    own = Tokenizer(ROOT / "data" / "mini-llama.model")
    model = LlamaPromptClassifier(config, own, NAMES) if head == "prompt" else LlamaEmbeddingClassifier(config)
    saved = {"pretrained_model_path": str(MODEL), "tokenizer": None, "max_sentence_len": None, "batch_size": 8}
    saved |= {"option": "finetune", "pooling": "last_token"} | options
    about = {"kind": "classifier", "head": head, "label_names": NAMES, "options": saved}
    write_checkpoint(path, model.state_dict(), llama.config, **about)
    return path


TEXTS = ["A dull story.", "A great film,\nand moving in its way, for nearly two hours.", "Fine"]


@pytest.mark.parametrize("head", ["linear", "prompt"])
def test_probabilities_are_those_of_the_command_line(head, tmp_path, capsys):
    path = fine_tuned(tmp_path / "best.pt", head)
    for text, found in zip(TEXTS, TextClassifier(path)(TEXTS, batch_size=2), strict=True):
        (wanted,) = by_command(
            capsys, "--option", "classify", "--finetuned", str(path), "--prompt", text, "--dtype", "fp32"
        )
        assert found == pytest.approx(wanted["probabilities"], abs=1e-6) and sum(found.values()) == pytest.approx(1.0)
        assert next(iter(found)) == wanted["class"] and list(found.values()) == sorted(found.values(), reverse=True)


def test_bad_texts_are_named_and_cut_ones_are_warned_of(tmp_path):
    classify = TextClassifier(fine_tuned(tmp_path / "best.pt", "linear"))
    with pytest.raises(ValueError, match=r"texts is one string \('one'\)"):
        classify("one")
    with pytest.raises(ValueError, match="text 1 is empty"):
        classify(["one", " \n"])
    with pytest.warns(UserWarning, match="1 of 2 texts were cut to the model's 1024 tokens"):
        classify(["one", "word " * 1200])
    assert classify([]) == []


def test_the_tokenizer_is_found_from_any_folder_and_a_missing_one_is_named(tmp_path, monkeypatch):
    path = fine_tuned(tmp_path / "best.pt", "linear", pretrained_model_path="data/mini-llama.safetensors")
    monkeypatch.chdir(tmp_path)
    assert TextClassifier(path).tokenizer.path == ROOT / "data" / "mini-llama.model"
    found = read_fine_tuned(fine_tuned(tmp_path / "other.pt", "linear", tokenizer="gone.model"))
    with pytest.raises(FileNotFoundError, match="other.pt was trained with the tokenizer gone.model, which is"):
        tokenizer_of(found)
