"""The course's own program and its commands, from the first step to the last."""

from __future__ import annotations

import contextlib
import copy
import io
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import tokenizer as tokenizer_module
from classifier import LlamaEmbeddingClassifier, LlamaZeroShotClassifier
from conftest import CONFORMANCE
from llama import load_pretrained
from lora import LoRALayer, apply_lora, get_lora_optimizer_params, merge_lora_weights
from optimizer import AdamW
from run_llama import main, parse
from tokenizer import Tokenizer

CHECKPOINT = CONFORMANCE / "course_tiny.pt"
NAMES = ["bad", "good"]


def random_ids(rows=4, columns=12, seed=0):
    return torch.randint(4, 500, (rows, columns), generator=torch.Generator().manual_seed(seed))


# The whole of the course's program, by our modules alone: its steps, in its order.
# It pads with the tokenizer's id and hands over no mask, divides by the batch size that was asked for, deep-copies the
# model after each best epoch, merges the copy, and saves it with its namespace; another process then builds a fresh
# classifier from that namespace and loads strictly.


class CourseProgram:
    """Sentences of two classes in a folder, and what the course's program does with them."""

    batch_size = 5

    def __init__(self, folder, tokenizer_path):
        self.folder = folder
        (folder / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
        self.tokenizer = Tokenizer(max_len=None)  # no path: it lies in the working directory
        self.rows = [("a bad dull film" if i % 2 == 0 else "one good day", i % 2) for i in range(12)]

    def batches(self):
        for start in range(0, len(self.rows), self.batch_size):
            some = self.rows[start : start + self.batch_size]
            ids = [self.tokenizer.encode(sentence, bos=True, eos=True) for sentence, _ in some]
            longest = max(map(len, ids))
            padded = [row + [self.tokenizer.pad_id] * (longest - len(row)) for row in ids]
            yield torch.tensor(padded), torch.tensor([label for _, label in some]), [sentence for sentence, _ in some]

    @torch.no_grad()
    def evaluate(self, model):
        """(accuracy, predictions)"""
        model.eval()
        predictions, labels = [], []
        for ids, some, _ in self.batches():
            predictions += model(ids).argmax(-1).tolist()
            labels += some.tolist()
        return sum(p == y for p, y in zip(predictions, labels, strict=True)) / len(labels), predictions

    def train(self, option, path, epochs=3):
        config = SimpleNamespace(
            hidden_dropout_prob=0.3,
            pretrained_model_path=str(CHECKPOINT),
            num_labels=2,
            data_dir=".",
            option="finetune" if option == "lora" else option,
        )
        model = LlamaEmbeddingClassifier(config)
        trained = model.parameters()
        if option == "lora":
            model = apply_lora(model, rank=4, alpha=1.0)
            trained = [*get_lora_optimizer_params(model), *model.classifier_head.parameters()]
        optimizer = AdamW(trained, lr=5e-3)
        best = -1.0
        for _ in range(epochs):
            model.train()
            for ids, labels, _ in self.batches():
                optimizer.zero_grad()
                loss = F.nll_loss(model(ids), labels.view(-1), reduction="sum") / self.batch_size
                loss.backward()
                optimizer.step()
            accuracy, predictions = self.evaluate(model)
            if accuracy > best:
                best, self.best_predictions = accuracy, predictions
                kept = merge_lora_weights(copy.deepcopy(model)) if option == "lora" else model
                content = {"model": kept.state_dict(), "optim": optimizer.state_dict(), "model_config": config}
                torch.save(content, path)
        return model

    def reload(self, path):
        saved = torch.load(path, weights_only=False)  # the course's file holds a namespace
        model = LlamaEmbeddingClassifier(saved["model_config"])
        model.load_state_dict(saved["model"], strict=True)
        return model

    def write(self, predictions, path):
        lines = [f"{label} ||| {sentence}" for label, (sentence, _) in zip(predictions, self.rows, strict=True)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def course_program(asset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1337)
    return CourseProgram(tmp_path, asset("stories260K/tok512.model"))


@pytest.mark.parametrize("option", ["finetune", "lora"])
def test_the_courses_program_trains_merges_a_copy_saves_reloads_and_predicts(course_program, tmp_path, option):
    model = course_program.train(option, tmp_path / "model.pt")
    wrapped = [module for module in model.modules() if isinstance(module, LoRALayer)]
    assert len(wrapped) == (4 * model.llama.config.n_layers if option == "lora" else 0)  # training went on with LoRA
    again = course_program.reload(tmp_path / "model.pt")
    accuracy, predictions = course_program.evaluate(again)
    assert accuracy == 1.0 and predictions == course_program.best_predictions
    course_program.write(predictions, tmp_path / "dev-output.txt")
    labels = [line.split(" ||| ")[0] for line in (tmp_path / "dev-output.txt").read_text().splitlines()]
    assert labels == [str(label) for _, label in course_program.rows]


def test_the_courses_program_classifies_by_prompting(course_program, tmp_path):
    config = SimpleNamespace(
        pretrained_model_path=str(CHECKPOINT), label_names=NAMES, num_labels=2, data_dir=".", option="prompt"
    )
    model = LlamaZeroShotClassifier(config, course_program.tokenizer, NAMES)
    _, predictions = course_program.evaluate(model)
    course_program.write(predictions, tmp_path / "dev-prompting-output.txt")
    assert set(predictions) <= {0, 1} and len(predictions) == len(course_program.rows)


def test_the_courses_program_generates_and_writes(course_program, tmp_path):
    model = load_pretrained(str(CHECKPOINT)).eval()
    ids = torch.tensor(course_program.tokenizer.encode("One day", bos=True, eos=False))[None]
    for temperature in (0.0, 1.0):
        made = model.generate(ids, max_new_tokens=7, temperature=temperature)
        assert made.shape == (1, ids.shape[1] + 7)
        text = course_program.tokenizer.decode(made[0].tolist())
        (tmp_path / f"generated-sentence-temp-{temperature:g}.txt").write_text(text, encoding="utf-8")
        assert text.startswith("One day")


@pytest.mark.parametrize("found", ["working directory", "beside the modules", "data"])
def test_a_tokenizer_without_a_path_is_looked_for_in_three_places(asset, tmp_path, monkeypatch, found):
    places = {
        "working directory": tmp_path,
        "beside the modules": tmp_path / "code",
        "data": tmp_path / "code" / "data",
    }
    (tmp_path / "code" / "data").mkdir(parents=True)
    monkeypatch.setattr(tokenizer_module, "HERE", tmp_path / "code")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no tokenizer.model in the working directory, .*code or .*code.data"):
        Tokenizer(max_len=None)
    for name, folder in reversed(places.items()):  # the last place first: each that is filled later comes before it
        (folder / "tokenizer.model").write_bytes(asset("stories260K/tok512.model").read_bytes())
        if name == found:
            break
    assert Tokenizer(8).path.resolve() == places[found] / "tokenizer.model"


def test_the_course_writes_a_checkpoint_that_loads(tmp_path):
    """{"model", "model_args", ...} with torch.compile's prefix and the training state beside it, as stories42M.pt."""
    content = torch.load(CHECKPOINT, weights_only=True)
    content["model"] = {f"_orig_mod.{name}": tensor for name, tensor in content["model"].items()}
    content |= {"iter_num": 7, "best_val_loss": torch.tensor(1.5), "config": {"dropout": 0.0, "compile": True}}
    torch.save(content, tmp_path / "any name")
    ids = random_ids()
    wanted, _ = load_pretrained(CHECKPOINT)(ids)
    got, _ = load_pretrained(tmp_path / "any name")(ids)
    assert torch.equal(got, wanted)


def test_the_options_of_the_command_line():
    defaults = {
        "option": "generate",
        "train": "data/cfimdb-train.txt",
        "dev": "data/cfimdb-dev.txt",
        "test": "data/cfimdb-test.txt",
        "label_names": "data/cfimdb-label-mapping.json",
        "pretrained_model_path": "stories42M.pt",
        "max_sentence_len": None,
        "seed": 1337,
        "epochs": 5,
        "use_gpu": False,
        "generated_sentence_low_temp_out": "generated-sentence-temp-0.txt",
        "generated_sentence_high_temp_out": "generated-sentence-temp-1.txt",
        "dev_out": "cfimdb-dev-prompting-output.txt",
        "test_out": "cfimdb-test-prompting-output.txt",
        "lora_rank": 4,
        "lora_alpha": 1.0,
        "batch_size": 8,
        "hidden_dropout_prob": 0.3,
        "lr": 2e-5,
    }
    parsed = parse([])
    assert {name: getattr(parsed, name) for name in defaults} == defaults


@pytest.fixture
def course_command(asset, tmp_path, monkeypatch):
    """A folder with data of two classes, in which `run(option, *arguments)` runs the command line."""
    monkeypatch.chdir(tmp_path)
    lines = [f"{i % 2} ||| {'a bad dull film' if i % 2 == 0 else 'one good day'} {i}" for i in range(12)]
    for split in ("train", "dev", "test"):
        (tmp_path / f"{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "names.json").write_text('["bad", "good"]', encoding="utf-8")
    fixed = ["--pretrained-model-path", str(CHECKPOINT), "--tokenizer", str(asset("stories260K/tok512.model"))]
    for split in ("train", "dev", "test"):
        fixed += [f"--{split}", f"{split}.txt"]
    fixed += ["--label-names", "names.json", "--batch_size", "5", "--epochs", "1", "--lr", "0.001"]

    def run(option, *arguments):
        before = set(tmp_path.iterdir())
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            code = main(["--option", option, *fixed, *arguments])
        return code, {path.name for path in set(tmp_path.iterdir()) - before if path.is_file()}

    return run


@pytest.mark.parametrize(
    "option, ending, more",
    [("prompt", "prompting", set()), ("finetune", "finetuning", {"finetune-1-0.001.pt"})]
    + [("lora", "lora", {"lora-1-0.001.pt"})],
)
def test_a_classifying_command_writes_its_files(course_command, tmp_path, option, ending, more):
    outputs = {split: f"x-{split}-{ending}-output.txt" for split in ("dev", "test")}
    code, made = course_command(option, "--dev_out", outputs["dev"], "--test_out", outputs["test"])
    assert code == 0 and made == set(outputs.values()) | more
    for split, name in outputs.items():
        predicted = [line.split(" ||| ") for line in (tmp_path / name).read_text(encoding="utf-8").splitlines()]
        source = [line.split(" ||| ") for line in (tmp_path / f"{split}.txt").read_text(encoding="utf-8").splitlines()]
        assert [sentence for _, sentence in predicted] == [sentence for _, sentence in source]
        assert {label for label, _ in predicted} <= {"0", "1"}


def test_generate_writes_its_two_files(course_command, tmp_path):
    code, made = course_command("generate", "--prompt", "One day", "--max_new_tokens", "4")
    assert code == 0 and made == {"generated-sentence-temp-0.txt", "generated-sentence-temp-1.txt"}
    assert all((tmp_path / name).read_text(encoding="utf-8").startswith("One day") for name in made)


@pytest.mark.parametrize("option", ["prompt", "finetune", "lora"])
def test_a_wrong_ending_stops_before_any_work(course_command, option):
    assert course_command(option, "--dev_out", "dev.txt", "--test_out", "test.txt") == (2, set())
