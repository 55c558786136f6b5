"""Configuration files: an option in a file counts as typed, and each example equals a published command."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from conftest import ROOT
from minillama.cli.checks import check_options
from minillama.cli.flags import OPTIONS, build_parser, used_by
from minillama.cli.loading import use_bundled_defaults
from minillama.cli.options import actions, given_options, parse_options, unused
from minillama.formats.checkpoint import write_checkpoint
from minillama.formats.names import tokenizer_beside, without_ending
from models import tiny_llama
from run_llama import main

EXAMPLES = sorted((ROOT / "examples").glob("*.json"))


@pytest.fixture
def configured(tmp_path, monkeypatch):
    """The options of a configuration file, and of what is typed beside it."""
    monkeypatch.chdir(tmp_path)

    def configured(content, *typed):
        Path("run.json").write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return parse_options(["--config", "run.json", *typed])

    return configured


def given(argv):
    """The options that were given, the place of the configuration aside."""
    args, typed = parse_options(argv)
    return {name: getattr(args, name) for name in sorted(typed) if name != "config"}


# One line of a configuration, and the same typed.
SAME = [
    ({"lr": 3e-4}, ["--lr", "3e-4"]),
    ({"lr": "3e-4", "epochs": 2}, ["--lr", "3e-4", "--epochs", "2"]),
    ({"option": "pretrain", "corpus": ["a b.txt", "c=2"]}, ["--option", "pretrain", "--corpus", "a b.txt", "c=2"]),
    ({"eval_train": True}, ["--eval_train"]),
    ({"prompt": "--lr 3\n“é”"}, ["--prompt=--lr 3\n“é”"]),
    ({"prompt": ""}, ["--prompt", ""]),
    ({"label-names": "a.json"}, ["--label-names", "a.json"]),
    ({"label_names": "a.json"}, ["--label-names", "a.json"]),
    ({"temperature": 0, "seed": 2**62}, ["--temperature", "0", "--seed", str(2**62)]),
]


@pytest.mark.parametrize("content, typed", SAME, ids=lambda value: str(value)[:40])
def test_an_option_in_a_file_is_as_one_typed(configured, content, typed):
    args, names = configured(content)
    there, there_names = parse_options(typed)
    assert vars(args) == vars(there) | {"config": "run.json"}
    assert names == there_names | {"config"}


def test_what_is_typed_overrides_the_file(configured):
    content = {"option": "pretrain", "lr": 0.5, "corpus": ["a.txt", "b.txt"], "eval_train": False}
    args, _ = configured(content, "--lr", "0.25", "--corpus", "c.txt", "--eval_train", "--option", "perplexity")
    assert (args.option, args.lr, args.corpus, args.eval_train) == ("perplexity", 0.25, ["c.txt"], True)
    assert args.batch_size == 8  # and not pretraining's 32, for its option was overridden


def test_a_switch_that_a_file_turns_off_counts_as_typed(configured):
    args, typed = configured({"eval_train": False})
    assert args.eval_train is False and "eval_train" in typed


def test_pretraining_in_a_file_has_its_own_defaults_and_knows_where_it_starts(configured):
    assert configured({"option": "pretrain"})[0].batch_size == 32
    assert not configured({"option": "pretrain"})[0].continued
    assert configured({"option": "pretrain", "pretrained-model-path": "a.pt"})[0].continued


def test_what_a_file_names_does_not_fall_back(configured, capsys):
    args, typed = configured({"option": "prompt", "dev": "mine.txt", "pretrained-model-path": "mine.pt"})
    use_bundled_defaults(args, typed)
    assert (args.dev, args.pretrained_model_path) == ("mine.txt", "mine.pt")
    assert "bundled" not in capsys.readouterr().err


BAD = [
    ('{"lr": 0}', "argument --lr: '0' is not allowed; it must be a number above 0"),
    ('{"lr": NaN}', "argument --lr: 'NaN' is not allowed"),
    ('{"epochs": 2.0}', "argument --epochs: '2.0' is not allowed; it must be a whole number of 1 or more"),
    ('{"option": "tune"}', "argument --option: invalid choice: 'tune'"),
    ('{"learning_rate": 1}', 'there is no option "learning_rate"; the nearest is "'),
    ('{"lora-rnk": 1}', 'there is no option "lora-rnk"; the nearest is "lora_rank"'),
    ('{"lr": 1, "lr": 2}', '"lr" is there twice'),
    ('{"label-names": "a", "label_names": "b"}', '"label_names" is there twice'),
    ('{"lr": null}', '"lr" is null; it must be a text or a number'),
    ('{"lr": [1]}', "it must be a text or a number"),
    ('{"lr": {"a": 1}}', "it must be a text or a number"),
    ('{"prompt": true}', '"prompt" is true; it must be a text or a number'),
    ('{"resume": 1}', "it must be true or false"),
    ('{"corpus": "a.txt"}', '"corpus" is "a.txt"; it must be a list'),
    ('{"corpus": ["a.txt", "--lr", "1"]}', "it must be a list of texts"),
    ('{"corpus": []}', "argument --corpus: expected at least one argument"),
    ('{"config": "a.json"}', 'there is no option "config"'),
    ('["--lr", "1"]', "must hold a JSON object"),
    ("{", "is no JSON"),
    ("", "is no JSON"),
    ('{"a\\nb": 1}', 'there is no option "a\\nb"'),
    ("[" * 5000, "is no JSON"),
]


@pytest.mark.parametrize("content, message", BAD, ids=[content[:40] for content, _ in BAD])
def test_a_bad_file_gets_one_line_that_names_it(configured, capsys, content, message):
    with pytest.raises(SystemExit, match="2"):
        configured(content)
    line = capsys.readouterr().err
    assert line.startswith("run_llama.py: error: --config run.json: ") and line.count("\n") == 1
    assert message in line


def test_a_missing_file_gets_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_options(["--config", "nowhere.json"])
    assert "--config nowhere.json: cannot be read (No such file or directory)" in capsys.readouterr().err


def test_what_is_typed_is_blamed_on_no_file(configured, capsys):
    with pytest.raises(SystemExit, match="2"):
        configured({"lr": 1}, "--epochs", "0")
    assert capsys.readouterr().err.startswith("run_llama.py: error: argument --epochs: '0'")


def test_a_file_that_is_read_is_not_written_over(configured):
    args, _ = configured({"option": "tokenizer", "corpus": ["a.txt"], "model_out": "run.json"})
    with pytest.raises(ValueError, match="run.json is to be read and to be written"):
        check_options(args)


def test_a_run_is_resumed_from_the_file_that_started_it_and_not_from_another(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("train", "dev", "test"):
        Path(f"{name}.txt").write_text("0 ||| a bad film\n1 ||| a good one\n" * 2, encoding="utf-8")
    Path("names.json").write_text('["bad", "good"]', encoding="utf-8")
    content = {"option": "finetune", "epochs": 1, "lr": 1e-3, "run_dir": "run", "label-names": "names.json"}
    content |= {split: f"{split}.txt" for split in ("train", "dev", "test")}
    model = tiny_llama(vocab_size=4096)
    write_checkpoint("model.pt", model.state_dict(), model.config)
    content |= {"pretrained-model-path": "model.pt", "tokenizer": str(ROOT / "data" / "mini-llama.model")}
    content |= {f"{split}_out": f"{split}-finetuning-output.txt" for split in ("dev", "test")}
    Path("run.json").write_text(json.dumps(content), encoding="utf-8")
    assert main(["--config", "run.json"]) == 0
    saved = json.loads(Path("run/options.json").read_text(encoding="utf-8"))["options"]
    assert (saved["lr"], saved["config"]) == (1e-3, "run.json")
    Path("other.json").write_text(json.dumps(content | {"eval_train": False}), encoding="utf-8")
    assert main(["--config", "other.json", "--resume"]) == 0
    capsys.readouterr()
    Path("other.json").write_text(json.dumps(content | {"lr": 2e-3}), encoding="utf-8")
    assert main(["--config", "other.json", "--resume"]) == 2
    assert "lr is 0.002, but run was started with 0.001" in capsys.readouterr().err


# examples/


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_each_example_is_a_run_that_could_start(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args, _ = parse_options(["--config", str(path)])
    args.processes = 1
    check_options(args)


def published():
    """What each published command gives: those of the README, the results, and the Makefile."""
    made = subprocess.run(["make", "-n", "bundled-model"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    pages = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/results.md")]
    text = "\n".join(
        [*(block for page in pages for block in re.findall(r"^```sh\n(.*?)^```", page, flags=re.M | re.S)), made]
    )
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if "run_llama.py" in words:
            yield given_options(build_parser(), words[words.index("run_llama.py") + 1 :])


# What an example may say beyond the published command, which leaves it to the defaults and to the fall-backs.
SAID_BY_DEFAULTS = {"pretrained_model_path", "train", "dev", "test", "label_names", "dev_out", "test_out"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_each_example_says_what_a_published_command_says(path):
    said = given(["--config", str(path)])
    assert any(
        command.items() <= said.items() and said.keys() - command.keys() <= SAID_BY_DEFAULTS for command in published()
    )


def test_the_page_of_the_examples_names_each():
    page = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert sorted(set(re.findall(r"`([\w-]+\.json)`", page))) == [path.name for path in EXAMPLES]


@pytest.mark.parametrize(
    "typed, message",
    [
        (["--lora_target", "mlp"], "unrecognized arguments: --lora_target mlp; the nearest is --lora_targets; see"),
        (["--lora-rnk=3", "b"], "unrecognized arguments: --lora-rnk=3 b; the nearest is --lora_rank; see"),
        (["--zzzzzzzzzz"], "unrecognized arguments: --zzzzzzzzzz; see"),
        (["--opt", "lora"], "unrecognized arguments: --opt lora; the nearest is --option; see"),
        (["--use-gpu=1"], "argument --use_gpu: it takes no value, and there is '1'; see"),
        (["lora_rank"], "unrecognized arguments: lora_rank; did you mean --lora_rank?; see"),
        (["finetune", "--lr", "1"], "unrecognized arguments: finetune; did you mean --option finetune?; see"),
        (["fine-tune"], "unrecognized arguments: fine-tune; did you mean --option finetune?; see"),
        (["zzzzzzzz"], "unrecognized arguments: zzzzzzzz; the name of a flag begins with --; see"),
        (["-option", "lora"], "unrecognized arguments: -option lora; the nearest is --option; see"),
        (
            ["--option", "Fine-Tune"],
            "argument --option: invalid choice: 'Fine-Tune'; the nearest is finetune (",
        ),
        (["--option=pretrian"], "argument --option: invalid choice: 'pretrian'; the nearest is pretrain (choose from"),
        (["--dtype", "float16"], "argument --dtype: invalid choice: 'float16'; the nearest is fp16 (choose from auto,"),
        (
            ["--lora_targets", "atention"],
            "argument --lora_targets: invalid choice: 'atention'; the nearest is attention",
        ),
        (
            ["--decoder", "zzzz"],
            "argument --decoder: invalid choice: 'zzzz' (choose from sample, beam, contrastive,",
        ),
        (["--ood_classes", "-1,-1"], "argument --ood_classes: '-1,-1' is not allowed; it must be a class number"),
        (["--lr", "-1e-3"], "argument --lr: '-1e-3' is not allowed; it must be a number above 0"),
        (["--ood", "-a"], "argument --ood: expected at least one argument; see"),
    ],
)
def test_what_is_not_understood_gets_one_line(capsys, typed, message):
    with pytest.raises(SystemExit, match="2"):
        parse_options(typed)
    line = capsys.readouterr().err
    assert line.startswith(f"run_llama.py: error: {message}") and line.count("\n") == 1


def test_a_dash_and_an_underscore_are_the_same_in_every_flag():
    for name, action in actions().items():
        for typed in action.option_strings:
            variants = {typed.replace("_", "-"), "--" + typed[2:].replace("-", "_")} - {"-h"}
            if action.nargs == 0 or name == "help":
                continue
            values = {build_parser()._spelled([variant])[0] for variant in variants}
            assert values <= set(action.option_strings), name
    mixed = ["--max-new-tokens", "5", "--label_names=a_b-c.json", "--generated_sentence-low_temp-out", "x-y_z"]
    args, typed = parse_options(["--use-gpu", *mixed])
    assert (args.use_gpu, args.max_new_tokens, args.label_names) == (True, 5, "a_b-c.json")
    assert args.generated_sentence_low_temp_out == "x-y_z"
    assert typed == {"use_gpu", "max_new_tokens", "label_names", "generated_sentence_low_temp_out"}


def test_a_value_may_begin_with_a_negative_number():
    assert parse_options(["--ood_classes", "-1,0,1", "0,1,-1"])[0].ood_classes == [[-1, 0, 1], [0, 1, -1]]


def test_what_was_typed_and_changes_nothing_is_known():
    def found(*line):
        return unused(parse_options(line)[0])

    assert found("--option", "finetune", "--lora_rank", "3", "--lr", "1e-3", "--alphas", "0.5") == [
        "--lora_rank",
        "--alphas",
    ]
    assert found("--option", "sft", "--lora_rank", "3", "--max_new_tokens", "9") == []
    assert found("--option", "lora", "--smart", "1", "--head", "prompt", "--save_every", "9") == []
    assert found("--option", "perplexity", "--quantize", "int8") == []
    for option in OPTIONS:
        assert found("--option", option) == []


def test_every_option_says_what_it_is_used_by():
    assert set(used_by()) == set(actions()) - {"help"}
    assert all(set(users) <= set(OPTIONS) for users in used_by().values())


# Names


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("run-0.1", "run-0.1"),
        ("runs/v1.5/model.safetensors", "runs/v1.5/model"),
        ("v1.5.PT", "v1.5"),
        ("a.b.txt", "a.b"),
        ("a.tokens.model", "a.tokens"),
        (".model", ".model"),
        ("plain", "plain"),
        ("llama-3.2-1b/", "llama-3.2-1b"),
    ],
)
def test_only_a_known_ending_is_taken_off_a_name(path, name):
    assert without_ending(path) == name


def test_models_whose_names_differ_behind_a_dot_have_tokenizers_of_their_own():
    assert [tokenizer_beside(f"run-0.{n}") for n in (1, 2)] == ["run-0.1.model", "run-0.2.model"]
    assert tokenizer_beside("out/run.safetensors") == "out/run.model"
