"""--option wise_ft: the ends against the options that made them, the middle against a mixture."""

from __future__ import annotations

import csv
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from classifier import LlamaEmbeddingClassifier, MergedClasses
from llama import load_pretrained
from minillama.cli import classifiers
from minillama.formats.checkpoint import read_checkpoint, write_checkpoint
from minillama.text.batches import tokenize_rows
from minillama.text.labelled import read_rows
from minillama.training.evaluation import evaluate
from models import tiny_llama
from programs import fine_tuned, next_command, outputs, run_with, writes
from run_llama import main
from tokenizer import Tokenizer


@pytest.fixture
def command(command_of_words):
    return command_of_words


def wise_ft(command, *more, **which):
    return run_with(command, "wise_ft", *more, **which)


def curve(folder):
    with (folder / "wise-ft-curve.csv").open(encoding="utf-8") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def same_files(command, names, others):
    return all(
        (command.folder / a).read_bytes() == (command.folder / b).read_bytes()
        for a, b in zip(names, others, strict=True)
    )


@pytest.mark.parametrize(
    "option, head, more",
    [
        ("finetune", "linear", []),
        ("finetune", "prompt", []),
        ("lora", "linear", []),
        ("lora", "prompt", []),
        ("lora", "linear", ["--dora", "--rslora", "--lora_targets", "mlp"]),
    ],
)
def test_at_1_it_judges_the_fine_tuned_model_and_needs_no_base(command, option, head, more):
    fine_tuned(command, option, head, *more)
    (command.folder / "model.pt").unlink()
    code, out, err = wise_ft(command, "--alphas", "1", "--dev_out", "d.txt", "--test_out", "t.txt")
    assert code == 0, err
    assert same_files(command, ["d.txt", "t.txt"], outputs(option))
    accuracy = torch.load("run/best.pt", weights_only=True)["dev_accuracy"]
    assert curve(command.folder) == [{"alpha": 1.0, "dev": pytest.approx(accuracy, abs=1e-6)}]
    assert (
        f"dev accuracy {accuracy:.3f}" in out
        and "test accuracy" in out
        and (command.folder / "wise-ft-curve.html").exists()
    )


@pytest.mark.parametrize("more", [[], ["--template", "So: {sentence} It ", "--label_words", "to,it"]])
def test_at_0_a_prompt_head_is_the_zero_shot_classifier(command, more):
    fine_tuned(command, "finetune", "prompt", *more)
    assert command("prompt", "--dtype", "fp32", *more)[0] == 0
    code, _, err = wise_ft(command, "--alphas", "0", "--dev_out", "d.txt", "--test_out", "t.txt")
    assert code == 0, err
    assert same_files(command, ["d.txt", "t.txt"], outputs("prompt"))
    assert not same_files(command, ["d.txt"], [outputs("finetune")[0]])


def test_between_it_judges_the_mixture_with_the_head_that_was_trained(command):
    fine_tuned(command)
    code, _, err = wise_ft(command, "--alphas", "0,0.3,0.5,0.8,1")
    assert code == 0, err
    saved = torch.load("run/best.pt", weights_only=True)["model"]
    base = read_checkpoint("model.pt").state
    config = SimpleNamespace(
        llama=load_pretrained("model.pt"), num_labels=2, hidden_dropout_prob=0.0, option="finetune"
    )
    model, tokenizer = LlamaEmbeddingClassifier(config), Tokenizer(tokenizer_model="tokenizer.model")
    rows, _ = tokenize_rows(read_rows("dev.txt", ["a", "b"]), tokenizer, 64)
    found = curve(command.folder)
    for line in found:
        a = line["alpha"]
        state = {name: tensor.double() for name, tensor in saved.items()}
        for name, tensor in base.items():
            state[f"llama.{name}"] = (1 - a) * tensor.double() + a * saved[f"llama.{name}"].double()
        model.load_state_dict(state)
        assert line["dev"] == pytest.approx(evaluate(model, rows, 3).accuracy, abs=1e-6)
    assert len({line["dev"] for line in found}) > 1


def test_balanced_accuracy_is_scikit_learns(command):
    from sklearn.metrics import balanced_accuracy_score

    fine_tuned(command)
    code, _, err = wise_ft(command, "--alphas", "1", "--score", "balanced_accuracy", "--dev_out", "d.txt")
    assert code == 0, err
    gold, predicted = (
        [line[0] for line in (command.folder / name).read_text(encoding="utf-8").splitlines()]
        for name in ("dev.txt", "d.txt")
    )
    assert curve(command.folder)[0]["dev"] == pytest.approx(balanced_accuracy_score(gold, predicted), abs=1e-6)
    assert "Balanced accuracy of the mixed weights" in (command.folder / "wise-ft-curve.html").read_text()


def test_test_is_judged_once_at_the_best_alpha_on_dev_the_largest_of_equals(command, monkeypatch):
    fine_tuned(command)
    names, scores = [], {"0": 0.2, "0.25": 0.7, "0.5": 0.7, "1": 0.6}
    weights = {}

    def judged(model, rows, batch_size, *, name, **settings):
        names.append(name)
        weights[name] = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        found = evaluate(model, rows, batch_size, name=name, **settings)
        return type(found)(found.predictions, scores[name.rpartition(" ")[2]], 0.5)

    monkeypatch.setattr("minillama.training.evaluation.evaluate", judged)
    code, out, _ = wise_ft(command, "--alphas", "0,0.25,0.5,1", "--ood", "train.txt")
    assert code == 0 and "alpha 0.5, the best on dev" in out
    assert [name for name in names if name.startswith("test")] == ["test, alpha 0.5"]
    assert len(names) == 2 * 4 + 1
    same = {
        alpha: all(
            torch.equal(tensor, weights["test, alpha 0.5"][key])
            for key, tensor in weights[f"dev, alpha {alpha}"].items()
        )
        for alpha in scores
    }
    assert same == {"0": False, "0.25": False, "0.5": True, "1": False}


def test_the_model_it_writes_is_a_fine_tuned_one_with_that_score(command):
    fine_tuned(command, "lora", "prompt")
    code, out, err = wise_ft(command, "--alphas", "0,0.5", "--model_out", "mixed.pt", "--dev_out", "d.txt")
    assert code == 0, err
    saved = torch.load("mixed.pt", weights_only=True)
    best = max(curve(command.folder), key=lambda line: (line["dev"], line["alpha"]))
    assert saved["wise_ft"]["alpha"] == best["alpha"] and saved["head"] == "prompt"
    assert not any("lora" in name for name in saved["model"])
    assert next_command(err)[:4] == ["--option", "classify", "--finetuned", "mixed.pt"]
    assert main(next_command(err)) == 0
    code, again, err = wise_ft(command, "--alphas", "1", "--dev_out", "e.txt", finetuned="mixed.pt")
    assert code == 0 and same_files(command, ["d.txt"], ["e.txt"]), err
    assert out.splitlines()[-2:] == again.splitlines()[-2:]


def test_a_set_of_fewer_classes_has_their_probabilities_added():
    class Fixed(nn.Module):
        def forward(self, ids, mask=None):
            return ids.double().log_softmax(-1)

    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0, -700.0], [0.0, 0.0, 900.0, 0.0, 0.5]])
    got = MergedClasses(Fixed(), [0, 1, -1, 0, 1])(scores)
    p = scores.double().softmax(-1)
    wanted = torch.stack([p[:, 0] + p[:, 3], p[:, 1] + p[:, 4]], dim=-1)
    torch.testing.assert_close(got[:1].exp(), wanted[:1])
    assert torch.isfinite(got).all() and (got[1, 1] > got[1, 0])  # where all of it rounds to 0


def test_sets_from_elsewhere_may_have_their_own_classes(command):
    lines = [f"{i % 3} ||| {('a bad dull film', 'one good day', 'so so')[i % 3]} {i}" for i in range(12)]
    for split in ("train", "dev", "test"):
        writes(f"{split}.txt", "\n".join(lines) + "\n")(command.folder)
    writes("names.json", '["in", "so", "of"]')(command.folder)
    fine_tuned(command)
    writes("two.txt", "".join(f"{i % 2} ||| one good film {i}\n" for i in range(9)))(command.folder)
    writes("two.json", '["no", "yes"]')(command.folder)
    more = ["--ood_classes", "0,1,1", "0,1,2", "--ood_label_names", "two.json", "names.json"]
    code, out, err = wise_ft(command, "--alphas", "0,1", "--ood", "two.txt", "train.txt", *more)
    assert code == 0, err
    found = curve(command.folder)
    assert list(found[0]) == ["alpha", "dev", "two", "train"]
    assert [line["train"] for line in found] == [line["dev"] for line in found]
    told = [line for line in err.splitlines() if line.startswith("classes ")]
    assert told == ["classes     two: in -> no; so, of -> yes", "classes     train: in -> in; so -> so; of -> of"]
    picture = (command.folder / "wise-ft-curve.html").read_text(encoding="utf-8")
    assert "chance, 2 classes (0.5)" in picture and "chance, 3 classes (0.333)" in picture


def test_classes_of_the_same_names_are_matched_by_name_and_others_by_their_order_which_is_told(command):
    for name, labels in (("train", "012"), ("dev", "012"), ("test", "012"), ("other", "abc")):
        lines = [f"{labels[i % 3]} ||| {('a bad dull film', 'one good day', 'so so')[i % 3]} {i}" for i in range(14)]
        writes(f"{name}.txt", "\n".join(lines) + "\n")(command.folder)
    writes("names.json", '["in", "so", "of"]')(command.folder)
    fine_tuned(command)
    writes("turned.json", '{"b": "so", "c": "of", "a": "in"}')(command.folder)  # a cycle, which is not its own inverse
    writes("two.json", '{"c": null, "b": "good", "a": "bad"}')(command.folder)
    more = ["--ood", "other.txt", "--ood_label_names"]
    code, _, err = wise_ft(command, "--alphas", "0,0.3,0.6,1", *more, "turned.json")
    assert code == 0 and "classes     other: so -> so; of -> of; in -> in" in err.splitlines(), err
    found = curve(command.folder)
    assert all(line["dev"] == line["other"] for line in found) and found[-1]["dev"] not in (0, 1)
    code, _, err = wise_ft(command, "--alphas", "1", *more, "two.json", "--ood_classes", "-1,0,1")
    assert code == 0 and "classes     other: so -> good; of -> bad; in left out" in err.splitlines(), err


def test_a_base_of_another_norm_is_told_without_an_option_that_was_not_typed(command):
    for name, norm in (("model.pt", "rmsnorm"), ("other.pt", "layernorm")):
        model = tiny_llama(vocab_size=512, max_seq_len=64, norm=norm)
        write_checkpoint(command.folder / name, model.state_dict(), model.config)
    fine_tuned(command)
    code, _, err = wise_ft(command, "--pretrained-model-path", "other.pt")
    assert code == 2 and "--norm" not in err
    assert (
        "other.pt has norm layernorm, run/best.pt has rmsnorm; name its base model with --pretrained-model-path" in err
    )


def test_data_files_of_other_forms_are_read_as_in_training(command):
    def tab(name, labels, folds=("a1", "b1")):
        lines = [
            f"{labels[i % 2]}\t{folds[i // 2 % 2]}\t{('a bad dull film', 'one good day')[i % 2]} {i}" for i in range(16)
        ]
        writes(name, "\n".join(lines) + "\n")(command.folder)

    tab("data.tsv", ("neg", "pos"))
    tab("same.tsv", ("no", "yes"))
    writes("map.json", '{"neg": "in", "pos": "of", "so": null}')(command.folder)
    writes("turned.json", '{"yes": "of", "no": "in"}')(command.folder)
    data = [
        "--train",
        "data.tsv",
        "--dev",
        "data.tsv#fold=b*",
        "--test",
        "data.tsv#fold=a*",
        "--label-names",
        "map.json",
    ]
    fine_tuned(command, "finetune", "prompt", *data)
    more = ["--ood", "data.tsv#fold=b*", "same.tsv#fold=b*", "--ood_label_names", "map.json", "turned.json"]
    (command.folder / "map.json").rename(command.folder / "elsewhere.json")
    more[-2] = "elsewhere.json"
    code, out, err = wise_ft(command, "--alphas", "0,0.4,1", *more)
    assert code == 0 and "(8 rows)" in out, err
    found = curve(command.folder)
    assert list(found[0]) == ["alpha", "dev", "data", "same"]
    assert all(line["dev"] == line["data"] == line["same"] for line in found)
    code, _, err = wise_ft(command, "--alphas", "1", "--ood", "data.tsv#fold=b*", "--curve_out", "data.tsv")
    assert code == 2 and "data.tsv is both input and output" in err


def test_the_curve_is_one_that_the_report_shows(command):
    fine_tuned(command)
    assert wise_ft(command, "--alphas", "0,0.5,1", "--ood", "test.txt")[0] == 0
    assert main(["--option", "report", "--runs", "run", "--curves", "wise-ft-curve.csv"]) == 0
    page = (command.folder / "report.html").read_text(encoding="utf-8")
    section = page.partition("wise-ft-curve.csv")[2].partition("<section")[0]
    assert section.count("<polyline") == 2
    for line in curve(command.folder):
        assert f"dev: {line['dev']:.4f}" in section and f"test.txt: {line['test.txt']:.4f}" in section


def another_base(folder):
    model = tiny_llama(vocab_size=512, max_seq_len=64, n_layers=1)
    write_checkpoint(folder / "other.pt", model.state_dict(), model.config)


BAD = [
    ("no file", ["--finetuned", "none.pt"], None, "none.pt: no such file; give the folder of a run"),
    ("a base in its place", ["--finetuned", "model.pt"], None, "model.pt is not a fine-tuned classifier"),
    ("a text in its place", ["--finetuned", "dev.txt"], None, "dev.txt is not a fine-tuned"),
    ("a base that is gone", [], lambda f: (f / "model.pt").unlink(), "model.pt, the base model of run/best.pt,"),
    (
        "another base",
        ["--pretrained-model-path", "other.pt"],
        another_base,
        "other.pt has n_layers 1, run/best.pt has 2",
    ),
    ("a template", ["--template", "{sentence} So"], None, "--template belongs to --option prompt and to --head prompt"),
    ("alphas beyond", ["--alphas", "0,1.5"], None, "'0,1.5' is not allowed; it must be increasing numbers from 0 to 1"),
    ("alphas of no number", ["--alphas", "half"], None, "'half' is not allowed"),
    ("classes left out", ["--ood", "dev.txt", "--ood_classes", "0,2"], None, "'0,2' is not allowed"),
    (
        "classes too many",
        ["--ood", "dev.txt", "--ood_classes", "0,0,1"],
        None,
        "0,0,1 has 3 numbers, but the model has 2",
    ),
    ("classes without data", ["--ood_classes", "0,1"], None, "--ood_classes has 1 values for 0 files of --ood"),
    ("other names", ["--label-names", "bad.json"], writes("bad.json", '["x", "y"]'), "leave out --label-names"),
    ("a label of another set", ["--ood", "o.txt"], writes("o.txt", "0 ||| a\n4 ||| b\n"), "o.txt, line 2: label '4'"),
    (
        "a label in words",
        ["--ood", "o.txt"],
        writes("o.txt", "neg ||| a\npos ||| b\n"),
        "o.txt, line 1: label 'neg' is none of 0 to 1 (in, of); correct it, or give the label file that belongs to it "
        "(--label-names, for one of --ood --ood_label_names)",
    ),
    ("one label alone", ["--ood", "o.txt"], writes("o.txt", "0 ||| a\n0 ||| b\n"), "o.txt has only one value in its"),
    ("dev of one label", ["--dev", "o.txt"], writes("o.txt", "0 ||| a\n0 ||| b\n"), "o.txt has only one value in its"),
    ("a curve over the data", ["--curve_out", "dev.txt", "--dev", "dev.txt"], None, "dev.txt is both input and output"),
    ("one file twice", ["--curve_out", "a.html"], None, "its name must end in .csv"),
    ("no folder", ["--curve_out", "none/a.csv"], None, "there is no folder none"),
]


def test_bad_input_gets_one_line_and_touches_nothing(command):
    fine_tuned(command)
    for what, more, change, message in BAD:
        kept = command.files()
        if change:
            change(command.folder)
        before = command.files()
        code, out, err = wise_ft(command, *more)
        errors = [line for line in err.splitlines() if "error" in line]
        assert code == 2 and out == "" and "Traceback" not in err, what
        assert len(errors) == 1 and errors[0].startswith("run_llama.py: error: ") and message in errors[0], (what, err)
        assert command.files() == before, what
        for name, content in kept.items():
            (command.folder / name).write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        "head",
        "label_names",
        "labels",
        "template",
        "label_words",
        "options",
        "model",
        "model_args",
        "NaN",
        "format_version",
    ],
)
def test_a_damaged_file_is_told_in_one_line(command, damage):
    path = fine_tuned(command)
    content = torch.load(path, weights_only=True)
    if damage == "NaN":
        content["model"]["classifier_head.bias"][0] = torch.nan
    elif damage == "model":
        del content["model"]["classifier_head.bias"]
    elif damage in ("template", "label_words"):
        content["options"][damage] = {"template": "{sentence} or {sentence}", "label_words": ["a", 1]}[damage]
    else:
        content[damage] = {
            "head": "other",
            "labels": {"0": "in"},
            "label_names": ["a"],
            "options": None,
            "model_args": {},
        }.get(damage, 9)
    torch.save(content, path)
    code, out, err = wise_ft(command, "--alphas", "1")
    assert code == 2 and out == "" and err.count("run/best.pt") == 1 and "Traceback" not in err


def test_an_earlier_file_that_does_not_say_its_head_has_the_linear_one(command):
    path = fine_tuned(command)
    content = torch.load(path, weights_only=True)
    del content["head"]
    torch.save(content, path)
    assert wise_ft(command, "--alphas", "1")[0] == 0


def test_it_takes_what_was_not_typed_from_the_run(command):
    fine_tuned(command, "finetune", "linear", "--max_sentence_len", "3", "--pooling", "last_column")
    options = json.loads((command.folder / "run" / "options.json").read_text(encoding="utf-8"))["options"]
    seen = {}

    def adopted(options, found, names):
        seen.update(inherit_options(options, found, names).values())
        raise ValueError("enough")

    inherit_options = classifiers.inherit_options
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifiers, "inherit_options", adopted)
        wise_ft(command, "--dev", "test.txt")
    assert (seen["max_sentence_len"], seen["pooling"], seen["dev"]) == (3, "last_column", "test.txt")
    for name in ("pretrained_model_path", "tokenizer", "test"):
        assert seen[name] == options[name]
