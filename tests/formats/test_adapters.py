"""LoRA adapters exchanged with peft, in both directions, and files that are no adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from classifier import LlamaEmbeddingClassifier
from llama import Llama, load_pretrained
from lora import (
    ATTENTION_PROJECTIONS,
    apply_lora,
    get_lora_optimizer_params,
    lora_layers,
    lora_state_dict,
    merge_lora_reversibly,
    merge_lora_weights,
    remove_lora,
    unmerge_lora,
)
from minillama.formats.adapters import Adapter, read_adapter, write_adapter, write_peft
from minillama.formats.checkpoint import write_checkpoint
from minillama.formats.huggingface import write_huggingface
from models import tiny_llama

IDS = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))
THEIR_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def all_logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found = model(IDS, targets=IDS)[0] if isinstance(model, Llama) else model(IDS).logits
    return found


def adapted(rank: int = 3, alpha: float = 7.0, targets=ATTENTION_PROJECTIONS, **variant: bool) -> Llama:
    model = apply_lora(tiny_llama(norm="rmsnorm", causal=True), rank, alpha, targets, **variant)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.lora_B.normal_(std=0.5)
            if layer.lora_magnitude is not None:
                layer.lora_magnitude.mul_(torch.rand_like(layer.lora_magnitude) + 0.5)
    return model


def written(folder: Path, model: Llama, base: str = "base", **variant: bool) -> Path:
    """The adapter of a model of `adapted`, as peft's folder."""
    write_peft(folder, Adapter(lora_state_dict(model), 3, 7.0, {}, **variant), model.config, base)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """The base model as a folder that both programs open."""
    model = tiny_llama(norm="rmsnorm", causal=True)
    folder = tmp_path_factory.mktemp("base")
    write_huggingface(folder, model.config, model.state_dict(), 1, 2)
    return folder


def their_base(base: Path) -> torch.nn.Module:
    return pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(base)


VARIANTS = [{}, {"rslora": True}, {"dora": True}, {"rslora": True, "dora": True}]


@pytest.mark.parametrize("targets", [ATTENTION_PROJECTIONS, ("compute_key", "w1", "w2", "w3")])
@pytest.mark.parametrize("variant", VARIANTS, ids=" ".join)
def test_our_adapter_gives_the_same_logits_in_peft(tmp_path, base, targets, variant):
    peft = pytest.importorskip("peft")
    model = adapted(targets=targets, **variant)
    written(tmp_path, model, str(base), rslora=variant.get("rslora", False))
    assert {name: peft.LoraConfig.from_pretrained(tmp_path).to_dict()[f"use_{name}"] for name in variant} == variant
    theirs = peft.PeftModel.from_pretrained(their_base(base), tmp_path)
    torch.testing.assert_close(all_logits(theirs), all_logits(model), rtol=1e-5, atol=1e-5)
    assert (all_logits(model) - all_logits(load_pretrained(base))).abs().max() > 0.1
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(all_logits(merged), all_logits(merge_lora_weights(model)), rtol=1e-5, atol=1e-5)
    again = load_pretrained(base)
    read_adapter(tmp_path, again.config).apply(again)
    assert torch.equal(all_logits(again), all_logits(adapted(targets=targets, **variant)))


@pytest.mark.parametrize("variant", VARIANTS, ids=" ".join)
def test_an_adapter_of_peft_gives_the_same_logits_here(tmp_path, base, variant):
    peft = pytest.importorskip("peft")
    used = {f"use_{name}": True for name in variant}
    settings = peft.LoraConfig(r=4, lora_alpha=6, target_modules=THEIR_TARGETS, **used)
    theirs = peft.get_peft_model(their_base(base), settings).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=generator)
            elif "lora_magnitude" in name:
                parameter.mul_(0.5 + torch.rand(parameter.shape, generator=generator))
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(base)
    read_adapter(tmp_path, ours.config).apply(ours)
    torch.testing.assert_close(all_logits(ours), all_logits(theirs), rtol=1e-5, atol=1e-5)
    merged = merge_lora_weights(ours)
    torch.testing.assert_close(all_logits(merged), all_logits(theirs.merge_and_unload()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS, ids=" ".join)
def test_the_file_of_a_fine_tuned_classifier_holds_an_adapter(tmp_path, variant):
    from types import SimpleNamespace

    backbone = tiny_llama(norm="rmsnorm", causal=True)
    config = SimpleNamespace(llama=backbone, num_labels=3, hidden_dropout_prob=0.0, option="lora", pooling="last_token")
    model = apply_lora(LlamaEmbeddingClassifier(config), 2, 5.0, **variant)
    with torch.no_grad():
        for parameter in get_lora_optimizer_params(model):
            parameter.normal_()
    options = {"lora_rank": 2, "lora_alpha": 5.0, "pooling": "mean", **variant}
    path = tmp_path / "lora.pt"
    write_checkpoint(path, model.state_dict(), backbone.config, kind="classifier", options=options)
    plain = tiny_llama(norm="rmsnorm", causal=True)
    adapter = read_adapter(path, plain.config)
    adapter.apply(plain)
    assert torch.equal(all_logits(plain), all_logits(model.llama))
    assert set(adapter.head) == {"classifier_head.weight", "classifier_head.bias"}
    write_adapter(tmp_path / "alone.pt", adapter, plain.config)
    alone = read_adapter(tmp_path / "alone.pt", plain.config)
    assert (alone.rank, alone.alpha, alone.rslora, alone.dora) == (2, 5.0, adapter.rslora, adapter.dora)
    for read, wanted in ((alone.state, adapter.state), (alone.head, adapter.head)):
        assert read.keys() == wanted.keys() and all(torch.equal(read[name], wanted[name]) for name in wanted)
    with pytest.raises(ValueError, match="alone.pt is a fine-tuned adapter, not a language model; give its base"):
        load_pretrained(tmp_path / "alone.pt")
    write_peft(tmp_path, adapter, plain.config, "base")
    with safe_open(tmp_path / "classifier_head.safetensors", "pt") as file:
        assert file.metadata()["pooling"] == "mean" and set(file.keys()) == set(adapter.head)
    again = read_adapter(tmp_path, plain.config)
    assert again.state.keys() == adapter.state.keys()
    assert (again.rslora, again.dora) == (variant.get("rslora", False), variant.get("dora", False))


def test_adapters_of_any_rank_and_kind_are_switched_without_a_copy_of_the_base():
    made = {"a": (4, ATTENTION_PROJECTIONS, {}), "b": (2, ("w1", "compute_key"), {"dora": True, "rslora": True})}
    adapters, wanted = {}, {}
    for name, (rank, targets, variant) in made.items():
        source = adapted(rank, 7.0, targets, **variant)
        adapters[name] = Adapter(lora_state_dict(source), rank, 7.0, {}, variant.get("rslora", False))
        wanted[name] = all_logits(source)
    model = tiny_llama(norm="rmsnorm", causal=True)
    base = {tensor.data_ptr() for tensor in model.parameters()}
    before = all_logits(model)
    for name in "abaab":
        adapters[name].apply(model)
        assert torch.equal(all_logits(model), wanted[name])
        assert base <= {tensor.data_ptr() for tensor in model.parameters()}
        if name == "b":
            merge_lora_reversibly(model)  # which the next one takes out again
    remove_lora(unmerge_lora(model))
    assert torch.equal(all_logits(model), before) and not torch.equal(wanted["a"], wanted["b"])


def test_an_adapter_that_does_not_fit_leaves_the_one_before():
    model, other = tiny_llama(norm="rmsnorm", causal=True), adapted(2)
    Adapter(lora_state_dict(adapted()), 3, 7.0, {}).apply(model)
    for state, message in (
        ({"layers.0.attention.q_proj.lora_A": torch.ones(2, 32)}, "no Linear is named q_proj"),
        (dict(list(lora_state_dict(other).items())[2:]), "does not fit the model"),
    ):
        with pytest.raises(ValueError, match=message):
            Adapter(state, 2, 7.0, {}).apply(model)
        assert torch.equal(all_logits(model), all_logits(adapted()))


def peft_folder(folder: Path, **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    written(folder, adapted())
    content = json.loads((folder / "adapter_config.json").read_text()) | changes
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; this program applies 'LORA' only"),
        ({"use_dora": True}, "use_dora is True, but adapter_model.safetensors has no magnitudes"),
        ({"use_dora": "yes"}, "use_dora is 'yes'; this program applies False only"),
        ({"use_rslora": 2}, "use_rslora is 2; this program applies False only"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern is {'q_proj': 8}"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is .'lm_head'."),
        ({"r": 0}, "r is 0 and lora_alpha 7.0; both must be numbers above 0"),
        ({"lora_alpha": "big"}, "lora_alpha 'big'"),
        ({"r": 5}, r"lora_A has shape \(3, 32\), which does not fit rank 5"),
        ({"r": 10**15}, "which does not fit rank 1000000000000000"),
        ({"lora_alpha": 10**400}, "both must be numbers above 0"),
        ({"lora_alpha": True}, "both must be numbers above 0"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'; this program applies True only"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(tmp_path, changes, message):
    model = tiny_llama(norm="rmsnorm", causal=True)
    with pytest.raises(ValueError, match=message) as raised:
        read_adapter(peft_folder(tmp_path / "adapter", **changes), model.config).apply(model)
    assert "\n" not in str(raised.value)


def test_what_is_no_adapter_of_this_model_is_refused(tmp_path):
    folder, config = peft_folder(tmp_path / "adapter"), tiny_llama(norm="rmsnorm", causal=True).config
    with pytest.raises(FileNotFoundError, match="no such adapter; --adapter takes a peft folder"):
        read_adapter(tmp_path / "gone", config)
    with pytest.raises(ValueError, match="not a LoRA matrix of a Llama of this size"):
        read_adapter(folder, tiny_llama(n_layers=1, norm="rmsnorm", causal=True).config)
    with pytest.raises(ValueError, match="has 32 rows, the model 64|has 16 rows, the model 32"):
        read_adapter(folder, tiny_llama(dim=64, norm="rmsnorm", causal=True).config)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no adapter_model.safetensors"):
        read_adapter(folder, config)
    model = tiny_llama()
    write_checkpoint(tmp_path / "model.pt", model.state_dict(), model.config)
    with pytest.raises(ValueError, match="is not a file of --option lora"):
        read_adapter(tmp_path / "model.pt", config)
    options = {"lora_rank": 4, "lora_alpha": 1.0}
    write_checkpoint(tmp_path / "tuned.pt", model.state_dict(), model.config, kind="classifier", options=options)
    with pytest.raises(ValueError, match="holds a model without LoRA"):
        read_adapter(tmp_path / "tuned.pt", config)
