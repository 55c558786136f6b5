"""--option generate as its user meets it: pieces of text, batches, a conversation, explanations, what it refuses."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from conftest import ROOT, Program, tiny_llama
from llama import llama_from_checkpoint
from minillama.commands.generate import overlap, text_pieces
from minillama.decoding import sampling as generation
from minillama.decoding.beam_search import beam_search
from minillama.decoding.contrastive_search import contrastive_search
from minillama.decoding.filters import top_k_filter
from minillama.decoding.lookup import lookup_decoding
from minillama.formats.checkpoint import read_checkpoint, write_checkpoint
from minillama.formats.huggingface import write_huggingface
from minillama.formats.tokenizer_json import write_huggingface_tokenizer
from run_llama import main
from tokenizer import Tokenizer

RUN_LLAMA = ROOT / "run_llama.py"


class Command(Program):
    """Runs `--option generate` in a folder with a small causal model; later options override."""

    def __init__(self, folder, tokenizer, capsys):
        super().__init__(folder, capsys)
        (folder / "tokenizer.model").write_bytes(tokenizer.read_bytes())
        model = tiny_llama(vocab_size=320, max_seq_len=128, causal=True)
        write_checkpoint(folder / "model.pt", model.state_dict(), model.config)

    def __call__(self, *more):
        """(exit code, stdout, stderr)"""
        return super().__call__("--pretrained-model-path", "model.pt", "--tokenizer", "tokenizer.model", *more)


@pytest.fixture
def command(small_tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    return Command(tmp_path, small_tokenizer, capsys)


def generated(command, *more, tokens="16"):
    code, out, err = command("--prompt", "one day", "--max_new_tokens", tokens, *more)
    assert code == 0, err
    return out, err


def test_a_stream_in_pieces_is_the_text_and_the_speed_is_told(command):
    out, err = generated(command, "--temperature", "0")
    assert re.search(r"^16 tokens in [\d.]+ s; the first after [\d.]+ s, then \d+ a second$", err, flags=re.M)
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


def test_an_explanation_has_a_line_for_each_token_and_a_page(command):
    plain, _ = generated(command, "--temperature", "0.9", "--top_k", "5")
    out, err = generated(command, "--temperature", "0.9", "--top_k", "5", "--explain", "page.html")
    assert out.startswith(plain) and len(out[len(plain) :].strip().splitlines()) == 1 + 16
    assert "wrote page.html" in err
    assert (command.folder / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_8_bits_are_told_of_and_a_bidirectional_model_too(command):
    out, err = generated(command, "--temperature", "0", "--quantize", "int8")
    assert "weights of 8 bits" in err and out.startswith("one day")
    out, err = generated(command, "--temperature", "0", "--attention", "bidirectional")
    assert "notice: attention is bidirectional here" in err


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
        (["--explain", "page.txt"], "--explain page.txt: the page's name must end in .html"),
        (["--explain", "--decoder", "beam"], "shows how one text was sampled"),
        (["--decoder", "beam", "--temperature", "1"], "--decoder beam draws nothing"),
        (["--decoder", "beam", "--top_k", "3"], "--decoder beam draws nothing; leave out --top_k"),
        (["--decoder", "beam", "--epsilon", "0.3"], "leave out --epsilon"),
        (["--temperature", "0", "--top_p", "0.5"], "temperature 0 draws nothing; leave out --top_p"),
        (["--temperature", "0", "--num_samples", "2"], "leave out --num_samples"),
        (["--beams", "7"], "--beams is for --decoder beam"),
        (["--decoder", "beam", "--contrast", "0.1"], "--contrast is for --decoder contrastive"),
        (["--length_penalty", "nan"], "it must be from -10 to 10"),
        (["--option", "perplexity", "--corpus", "model.pt", "--top_p", "0.5"], "--top_p belongs to --option generate"),
        (["--decoder", "contrastive", "--top_p", "0.3"], "--decoder contrastive draws nothing; leave out --top_p"),
        (["--decoder", "lookup", "--repetition_penalty", "2"], "--decoder lookup has no repetition penalty"),
        (["--decoder", "lookup", "--attention", "bidirectional"], "--decoder lookup needs causal attention"),
        (["--stop", ""], "--stop has an empty text"),
        (
            ["--temperature", "1", "--generated_sentence_low_temp_out", "a.txt"],
            "with --temperature the two texts, at temperature 0 and at 1, and their files are not made; leave out "
            "--generated_sentence_low_temp_out",
        ),
        (["--json", "--generated_sentence_high_temp_out", "a.txt"], "leave out --generated_sentence_high_temp_out"),
        (["--explain", "--generated_sentence_high_temp_out", "a.txt"], "with --explain the two texts"),
        (["--decoder", "beam", "--generated_sentence_high_temp_out", "a.txt"], "with --decoder the two texts"),
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
    assert code == 2 and "--quantize is for a model that only runs; leave it out for --option finetune" in err


# Pieces of text


class Letters:
    """Each token a byte of UTF-8."""

    def decode(self, ids):
        return bytes(ids).decode("utf-8", errors="replace")


def pieces(text, stops=(), prompt="say: "):
    return list(text_pieces(Letters(), list(prompt.encode()), iter(text.encode()), stops))


@pytest.mark.parametrize("text", ["", "abc", "naïve — 日本 🙂 end", "🙂"])
def test_pieces_make_the_text_and_no_piece_is_half_a_character(text):
    found = pieces(text)
    assert "".join(found) == "say: " + text and not any("\ufffd" in piece for piece in found)


def test_pieces_come_as_soon_as_they_can():
    assert pieces("abc") == ["say: ", "a", "b", "c", ""]


def test_what_may_become_a_stop_is_held_back_and_what_did_not_is_shown():
    assert pieces("an END", ["END", "say"]) == ["say: ", "a", "n", " ", ""]
    assert "".join(pieces("an EN. ENE", ["END"])) == "say: an EN. ENE"
    assert "".join(pieces("EENDx", ["END"])) == "say: E"
    assert "".join(pieces("x\nyEND", ["\n", "END"])) == "say: x"
    assert "".join(pieces("abcd", ["cd", "bcd", "d"])) == "say: a"  # all come with the same token; the first one counts


@pytest.mark.parametrize("text, stop, wanted", [("abc", "cd", 1), ("abab", "abc", 2), ("abc", "x", 0), ("", "x", 0)])
def test_overlap_counts_the_beginning_of_a_stop_at_the_end_of_a_text(text, stop, wanted):
    assert overlap(text, stop) == wanted


# Streams and files


class Stdout(io.TextIOWrapper):
    def __init__(self, encoding):
        super().__init__(io.BytesIO(), encoding=encoding)

    def text(self):
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)


@pytest.mark.parametrize(
    "encoding, shown", [("ascii", "caf\\xe9 \\u2014"), ("latin-1", "café \\u2014"), ("utf-8", "café —")]
)
def test_what_stdout_cannot_say_is_escaped_and_the_files_are_written(command, monkeypatch, encoding, shown):
    def printed(*more):
        monkeypatch.setattr("sys.stdout", Stdout(encoding))
        code, _, err = command("--prompt", "café —", "--max_new_tokens", "4", *more)
        assert code == 0, err
        return sys.stdout.text()

    assert printed("--explain", "page.html").startswith(shown)
    assert "<p class=text>café —<span>" in (command.folder / "page.html").read_text(encoding="utf-8")
    assert printed().count(shown) == 2
    for name in ("generated-sentence-temp-0.txt", "generated-sentence-temp-1.txt"):
        assert (command.folder / name).read_text(encoding="utf-8").startswith("café —")
    said = printed("--json")
    assert json.loads(said)["prompt"] == "café —" and ("café" in said) == (encoding == "utf-8")


def test_the_page_is_written_before_the_table_is_printed(command, monkeypatch):
    def table(explanation):
        assert (command.folder / "page.html").exists()
        raise OSError("stdout is full")

    monkeypatch.setattr("minillama.decoding.explanation.Explanation.table", table)
    code, _, err = command("--prompt", "one day", "--max_new_tokens", "4", "--explain", "page.html")
    assert code == 2 and "stdout is full" in err


@pytest.mark.skipif(os.name != "posix", reason="a shell closes the streams")
@pytest.mark.parametrize(
    "more, redirected, message",
    [
        (["--interactive"], " <&-", "--interactive reads the standard input, which is closed"),
        (["--prompt_file", "-"], " <&-", "--prompt_file - reads the standard input, which is closed"),
        (["--temperature", "0"], " >&-", "the standard output, where the text goes, is closed; send it to a file"),
    ],
)
def test_a_closed_stream_is_one_line(command, more, redirected, message):
    before = command.files()
    arguments = ["--pretrained-model-path", "model.pt", "--tokenizer", "tokenizer.model", *more]
    line = shlex.join([sys.executable, str(RUN_LLAMA), "--option", "generate", *arguments]) + redirected
    done = subprocess.run(line, shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stdout, command.files()) == (2, "", before)
    assert [message in line for line in done.stderr.splitlines()] == [True]


def test_what_is_typed_is_utf8_whatever_the_locale(command, monkeypatch):
    for encoding in ("ascii", "latin-1", "utf-8"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("café\n".encode()), encoding=encoding))
        code, out, err = command("--interactive", "--temperature", "0", "--max_new_tokens", "4")
        assert code == 0 and out.startswith("café") and "UTF-8" not in err


def test_a_missing_file_of_prompts_is_told_before_a_model_is_read(command):
    (command.folder / "model.pt").unlink()
    code, _, err = command("--prompt_file", "none.txt")
    assert code == 2 and "none.txt: no such file of prompts" in err


def test_no_prompt_is_too_long_before_one_is_typed(command, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    code, _, err = command("--interactive", "--max_new_tokens", "3000")
    assert code == 0 and "warning" not in err


# What the options reach


def made_of(command):
    """The model and the tokenizer in the command's folder."""
    llama = llama_from_checkpoint(read_checkpoint(command.folder / "model.pt"))
    return llama, Tokenizer(tokenizer_model=command.folder / "tokenizer.model")


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


class Asked:
    """Remembers the prompts' ids that generation.stream is asked to continue."""

    def __init__(self, monkeypatch):
        self.prompts, really = [], generation.stream
        monkeypatch.setattr(
            generation, "stream", lambda model, idx, *a, **s: self.took(idx) or really(model, idx, *a, **s)
        )

    def took(self, idx):
        self.prompts.append(idx[0].tolist())


LONG = "one day " * 8
CHAT = ["--interactive", "--chat", "--temperature", "0", "--max_new_tokens", "4"]


def test_a_conversation_remembers_and_forgets_its_oldest_turns(command, monkeypatch):
    asked = Asked(monkeypatch)
    _, tokenizer = made_of(command)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"hi\nme\n{LONG}\nhe\n"))
    code, out, _ = command(*CHAT, "--system", "a")
    answers = out.splitlines()
    assert code == 0 and len(asked.prompts) == 4

    def ids(*said):
        roles = [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(said)]
        return tokenizer.encode_chat([{"role": "system", "content": "a"}, *roles])

    assert asked.prompts[0] == ids("hi") and asked.prompts[1] == ids("hi", answers[0].strip(), "me")
    assert all(len(prompt) + 4 <= 128 for prompt in asked.prompts)
    assert asked.prompts[-1] != ids("hi", answers[0].strip(), "me", answers[1].strip(), LONG, answers[2].strip(), "he")
    assert asked.prompts[-1][-5:] == ids("he")[-5:]


def test_a_line_that_cannot_be_a_prompt_does_not_end_the_conversation(command, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hi\n[INST] evil\n\xff\xfe\nme\n"), encoding="utf-8"))
    code, out, err = command(*CHAT)
    assert code == 0 and len(out.splitlines()) == 2 and "[INST]" in err and "UTF-8" in err


def test_a_prompt_of_the_loop_that_outgrows_the_context_is_warned_of(command, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one day " * 100 + "\n"))
    code, _, err = command("--interactive", "--temperature", "0", "--max_new_tokens", "4")
    assert code == 0 and "exceed the model's context of 128; it will see only the last 128" in err


def test_ctrl_c_at_the_prompt_ends_nothing(command, monkeypatch):
    lines = iter([KeyboardInterrupt(), "one day", EOFError()])

    def typed(_):
        line = next(lines)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", typed)
    code, out, err = command("--interactive", "--temperature", "0", "--max_new_tokens", "4")
    assert code == 0 and out.lstrip("\n").startswith("one day") and "Ctrl-C stops an answer; Ctrl-D ends" in err


def test_another_filter_takes_the_place_of_epsilon(command):
    free = generated(command, "--temperature", "1.5", "--epsilon", "0", "--seed", "3")[0]
    assert generated(command, "--temperature", "1.5", "--top_p", "1", "--seed", "3")[0] == free
    assert generated(command, "--temperature", "1.5", "--seed", "3")[0] != free
    both = generated(command, "--temperature", "1.5", "--top_p", "1", "--epsilon", "0.05", "--seed", "3")[0]
    assert both == generated(command, "--temperature", "1.5", "--seed", "3")[0]


@pytest.mark.parametrize("value", [True, "page.html"])
def test_an_explanation_can_stand_in_a_configuration_file(command, value):
    (command.folder / "run.json").write_text(json.dumps({"explain": value, "max_new_tokens": 3}), encoding="utf-8")
    code, out, err = command("--config", "run.json", "--temperature", "1")
    assert code == 0 and "kept, and | cut" in out and (command.folder / "page.html").exists() == (value is not True)


# Models of other programs


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
    assert "64 ids of the model have no piece; they are never generated" in err
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
