"""--option generate: the end of a text, with our models and with those of other programs."""

from __future__ import annotations

import json

import pytest
import torch

from minillama.decoding import sampling as generation
from minillama.formats.huggingface import write_huggingface
from minillama.formats.tokenizer_json import write_huggingface_tokenizer
from models import tiny_llama
from programs import generated, made_of
from run_llama import main
from tokenizer import Tokenizer


@pytest.fixture
def command(generate_command):
    return generate_command


@pytest.mark.parametrize("how", ["alone", "batch"])
def test_the_end_of_the_sequence_ends_a_text(command, monkeypatch, how):
    really, calls = generation.next_token, []

    def ends_soon(logits, *arguments):
        calls.append(1)
        return torch.full((len(logits),), 2) if len(calls) == 4 else really(logits, *arguments)

    monkeypatch.setattr(generation, "next_token", ends_soon)
    if how == "alone":
        out, err = generated(command, "--temperature", "0")
        assert "4 tokens in" in err and len(calls) == 4
    else:
        out, _ = generated(command, "--temperature", "0", "--json")
        assert (json.loads(out)["finish"], json.loads(out)["tokens"], len(calls)) == ("end", 4, 4)


def test_the_end_of_one_row_of_a_batch_is_not_that_of_the_others(command, monkeypatch):
    really, calls = generation.next_token, []

    def first_row_ends_soon(logits, *arguments):
        calls.append(1)
        chosen = really(logits, *arguments)
        chosen[0] = 2 if len(calls) == 4 else 9
        return chosen

    monkeypatch.setattr(generation, "next_token", first_row_ends_soon)
    out, _ = generated(command, "--num_samples", "2", "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [(row["finish"], row["tokens"]) for row in rows] == [("end", 4), ("length", 16)] and len(calls) == 16


@pytest.mark.parametrize("more, tokens", [([], 1), (["--chat"], 2)])
def test_a_stop_ends_an_answer_of_a_batch_where_it_ends_one_alone(command, monkeypatch, more, tokens):
    """An answer to a chat begins without the space that its first token has behind a prompt."""
    token = made_of(command)[1].encode("the", bos=False, eos=False)[0]
    monkeypatch.setattr(generation, "next_token", lambda logits, *_: torch.full((len(logits),), token))
    out, _ = generated(command, *more, "--num_samples", "2", "--json", "--stop", " the")
    for found in map(json.loads, out.splitlines()):
        assert (found["text"], found["finish"], found["tokens"]) == ("the" if more else "", "stop", tokens)
    alone, err = generated(command, *more, "--temperature", "0", "--stop", " the")
    assert alone == ("the\n" if more else "one day\n") and f"{tokens} tokens in" in err


def test_a_stop_that_the_last_token_brings_is_a_stop(command):
    drawn = ["--temperature", "2", "--epsilon", "0"]
    full = generated(command, *drawn)[0].rstrip("\n")
    last = full[-2:]
    assert full.count(last) == 1
    found = json.loads(generated(command, *drawn, "--json", "--stop", last)[0])
    assert found["finish"] == "stop" and "one day" + found["text"] == full[:-2]


@pytest.mark.parametrize("decoder", ["beam", "lookup"])
def test_a_stop_ends_a_text_of_the_other_decoders_too(command, decoder):
    full = generated(command, "--decoder", decoder)[0].rstrip("\n")
    stop = full[len("one day") + 3 : len("one day") + 6]
    found = json.loads(generated(command, "--decoder", decoder, "--json", "--stop", stop)[0])
    assert found["finish"] == "stop" and found["tokens"] < 16
    assert "one day" + found["text"] == full[: full.index(stop, len("one day"))]


def huggingface_model(folder, tokenizer_model, vocab_size, edit=lambda content: None, eos=2):
    """A folder with a model whose ids from 320 on would be likeliest, and its tokenizer.json as `edit` leaves it."""
    model = tiny_llama(vocab_size=vocab_size, norm="rmsnorm", causal=True, max_seq_len=64)
    with torch.no_grad():
        model.output.weight[320:] *= 20
        model.output.weight[3:259] = 0  # bytes, of which libraries make different texts where they are no UTF-8
    folder.mkdir()
    write_huggingface(folder, model.config, model.state_dict(), 1, eos)
    write_huggingface_tokenizer(Tokenizer(tokenizer_model=tokenizer_model), folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    edit(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer.model").unlink()
    return folder


def test_a_text_ends_where_the_next_would_begin(asset, capsys):
    path = asset("stories260K/stories260K_v0.bin")
    arguments = ["--pretrained-model-path", path, "--tokenizer", asset("stories260K/tok512.model"), "--prompt", ""]
    arguments += ["--temperature", "0", "--max_new_tokens", "400"]
    assert main([*map(str, arguments), "--json"]) == 0
    (made,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert made["finish"] == "end" and made["tokens"] < 400
    assert made["text"].count("Once upon a time") == 1


@pytest.mark.parametrize("begins", [True, False])
def test_a_greedy_text_is_that_of_transformers_with_and_without_bos(tmp_path, small_tokenizer, capsys, begins):
    transformers = pytest.importorskip("transformers")
    edit = (lambda content: None) if begins else (lambda content: content.update(post_processor=None))
    folder = huggingface_model(tmp_path / "model", small_tokenizer, 320, edit)
    path = ["--pretrained-model-path", str(folder), "--prompt", "the boy", "--max_new_tokens", "12"]
    assert main([*path, "--temperature", "0", "--json"]) == 0
    (made,) = map(json.loads, capsys.readouterr().out.splitlines())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("the boy", return_tensors="pt").input_ids
    assert (ids[0, 0] == 1) == begins
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    found = theirs.generate(input_ids=ids, max_new_tokens=12, do_sample=False, eos_token_id=[2, 1])
    prompt = tokenizer.decode(ids[0], skip_special_tokens=True)
    assert made["text"] == tokenizer.decode(found[0], skip_special_tokens=True).removeprefix(prompt)


@pytest.mark.parametrize("decoder", ["sample", "beam", "contrastive", "lookup"])
def test_ids_without_a_piece_are_told_of_and_never_generated(tmp_path, small_tokenizer, capsys, decoder):
    folder = huggingface_model(tmp_path / "model", small_tokenizer, 384)
    (tmp_path / "prompts.txt").write_text("the boy\na dog ran home\n")
    path = ["--pretrained-model-path", str(folder), "--prompt_file", str(tmp_path / "prompts.txt")]
    assert main([*path, "--temperature", "0", "--decoder", decoder, "--json", "--max_new_tokens", "12"]) == 0
    out, err = capsys.readouterr()
    assert "64 ids of the model have no piece and are never generated" in err
    assert [json.loads(line)["tokens"] > 0 for line in out.splitlines()] == [True, True]


def test_each_id_of_the_models_own_list_ends_a_text(tmp_path, small_tokenizer, capsys):
    transformers = pytest.importorskip("transformers")
    folder = huggingface_model(tmp_path / "model", small_tokenizer, 320)
    ids = torch.tensor([Tokenizer(tokenizer_model=small_tokenizer).encode_prompt("the boy")])
    free = transformers.AutoModelForCausalLM.from_pretrained(folder)
    end = int(free.generate(input_ids=ids, max_new_tokens=5, do_sample=False)[0, -1])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, end]}))
    arguments = ["--pretrained-model-path", str(folder), "--prompt", "the boy", "--temperature", "0", "--json"]
    for decoder in ("sample", "lookup"):
        assert main([*arguments, "--max_new_tokens", "20", "--decoder", decoder]) == 0
        (made,) = map(json.loads, capsys.readouterr().out.splitlines())
        assert made["finish"] == "end" and made["tokens"] <= 5
