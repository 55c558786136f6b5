"""sanity_check.py: its comparisons, and its message where a comparison is impossible."""

from __future__ import annotations

import ast
import re
import sys
import warnings
from pathlib import Path

import pytest
import safetensors.numpy
import torch

import make_bundled_reference
import sanity_check
from conftest import ROOT
from minillama.formats.checkpoint import write_checkpoint, write_safetensors
from models import tiny_llama

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
    missing = [Path("data/reference") / name for name in sanity_check.COURSE_REFERENCES]
    monkeypatch.setattr(sanity_check, "course_references", lambda: missing)
    assert sanity_check.main([]) == 0
    out = capsys.readouterr().out
    assert "tests/conformance" in out and "agrees" in out
    assert "python fetch_data.py references" in out and "python fetch_data.py checkpoint" in out
    assert out.splitlines()[-1] == (
        "2 of 5 references compared, all agree; 3 not compared: data/reference and stories42M.pt are missing"
    )
    assert sanity_check.main(["--strict"]) == 3


@pytest.mark.parametrize(
    ("edition", "attention"), [("2024", "bidirectional"), ("fall2025", "bidirectional"), ("spring2026", "causal")]
)
def test_the_courses_own_files_tell_their_attention(asset, tmp_path, monkeypatch, capsys, edition, attention):
    path = asset(f"course/reference/sanity_check_{edition}.data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sanity_check, "course_references", lambda: [path])
    assert sanity_check.main([]) == 0
    out = capsys.readouterr().out
    assert f"{path} ({attention} attention)\n    not compared: stories42M.pt is missing" in out
    assert out.endswith("\n2 of 3 references compared, all agree; 1 not compared: stories42M.pt is missing\n")


def check(name="a", agrees=True, not_compared=""):
    return sanity_check.Check(name, agrees, not_compared)


@pytest.mark.parametrize(
    ("checks", "wanted", "code", "strict"),
    [
        ([check(), check()], "2 of 2 references compared, all agree", 0, 0),
        ([check(), check("b", False)], "2 of 2 references compared, 1 DIFFER: b", 1, 1),
        (
            [check(), *[check("c", True, "m.pt is missing")] * 3],
            "1 of 4 references compared, all agree; 3 not compared: m.pt is missing",
            0,
            3,
        ),
        (
            [check("b", False), check("c", True, "m.pt is missing"), check("d", True, "d is missing")],
            "1 of 3 references compared, 1 DIFFER: b; 1 not compared: m.pt is missing; 1 not compared: d is missing",
            1,
            1,
        ),
        ([check("c", True, "gone")], "0 of 1 references compared; 1 not compared: gone", 0, 3),
        ([check("c", False, "of another model")], "0 of 1 references compared; 1 not compared: of another model", 1, 1),
    ],
)
def test_the_last_line_is_the_verdict_and_decides_the_exit_code(monkeypatch, capsys, checks, wanted, code, strict):
    monkeypatch.setattr(sanity_check, "run", lambda *_: checks)
    assert sanity_check.main([]) == code and capsys.readouterr().out == f"{wanted}\n"
    assert sanity_check.main(["--strict"]) == strict


def test_with_the_checkpoint_every_reference_is_compared(course_like, tmp_path, monkeypatch, capsys):
    arguments = course_like("rmsnorm", True)
    (tmp_path / "other.data").write_bytes((tmp_path / "sanity_check.data").read_bytes())
    monkeypatch.setattr(sanity_check, "course_references", lambda: sorted(tmp_path.glob("*.data")))
    assert sanity_check.main([*arguments[:2], "--strict"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "4 of 4 references compared, all agree"


def test_a_model_that_computes_something_else_fails_the_conformance_check(monkeypatch, capsys):
    monkeypatch.setattr("rope.rotary_table", lambda *_: torch.ones(64, 4, dtype=torch.complex64))
    assert sanity_check.check_conformance().agrees is False
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
    monkeypatch.setattr(sanity_check, "course_references", lambda: [tmp_path / "bad.data"])
    monkeypatch.setattr(sanity_check, "check_conformance", check)
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


PROMPT = (1, 5, 9)


@pytest.fixture
def bundled(request, tmp_path, monkeypatch):
    """A tiny model in the place of the bundled one, and its reference; returns the model. The parameter is its norm."""
    norm = getattr(request, "param", "rmsnorm")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sanity_check, "HERE", tmp_path)
    monkeypatch.setattr(sanity_check, "BUNDLED", Path("model.safetensors"))
    monkeypatch.setattr(sanity_check, "BUNDLED_EXPECTED", Path("expected.safetensors"))
    model = tiny_llama(norm=norm, causal=True, rope_theta=500.0)
    write_bundled(model)
    read = make_bundled_reference.read_model(sanity_check.BUNDLED)
    outputs, lead = make_bundled_reference.reference_outputs(read, PROMPT)
    assert lead > make_bundled_reference.MARGIN
    make_bundled_reference.write_reference(sanity_check.BUNDLED_EXPECTED, outputs, read.sha256)
    return model


def write_bundled(model):
    write_safetensors(sanity_check.BUNDLED, model.state_dict(), model.config, torch.bfloat16)


def pretend_the_reference_is_of_this_model():
    """Records the SHA-256 of the model that is there now, beside the outputs of the one that was."""
    outputs = safetensors.numpy.load_file(sanity_check.BUNDLED_EXPECTED)
    sha256 = make_bundled_reference.read_model(sanity_check.BUNDLED).sha256
    make_bundled_reference.write_reference(sanity_check.BUNDLED_EXPECTED, outputs, sha256)


@pytest.mark.parametrize("bundled", ["rmsnorm", "layernorm"], indirect=True)
def test_the_bundled_model_agrees_with_float64_numpy(bundled, capsys):
    assert sanity_check.check_bundled().agrees is True
    out = capsys.readouterr().out
    norm = {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}[bundled.config.norm]
    assert out.startswith(f"model.safetensors, the bundled model ({norm}, causal attention)\n    agrees: ")
    for what in ("last logits", "hidden states", "log-probabilities", "greedy tokens 0.0e+00"):
        assert what in out


@pytest.mark.parametrize(
    "name",
    [
        "tok_embeddings.weight",
        "layers.0.attention.compute_key.weight",
        "layers.1.feed_forward.w3.weight",
        "layers.1.ffn_norm.weight",
        "norm.weight",
    ],
)
def test_a_changed_weight_of_the_bundled_model_is_caught(bundled, capsys, name):
    with torch.no_grad():
        bundled.get_parameter(name).flatten()[5] += 0.05
    write_bundled(bundled)
    pretend_the_reference_is_of_this_model()
    assert sanity_check.check_bundled().agrees is False
    assert "DIFFERS" in capsys.readouterr().out


@pytest.mark.parametrize("change", [{"rope_theta": 510.0}, {"layer_norm_eps": 1e-4}, {"n_kv_heads": 4}, {"n_heads": 2}])
def test_another_convention_of_the_bundled_model_is_caught(bundled, capsys, change):
    changed = tiny_llama(**({"norm": "rmsnorm", "causal": True, "rope_theta": 500.0} | change))
    same = {
        name: tensor
        for name, tensor in bundled.state_dict().items()
        if changed.state_dict()[name].shape == tensor.shape
    }
    changed.load_state_dict(same, strict=False)
    write_bundled(changed)
    pretend_the_reference_is_of_this_model()
    assert sanity_check.check_bundled().agrees is False
    assert "DIFFERS" in capsys.readouterr().out


def test_a_reference_of_another_model_is_told_and_gives_exit_code_1(bundled, monkeypatch, capsys):
    monkeypatch.setattr(sanity_check, "course_references", list)
    monkeypatch.setattr(sanity_check, "check_conformance", check)
    assert sanity_check.main([]) == 0
    write_bundled(tiny_llama(seed=1, norm="rmsnorm", causal=True))
    capsys.readouterr()
    assert sanity_check.main([]) == 1
    out = capsys.readouterr().out
    assert "NOT COMPARED: expected.safetensors belongs to another model" in out
    assert "python tests/make_bundled_reference.py" in out and "agrees" not in out


def test_a_bundled_model_that_is_missing_is_passed_over_and_its_reference_is_not(bundled, capsys):
    sanity_check.BUNDLED_EXPECTED.unlink()
    assert sanity_check.check_bundled().agrees is False
    assert "expected.safetensors is missing; python tests/make_bundled_reference.py" in capsys.readouterr().out
    sanity_check.BUNDLED.unlink()
    assert sanity_check.check_bundled().agrees is True
    assert capsys.readouterr().out.startswith("The bundled model model.safetensors is missing")


@pytest.mark.parametrize("content", [b"", b"text", b"\x02" + b"\0" * 7 + b"{}"], ids=["empty", "text", "bare"])
def test_a_damaged_reference_of_the_bundled_model_gives_one_line_and_exit_code_2(bundled, monkeypatch, capsys, content):
    monkeypatch.setattr(sanity_check, "check_conformance", check)
    sanity_check.BUNDLED_EXPECTED.write_bytes(content)
    assert sanity_check.main([]) == 2
    assert re.fullmatch(r".*expected\.safetensors is damaged .*\n", capsys.readouterr().err)


def test_the_second_implementation_shares_no_code():
    tree = ast.parse((ROOT / "tests" / "make_bundled_reference.py").read_text(encoding="utf-8"))
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    outside = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert outside == {"numpy", "safetensors"}


def test_the_script_writes_what_the_check_reads(bundled, capsys):
    made = sanity_check.BUNDLED_EXPECTED.read_bytes()
    arguments = ["--model", str(sanity_check.BUNDLED), "--out", str(sanity_check.BUNDLED_EXPECTED)]
    sanity_check.BUNDLED_EXPECTED.unlink()
    assert make_bundled_reference.main([*arguments, "--prompt", *map(str, PROMPT)]) == 0
    assert "expected.safetensors: reference outputs of model.safetensors" in capsys.readouterr().out
    assert sanity_check.BUNDLED_EXPECTED.read_bytes() == made
    assert len(made) < 200_000


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--model", "nowhere"], "nowhere: No such file"),
        (["--model", "expected.safetensors"], "is damaged, or no safetensors file that this project wrote"),
        (["--model", "untied.safetensors"], "references are made for"),
        (["--model", "short.safetensors"], "context of 24 tokens is too short for the 27"),
        (["--prompt", "64"], "ids of this model are 0 to 63"),
        (["--prompt", "one"], "invalid int value"),
        (["--out", "nowhere/expected.safetensors"], "in a folder that is there"),
    ],
)
def test_the_script_explains_in_one_line_and_exits_with_2(bundled, capsys, arguments, wanted):
    for name, change in (("untied", {"tie_embeddings": False}), ("short", {"max_seq_len": 24})):
        model = tiny_llama(**({"causal": True} | change))
        write_safetensors(f"{name}.safetensors", model.state_dict(), model.config)
    made = sanity_check.BUNDLED_EXPECTED.read_bytes()
    defaults = ["--model", "model.safetensors", "--out", "expected.safetensors", "--prompt", *map(str, PROMPT)]
    with pytest.raises(SystemExit, match="2"):
        make_bundled_reference.main([*defaults, *arguments])
    error = capsys.readouterr().err
    assert re.search(wanted, error.splitlines()[-1]) and error.count("\n") == 1
    assert sanity_check.BUNDLED_EXPECTED.read_bytes() == made


def test_the_script_refuses_greedy_tokens_that_are_too_close_to_call(bundled, monkeypatch, capsys):
    monkeypatch.setattr(make_bundled_reference, "MARGIN", 1e3)
    with pytest.raises(SystemExit, match="2"):
        make_bundled_reference.main(["--model", "model.safetensors", "--out", "other", "--prompt", "1"])
    assert "give another --prompt" in capsys.readouterr().err
    assert not Path("other").exists()
