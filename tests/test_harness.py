"""What outside code does with our modules, by names and numbers alone: build, wrap, train, merge, save, reload, ask.

A grading script of the course imports the names below and calls them positionally, as here; nothing else of the
project is relied on.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import tokenizer as tokenizer_module
from classifier import LlamaEmbeddingClassifier, LlamaZeroShotClassifier
from config import LlamaConfig
from conftest import CONFORMANCE
from llama import Attention, FeedForward, LayerNorm, Llama, LlamaLayer, load_pretrained
from lora import LoRALayer, apply_lora, count_lora_parameters, get_lora_optimizer_params, merge_lora_weights
from minillama.cli.flags import build_parser
from optimizer import AdamW
from rope import apply_rotary_emb, reshape_for_broadcast
from run_llama import main
from tokenizer import Tokenizer

CHECKPOINT = CONFORMANCE / "course_tiny.pt"
NAMES = ["bad", "good"]


@pytest.fixture
def tokenizer(asset):
    return Tokenizer(max_len=None, tokenizer_model=str(asset("stories260K/tok512.model")))


def classifier_config(option="finetune", **changes):
    values = {"pretrained_model_path": str(CHECKPOINT), "num_labels": 2, "hidden_dropout_prob": 0.0, "option": option}
    return SimpleNamespace(**(values | changes))


def random_ids(rows=4, columns=12, seed=0):
    return torch.randint(4, 500, (rows, columns), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "callable_, defaults",
    [
        (
            LlamaConfig,
            {
                "vocab_size": 32000,
                "dim": 512,
                "dropout": 0.0,
                "n_layers": 8,
                "n_heads": 8,
                "n_kv_heads": 8,
                "max_seq_len": 1024,
                "layer_norm_eps": 1e-5,
                "multiple_of": 32,
                "hidden_dim": None,
                "position_embedding_type": "rotary",
                "use_cache": True,
            },
        ),
        (Llama.forward, {"self": ..., "tokens": ..., "targets": None}),
        (Llama.generate, {"self": ..., "idx": ..., "max_new_tokens": ..., "temperature": 1.0, "epsilon": 0.05}),
        (LayerNorm, {"dim": ..., "eps": ...}),
        (FeedForward, {"dim": ..., "hidden_dim": ..., "multiple_of": ..., "dropout": ...}),
        (LlamaLayer, {"layer_id": ..., "config": ...}),
        (Attention, {"config": ...}),
        (Attention.compute_query_key_value_scores, {"self": ..., "query": ..., "key": ..., "value": ...}),
        (load_pretrained, {"checkpoint": ...}),
        (apply_rotary_emb, {"query": ..., "key": ..., "head_dim": ..., "max_seq_len": ..., "theta": 10000.0}),
        (reshape_for_broadcast, {"freqs_cis": ..., "x": ...}),
        (
            AdamW,
            {
                "params": ...,
                "lr": 1e-3,
                "betas": (0.9, 0.999),
                "eps": 1e-6,
                "weight_decay": 0.0,
                "correct_bias": True,
                "max_grad_norm": None,
            },
        ),
        (LoRALayer, {"original_layer": ..., "rank": 4, "alpha": 1.0}),
        (apply_lora, {"model": ..., "rank": 4, "alpha": 1.0}),
        (count_lora_parameters, {"model": ...}),
        (get_lora_optimizer_params, {"model": ...}),
        (merge_lora_weights, {"model": ...}),
        (LlamaZeroShotClassifier, {"config": ..., "tokenizer": ..., "label_names": ...}),
        (LlamaEmbeddingClassifier, {"config": ...}),
        (Tokenizer, {"max_len": None, "tokenizer_model": None}),
        (Tokenizer.encode, {"self": ..., "s": ..., "bos": ..., "eos": ...}),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_signatures(callable_, defaults):
    """The first parameters, in this order, with these defaults (`...`: whatever); more may follow, with defaults."""
    parameters = list(inspect.signature(callable_).parameters.values())
    assert [p.name for p in parameters[: len(defaults)]] == list(defaults)
    for parameter, default in zip(parameters, defaults.values(), strict=False):
        assert default is ... or parameter.default == default
    assert all(p.default is not p.empty or p.kind is p.VAR_KEYWORD for p in parameters[len(defaults) :])


def test_the_state_dict_has_the_course_keys():
    model = Llama(LlamaConfig(**torch.load(CHECKPOINT, weights_only=True)["model_args"]))
    layer = ["attention_norm.weight", "attention_norm.bias", "ffn_norm.weight", "ffn_norm.bias"]
    layer += [f"attention.compute_{name}.weight" for name in ("query", "key", "value", "output")]
    layer += [f"feed_forward.w{i}.weight" for i in (1, 2, 3)]
    wanted = {"tok_embeddings.weight", "norm.weight", "norm.bias", "output.weight"}
    wanted |= {f"layers.{i}.{name}" for i in range(model.config.n_layers) for name in layer}
    assert set(model.state_dict()) == wanted
    assert model.output.weight is model.tok_embeddings.weight


def test_the_42m_checkpoint_has_75_tensors():
    with torch.device("meta"):
        model = Llama(LlamaConfig(dim=512, n_layers=8, n_heads=8, n_kv_heads=8, vocab_size=32000))
    assert len([name for name in model.state_dict() if not name.endswith("norm.bias")]) == 75
    assert model.layers[0].feed_forward.w1.weight.shape == (1376, 512)


def test_the_parts_called_one_by_one():
    config = LlamaConfig(vocab_size=64, dim=32, n_layers=2, n_heads=4, n_kv_heads=None, max_seq_len=20, multiple_of=8)
    x = torch.randn(2, 7, 32, dtype=torch.float16)
    norm = LayerNorm(32, 1e-5)
    assert norm.weight.shape == norm.bias.shape == (32,) and norm(x).dtype == torch.float16
    wanted = F.layer_norm(x.float(), (32,), norm.weight, norm.bias, 1e-5)
    torch.testing.assert_close(norm(x).float(), wanted, atol=2e-3, rtol=2e-3)

    query, key, value = torch.randn(3, 2, 4, 7, 8).unbind(0)
    attention = Attention(config).eval()
    scores = attention.compute_query_key_value_scores(query, key, value)
    by_hand = (query @ key.transpose(-1, -2) / 8**0.5).softmax(-1) @ value  # a bare config: no causal mask
    torch.testing.assert_close(scores.reshape(by_hand.shape), by_hand, atol=1e-5, rtol=1e-5)

    feed_forward = FeedForward(32, None, 8, 0.0)
    x = x.float()
    assert feed_forward.w1.out_features == 88  # 8 * ceil(int(8 * 32 / 3) / 8)
    by_hand = feed_forward.w2(F.silu(feed_forward.w1(x)) * feed_forward.w3(x))
    torch.testing.assert_close(feed_forward.SwiGLU(x), by_hand)
    torch.testing.assert_close(feed_forward(x), by_hand)

    assert LlamaLayer(0, config)(x).shape == x.shape
    query, key = apply_rotary_emb(torch.randn(2, 7, 4, 8), torch.randn(2, 7, 2, 8), 8, 20)
    assert query.shape == (2, 7, 4, 8) and key.shape == (2, 7, 2, 8)
    assert reshape_for_broadcast(torch.randn(7, 4), torch.randn(2, 7, 4, 4)).shape == (1, 7, 1, 4)


def test_the_forward_pass_reads_the_last_position_or_all():
    model = load_pretrained(str(CHECKPOINT)).eval()
    ids = random_ids()
    logits, hidden = model(ids)
    assert logits.shape == (4, 1, 512) and hidden.shape == (4, 12, model.config.dim)
    all_logits, _ = model(ids, targets=ids)
    assert all_logits.shape == (4, 12, 512)
    torch.testing.assert_close(all_logits[:, -1:], logits)
    torch.testing.assert_close(model.output(hidden), all_logits)
    assert model.config.convention.startswith("LayerNorm, bidirectional")


def test_generation_returns_prompt_and_continuation():
    model = load_pretrained(CHECKPOINT)
    ids = random_ids(2, 5)
    greedy = model.generate(ids, 6, temperature=0.0)
    assert greedy.shape == (2, 11) and torch.equal(greedy[:, :5], ids)
    torch.manual_seed(0)
    sampled = model.generate(ids, max_new_tokens=6, temperature=1.0, epsilon=0.05)
    assert sampled.shape == (2, 11) and torch.equal(sampled[:, :5], ids)


def test_the_tokenizer(tokenizer):
    assert (tokenizer.n_words, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (512, 1, 2, 3)
    ids = tokenizer.encode("Once upon a time", bos=True, eos=True)
    assert ids[0] == 1 and ids[-1] == 2 and tokenizer.decode(ids) == "Once upon a time"
    short = Tokenizer(max_len=2, tokenizer_model=tokenizer.path).encode("Once upon a time", bos=True, eos=True)
    assert short == [1, *ids[1:3], 2]


def test_the_zero_shot_classifier_evaluates(tokenizer):
    model = LlamaZeroShotClassifier(classifier_config("prompt"), tokenizer, NAMES).eval()
    with torch.no_grad():
        log_probs = model(random_ids())
    assert log_probs.shape == (4, 2) and (log_probs < 0).all() and torch.isfinite(log_probs).all()


@pytest.mark.parametrize("option", ["pretrain", "finetune", "lora"])
def test_a_classifier_trains_two_steps_is_saved_and_reloaded(option, tmp_path):
    torch.manual_seed(0)
    model = LlamaEmbeddingClassifier(classifier_config(option))
    assert isinstance(model.dropout, torch.nn.Dropout) and model.classifier_head.out_features == 2
    if option == "lora":
        apply_lora(model, 2, 4.0)
        lora, total, percent = count_lora_parameters(model)
        assert lora == sum(p.numel() for p in get_lora_optimizer_params(model)) and percent == 100 * lora / total
        layer = model.llama.layers[0].attention.compute_query
        assert isinstance(layer, LoRALayer) and layer.scaling == 2.0
        assert layer.lora_A.shape == (2, model.llama.config.dim) and not layer.lora_B.any()
        assert layer.original_layer.weight.requires_grad is False
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids, labels = random_ids(), torch.tensor([0, 1, 1, 0])
    model.train()
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = F.nll_loss(model(ids), labels, reduction="sum") / len(labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    trained = model(ids)
    assert losses[1] < losses[0] and trained.shape == (4, 2)
    torch.testing.assert_close(trained.exp().sum(-1), torch.ones(4))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    if option == "pretrain":
        assert changed == {"classifier_head.weight", "classifier_head.bias"}
    elif option == "finetune":
        # A 4-row batch reaches every weight; all but the untouched rows of the embedding change.
        assert changed == set(before)
    else:
        assert {name.split(".")[-1] for name in changed if name.startswith("llama")} == {"lora_A", "lora_B"}
        merge_lora_weights(model)
        torch.testing.assert_close(model(ids), trained, atol=1e-5, rtol=1e-5)

    torch.save({"model": model.state_dict(), "model_args": vars(classifier_config(option))}, tmp_path / "model.pt")
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    again = LlamaEmbeddingClassifier(SimpleNamespace(**saved["model_args"]))
    again.load_state_dict(saved["model"])
    torch.testing.assert_close(again.eval()(ids), trained, atol=1e-5, rtol=1e-5)


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
    with pytest.raises(FileNotFoundError, match="no tokenizer.model in the working directory, beside .*, or in .*data"):
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
    parsed = vars(build_parser().parse_args([]))
    assert {name: parsed[name] for name in defaults} == defaults


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
