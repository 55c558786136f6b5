"""Default files of a run: which ones are taken, and the line that says so."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest

import tokenizer as tokenizer_module
from conftest import ROOT
from minillama.cli import loading as environment
from minillama.cli.checks import check_options
from minillama.cli.data_files import data_name
from minillama.cli.header import display_path
from minillama.cli.loading import fit_tokenizer, is_chat_model, load_tokenizer, open_checkpoint
from minillama.formats.checkpoint import write_checkpoint, write_safetensors
from minillama.formats.tokenizer_json import write_huggingface_tokenizer
from models import tiny_llama
from run_llama import parse
from tokenizer import Tokenizer

SPLITS = ("train", "dev", "test")
WORDS = {"prompt": "prompting", "finetune": "finetuning", "lora": "lora"}


@pytest.fixture
def resolve(tmp_path, monkeypatch, capsys):
    """The options as run_llama.py takes them, in a folder with the files named, and what was told."""
    monkeypatch.chdir(tmp_path)

    def resolve(*arguments, there=()):
        for name in there:
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text("x", encoding="utf-8")
        capsys.readouterr()
        options = parse(arguments)
        options = options.command.resolve(options)
        check_options(options)
        return options, capsys.readouterr().err.splitlines()

    return resolve


COURSE = ["stories42M.pt", *(f"data/cfimdb-{split}.txt" for split in SPLITS), "data/cfimdb-label-mapping.json"]
BUNDLED = str(ROOT / "data" / "mini-llama.safetensors")
DEMO = {split: str(ROOT / "data" / f"demo-{split}.txt") for split in SPLITS}


def data_of(args):
    return {split: getattr(args, split) for split in SPLITS}


# The model


@pytest.mark.parametrize("option", ["generate", "prompt", "finetune", "lora", "perplexity"])
def test_a_default_model_that_is_not_here_gives_way_to_the_bundled_one(resolve, option):
    args, lines = resolve("--option", option, "--corpus", "a.txt", there=COURSE[1:])
    assert args.pretrained_model_path == BUNDLED
    assert lines == [f"using the bundled model, {BUNDLED} (python fetch_data.py downloads the course's stories42M.pt)"]


def test_a_default_model_that_is_here_is_taken(resolve):
    for option in ("generate", "prompt", "finetune", "lora"):
        args, lines = resolve("--option", option, there=COURSE)
        assert args.pretrained_model_path == "stories42M.pt" and lines == []


@pytest.mark.parametrize("name", ["mine.pt", "stories42M.pt"])
def test_a_typed_model_never_gives_way(resolve, name):
    args, lines = resolve("--option", "generate", "--pretrained-model-path", name)
    assert args.pretrained_model_path == name and lines == []


@pytest.mark.parametrize("option", ["pretrain", "tokenizer"])
def test_a_new_model_needs_none(resolve, option):
    args, lines = resolve("--option", option, "--corpus", "a.txt", "--model_out", "b.model2")
    assert args.pretrained_model_path == "stories42M.pt" and lines == []


def test_sft_trains_a_new_model_as_pretrain_does_unless_told_otherwise(resolve):
    def chosen(*arguments):
        files = ("--train", "a.jsonl", "--dev", "b.jsonl", "--model_out", "c.safetensors")
        args, _ = resolve("--option", "sft", *files, *arguments)
        return args.optimizer, args.lr

    assert chosen("--dim", "64") == ("muon", 4e-3)
    assert chosen("--dim", "64", "--lr", "1e-3", "--optimizer", "adamw") == ("adamw", 1e-3)
    assert chosen("--pretrained-model-path", "mine.pt") == ("adamw", 5e-4)


# The data


@pytest.mark.parametrize("option", WORDS)
@pytest.mark.parametrize("there", [[], COURSE[1:3], COURSE[2:]])
def test_default_data_that_is_not_all_here_gives_way_to_the_demo_data_together(resolve, option, there):
    if option == "prompt" and there == COURSE[2:]:
        pytest.skip("prompt needs no train; see below")
    args, lines = resolve("--option", option, there=["stories42M.pt", *there])
    assert data_of(args) == DEMO and args.label_names == str(ROOT / "data" / "demo-label-mapping.json")
    assert all(os.path.exists(path) for path in [*DEMO.values(), args.label_names])
    (line,) = lines
    assert line.startswith("using the demo data") and "data/demo-*" in line
    first = next(name for name in COURSE[1:] if name not in there and (option != "prompt" or "train" not in name))
    assert line.endswith(f"(python fetch_data.py downloads the course's {first})")
    assert (args.dev_out, args.test_out) == tuple(f"demo-{split}-{WORDS[option]}-output.txt" for split in SPLITS[1:])


def test_prompting_needs_no_training_data_so_that_its_absence_changes_nothing(resolve):
    args, lines = resolve("--option", "prompt", there=["stories42M.pt", *COURSE[2:]])
    assert args.dev == "data/cfimdb-dev.txt" and lines == []
    assert args.dev_out == "cfimdb-dev-prompting-output.txt"


def test_label_names_that_are_not_here_are_missing_data_too(resolve):
    args, lines = resolve("--option", "finetune", there=COURSE[:-1])
    assert data_of(args) == DEMO and lines[0].endswith("the course's data/cfimdb-label-mapping.json)")


@pytest.mark.parametrize("option", WORDS)
def test_the_courses_data_is_taken_where_it_is(resolve, option):
    args, lines = resolve("--option", option, there=COURSE)
    assert data_of(args) == {split: f"data/cfimdb-{split}.txt" for split in SPLITS} and lines == []
    assert args.label_names == COURSE[-1]
    assert (args.dev_out, args.test_out) == tuple(f"cfimdb-{split}-{WORDS[option]}-output.txt" for split in SPLITS[1:])


@pytest.mark.parametrize("typed", ["--dev", "--test", "--label-names"])
def test_typed_data_never_gives_way_and_mixing_it_with_defaults_is_warned_of(resolve, typed):
    args, lines = resolve("--option", "finetune", typed, "mine", there=["stories42M.pt"])
    assert getattr(args, typed[2:].replace("-", "_")) == "mine"
    left = {f"--{split}": f"data/cfimdb-{split}.txt" for split in SPLITS} | {"--label-names": COURSE[-1]}
    del left[typed]
    assert data_of(args) == {split: left.get(f"--{split}", "mine") for split in SPLITS}
    defaults = ", ".join(f"{flag} {path}" for flag, path in left.items())
    assert lines == [f"warning: {defaults} by default; check that they belong to the files you named"]
    for split in SPLITS[1:]:
        whose = "mine" if typed == f"--{split}" else "cfimdb"
        assert getattr(args, f"{split}_out") == f"{whose}-{split}-finetuning-output.txt"


def test_own_training_data_needs_no_other_file(resolve):
    args, lines = resolve("--option", "lora", "--train", "mine.csv", there=["stories42M.pt", *COURSE])
    assert (args.train, args.dev, args.test, args.label_names) == ("mine.csv", "0.1", None, None) and lines == []
    assert (args.dev_out, args.test_out) == ("mine-dev-lora-output.csv", None)
    args, _ = resolve("--option", "prompt", "--test", "mine.jsonl", there=["stories42M.pt", *COURSE])
    assert (args.dev, args.test, args.label_names) == (None, "mine.jsonl", None)
    assert (args.dev_out, args.test_out) == (None, "mine-test-prompting-output.jsonl")


def test_the_courses_training_file_keeps_its_defaults(resolve):
    args, _ = resolve("--option", "finetune", "--train", "elsewhere/cfimdb-train.txt", there=COURSE)
    assert (args.dev, args.test, args.label_names) == ("data/cfimdb-dev.txt", "data/cfimdb-test.txt", COURSE[-1])
    assert args.dev_out == "cfimdb-dev-finetuning-output.txt"


def test_data_typed_in_full_is_not_warned_of(resolve):
    def flags(option):
        outputs = [f"d-{split}-{WORDS[option]}-output.txt" for split in SPLITS[1:]]
        return ["--option", option, "--dev", "a", "--test", "b", "--label-names", "c"] + [
            *("--dev_out", outputs[0], "--test_out", outputs[1])
        ]

    args, lines = resolve(*flags("prompt"), there=["stories42M.pt"])
    assert (args.dev, args.test, args.label_names) == ("a", "b", "c") and lines == []
    assert resolve(*flags("lora"))[1] == [
        "warning: --train data/cfimdb-train.txt by default; check that they belong to the files you named"
    ]
    assert resolve(*flags("lora"), "--train", "d")[1] == []


def test_typed_outputs_stay(resolve):
    args, _ = resolve("--option", "lora", "--dev_out", "my-dev-lora-output.txt")
    assert (args.dev_out, args.test_out) == ("my-dev-lora-output.txt", "demo-test-lora-output.txt")


def test_generating_reads_no_data_and_says_nothing_of_it(resolve):
    args, lines = resolve("--option", "generate", there=["stories42M.pt"])
    assert args.dev == "data/cfimdb-dev.txt" and lines == []


def test_a_path_of_ours_is_told_as_one_would_type_it(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    assert display_path(ROOT / "data" / "demo-dev.txt") == "data/demo-dev.txt"
    monkeypatch.chdir(tmp_path)
    assert display_path(ROOT / "data" / "demo-dev.txt") == str(ROOT / "data" / "demo-dev.txt")


# The tokenizer


@pytest.fixture
def folder(tmp_path, small_tokenizer, monkeypatch):
    """A tokenizer by each name that is looked for; a test takes away those it does not want."""
    monkeypatch.chdir(tmp_path)
    for name in ("typed.model", "model.model", "tokenizer.model", "bundled.model"):
        (tmp_path / name).write_bytes(small_tokenizer.read_bytes())
    model = tiny_llama()
    write_safetensors(tmp_path / "model.safetensors", model.state_dict(), model.config)
    monkeypatch.setattr(tokenizer_module, "HERE", tmp_path / "code")
    monkeypatch.setattr(environment, "BUNDLED_MODEL", tmp_path / "bundled.safetensors")
    return tmp_path


def chosen(*, option="generate", continued=False, tokenizer=None, pretrained_model_path="model.safetensors"):
    options = SimpleNamespace(tokenizer=tokenizer, pretrained_model_path=pretrained_model_path)
    return load_tokenizer(options, new=option == "pretrain" and not continued).path.name


@pytest.mark.parametrize(
    "settings, order",
    [
        ({"option": "generate"}, ["model.model", "tokenizer.model", None]),
        ({"option": "perplexity"}, ["model.model", "tokenizer.model", None]),
        ({"option": "pretrain", "continued": True}, ["model.model", "tokenizer.model", None]),
        ({"option": "pretrain"}, ["tokenizer.model", "bundled.model", None]),
    ],
)
def test_the_tokenizer_is_the_first_that_is_there(folder, settings, order):
    assert chosen(tokenizer="typed.model", **settings) == "typed.model"
    for name in order:
        if name is None:
            with pytest.raises(FileNotFoundError, match="tokenizer"):
                chosen(**settings)
        else:
            assert chosen(**settings) == name
            (folder / name).unlink()


def test_a_checkpoint_that_is_not_there_is_what_is_told(folder):
    """And not that no tokenizer is to be found."""
    (folder / "tokenizer.model").unlink()
    with pytest.raises(FileNotFoundError, match="gone.pt: no such checkpoint"):
        chosen(pretrained_model_path="gone.pt")


def test_of_a_fine_tuned_model_without_a_tokenizer_its_kind_is_told(folder):
    (folder / "tokenizer.model").unlink()
    model = tiny_llama()
    write_checkpoint("fine.pt", model.state_dict(), model.config, kind="classifier")
    with pytest.raises(ValueError, match="fine.pt is a fine-tuned classifier.*--option classify --finetuned fine.pt"):
        chosen(pretrained_model_path="fine.pt")


def test_a_typed_tokenizer_that_is_not_there_is_an_error(folder):
    with pytest.raises(FileNotFoundError, match="none.model: no such tokenizer"):
        chosen(tokenizer="none.model")


def test_a_model_of_another_vocabulary_is_refused(folder):
    model = tiny_llama(vocab_size=300)
    write_checkpoint("model.pt", model.state_dict(), model.config)
    args = SimpleNamespace(pretrained_model_path="model.pt", norm=None, attention=None)
    with pytest.raises(
        ValueError, match=r"vocabulary of 300 tokens, but typed.model has 320; give the --tokenizer that the"
    ):
        open_checkpoint(args, Tokenizer(tokenizer_model="typed.model"))


@pytest.mark.parametrize("dtype", ["auto", "bf16"])
def test_a_checkpoint_without_its_embedding_is_one_line(folder, capsys, dtype):
    from run_llama import main

    model = tiny_llama(vocab_size=320)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "tok_embeddings.weight"}
    write_checkpoint("model.pt", state, model.config)
    arguments = ["--pretrained-model-path", "model.pt", "--tokenizer", "typed.model", "--temperature", "0"]
    assert main([*arguments, "--dtype", dtype]) == 2
    assert "tensor tok_embeddings.weight is missing" in capsys.readouterr().err.splitlines()[-1]


# A vocabulary and a tokenizer of unlike size


@pytest.fixture
def model_folder(tmp_path, small_tokenizer):
    """A Hugging Face folder, as far as its tokenizers go: tokenizer.model with 320 pieces, tokenizer.json with a <pad>
    more; and what makes its vocabulary another size.
    """
    write_huggingface_tokenizer(Tokenizer(tokenizer_model=small_tokenizer), tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 320, "content": "<pad>"})
    path.write_text(json.dumps(content))

    def sized(vocab_size: int):
        (tmp_path / "config.json").write_text(json.dumps({"vocab_size": vocab_size}))
        return tmp_path

    return sized


@pytest.mark.parametrize(
    ("vocab_size", "there", "name", "unused"),
    [
        (320, "both", "tokenizer.model", 0),
        (321, "both", "tokenizer.json", 0),
        (384, "both", "tokenizer.json", 63),
        (500, "both", "tokenizer.json", 179),
        (321, "tokenizer.model", "tokenizer.model", 1),
        (320, "tokenizer.json", "tokenizer.json", 0),
    ],
)
def test_the_tokenizer_of_a_folder_is_the_one_that_fits(model_folder, vocab_size, there, name, unused):
    folder = model_folder(vocab_size)
    for other in {"tokenizer.model", "tokenizer.json"} - {there} if there != "both" else ():
        (folder / other).unlink()
    args = SimpleNamespace(tokenizer=None, pretrained_model_path=str(folder))
    tokenizer = load_tokenizer(args)
    assert tokenizer.path.name == name
    fit_tokenizer(folder, tiny_llama(vocab_size=vocab_size).config, tokenizer)
    assert len(tokenizer.unused_ids) == unused


def test_a_damaged_tokenizer_gives_way_to_a_sound_one(model_folder):
    folder = model_folder(320)
    (folder / "tokenizer.model").write_bytes(b"nothing")
    args = SimpleNamespace(tokenizer=None, pretrained_model_path=str(folder))
    assert load_tokenizer(args).path.name == "tokenizer.json"
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer.model is not a tokenizer;"):
        load_tokenizer(args)


@pytest.mark.parametrize("vocab_size", [321, 328, 384, 512, 1024])
def test_a_tokenizer_from_elsewhere_may_lack_a_few_pieces_or_those_up_to_a_round_number(small_tokenizer, vocab_size):
    tokenizer = Tokenizer(tokenizer_model=small_tokenizer)
    fit_tokenizer("model.pt", tiny_llama(vocab_size=vocab_size).config, tokenizer, [5])
    assert tokenizer.unused_ids == tuple(range(320, vocab_size)) and tokenizer.stop_ids == (2, 1, 5)


@pytest.mark.parametrize("vocab_size", [319, 312, 300, 329, 400, 500, 640, 4096])
def test_a_tokenizer_of_another_model_is_refused(small_tokenizer, vocab_size):
    with pytest.raises(ValueError, match=rf"vocabulary of {vocab_size} tokens, but .* has 320; give the --tokenizer"):
        fit_tokenizer("model.pt", tiny_llama(vocab_size=vocab_size).config, Tokenizer(tokenizer_model=small_tokenizer))


@pytest.mark.parametrize(
    "stop_ids, special_ids, chats", [((5,), {"<|eot_id|>": 5}, True), ((4,), {"<|eot_id|>": 5}, False), ((), {}, False)]
)
def test_a_model_whose_texts_end_with_llama_3s_turns_is_a_chat_model(tmp_path, stop_ids, special_ids, chats):
    checkpoint = SimpleNamespace(path=tmp_path / "model.pt", stop_ids=stop_ids)
    assert is_chat_model(checkpoint, SimpleNamespace(special_ids=special_ids)) is chats


@pytest.mark.parametrize(
    "path, name",
    [("x/reviews-train.csv", "reviews"), ("reviews.csv", "reviews"), ("train.tsv", ""), ("strain.csv", "strain")]
    + [("latest.jsonl", "latest"), ("my_valid.txt", "my"), ("-x.csv", "x"), ("r.tsv#fold=a*", "r"), ("all.csv", "all")],
)
def test_data_have_the_name_of_their_file_without_that_of_the_split(path, name):
    assert data_name(path) == name
