"""sanity_check.py: what it compares, what it tells from a reference file alone, and what it says when it cannot."""

from __future__ import annotations

import re

import pytest
import torch

import sanity_check
from checkpoint import write_checkpoint
from conftest import tiny_llama

CONVENTIONS = [("layernorm", False), ("layernorm", True), ("rmsnorm", False), ("rmsnorm", True)]


@pytest.fixture
def course_like(tmp_path):
    """Writes a tiny checkpoint with the course's vocabulary, and what it computes under a convention as a reference."""

    def write(norm, causal, change=0.0):
        model = tiny_llama(vocab_size=32000, norm=norm, causal=causal)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.zero_()
            logits, hidden = model(torch.tensor(sanity_check.REFERENCE_IDS))
        weights = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("bias")}
        write_checkpoint(tmp_path / "model.pt", weights, tiny_llama(vocab_size=32000).config)
        torch.save({"logits": logits, "hidden_states": hidden + change}, tmp_path / "sanity_check.data")
        return ["--pretrained-model-path", str(tmp_path / "model.pt"), str(tmp_path / "sanity_check.data")]

    return write


@pytest.mark.parametrize(("norm", "causal"), CONVENTIONS)
def test_compares_under_the_convention_that_the_file_shows(course_like, capsys, norm, causal):
    assert sanity_check.main(course_like(norm, causal)) == 0
    out = capsys.readouterr().out
    assert {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}[norm] in out
    assert ("causal" if causal else "bidirectional") in out
    assert "agrees: largest difference of logits" in out


def test_a_difference_is_shown_and_gives_exit_code_1(course_like, capsys):
    assert sanity_check.main(course_like("rmsnorm", True, change=0.1)) == 1
    assert "DIFFERS: largest difference of logits 0.0e+00, hidden states 1.0e-01" in capsys.readouterr().out


def test_with_nothing_fetched_it_checks_the_tiny_model_and_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sanity_check, "found_references", list)
    assert sanity_check.main([]) == 0
    out = capsys.readouterr().out
    assert "tests/conformance" in out and "agrees" in out
    assert "python fetch_data.py references" in out and "python fetch_data.py checkpoint" in out


@pytest.mark.parametrize(
    ("edition", "attention"), [("2024", "bidirectional"), ("fall2025", "bidirectional"), ("spring2026", "causal")]
)
def test_the_courses_own_files_tell_their_attention(asset, tmp_path, monkeypatch, capsys, edition, attention):
    path = asset(f"course/reference/sanity_check_{edition}.data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sanity_check, "found_references", lambda: [path])
    assert sanity_check.main([]) == 0
    assert f"{path} ({attention} attention)\n    not compared, for want of stories42M.pt" in capsys.readouterr().out


def test_a_model_that_computes_something_else_fails_the_conformance_check(monkeypatch, capsys):
    monkeypatch.setattr("rope.rotary_table", lambda *_: torch.ones(64, 4, dtype=torch.complex64))
    assert sanity_check.check_conformance() is False
    assert "DIFFERS" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (None, "no such reference file"),
        (b"", "damaged"),
        (b"text", "refused|damaged"),
        ({"logits": torch.zeros(2, 1, 32000)}, "holds the tensors logits and hidden_states"),
        ({"logits": torch.zeros(2, 1, 32000), "hidden_states": torch.zeros(2, 8, 512)}, r"is \(2, 8, 512\)"),
    ],
    ids=["missing", "empty", "text", "half", "of another size"],
)
def test_an_unusable_reference_gives_one_line_and_exit_code_2(course_like, tmp_path, capsys, content, wanted):
    arguments = course_like("rmsnorm", True)
    bad = tmp_path / "bad.data"
    if isinstance(content, bytes):
        bad.write_bytes(content)
    elif content is not None:
        torch.save(content, bad)
    assert sanity_check.main([*arguments[:2], str(bad)]) == 2
    out, error = capsys.readouterr()
    assert not out and len(error.splitlines()) == 1
    assert re.search(wanted, error)


def test_a_checkpoint_that_is_named_and_missing_is_an_error(capsys):
    assert sanity_check.main(["--pretrained-model-path", "nowhere.pt"]) == 2
    assert "nowhere.pt: no such checkpoint" in capsys.readouterr().err
