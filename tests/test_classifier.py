"""Classifiers: the same scores alone and in a batch; prompts and calibration against brute force."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch

from classifier import LlamaEmbeddingClassifier, LlamaPromptClassifier, LlamaZeroShotClassifier
from conftest import CONFORMANCE, ROOT
from llama import load_pretrained
from lora import apply_lora
from minillama.text.batches import cut_in_batches, pad, to_batch, tokenize_rows
from minillama.text.labelled import Row, read_rows
from models import tiny_llama
from tokenizer import Tokenizer

NAMES = ["x", "yx", "yz", "yxz"]
PIECES = {"x": [10], "yx": [11, 10], "yz": [11, 12], "yxz": [11, 10, 12]}


class Pieces:
    """A tokenizer of four known words, of one to three tokens."""

    def encode(self, name, bos, eos):
        assert not bos and not eos
        return PIECES[name]

    def decode(self, ids):
        return f"<{ids[0]}>"


def zero_shot(llama, pooling="last_token"):
    config = SimpleNamespace(llama=llama, num_labels=len(NAMES), pooling=pooling)
    return LlamaZeroShotClassifier(config, Pieces(), NAMES).eval()


def embedding(llama, pooling="last_token", option="finetune", num_labels=3):
    torch.manual_seed(1)
    config = SimpleNamespace(
        llama=llama, num_labels=num_labels, hidden_dropout_prob=0.3, option=option, pooling=pooling
    )
    return LlamaEmbeddingClassifier(config).eval()


def answering(llama, pooling="last_token", names=("x", "yz")):
    config = SimpleNamespace(llama=llama, hidden_dropout_prob=0.3, pooling=pooling)
    return LlamaPromptClassifier(config, Pieces(), names).eval()


def averaging(llama, pooling="mean"):
    return embedding(llama, pooling)


MODELS = {"prompt": zero_shot, "finetune": embedding, "finetune the mean": averaging, "finetune to answer": answering}


def rows_of_lengths(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [Row(0, "", tuple(torch.randint(4, 64, (n,), generator=generator).tolist())) for n in lengths]


@torch.no_grad()
def scores(model, rows, size):
    batches = [to_batch(rows, positions, 3) for positions in cut_in_batches(range(len(rows)), size)]
    return torch.cat([model(batch.ids, batch.mask) for batch in batches])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("option", MODELS)
@pytest.mark.parametrize(
    "lengths",
    [[1 + 7 * i % 29 for i in range(80)], [29] + [1] * 79, [1] * 79 + [29], [5] * 80, [1, 29] * 40],
    ids=["mixed", "one long first", "one long last", "all alike", "short and long in turn"],
)
def test_a_row_scores_the_same_alone_and_in_a_batch_of_10_and_of_80(option, causal, lengths):
    model = MODELS[option](tiny_llama(causal=causal))
    rows = rows_of_lengths(lengths)
    alone = scores(model, rows, 1)
    for size in (10, 80):
        torch.testing.assert_close(scores(model, rows, size), alone, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("option", MODELS)
def test_the_side_of_the_padding_makes_no_difference(option, side, causal):
    model = MODELS[option](tiny_llama(causal=causal))
    rows = rows_of_lengths([2, 9, 5, 14])
    ids, mask = pad([row.ids for row in rows], 3, side)
    for kind in (torch.bool, torch.int64):
        torch.testing.assert_close(model(ids, mask.to(kind)), scores(model, rows, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("option", MODELS)
def test_the_courses_reading_depends_on_the_batch(option):
    """The course's reading: what the switch is for, and proof that the test above can fail."""
    model = MODELS[option](tiny_llama(), "last_column")
    rows = rows_of_lengths([3, 9, 20])
    assert (scores(model, rows, 3) - scores(model, rows, 1)).abs().max() > 1e-2


@torch.no_grad()
def test_the_mean_is_over_the_real_tokens_of_a_row():
    model = averaging(tiny_llama())
    rows = rows_of_lengths([2, 9, 5, 14])
    wide = copy.deepcopy(model).double()
    for row, got in zip(rows, scores(model, rows, 4), strict=True):
        _, hidden = wide.llama(torch.tensor([row.ids]))
        logits = wide.classifier_head.weight @ hidden[0].mean(0) + wide.classifier_head.bias
        torch.testing.assert_close(got.double(), logits.log_softmax(-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("build", [zero_shot, answering])
def test_a_prompt_is_not_answered_at_a_mean(build):
    with pytest.raises(ValueError, match="pooling is 'mean'; it must be one of last_token, last_column"):
        build(tiny_llama(), "mean")


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
def test_a_label_of_several_tokens_has_the_product_of_their_probabilities(causal):
    llama = tiny_llama(causal=causal)
    rows = rows_of_lengths([2, 9, 5, 14])
    got = scores(zero_shot(llama), rows, len(rows))
    for row, line in zip(rows, got, strict=True):
        for name, score in zip(NAMES, line, strict=True):
            by_hand, ids = 0.0, list(row.ids)
            for piece in PIECES[name]:
                logits, _ = llama(torch.tensor([ids]))
                by_hand += logits[0, -1].double().log_softmax(-1)[piece].item()
                ids.append(piece)
            assert score.item() == pytest.approx(by_hand, abs=1e-5)


@torch.no_grad()
def brute_force(llama, prompts, labels, content_free=()):
    """In float64, a loop over rows and labels with a whole pass for every token: log p(label | prompt), less the log of
    its mean probability after the prompts without content."""
    wide = copy.deepcopy(llama).double()

    def probability(prompt, label):
        product = 1.0
        for n, piece in enumerate(label):
            logits, _ = wide(torch.tensor([[*prompt, *label[:n]]]))
            product *= logits[0, -1].softmax(-1)[piece].item()
        return product

    wanted = [[math.log(probability(prompt, label)) for label in labels] for prompt in prompts]
    if content_free:
        means = [sum(probability(c, label) for c in content_free) / len(content_free) for label in labels]
        wanted = [[score - math.log(mean) for score, mean in zip(row, means, strict=True)] for row in wanted]
    return torch.tensor(wanted)


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [[4], [3, 9, 5], []])
def test_calibration_is_the_brute_force_one(causal, lengths):
    llama = tiny_llama(causal=causal)
    model, rows, without = zero_shot(llama), rows_of_lengths([2, 9, 5, 14]), rows_of_lengths(lengths, seed=1)
    plain = scores(model, rows, 4)
    labels = [PIECES[name] for name in NAMES]
    prompts, content_free = ([row.ids for row in some] for some in (rows, without))
    if without:
        for _ in range(2):  # a second time changes nothing
            model.calibrate(*pad(content_free, 3))
    wanted = brute_force(llama, prompts, labels, content_free)
    torch.testing.assert_close(scores(model, rows, 4), wanted, atol=1e-5, rtol=1e-5)
    assert (plain.argmax(-1) != wanted.argmax(-1)).any() or not without  # it matters


@torch.no_grad()
def test_the_bundled_model_scores_real_prompts_as_brute_force_does():
    """From the text on: what is scored is the text's own tokens behind the prompt's."""
    tokenizer = Tokenizer(tokenizer_model=ROOT / "data" / "mini-llama.model")
    llama = load_pretrained(ROOT / "data" / "mini-llama.safetensors").eval()
    words = ["bad", "so-so", "very good"]
    before, behind = 'A review: "', '" All in all, it was'
    rows = read_rows(ROOT / "data" / "demo-dev.txt", list("01234"))[:2]
    config = SimpleNamespace(llama=llama, num_labels=3)
    model = LlamaZeroShotClassifier(config, tokenizer, words).eval()
    fill = lambda some: tokenize_rows(some, tokenizer, model.max_input_len, before=before, question=behind)[0]  # noqa: E731
    without = [Row(0, text) for text in ("N/A", "[MASK]", "")]
    model.calibrate(*pad([row.ids for row in fill(without)], tokenizer.pad_id))

    def ids(text):
        return tokenizer.encode(text, bos=True, eos=False)

    prompts, content_free = ([ids(before + row.sentence + behind) for row in some] for some in (rows, without))
    labels = [ids(f"{before}x{behind} {word}")[len(ids(f"{before}x{behind}")) :] for word in words]
    assert sorted(map(len, labels)) != [1, 1, 1]
    wanted = brute_force(llama, prompts, labels, content_free)
    torch.testing.assert_close(scores(model, fill(rows), 2), wanted, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_the_courses_reading_sums_a_labels_pieces_at_the_last_column():
    llama = tiny_llama()
    ids, mask = pad([[5, 6, 7], [8]], 3)
    logits, hidden = llama(ids)
    column = logits[:, -1].log_softmax(-1)
    wanted = torch.stack([column[:, PIECES[name]].sum(-1) for name in NAMES], dim=-1)
    torch.testing.assert_close(zero_shot(llama, "last_column")(ids, mask), wanted)
    model = embedding(llama, "last_column")
    torch.testing.assert_close(model(ids, mask), model.classifier_head(hidden[:, -1]).log_softmax(-1))


@torch.no_grad()
@pytest.mark.parametrize("option", MODELS)
def test_without_a_mask_every_token_is_real(option):
    model = MODELS[option](tiny_llama())
    ids = torch.randint(4, 64, (5, 9))
    torch.testing.assert_close(model(ids), model(ids, torch.ones_like(ids, dtype=torch.bool)), atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_head_reads_the_last_real_state_of_each_row():
    llama = tiny_llama(causal=False)
    model = embedding(llama)
    rows = rows_of_lengths([4, 11])
    got = scores(model, rows, 2)
    for row, line in zip(rows, got, strict=True):
        _, hidden = llama(torch.tensor([row.ids]))
        wanted = (hidden[0, -1] @ model.classifier_head.weight.T + model.classifier_head.bias).log_softmax(-1)
        torch.testing.assert_close(line, wanted, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_an_answers_logits_are_the_label_words_among_the_models_own(tied):
    llama = tiny_llama(causal=False, tie_embeddings=tied)
    rows = rows_of_lengths([4, 11, 7])
    got = scores(answering(llama), rows, 3)
    for row, line in zip(rows, got, strict=True):
        logits, _ = llama(torch.tensor([row.ids]))
        torch.testing.assert_close(line, logits[0, -1, [10, 11]].log_softmax(-1), atol=1e-5, rtol=0)


def test_before_training_an_answer_is_what_the_zero_shot_classifier_says_of_labels_of_one_token(monkeypatch):
    monkeypatch.setitem(PIECES, "yz", [12])
    llama, rows, names = tiny_llama(), rows_of_lengths([4, 11]), ["x", "yz"]
    config = SimpleNamespace(llama=llama, num_labels=2)
    wanted = scores(LlamaZeroShotClassifier(config, Pieces(), names).eval(), rows, 2).log_softmax(-1)
    torch.testing.assert_close(scores(answering(llama), rows, 2), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("option", ["finetune", "lora"])
def test_answering_trains_the_models_weights_and_no_others(option):
    llama = tiny_llama()
    own = {f"llama.{name}" for name, _ in llama.named_parameters()}
    model = answering(llama)
    assert {name for name, _ in model.named_parameters()} == own == set(model.state_dict()) - {"llama.output.weight"}
    if option == "lora":
        apply_lora(model, 2, 4.0)
    model(torch.randint(4, 64, (3, 6)))[:, 0].sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == ({name for name, _ in model.named_parameters() if "lora_" in name} if option == "lora" else own)


def test_labels_that_begin_alike_have_no_words_to_answer_with():
    message = "the labels 'yx' and 'yz' begin with the same token, '<11>', .*give other --label_words, or --head linear"
    with pytest.raises(ValueError, match=message):
        answering(tiny_llama(), names=("x", "yx", "yz"))


@pytest.mark.parametrize("classifier", [embedding, answering])
def test_dropout_acts_in_training_only(classifier):
    model = classifier(tiny_llama())
    ids = torch.randint(4, 64, (3, 6))
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


@pytest.mark.parametrize("option, trains", [("pretrain", False), ("finetune", True), ("lora", True)])
def test_pretrain_freezes_the_backbone(option, trains):
    model = embedding(tiny_llama(), option=option)
    assert {p.requires_grad for p in model.llama.parameters()} == {trains}
    assert all(p.requires_grad for p in model.classifier_head.parameters())
    model(torch.randint(4, 64, (2, 5))).sum().backward()
    assert (model.llama.layers[0].feed_forward.w1.weight.grad is not None) == trains


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("option", MODELS)
def test_log_probabilities_are_float32_under_autocast(option, dtype):
    model = MODELS[option](tiny_llama())
    ids, mask = pad([[5, 6, 7, 9], [8]], 3)
    with torch.autocast("cpu", dtype=dtype):
        got = model(ids, mask)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, model(ids, mask), atol=0.3, rtol=0.1)


@pytest.mark.parametrize("norm, causal", [("rmsnorm", True), (None, None)])
def test_a_config_may_override_the_convention(norm, causal):
    config = SimpleNamespace(
        pretrained_model_path=CONFORMANCE / "course_tiny.pt",
        num_labels=2,
        hidden_dropout_prob=0.0,
        option="finetune",
        norm=norm,
        causal=causal,
    )
    convention = LlamaEmbeddingClassifier(config).llama.config
    assert (convention.norm, convention.causal) == (norm or "layernorm", bool(causal))


def test_bad_settings_are_named():
    llama = tiny_llama()
    with pytest.raises(ValueError, match="option is 'train'; it must be one of pretrain, finetune, lora"):
        embedding(llama, option="train")
    with pytest.raises(ValueError, match="pooling is 'median'; it must be one of last_token, mean, last_column"):
        embedding(llama, "median")
    with pytest.raises(ValueError, match="num_labels is 3, but there are 4 label names"):
        LlamaZeroShotClassifier(SimpleNamespace(llama=llama, num_labels=3), Pieces(), NAMES)
