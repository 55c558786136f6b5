"""The README and the pages of docs/ for users: their commands run as written, and print what the pages show."""

from __future__ import annotations

import contextlib
import csv
import importlib
import io
import json
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

import sanity_check
import tokenizer
from classifier import LlamaEmbeddingClassifier
from conftest import ROOT
from llama import Llama, LlamaConfig, load_pretrained
from minillama.formats.checkpoint import write_checkpoint

USER_PAGES = ("understand", "xray", "generate", "classify", "pretrain", "course", "plan", "runs", "checkpoints")
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXT = "\n".join([README, *((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in USER_PAGES)])
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, flags=re.M | re.S)
COMMANDS = [
    shlex.split(line)
    for language, text in BLOCKS
    if language == "sh"
    for line in text.replace("\\\n", "").splitlines()
    if line.startswith("python ")
]
OURS = [command[1:] for command in COMMANDS if command[1].endswith(".py")]
RUNS_OF_OPTIONS = {tuple(command): command for command in OURS if "--option" in command}.values()  # each once
CORPORA = ("sst", "cfimdb")


def identifier(command):
    return " ".join(command)[:70]


def run(command):
    """Runs a command in this process and folder; returns its stdout."""
    script, *arguments = command
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = importlib.import_module(script.removesuffix(".py")).main(arguments)
    assert code == 0
    return out.getvalue()


@pytest.fixture
def course_folder(asset, tmp_path, monkeypatch):
    """A folder as fetch_data.py leaves it, with 24 rows a split and a tiny model instead of the course's."""
    (tmp_path / "data").mkdir()
    for corpus in CORPORA:
        shutil.copy(ROOT / "data" / f"{corpus}-label-mapping.json", tmp_path / "data")
        for split in ("train", "dev", "test"):
            name = f"{corpus}-{split}.txt"
            rows = asset(f"course/data/{name}").read_text(encoding="utf-8").split("\n")[:24]
            (tmp_path / "data" / name).write_text("\n".join(rows) + "\n", encoding="utf-8")
    for split in ("train", "dev", "test"):
        rows = (ROOT / "data" / f"demo-{split}.txt").read_text(encoding="utf-8").split("\n")[:24]
        (tmp_path / "data" / f"demo-{split}.txt").write_text("\n".join(rows) + "\n", encoding="utf-8")
    shutil.copy(ROOT / "data" / "demo-label-mapping.json", tmp_path / "data")
    for name in ("README.md", "docs", "data/mini-llama.safetensors", "data/mini-llama.model"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    for split in ("train", "dev", "test"):
        lines = (ROOT / "data" / f"demo-qa-{split}.jsonl").read_text(encoding="utf-8").split("\n")[:24]
        (tmp_path / "data" / f"demo-qa-{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = [f'"{i} was a {word} film, {i} times",{word}' for i in range(12) for word in ("good", "bad")]
    (tmp_path / "all.csv").write_text("\n".join(["review,stars", *rows]) + "\n", encoding="utf-8")
    (tmp_path / "new.csv").write_text("id,review\n1,12 was a bad film\n2,12 was a good film\n", encoding="utf-8")
    monkeypatch.setattr("minillama.cli.bundled.HERE", tmp_path)  # which finds data/ beside the program
    (tmp_path / "data" / "stories260K").mkdir()
    for name in ("stories260K/stories260K_v0.bin", "stories260K/tok512.model"):
        shutil.copy(asset(name), tmp_path / "data" / name)
    model = Llama(LlamaConfig(vocab_size=32000, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=256))
    write_checkpoint(tmp_path / "stories42M.pt", model.state_dict(), model.config)
    shutil.copy(asset("course/tokenizer.model"), tmp_path / "data")
    monkeypatch.setattr(tokenizer, "HERE", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_readme_begins_with_the_shortest_command_and_has_the_tests():
    assert OURS[0] == ["run_llama.py"]
    assert ["python", "-m", "pytest", "-n", "2", "--dist", "worksteal"] in COMMANDS
    for script in ("sanity_check.py", "fetch_data.py", "prepare_submit.py"):
        assert f"`python {script}" in TEXT


def test_the_first_command_prints_what_the_readme_shows_with_nothing_fetched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = next(text for language, text in BLOCKS if not language)
    greedy = run(OURS[0]).split("\n\n")[0].split()
    assert " ".join(greedy[:20]) in " ".join(shown.split())


def test_the_sanity_check_prints_what_its_page_shows(tmp_path, monkeypatch):
    shown = next(text for language, text in BLOCKS if not language and "tests/conformance" in text)
    missing = [Path("data/reference") / name for name in sanity_check.COURSE_REFERENCES]
    monkeypatch.setattr(sanity_check, "course_references", lambda: missing)
    monkeypatch.chdir(tmp_path)

    def shape(text):
        return re.sub(r"\d\.\de-\d\d", "#", text)

    assert shape(run(["sanity_check.py"])) == shape(shown)


def write_fine_tuned(path):
    """The file that finetune writes, from the model and the SST data in the folder, with nothing learnt."""
    llama, names = load_pretrained("stories42M.pt"), json.loads(Path("data/sst-label-mapping.json").read_text())
    config = SimpleNamespace(llama=llama, num_labels=len(names), hidden_dropout_prob=0.0, option="finetune")
    options = {"pretrained_model_path": "stories42M.pt", "tokenizer": None, "max_sentence_len": None}
    labels = {str(number): name for number, name in enumerate(names)}
    options |= {"dev": "data/sst-dev.txt", "test": "data/sst-test.txt", "pooling": "last_token", "batch_size": 8}
    state = LlamaEmbeddingClassifier(config).state_dict()
    about = {"kind": "classifier", "head": "linear", "label_names": names, "labels": labels, "options": options}
    write_checkpoint(path, state, llama.config, **about, epoch=1)


def prepare(command):
    """Makes what the commands before this one make."""
    if "mine.model" in command and "--tokenizer" in command:
        shutil.copy(ROOT / "data" / "mini-llama.model", "mine.model")
    if "further.safetensors" in command and "perplexity" in command:
        for ending in ("safetensors", "model"):
            shutil.copy(ROOT / "data" / f"mini-llama.{ending}", f"further.{ending}")
    if "convert" in command and "data/mini-llama.safetensors" in command:
        for ending in ("safetensors", "model"):
            shutil.copy(ROOT / "data" / f"mini-llama.{ending}", "data")
    if "--finetuned" in command:
        write_fine_tuned(Path(command[command.index("--finetuned") + 1]))
    if "--against" in command:  # the base of what `write_fine_tuned` wrote
        shutil.copy("stories42M.pt", command[command.index("--against") + 1])
    if "report" in command:
        run(trimmed(next(other for other in OURS if "pretrain" in other and "further.safetensors" in other)))


def trimmed(command):
    """The command with fewer steps, for long training is not what is tested."""
    command = list(command)
    if "--max_steps" in command:
        command[command.index("--max_steps") + 1] = "5"
        if "--warmup_steps" in command:
            command[command.index("--warmup_steps") + 1] = "2"
    return command


def test_two_commands_of_the_readme_label_a_table(course_folder):
    """`all.csv` says good of good films and bad of bad ones, and so does the label of each row of `new.csv`."""
    shown = [command for command in OURS if "all.csv" in command or "new.csv" in command]
    assert len(shown) >= 2 and README.count("all.csv") >= 2
    Path("stories42M.pt").unlink()  # random weights; the bundled model takes its place
    for command in shown[:2]:
        run(command)
    with (course_folder / "new-classified.csv").open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    assert [(row["id"], row["review"], row["predicted"]) for row in found] == [
        ("1", "12 was a bad film", "bad"),
        ("2", "12 was a good film", "good"),
    ]


@pytest.mark.parametrize("command", RUNS_OF_OPTIONS, ids=identifier)
def test_each_option_runs_as_its_page_says(course_folder, command):
    option = command[command.index("--option") + 1]
    if option in ("tokenizer", "pretrain"):  # 24 rows are too few for a tokenizer
        shutil.copy(ROOT / "data" / "demo-train.txt", "data")
    prepare(command)
    before = {path.name for path in course_folder.iterdir()}
    out = run(trimmed(command))
    made = {path.name for path in course_folder.iterdir()} - before
    if "--plan" in command:
        assert out.startswith(("train ", "demo-train ")) and not made
        return
    if "all.csv" in command:
        assert made == {"all-finetune-10-0.0003.pt", "all-dev-finetuning-output.csv", "runs"}
        return
    if option in ("report", "perplexity", "tokenizer", "pretrain", "sft", "convert", "wise_ft", "classify", "evaluate"):
        wanted = {
            "report": {"report.html", "plots"},
            "perplexity": set(),
            "classify": {"new-classified.csv"} if "new.csv" in command else {"page.html"} & set(command),
            "evaluate": set(),
            "tokenizer": {"mine.model"},
            "pretrain": {f"{name}.{ending}" for name in ("further", "mine") for ending in ("safetensors", "model")},
            "convert": {"stories260K-hf", "mini-llama-hf", "mini-llama.gguf", "mini-llama-int8.bin"},
            "sft": {"answers.safetensors", "answers.model", "sft-dev-answers.jsonl", "sft-test-answers.jsonl"},
            "wise_ft": {"wise-ft-curve.csv", "wise-ft-curve.html"},
        }
        made.discard("runs")
        assert made <= wanted[option] and (made or not wanted[option])
        return
    if option == "generate":
        made.discard("runs")  # which has the record of what they were made from
        assert made == {"generated-sentence-temp-0.txt", "generated-sentence-temp-1.txt"}
        return
    for name in {name for name in made if name.endswith("-output.txt")}:
        corpus, split, _ = name.split("-", 2)
        source = (course_folder / "data" / f"{corpus}-{split}.txt").read_text(encoding="utf-8").splitlines()
        predicted = (course_folder / name).read_text(encoding="utf-8").splitlines()
        assert [line[1:].strip() for line in source] == [line[1:].strip() for line in predicted]
    assert len([name for name in made if name.endswith("-output.txt")]) == 2
    assert ("no gold labels" in out) == (not any("sst" in word or "demo" in word for word in command))


def test_the_python_snippet_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    snippet = next(text for language, text in BLOCKS if language == "python")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(snippet, "README.md", "exec"), {})
    assert out.getvalue().startswith("Once upon a time")
