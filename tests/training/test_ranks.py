"""Several processes: memory, precision and weights of shards, and resuming. The file is also the program of a rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from config import LlamaConfig
from fitting import a_classifier, settings, some_rows, split
from llama import Llama, llama_from_checkpoint, llama_without_weights
from lora import apply_lora
from minillama.formats.checkpoint import read_checkpoint, write_checkpoint, write_safetensors
from minillama.layers.precision import autocast
from minillama.training.distributed import Processes
from minillama.training.loop import Training
from minillama.training.run_directory import RunDirectory
from models import random_ids, tiny_config, tiny_llama
from optimizer import Muon, decay_groups, local

ROOT = Path(__file__).resolve().parents[2]
KINDS = {
    "tied": {"norm": "layernorm"},
    "untied": {"norm": "rmsnorm", "tie_embeddings": False},
    "differential": {"attention_type": "differential", "causal": True},
}


def run_ranks(work, world, folder):
    """The results of work(processes, folder) in `world` processes."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, work.__name__, str(rank), str(world), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    assert not any(rank.returncode for rank in ranks), outputs
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


# Memory and precision, in two processes


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return measured(tmp_path_factory.mktemp("ranks"))


def measured(folder):
    write_safetensors(folder / "model.safetensors", Llama(MEDIUM).state_dict(), MEDIUM)
    return run_ranks(memory_and_precision, 2, folder)


def memory_and_precision(processes, folder):
    return {"memory": memory(processes, folder), "precision": precision(processes), "muon": muon(processes)}


def muon(processes):
    """The largest difference of weights after three steps of Muon, sharded and whole, from the same gradients."""
    models = whole, sharded = tiny_llama(), tiny_llama()
    processes.divide(sharded, torch.float32)
    groups = [decay_groups(model.named_parameters(), 0.1, hidden=True) for model in models]
    optimizers = [Muon(group, lr=0.01) for group in groups]
    for step in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            (losses, _), _ = model(random_ids(2, 8, seed=step), random_ids(2, 8, seed=9 + step), losses=True)
            losses.mean().backward()
            optimizer.step()
    pairs = zip(sharded.parameters(), whole.parameters(), strict=True)
    return max(float((ours.full_tensor() - theirs).abs().max()) for ours, theirs in pairs)


def test_sharded_matrices_are_orthogonalized_whole(two_ranks):
    assert all(rank["muon"] < 1e-5 for rank in two_ranks), [rank["muon"] for rank in two_ranks]


MEDIUM = LlamaConfig(vocab_size=4000, dim=512, n_layers=10, n_heads=8, norm="rmsnorm", causal=True)


def peak_of(make):
    """The most memory that make() takes at once, per float32 byte of the model that it returns."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak becomes the current memory
    before = kilobytes("VmHWM")
    model = make()
    return 1024 * (kilobytes("VmHWM") - before) / sum(4 * parameter.numel() for parameter in model.parameters())


def kilobytes(what):
    return int(Path("/proc/self/status").read_text(encoding="utf-8").split(f"{what}:")[1].split()[0])


def memory(processes, folder):
    """The peaks of sharding a model from a file and a new one; None where the system does not tell."""
    if not Path("/proc/self/clear_refs").exists():
        return None

    def sharded(model):
        processes.divide(model, torch.bfloat16)
        return model

    sharded(tiny_llama())  # torch imports modules of about 60 MB
    path = folder / "model.safetensors"
    return {
        "whole": peak_of(lambda: Llama(MEDIUM)),
        "loaded": peak_of(lambda: sharded(llama_from_checkpoint(read_checkpoint(path), dtype=None))),
        "new": peak_of(lambda: sharded(llama_without_weights(MEDIUM))),
    }


def test_a_process_never_holds_the_whole_model(two_ranks, tmp_path):
    """Buffers of the connection add up to a tenth now and then, so the least of three measurements counts."""
    if two_ranks[0]["memory"] is None:
        pytest.skip("needs Linux")

    def most(ranks):
        assert all(rank["memory"]["whole"] > 0.95 for rank in ranks)  # the measurement sees a whole model
        return max(rank["memory"][kind] for rank in ranks for kind in ("loaded", "new"))

    found = [most(two_ranks)]
    while found[-1] > 0.6 and len(found) < 3:
        found.append(most(measured(tmp_path)))
    assert found[-1] <= 0.6, found


def precision(processes):
    """For each kind of model: whether loss and gradients in bfloat16 equal autocast's, and how many bytes of bfloat16
    weights wait for the backward pass.
    """
    found = {}
    for kind, changes in {**KINDS, "lora": {}, "dora": {}}.items():
        results, waiting = [], []
        for sharded in (False, True):
            model = tiny_llama(**changes)
            if kind in ("lora", "dora"):
                torch.manual_seed(0)
                apply_lora(model, dora=kind == "dora")
            shapes = {parameter.shape for layer in model.layers for parameter in layer.parameters()}
            shapes = {one for shape in shapes if len(shape) == 2 for one in (shape, shape[::-1])}
            if sharded:
                processes.divide(model, torch.bfloat16)
            saved = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
                with autocast(torch.device("cpu"), torch.bfloat16):
                    (losses, _), hidden = model(random_ids(4, 16), random_ids(4, 16, seed=1), losses=True)
            copies = {t.untyped_storage() for t in saved if t.dtype == torch.bfloat16 and t.shape in shapes}
            waiting.append(sum(storage.nbytes() for storage in copies))
            losses.sum().backward()
            gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
            gradients = {name: g.full_tensor() if sharded else g for name, g in gradients.items()}
            results.append({"loss": losses.detach(), "hidden": hidden.detach(), **gradients})
        differ = [name for name in results[0] if not torch.equal(results[0][name], results[1][name])]
        found[kind] = {"differ": differ, "waiting": waiting}
    return found


def test_in_half_precision_sharded_equals_autocast_and_keeps_no_copies(two_ranks):
    for rank in two_ranks:
        for kind, one in rank["precision"].items():
            assert one["differ"] == [], (kind, one)
            autocast_bytes, sharded_bytes = one["waiting"]
            assert autocast_bytes > 10_000
            if kind not in ("differential", "dora"):  # their vectors need float32, so autocast casts the matrices
                assert sharded_bytes == 0, (kind, one)


# Weights and resuming, in three processes


@pytest.fixture(scope="module")
def three_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    for kind, changes in KINDS.items():
        model = tiny_llama(**changes)
        write_checkpoint(folder / f"{kind}.pt", model.state_dict(), model.config)
        write_safetensors(folder / f"{kind}.half", model.state_dict(), model.config, torch.bfloat16)
    return run_ranks(weights_and_resuming, 3, folder)


def weights_and_resuming(processes, folder):
    return {"weights": weights(processes, folder), "resuming": resuming(processes, folder)}


def weights(processes, folder):
    """Whether the shards hold this process's rows of loaded, drawn and restored weights."""
    equal = {}

    def same(model, whole):
        pairs = zip(model.named_parameters(), whole.named_parameters(), strict=True)
        return all(
            name == other
            and local(shard).dtype == torch.float32
            and torch.equal(local(shard), processes.own_rows(weight.float()))
            for (name, shard), (other, weight) in pairs
        )

    for kind, changes in KINDS.items():
        for file in folder.glob(f"{kind}.*"):
            whole = llama_from_checkpoint(read_checkpoint(file), dtype=None)
            model = llama_from_checkpoint(read_checkpoint(file), dtype=None)
            processes.divide(model, torch.float32)
            equal[file.name] = same(model, whole)

        config = tiny_config(**changes)
        torch.manual_seed(3)
        whole, state = Llama(config), torch.get_rng_state()
        torch.manual_seed(3)
        model = llama_without_weights(config)
        processes.divide(model, torch.float32)
        equal[f"{kind} drawn"] = same(model, whole) and torch.equal(torch.get_rng_state(), state)

        model(random_ids(1, 8), random_ids(1, 8))  # leaves the embedding gathered
        processes.load(model, tiny_llama(seed=5, **changes).state_dict())
        equal[f"{kind} restored"] = same(model, tiny_llama(seed=5, **changes))
    return equal


def test_shards_hold_the_weights_of_one_process(three_ranks):
    """Their rows do not divide evenly."""
    for rank in three_ranks:
        equal = rank["weights"]
        assert len(equal) == 4 * len(KINDS) and all(equal.values()), equal


class StoppingRun(RunDirectory):
    """A run that is stopped after its fourth step."""

    def metric(self, step, **values):
        super().metric(step, **values)
        if step == 4:
            raise KeyboardInterrupt


def resuming(processes, folder):
    """For replicas and shards: the parameters for which a run, and another that was stopped and resumed, differ."""
    differ = {}
    for kind in ("replicas", "shards"):
        own = replace(processes, fsdp=kind == "shards")

        def trained(name, run_class=RunDirectory, own=own, kind=kind):
            path = folder / f"{kind} {name}"
            path.mkdir(exist_ok=True)
            task, chosen = split(settings(lr=1e-3, save_every=1), some_rows(11), some_rows(5))
            training = Training(a_classifier(), task, chosen, run_class(path, own.is_main), own, lambda line: None)
            training.restore()
            if name == "stopped" and run_class is RunDirectory:
                assert training.progress.step == 3
            while not training.progress.finished:
                training.epoch()
                training.end_epoch(lambda state, epoch, score: training.run.best_path.touch())
            averages = training.optimizer.state  # a difference in the last bit is lost when it is added to a weight
            return {
                name: torch.stack([local(parameter), local(averages[parameter]["exp_avg"])])
                for name, parameter in training.model.named_parameters()
            }

        whole = trained("whole")
        with pytest.raises(KeyboardInterrupt):
            trained("stopped", StoppingRun)
        resumed = trained("stopped")
        differ[kind] = [name for name in whole if not torch.equal(whole[name], resumed[name])]
    return differ


def test_three_processes_resume_bit_for_bit(three_ranks):
    """With three, the result depends on the order in which their gradients are added."""
    for rank in three_ranks:
        assert rank["resuming"] == {"replicas": [], "shards": []}


if __name__ == "__main__":
    name, rank, world, folder = sys.argv[1:]
    store = f"file://{folder}/{name} {world}"
    dist.init_process_group("gloo", init_method=store, rank=int(rank), world_size=int(world))
    print(json.dumps(globals()[name](Processes(int(rank), int(world), int(world) > 1), Path(folder))))
    dist.barrier()
    dist.destroy_process_group()
