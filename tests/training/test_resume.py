"""Training that is interrupted: it resumes bit for bit, or refuses in one line."""

from __future__ import annotations

import contextlib
import io
import math
import os
import signal
from types import SimpleNamespace

import pytest
import torch

from classifier import LlamaEmbeddingClassifier
from fitting import Bag, a_classifier, assert_same, metrics, settings, some_rows, state_of
from minillama.training import classification as tasks
from minillama.training import evaluation
from minillama.training import loop as training
from minillama.training.interrupts import Stopped
from minillama.training.run_directory import RunDirectory
from minillama.training.task import PIECE_COST
from models import tiny_llama
from programs import Crash


@pytest.mark.parametrize(
    "option, dtype",
    [("finetune", torch.float32), pytest.param("dora", torch.float16, marks=pytest.mark.slow)],
)
def test_a_run_that_crashes_anywhere_ends_bit_for_bit_as_one_that_did_not(fit, monkeypatch, option, dtype):
    """Crashes at the n-th of all moments at which something is computed, written, or put in place, for many n."""
    monkeypatch.setitem(PIECE_COST, "cpu", 4)  # most batches are cut
    rows = some_rows(11)
    chosen = settings(epochs=2, save_every=2, lr=1e-3, dtype=dtype, lora_plus=16.0)
    moments = {"count": 0, "crash at": 0}

    def may_crash(function):
        def wrapped(*arguments, **settings_):
            moments["count"] += 1
            if moments["count"] == moments["crash at"]:
                raise Crash
            return function(*arguments, **settings_)

        return wrapped

    for module, name in (
        (os, "replace"),
        (os, "fsync"),
        (torch, "save"),
        (RunDirectory, "metric"),
        (RunDirectory, "load"),
        (tasks, "forward"),
        (evaluation, "forward"),
    ):
        monkeypatch.setattr(module, name, may_crash(getattr(module, name)))

    def one(name):
        torch.manual_seed(7)
        model = a_classifier(option, dropout=0.4)
        torch.manual_seed(7)
        return fit(model, rows, rows, chosen, name=name), model

    whole, straight = one("whole")
    total = moments["count"]
    assert total > 40
    for crash_at in range(1, total, 3):
        moments.update({"count": 0, "crash at": crash_at})
        name = f"crash {crash_at}"
        with pytest.raises(Crash):
            one(name)
        moments.update({"count": 0, "crash at": max(2, (7 * crash_at) % total)})  # and again in what is left
        with contextlib.suppress(Crash):
            one(name)
        moments["crash at"] = 0
        run, model = one(name)
        assert metrics(run) == metrics(whole)
        ours, theirs = ({k: v for k, v in state_of(r).items() if k != "metrics_bytes"} for r in (run, whole))
        assert_same(ours, theirs)
        assert_same(model.state_dict(), straight.state_dict())
        assert not list(run.path.glob(".*.tmp"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("call", [0, 1, 3, 6, 9])
def test_a_signal_saves_where_the_run_is(fit, monkeypatch, number, call):
    class Signals(Bag):
        def forward(self, ids, mask=None):
            if len(self.seen) == call:
                os.kill(os.getpid(), number)
            return super().forward(ids, mask)

    rows, chosen = some_rows(11), settings(epochs=2)
    whole = fit(Bag(), rows, rows, chosen)
    model = Signals()
    before = signal.getsignal(number)
    if call == 0:  # before the first step
        monkeypatch.setattr(
            training.Interrupts, "__enter__", lambda self: (setattr(self, "number", int(number)), self)[1]
        )
    with pytest.raises(Stopped, match=f"stopped by {number.name}; resume with --resume --run_dir .*a") as stopped:
        fit(model, rows, rows, chosen, name="a")
    assert stopped.value.number == number and signal.getsignal(number) is before
    assert torch.equal(state_of(fit.run("a"))["model"]["table"], model.table)
    monkeypatch.undo()
    again = fit(Bag(seed=3), rows, rows, chosen, name="a")
    assert metrics(again) == metrics(whole)
    assert_same(state_of(again)["model"], state_of(whole)["model"])
    assert_same(state_of(again)["optimizer"]["state"]["table"], state_of(whole)["optimizer"]["state"]["table"])


def test_an_untied_output_that_nothing_reads_is_no_obstacle(fit):
    def untied(seed):
        config = SimpleNamespace(
            llama=tiny_llama(tie_embeddings=False), num_labels=3, hidden_dropout_prob=0.1, option="finetune"
        )
        torch.manual_seed(seed)
        return LlamaEmbeddingClassifier(config)

    rows = some_rows(9)
    torch.manual_seed(1)
    fit(untied(5), rows, rows, settings(save_every=1), name="a")
    best = fit.tmp_path / "a" / "best.pt"
    again = untied(6)
    fit(again, rows, rows, settings(save_every=1), name="a")
    assert torch.equal(
        again.classifier_head.weight, torch.load(best, weights_only=True)["model"]["classifier_head.weight"]
    )


def test_a_full_disk_leaves_the_last_good_state(fit, monkeypatch):
    rows, chosen = some_rows(11), settings(epochs=2, save_every=1)
    whole = fit(Bag(), rows, rows, chosen)
    save, saves = torch.save, []

    class Full(io.BytesIO):
        def write(self, text):
            if self.tell():
                raise OSError(28, "No space left on device")
            return super().write(text)

    def full(content, file):
        saves.append(file)
        save(content, Full() if len(saves) == 4 else file)  # torch's own writer meets the error, and covers it up

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        OSError, match=r"No space left on device; the last good checkpoint is .*; free disk space and add --resume"
    ):
        fit(Bag(), rows, rows, chosen, name="a")
    run = fit.run("a")
    assert state_of(run)["progress"]["step"] in (2, 3) and not list(run.path.glob(".*.tmp"))
    fit(Bag(), rows, rows, chosen, name="a")
    assert metrics(run) == metrics(whole)
    assert_same(state_of(run)["model"], state_of(whole)["model"])


@pytest.mark.parametrize("change", ["rows", "dev rows", "frozen weights", "classes"])
def test_a_run_goes_on_with_its_own_rows_and_weights_only(fit, change):
    rows, model = some_rows(), Bag()
    dev = rows
    fit(model, rows, dev, settings(), name="a")
    if change == "rows":
        rows = [*rows[1:], rows[0]]
    elif change == "dev rows":
        dev = dev[1:]
    elif change == "classes":
        model = Bag(classes=4)
    else:
        with torch.no_grad():
            model.frozen += 1
    with pytest.raises(ValueError, match="a was started with another model, or other training or dev rows"):
        fit(model, rows, dev, settings(), name="a")


def test_a_damaged_run_is_told_in_one_line(fit):
    rows = some_rows()
    run = fit(Bag(), rows, rows, settings(), name="a")
    for damage, message in (
        (lambda: run.metrics_path.write_text("{}"), "metrics.jsonl has 2 of"),
        (lambda: run.best_path.unlink(), "best.pt, the run's best model, is missing"),
        (lambda: torch.save([1], run.last_path), "last.pt is not the state of a run"),
        (lambda: torch.save({"base": 0}, run.last_path), "last.pt is not the state of a run"),
    ):
        kept = {path: path.read_bytes() for path in (run.metrics_path, run.best_path, run.last_path)}
        damage()
        with pytest.raises(ValueError, match=message):
            fit(Bag(), rows, rows, settings(), name="a")
        for path, content in kept.items():
            path.write_bytes(content)


def test_what_a_killed_save_left_half_written_goes_away(fit):
    rows = some_rows()
    run = fit(Bag(), rows, rows, settings(), name="a")
    for name in ("last.pt", "best.pt", "last.json"):
        (run.path / f".{name}.x1y2.tmp").write_text("half")
    fit(Bag(), rows, rows, settings(), name="a")
    assert not list(run.path.glob(".*"))


@pytest.mark.parametrize("save_every", [1, 500])
def test_an_update_that_breaks_the_weights_is_neither_saved_nor_evaluated(fit, save_every):
    rows, message = (
        some_rows(4),
        r"the weights are NaN or infinite after step 2 \(epoch 2\), .*; the last good .*, of step 1",
    )

    class Breaks(Bag):
        def forward(self, ids, mask=None):
            scores = super().forward(ids, mask)
            if sum(training_ for training_, _ in self.seen) == 2 and self.training:
                scores.register_hook(lambda gradient: gradient * math.inf)
            return scores

    with pytest.raises(ValueError, match=message):
        fit(Breaks(), rows, rows, settings(epochs=3, save_every=save_every), name="a")
    state = state_of(fit.run("a"))
    assert state["progress"]["step"] == 1 and torch.isfinite(state["model"]["table"]).all()


def test_the_optimizer_is_saved_by_name(fit):
    run = fit(a_classifier("lora"), some_rows(), some_rows(), settings())
    state = state_of(run)
    name = "llama.layers.1.attention.compute_value.lora_B"
    assert name in state["model"] and state["optimizer"]["state"][name]["exp_avg"].shape == state["model"][name].shape
    assert not any("original_layer" in name for name in state["model"])  # frozen weights are in their own file


def test_a_signal_is_noted_though_nobody_reads_stderr(monkeypatch):
    def broken(*_):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("os.write", broken)
    with training.Interrupts() as interrupts:
        interrupts._note(signal.SIGTERM, None)
    assert interrupts.number == signal.SIGTERM
