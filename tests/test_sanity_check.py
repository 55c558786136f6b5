"""sanity_check.py: what it compares, what it tells from a reference file alone, and what it says when it cannot."""

from __future__ import annotations

import re
import warnings

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


def nested(tensor):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls them a prototype
        return torch.nested.nested_tensor(list(tensor))


LOGITS, HIDDEN = torch.zeros(2, 1, 32000), torch.zeros(2, 8, 32)


@pytest.mark.parametrize(
    ("logits", "hidden", "wanted"),
    [
        (torch.zeros(4), torch.tensor(1.0), r"logits is \(4,\); it must be \(2, 1, V\)"),
        (LOGITS, torch.tensor(1.0), r"hidden_states is \(\); it must be \(2, 8, D\)"),
        (LOGITS, torch.zeros(1, 8, 32), r"hidden_states is \(1, 8, 32\); it must be"),
        (LOGITS[:, :, :0], HIDDEN, r"logits is \(2, 1, 0\)"),
        (LOGITS, HIDDEN.to_sparse(), "hidden_states is sparse, has no data or no real numbers; save it dense"),
        (LOGITS.to("meta"), HIDDEN, "logits is sparse, has no data"),
        (LOGITS.to(torch.complex64), HIDDEN, "no real numbers"),
        (LOGITS, nested(HIDDEN), "hidden_states is sparse"),
    ],
    ids=["ranks", "rank", "rows", "empty", "sparse", "meta", "complex", "nested"],
)
def test_tensors_that_are_no_outputs_give_one_line_with_a_checkpoint_and_without(
    course_like, tmp_path, monkeypatch, capsys, logits, hidden, wanted
):
    arguments = course_like("rmsnorm", True)
    torch.save({"logits": logits, "hidden_states": hidden}, tmp_path / "bad.data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sanity_check, "found_references", lambda: [tmp_path / "bad.data"])
    monkeypatch.setattr(sanity_check, "check_conformance", lambda: True)
    for argv in ([*arguments[:2], "bad.data"], []):
        assert sanity_check.main(argv) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1 and "bad.data: " in error
        assert re.search(wanted, error)


def test_a_reference_may_be_saved_in_another_precision(course_like, tmp_path):
    arguments = course_like("layernorm", False)
    wanted = torch.load(tmp_path / "sanity_check.data")
    torch.save({name: tensor.double() for name, tensor in wanted.items()}, tmp_path / "sanity_check.data")
    assert sanity_check.main(arguments) == 0


def test_a_checkpoint_that_is_named_and_missing_is_an_error(capsys):
    assert sanity_check.main(["--pretrained-model-path", "nowhere.pt"]) == 2
    assert "nowhere.pt: no such checkpoint" in capsys.readouterr().err
