"""--option generate: batches, explanations, settings, and errors."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from conftest import ROOT
from llama import llama_from_checkpoint
from minillama.decoding import sampling as generation
from minillama.decoding.beam_search import beam_search
from minillama.decoding.contrastive_search import contrastive_search
from minillama.decoding.filters import top_k_filter
from minillama.decoding.lookup import lookup_decoding
from minillama.formats.checkpoint import read_checkpoint
from programs import generated, made_of
from tokenizer import Tokenizer

RUN_LLAMA = ROOT / "run_llama.py"


@pytest.fixture
def command(generate_command):
    return generate_command


def test_a_stream_in_pieces_is_the_text_and_the_speed_is_told(command):
    out, err = generated(command, "--temperature", "0")
    later = r"(, the second after [\d.]+ s \(loading compiled code\))?"  # in the first test of a process
    assert re.search(rf"^16 tokens in [\d.]+ s; the first after [\d.]+ s{later}, then \d+ per second$", err, flags=re.M)
    llama = llama_from_checkpoint(read_checkpoint(command.folder / "model.pt"))
    tokenizer = Tokenizer(tokenizer_model=command.folder / "tokenizer.model")
    ids = torch.tensor([tokenizer.encode("one day", bos=True, eos=False)])
    assert out == tokenizer.decode(llama.generate(ids, 16, temperature=0.0)[0].tolist()) + "\n"


@pytest.mark.skipif(not Path("/dev/stdin").exists(), reason="no /dev/stdin here")
def test_prompts_can_be_piped_in(command):
    arguments = ["--pretrained-model-path", "model.pt", "--tokenizer", "tokenizer.model", "--max_new_tokens", "8"]
    (command.folder / "prompts.txt").write_text("one day\n\nthe cat\n")
    greedy = [sys.executable, RUN_LLAMA, "--option", "generate", *arguments, "--temperature", "0", "--prompt_file"]
    piped = subprocess.run([*greedy, "-"], input="one day\n\nthe cat\n", capture_output=True, text=True)
    read = subprocess.run([*greedy, "prompts.txt"], capture_output=True, text=True)
    assert piped.returncode == 0, piped.stderr
    assert piped.stdout == read.stdout and piped.stdout.count("\n\n") == 2


@pytest.mark.parametrize("decoder", ["beam", "contrastive", "lookup"])
def test_every_decoder_can_be_named(command, decoder):
    out, _ = generated(command, "--decoder", decoder)
    assert out.startswith("one day") and len(out) > 12
    assert not list(command.folder.glob("generated*"))


@pytest.mark.parametrize(
    "option, value",
    [("top_k", "1"), ("top_p", "1e-9"), ("min_p", "1"), ("typical_p", "1e-9"), ("eta", "0.999"), ("epsilon", "0.999")],
)
def test_each_filter_reaches_the_draw(command, option, value):
    greedy, _ = generated(command, "--temperature", "0")
    free, _ = generated(command, "--temperature", "1.5", "--epsilon", "0", "--seed", "3")
    cut, _ = generated(command, "--temperature", "1.5", "--epsilon", "0", "--seed", "3", f"--{option}", value)
    assert cut != free and (option in ("typical_p", "eta") or cut == greedy)


def test_a_repetition_penalty_reaches_the_draw(command):
    assert (
        generated(command, "--temperature", "0")[0]
        != generated(command, "--temperature", "0", "--repetition_penalty", "5")[0]
    )


def test_a_stop_text_ends_the_text_before_it(command):
    text = generated(command, "--temperature", "0")[0].rstrip("\n")
    stop = text[len("one day") + 4 : len("one day") + 7]
    wanted = text[: text.index(stop, len("one day"))]
    assert generated(command, "--temperature", "0", "--stop", "never comes", stop)[0] == wanted + "\n"
    batch = [json.loads(generated(command, "--temperature", "0", "--json", "--stop", stop)[0])]
    assert batch[0]["prompt"] + batch[0]["text"] == wanted and batch[0]["finish"] == "stop"


def test_a_file_of_prompts_is_continued_line_by_line_as_each_would_be_alone(command):
    (command.folder / "prompts.txt").write_text("one day\na big dog and a cat\nhe\n\nthey were\n", encoding="utf-8")
    more = ["--prompt_file", "prompts.txt", "--json", "--temperature", "0", "--max_new_tokens", "8"]
    code, out, _ = command(*more, "--batch_size", "3")
    found = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [one["prompt"] for one in found] == ["one day", "a big dog and a cat", "he", "they were"]
    for one in found:
        alone, _ = generated(command, "--prompt", one["prompt"], "--temperature", "0", tokens="8")
        assert alone == one["prompt"] + one["text"] + "\n"
        assert one["finish"] in ("end", "length") and one["tokens"] <= 8


def test_samples_of_one_prompt_differ_and_come_back_with_the_seed(command):
    more = ["--num_samples", "4", "--temperature", "2", "--epsilon", "0"]
    out, err = generated(command, *more)
    assert len(set(out.split("\n\n"))) == 5 and re.search(r"\d+ tokens in [\d.]+ s", err)
    assert generated(command, *more)[0] == out


def test_an_explanation_has_a_line_for_each_token(command):
    plain, _ = generated(command, "--temperature", "0.9", "--top_k", "5")
    out, err = generated(command, "--temperature", "0.9", "--top_k", "5", "--explain")
    assert out.startswith(plain) and len(out[len(plain) :].strip().splitlines()) == 1 + 16


def test_8_bits_are_told_of_and_a_bidirectional_model_too(command):
    out, err = generated(command, "--temperature", "0", "--quantize", "int8")
    assert "8-bit weights" in err and out.startswith("one day")
    out, err = generated(command, "--temperature", "0", "--attention", "bidirectional")
    assert "notice: attention is bidirectional" in err


def test_the_loop_answers_line_by_line_until_the_input_ends(command, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one day\n\nhe was\n"))
    code, out, err = command("--interactive", "--temperature", "0", "--max_new_tokens", "8")
    alone = [
        generated(command, "--prompt", prompt, "--temperature", "0", tokens="8")[0] for prompt in ("one day", "he was")
    ]
    assert code == 0 and out == "".join(alone) and "Ctrl-D ends" in err


def test_ctrl_c_stops_an_answer_and_not_the_loop(command, monkeypatch):
    calls = []
    really = generation.next_token

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return really(*arguments)

    monkeypatch.setattr(generation, "next_token", interrupted)
    monkeypatch.setattr("sys.stdin", io.StringIO("one day\nhe was\n"))
    code, out, err = command("--interactive", "--temperature", "0", "--max_new_tokens", "8")
    first, second = out.splitlines()[0], out.splitlines()[1]
    assert code == 0 and first.startswith("one day") and second.startswith("he was") and "stopped" in err
    assert len(calls) == 3 + 8


@pytest.mark.parametrize(
    "more, message",
    [
        (["--interactive", "--json"], "leave out --json"),
        (["--interactive", "--num_samples", "2"], "leave out --num_samples"),
        (["--interactive", "--prompt_file", "model.pt"], "leave out --prompt_file"),
        (["--interactive", "--prompt", "x"], "leave out --prompt"),
        (["--prompt_file", "model.pt", "--prompt", "x"], "leave out --prompt"),
        (["--xray", "page.txt"], "--xray page.txt: the page's name must end in .html"),
        (["--against", "model.pt"], "--against needs a page; add --xray PAGE.html"),
        (["--xray", "page.html", "--against", "none.pt"], "--against none.pt: no such file"),
        (["--xray", "page.html", "--quantize", "int8"], "--xray shows one text"),
        (["--explain", "--decoder", "beam"], "shows the sampling of one text"),
        (["--decoder", "beam", "--temperature", "1"], "--decoder beam does not sample"),
        (["--decoder", "beam", "--top_k", "3"], "--decoder beam does not sample; leave out --top_k"),
        (["--decoder", "beam", "--epsilon", "0.3"], "leave out --epsilon"),
        (["--temperature", "0", "--top_p", "0.5"], "temperature 0 does not sample; leave out --top_p"),
        (["--temperature", "0", "--num_samples", "2"], "leave out --num_samples"),
        (["--beams", "7"], "--beams is for --decoder beam"),
        (["--decoder", "beam", "--contrast", "0.1"], "--contrast is for --decoder contrastive"),
        (["--length_penalty", "nan"], "it must be from -10 to 10"),
        (["--option", "perplexity", "--corpus", "model.pt", "--top_p", "0.5"], "--top_p belongs to --option generate"),
        (["--decoder", "contrastive", "--top_p", "0.3"], "--decoder contrastive does not sample; leave out --top_p"),
        (["--decoder", "lookup", "--repetition_penalty", "2"], "--decoder lookup has no repetition penalty"),
        (["--decoder", "lookup", "--attention", "bidirectional"], "--decoder lookup needs causal attention"),
        (["--stop", ""], "--stop has an empty text"),
        (
            ["--temperature", "1", "--generated_sentence_low_temp_out", "a.txt"],
            "with --temperature, generate does not write the two files at temperature 0 and 1; leave out "
            "--generated_sentence_low_temp_out",
        ),
        (["--json", "--generated_sentence_high_temp_out", "a.txt"], "leave out --generated_sentence_high_temp_out"),
        (
            ["--explain", "--generated_sentence_high_temp_out", "a.txt"],
            "with --explain, generate does not write the two files",
        ),
        (
            ["--decoder", "beam", "--generated_sentence_high_temp_out", "a.txt"],
            "with --decoder, generate does not write the two files",
        ),
        (["--repetition_penalty", "1e38"], "'1e38' is not allowed; it must be from 0.01 to 100 (1 changes nothing)"),
        (["--repetition_penalty", "1e-38"], "'1e-38' is not allowed; it must be from 0.01 to 100"),
        (["--repetition_penalty", "nan"], "'nan' is not allowed; it must be from 0.01 to 100"),
        (["--top_p", "0"], "'0' is not allowed; it must be above 0 and at most 1"),
        (["--top_k", "0"], "'0' is not allowed"),
        (["--quantize", "int4"], "invalid choice: 'int4'"),
        (["--prompt_file", "none.txt"], "none.txt"),
    ],
)
def test_what_generate_cannot_do_is_one_line(command, more, message):
    before = command.files()
    code, out, err = command(*more)
    assert code == 2 and message in err.splitlines()[-1] and out == "" and command.files() == before


def test_8_bits_are_for_models_that_run(command):
    code, _, err = command("--option", "finetune", "--quantize", "int8")
    assert code == 2 and "--quantize is for commands that only run a model; leave it out for --option finetune" in err


@pytest.mark.parametrize(
    "more, decode",
    [
        (["beam"], lambda llama, idx: beam_search(llama, idx, 16)[0]),
        (
            ["beam", "--beams", "2", "--length_penalty", "-3"],
            lambda llama, idx: beam_search(llama, idx, 16, beams=2, length_penalty=-3.0)[0],
        ),
        (
            ["contrastive", "--contrast", "0.9", "--top_k", "9"],
            lambda llama, idx: contrastive_search(llama, idx, 16, k=9, alpha=0.9),
        ),
        (
            ["lookup", "--temperature", "1.3", "--top_k", "5"],
            lambda llama, idx: lookup_decoding(
                llama,
                idx,
                16,
                temperature=1.3,
                filters=[partial(top_k_filter, k=5)],
                generator=torch.Generator().manual_seed(1337),
            ),
        ),
    ],
    ids=["beam", "beam with settings", "contrastive", "lookup"],
)
def test_a_decoders_settings_reach_it(command, more, decode):
    llama, tokenizer = made_of(command)
    wanted = decode(llama, torch.tensor([tokenizer.encode("one day", bos=True, eos=False)]))
    assert generated(command, "--decoder", *more)[0] == tokenizer.decode(wanted.tolist()) + "\n"


def test_another_filter_takes_the_place_of_epsilon(command):
    free = generated(command, "--temperature", "1.5", "--epsilon", "0", "--seed", "3")[0]
    assert generated(command, "--temperature", "1.5", "--top_p", "1", "--seed", "3")[0] == free
    assert generated(command, "--temperature", "1.5", "--seed", "3")[0] != free
    both = generated(command, "--temperature", "1.5", "--top_p", "1", "--epsilon", "0.05", "--seed", "3")[0]
    assert both == generated(command, "--temperature", "1.5", "--seed", "3")[0]


@pytest.mark.parametrize("page", [None, "page.html"])
def test_an_explanation_can_stand_in_a_configuration_file(command, page):
    settings = {"explain": True, "max_new_tokens": 3} | ({"xray": page} if page else {})
    (command.folder / "run.json").write_text(json.dumps(settings), encoding="utf-8")
    code, out, err = command("--config", "run.json", "--temperature", "1")
    assert code == 0 and "kept | removed" in out and (command.folder / "page.html").exists() == bool(page)
