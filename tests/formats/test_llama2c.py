"""llama2.c's files: read, written and damaged; against a writer of our own."""

from __future__ import annotations

import signal
import struct
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from config import LlamaConfig, RopeScaling
from conftest import find_asset
from llama import Llama, load_pretrained
from minillama.formats.checkpoint import read_checkpoint
from minillama.formats.keys import renamed
from minillama.formats.llama2c import write_llama2c
from models import all_logits, foreign_llama
from reference import llama2c_arrays, v0_bytes, v1_bytes

MATRICES = ("compute_query", "compute_key", "compute_value", "compute_output")


# An independent writer of llama2.c's files


def by_our_names(arrays) -> dict[str, np.ndarray]:
    named = {"tok_embeddings.weight": arrays["embedding"], "norm.weight": arrays["norm"]}
    named["output.weight"] = arrays.get("classifier", arrays["embedding"])
    layer_names = {"att_norm": "attention_norm", "ffn_norm": "ffn_norm"}
    layer_names |= {name: f"feed_forward.{name}" for name in ("w1", "w2", "w3")}
    layer_names |= {f"w{m.removeprefix('compute_')[0]}": f"attention.{m}" for m in MATRICES}
    for short, name in layer_names.items():
        for i, array in enumerate(arrays[short]):
            named[f"layers.{i}.{name}.weight"] = array
    return named


@pytest.mark.parametrize("version", ["v0", "v1"])
@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(4, 4), (4, 2), (8, 1)])
def test_llama2c_files_are_read(tmp_path, version, untied, n_heads, n_kv_heads):
    made = llama2c_arrays(untied=untied, n_heads=n_heads, n_kv_heads=n_kv_heads)
    path = tmp_path / "named_without_a_hint"
    path.write_bytes({"v0": v0_bytes, "v1": v1_bytes}[version](**made))
    checkpoint = read_checkpoint(path)
    assert checkpoint.kind == f"llama2.c {version}"
    assert checkpoint.config == LlamaConfig(
        dim=16,
        hidden_dim=20,
        n_layers=2,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        vocab_size=11,
        max_seq_len=6,
        norm="rmsnorm",
        causal=True,
        tie_embeddings=not untied,
    )
    state = load_pretrained(path).state_dict()
    wanted = by_our_names(made["arrays"])
    assert state.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(state[name].numpy(), array, err_msg=name)


@pytest.mark.parametrize("length", [4, 36, 37, 255])
def test_a_llama2c_file_cut_inside_its_header_says_so(tmp_path, length):
    path = tmp_path / "short.bin"
    path.write_bytes(v1_bytes(**llama2c_arrays())[:length])
    with pytest.raises(ValueError, match="short.bin is cut short inside its header"):
        read_checkpoint(path)


@pytest.mark.parametrize("version", ["v0", "v1"])
@pytest.mark.parametrize("more", [1, 4, 4000])
def test_a_llama2c_file_with_bytes_too_many_raises(tmp_path, version, more):
    path = tmp_path / "long.bin"
    path.write_bytes({"v0": v0_bytes, "v1": v1_bytes}[version](**llama2c_arrays()) + b"\0" * more)
    message = {"v0": "long.bin is not a checkpoint", "v1": r"long.bin has [\d,]+ bytes, its header asks for [\d,]+"}
    with pytest.raises(ValueError, match=message[version]):
        read_checkpoint(path)


@contextmanager
def at_most(seconds: float):
    """Raises TimeoutError inside the block once the time is up."""

    def stop(*_):
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("version", ["v0", "v1"])
@pytest.mark.parametrize("value", [0, -1, 3, 7, 1 << 19, (1 << 31) - 1, -(1 << 31)])
@pytest.mark.parametrize("field", range(7))
def test_a_damaged_header_raises_at_once(tmp_path, version, field, value):
    if version == "v1" and field == 6 and value > 0:
        value = 0  # any context length goes with a v1 file, which holds nothing of that size
    content = bytearray({"v0": v0_bytes, "v1": v1_bytes}[version](**llama2c_arrays()))
    struct.pack_into("<i", content, 4 * field + (8 if version == "v1" else 0), value)
    path = tmp_path / "damaged.bin"
    path.write_bytes(content)
    with at_most(0.5), pytest.raises(ValueError, match="damaged.bin"):
        load_pretrained(path)


@pytest.mark.parametrize("version", [0, 3, -1])
def test_a_llama2c_file_of_another_version_is_refused_with_its_number(tmp_path, version):
    path = tmp_path / "quantised.bin"
    path.write_bytes(v1_bytes(**llama2c_arrays(), version=version))
    with pytest.raises(ValueError, match=f"quantised.bin is llama2.c version {version}; this program reads"):
        read_checkpoint(path)


def test_nan_in_a_llama2c_file_raises(tmp_path):
    made = llama2c_arrays()
    made["arrays"]["wk"][1, 2, 3] = np.nan
    path = tmp_path / "nan.bin"
    path.write_bytes(v1_bytes(**made))
    with pytest.raises(ValueError, match="layers.1.attention.compute_key.weight holds NaN"):
        load_pretrained(path)


@pytest.mark.parametrize("version", [0, 1])
def test_a_real_llama2c_file_is_written_back_byte_for_byte(tmp_path, version):
    original = find_asset(f"stories260K/stories260K_v{version}.bin")
    checkpoint = read_checkpoint(original)
    write_llama2c(tmp_path / "again", checkpoint.config, checkpoint.complete_state(checkpoint.config), version)
    assert (tmp_path / "again").read_bytes() == original.read_bytes()


def q80(weight: np.ndarray, group: int) -> bytes:
    """llama2.c's quantization, a number at a time."""
    integers, scales = bytearray(), bytearray()
    for start in range(0, weight.size, group):
        part = weight.reshape(-1)[start : start + group]
        scale = np.float32(np.abs(part).max() / np.float32(127))
        scales += struct.pack("<f", scale)
        integers += b"".join(struct.pack("<b", int(np.rint(x / scale))) for x in part)
    return bytes(integers + scales)


def v2_bytes(model: Llama, group: int) -> bytes:
    """An independent writer, by llama2.c's own names and order."""
    config, state = model.config, {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    hidden = model.layers[0].feed_forward.w1.out_features
    sizes = (config.dim, hidden, config.n_layers, config.n_heads, config.kv_heads, config.vocab_size)
    head = struct.pack("<Ii7iBi", 0x616B3432, 2, *sizes, config.max_seq_len, config.tie_embeddings, group)
    layers = [f"layers.{i}" for i in range(config.n_layers)]
    norms = [f"{layer}.{norm}.weight" for norm in ("attention_norm", "ffn_norm") for layer in layers] + ["norm.weight"]
    matrices = ["tok_embeddings.weight"]
    for matrix in ("attention.compute_query", "attention.compute_key", "attention.compute_value"):
        matrices += [f"{layer}.{matrix}.weight" for layer in layers]
    for matrix in ("attention.compute_output", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"):
        matrices += [f"{layer}.{matrix}.weight" for layer in layers]
    if not config.tie_embeddings:
        matrices.append("output.weight")
    body = b"".join(state[name].astype("<f4").tobytes() for name in norms)
    return head.ljust(256, b"\0") + body + b"".join(q80(state[name], group) for name in matrices)


@pytest.mark.parametrize("tied", [True, False])
def test_int8_files_are_written_and_read_as_llama2c_has_them(tmp_path, tied):
    model = foreign_llama(tie_embeddings=tied)
    state = model.state_dict()
    write_llama2c(tmp_path / "ours", model.config, state, 2)
    assert (tmp_path / "ours").read_bytes() == v2_bytes(model, 32)
    (tmp_path / "theirs").write_bytes(v2_bytes(model, 8))
    for name, group in (("ours", 32), ("theirs", 8)):
        again = load_pretrained(tmp_path / name)
        assert read_checkpoint(tmp_path / name).kind == "llama2.c v2"
        assert again.config.tie_embeddings == tied and again.config.norm == "rmsnorm" and again.config.causal
        for key, tensor in again.state_dict().items():
            if tensor.dim() == 1:
                assert torch.equal(tensor, state[key])
            else:
                step = state[key].reshape(-1, group).abs().amax(1, keepdim=True) / 127
                error = (tensor - state[key]).reshape(-1, group).abs()
                assert (error <= 0.5001 * step).all() and error.max() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "layernorm"}, "llama2.c supports only RMSNorm, and this model has LayerNorm"),
        ({"causal": False}, "llama2.c supports only causal attention, and this model's is bidirectional"),
        ({"rope_theta": 500000.0}, "only rope_theta 10000.0, and this model has 500000.0"),
        ({"layer_norm_eps": 1e-6}, "only layer_norm_eps 1e-05, and this model has 1e-06"),
        ({"rope_scaling": RopeScaling(8.0)}, "only rope_scaling None"),
    ],
)
def test_what_a_llama2c_file_cannot_hold_is_refused(tmp_path, changes, message):
    model = foreign_llama(**changes)
    with pytest.raises(ValueError, match=message):
        write_llama2c(tmp_path / "a", model.config, model.state_dict(), 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("group", [0, -1, 7, 1 << 30])
def test_a_group_that_divides_nothing_is_refused(tmp_path, group):
    content = bytearray(v2_bytes(foreign_llama(), 8))
    struct.pack_into("<i", content, 37, group)
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"a.bin(: groups of|.*its header asks for)"):
        load_pretrained(tmp_path / "a.bin")


def test_llama2c_checkpoints_of_training_are_rmsnorm_and_causal(tmp_path):
    model = foreign_llama()
    names = renamed(model.state_dict(), "ours", "meta")
    sizes = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "max_seq_len")
    arguments = {name: getattr(model.config, name) for name in sizes} | {"dropout": 0.0}
    state = {"_orig_mod." + names[name]: tensor for name, tensor in model.state_dict().items()}
    torch.save({"model": state, "model_args": arguments, "iter_num": 3, "config": {}}, tmp_path / "ckpt.pt")
    checkpoint = read_checkpoint(tmp_path / "ckpt.pt")
    assert checkpoint.kind == "llama2.c" and checkpoint.config.convention == "RMSNorm, causal attention"
    assert torch.equal(all_logits(load_pretrained(tmp_path / "ckpt.pt")), all_logits(model))
