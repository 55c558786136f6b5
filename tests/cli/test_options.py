"""Configuration files: an option in a file counts as typed, and each example equals a published command."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

from conftest import ROOT
from minillama.cli.checks import check_options
from minillama.cli.options import all_flags, build_parser, given_options
from minillama.cli.session import settings_of
from minillama.commands import COMMANDS
from minillama.formats.checkpoint import write_checkpoint
from minillama.formats.names import tokenizer_beside, without_ending
from models import tiny_llama
from run_llama import main, parse

EXAMPLES = sorted((ROOT / "examples").glob("*.json"))


@pytest.fixture
def configured(tmp_path, monkeypatch):
    """The options of a configuration file, and of what is typed beside it."""
    monkeypatch.chdir(tmp_path)

    def configured(content, *typed):
        Path("run.json").write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return parse(["--config", "run.json", *typed])

    return configured


def given(argv):
    """The options that were given, the place of the configuration aside."""
    options = parse(argv)
    return {name: getattr(options, name) for name in options.typed}


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
    options = configured(content)
    assert options.values() == parse(typed).values() | {"config": "run.json"}


def test_what_is_typed_overrides_the_file(configured):
    content = {"option": "pretrain", "lr": 0.5, "corpus": ["a.txt", "b.txt"], "eval_train": False}
    options = configured(content, "--lr", "0.25", "--corpus", "c.txt", "--eval_train", "--option", "perplexity")
    assert (options.option, options.lr, options.corpus, options.eval_train) == ("perplexity", 0.25, ["c.txt"], True)
    assert options.batch_size == 8  # and not pretraining's 32, for its option was overridden


def test_a_switch_that_a_file_turns_off_counts_as_typed(configured):
    options = configured({"eval_train": False})
    assert options.eval_train is False and "eval_train" in options.typed


def test_pretraining_in_a_file_has_its_own_defaults_and_knows_where_it_starts(configured):
    assert configured({"option": "pretrain"}).batch_size == 8
    assert not configured({"option": "pretrain"}).continued
    assert configured({"option": "pretrain", "pretrained-model-path": "a.pt"}).continued


@pytest.mark.parametrize("option", ["finetune", "lora", "sft", "pretrain"])
def test_only_pretraining_uses_muon(option):
    chosen = settings_of(parse(["--option", option]), torch.float32)
    assert chosen.optimizer == ("muon" if option == "pretrain" else "adamw")


def test_what_a_file_names_does_not_fall_back(configured, capsys):
    options = configured({"option": "prompt", "dev": "mine.txt", "pretrained-model-path": "mine.pt"})
    options = options.command.resolve(options)
    assert (options.dev, options.pretrained_model_path) == ("mine.txt", "mine.pt")
    assert "bundled" not in capsys.readouterr().err


BAD = [
    ('{"lr": 0}', "argument --lr: '0' is not allowed; it must be a number above 0"),
    ('{"lr": NaN}', "argument --lr: 'NaN' is not allowed"),
    ('{"epochs": 2.0}', "argument --epochs: '2.0' is not allowed; it must be a whole number of 1 or more"),
    ('{"option": "tune"}', "argument --option: invalid choice: 'tune'"),
    ('{"learning_rate": 1}', 'there is no option "learning_rate"; the nearest is "'),
    ('{"lora-rnk": 1}', 'there is no option "lora-rnk"; the nearest is "lora_rank"'),
    ('{"lr": 1, "lr": 2}', '"lr" occurs twice'),
    ('{"label-names": "a", "label_names": "b"}', '"label_names" occurs twice'),
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
    ("{", "is not JSON"),
    ("", "is not JSON"),
    ('{"a\\nb": 1}', 'there is no option "a\\nb"'),
    ("[" * 5000, "is not JSON"),
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
        parse(["--config", "nowhere.json"])
    assert "--config nowhere.json: cannot be read (No such file or directory)" in capsys.readouterr().err


def test_what_is_typed_is_blamed_on_no_file(configured, capsys):
    with pytest.raises(SystemExit, match="2"):
        configured({"lr": 1}, "--epochs", "0")
    assert capsys.readouterr().err.startswith("run_llama.py: error: argument --epochs: '0'")


def test_a_file_that_is_read_is_not_written_over(configured):
    options = configured({"option": "tokenizer", "corpus": ["a.txt"], "model_out": "run.json"})
    with pytest.raises(ValueError, match="run.json is both input and output"):
        check_options(options)


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
    options = parse(["--config", str(path)])
    check_options(options.command.resolve(options))


def published():
    """The options that each published command gives: those of the README, the results, and the Makefile."""
    made = subprocess.run(
        ["make", "-n", "bundled-model", "bundled-classifier"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    pages = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/results.md")]
    text = "\n".join(
        [*(block for page in pages for block in re.findall(r"^```sh\n(.*?)^```", page, flags=re.M | re.S)), made]
    )
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if "run_llama.py" in words:
            arguments = words[words.index("run_llama.py") + 1 :]
            if arguments[:1] == ["--config"] and arguments[1].startswith("examples/bundled-"):
                yield given(["--config", str(ROOT / arguments[1])])  # the Makefile has them from the example itself
            else:
                yield given_options(build_parser(COMMANDS), arguments)


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
        (["--use-gpu=1"], "argument --use_gpu: it takes no value, but got '1'; see"),
        (["lora_rank"], "unrecognized arguments: lora_rank; did you mean --lora_rank?; see"),
        (["finetune", "--lr", "1"], "unrecognized arguments: finetune; did you mean --option finetune?; see"),
        (["fine-tune"], "unrecognized arguments: fine-tune; did you mean --option finetune?; see"),
        (
            ["zzzzzzzz"],
            "unrecognized arguments: zzzzzzzz; flags begin with --, and a text with spaces needs quotes; see",
        ),
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
        parse(typed)
    line = capsys.readouterr().err
    assert line.startswith(f"run_llama.py: error: {message}") and line.count("\n") == 1


def test_a_dash_and_an_underscore_are_the_same_in_every_flag():
    for flag in all_flags(COMMANDS).values():
        variants = {flag.name.replace("_", "-"), "--" + flag.name[2:].replace("-", "_")}
        assert {build_parser(COMMANDS)._spelled([variant])[0] for variant in variants} == {flag.name}
    mixed = ["--max-new-tokens", "5", "--label_names=a_b-c.json", "--generated_sentence-low_temp-out", "x-y_z"]
    options = parse(["--use-gpu", *mixed])
    assert (options.use_gpu, options.max_new_tokens, options.label_names) == (True, 5, "a_b-c.json")
    assert options.generated_sentence_low_temp_out == "x-y_z"
    assert options.typed == ["generated_sentence_low_temp_out", "label_names", "max_new_tokens", "use_gpu"]


def test_a_value_may_begin_with_a_negative_number():
    assert parse(["--ood_classes", "-1,0,1", "0,1,-1"]).ood_classes == [[-1, 0, 1], [0, 1, -1]]


def test_what_was_typed_and_changes_nothing_is_known():
    def found(*line):
        return parse(line).ignored()

    assert found("--option", "finetune", "--lora_rank", "3", "--lr", "1e-3", "--alphas", "0.5") == [
        "--lora_rank",
        "--alphas",
    ]
    assert found("--option", "sft", "--lora_rank", "3", "--max_new_tokens", "9") == []
    assert found("--option", "lora", "--smart", "1", "--head", "prompt", "--save_every", "9") == []
    assert found("--option", "perplexity", "--quantize", "int8") == []
    for command in COMMANDS:
        assert found("--option", command.name) == []


def test_a_flag_is_declared_once_however_many_commands_use_it():
    declared = [flag for command in COMMANDS for group in command.groups for flag in group.flags]
    assert len({id(flag) for flag in declared}) == len({flag.key for flag in declared})
    assert all(len({flag.key for group in one.groups for flag in group.flags}) for one in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_a_command_says_the_defaults_that_it_has(command):
    options = parse(["--option", command.name])
    assert set(command.defaults) | set(command.default_texts) <= command.keys
    for name, value in command.defaults.items():
        assert getattr(options, name) == value
    for flag in all_flags([command]).values():
        if flag.key not in ("option", *command.defaults):
            assert getattr(options, flag.key) == flag.default


def test_the_options_of_a_command_that_is_unknown_are_refused():
    with pytest.raises(ValueError, match="there is no option 'frobnicate'"):
        parse([]).replace(option="frobnicate")


def test_options_do_not_change_in_place():
    options = parse(["--lr", "1"])
    with pytest.raises(AttributeError, match=r"use replace\(lr=...\)"):
        options.lr = 2.0
    other = options.replace(lr=2.0, option="lora")
    assert (options.lr, options.command.name, other.lr, other.command.name) == (1.0, "generate", 2.0, "lora")


# Help


def test_the_help_is_one_screen_and_names_every_command(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 120
    for command in COMMANDS:
        assert any(re.match(rf"  {command.name} +{re.escape(command.summary)}$", line) for line in lines)
    known = {name for flag in all_flags(COMMANDS).values() for name in (flag.name,)} | {"--help"}
    assert set(re.findall(r"--[\w-]+", "\n".join(lines))) <= known


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_the_help_of_a_command_has_its_flags_and_its_defaults_alone(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit, match="0"):
        parse(["-h", "--option", command.name])
    text = capsys.readouterr().out
    listed = re.findall(r"^  (--[\w-]+)", text, flags=re.M)
    assert sorted(listed) == sorted(flag.name for flag in all_flags([command]).values() if flag.key != "option")
    for name, value in command.defaults.items():
        assert value is None or name in command.default_texts or f"(default: {value})" in text
    for line in command.examples.strip().replace("\\\n", " ").splitlines():
        words = shlex.split(line)
        assert words[:2] == ["python", "run_llama.py"]
        options = parse(words[2:])
        assert options.ignored() == []


def test_a_mistyped_command_is_told_beside_help_too(capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(["--option", "fine-tune", "--help"])
    assert "the nearest is finetune" in capsys.readouterr().err


def test_the_page_of_options_is_current():
    from make_options_page import PAGE, page

    assert PAGE.read_text(encoding="utf-8") == page(), "type `make docs`"


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
