"""The training loop of every mode. A `Task` (task.py) provides the batches, the loss and the score.

A run can stop at any moment and resume to the same weights, bit for bit. Each step depends only on the state in
`Training.state`, and on rows and settings, which must be the same.
"""

from __future__ import annotations

import math
import signal
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from minillama.environment import keep_freed_memory
from minillama.formats.files import raw_bytes, read_torch, release_pages
from minillama.layers.precision import at_least_float32, sum_dtype
from minillama.training.distributed import Processes
from minillama.training.interrupts import Interrupts, Stopped
from minillama.training.progress import Pace, Progress, advance, describe_epoch, describe_part, epoch_bar
from minillama.training.run_directory import RunDirectory
from minillama.training.settings import Settings, make_optimizer
from minillama.training.task import Score, Task, cut_batch
from optimizer import local, set_learning_rate


def train(
    model: nn.Module,
    task: Task,
    settings: Settings,
    run: RunDirectory,
    *,
    processes: Processes | None = None,
    write_best: Callable[[dict[str, Tensor], int, Score], None] = lambda state, epoch, score: None,
    begun: Callable[[], None] = lambda: None,
    log: Callable[[str], None] = print,
) -> nn.Module:
    """Trains the parameters of `model` that require gradients, and restores the weights of the best epoch.

    The model is scored after each epoch. Of equal epochs the first is best; without scores, the last. Training resumes
    from the state in `run`, if any; a finished run goes on if the task has more epochs now. begun() is called once that
    state is accepted, write_best(state dict, epoch, score) in the main process for each epoch that is the best so far.
    Returns the model, which FSDP divides among the processes.

    Raises ValueError if the loss is NaN or infinite, the device's memory is too small, or the saved state was removed
    or belongs to other weights or rows. Raises OSError if the disk is full, and Stopped, with a saved state, after
    SIGINT or SIGTERM.
    """
    training = Training(model, task, settings, run, processes or Processes(), log)
    training.restore()
    run.rewind_metrics()  # only now: a state that is refused keeps its metrics
    begun()
    with Interrupts() as interrupts:
        training.interrupts = interrupts
        try:
            while not training.progress.finished:
                training.epoch()
                training.end_epoch(write_best)
            training.check_interrupts()  # a signal after the last step
        except OSError as error:
            remedy = f"free disk space and add --resume --run_dir {run.path}"
            raise OSError(f"{error}; {training.last_good()}; {remedy}") from error
        except torch.OutOfMemoryError as error:
            rows = settings.micro_batch_size or task.batch_size
            raise ValueError(
                f"{rows} rows at once do not fit into the memory of {training.device}; {training.last_good()}. "
                f"Try --micro_batch_size {max(1, rows // 2)}, which takes the same steps"
            ) from error
    run.note_end({"base": training.base, "progress": asdict(training.progress)})
    training.load_best()
    return training.model.eval()


class Training:
    """The state of a run, and the steps that change it."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        settings: Settings,
        run: RunDirectory,
        processes: Processes,
        log: Callable[[str], None] = print,
    ) -> None:
        self.task, self.settings = task, settings
        self.run, self.processes, self.log = run, processes, log
        self.base = self._checksum(model)
        processes.divide(model, settings.dtype)
        if processes.rank:  # the main process goes on with the draws of a run alone
            torch.manual_seed(torch.initial_seed() + processes.rank)  # other dropout masks
        self.model = model
        self.device = next(model.parameters()).device
        if self.device.type == "cpu":
            keep_freed_memory()
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if task.average is not None:
            task.average.start(model)
        self.optimizer = make_optimizer(model, settings)
        # fp16 gradients underflow without a scaled loss; bf16 has float32's range.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.dtype == torch.float16)
        self.progress = Progress()
        self.pace = Pace()
        self.warned = False  # whether the warning of a score was given
        self.interrupts = Interrupts()
        self.interrupted = True  # whether a process may have received a signal; known after each step
        self.took_step = False  # whether the last step changed the weights; fp16 skips a step that overflows
        self.optimizer.register_step_post_hook(lambda *_: setattr(self, "took_step", True))
        self.saved_at = (0, 0)  # (epoch, step)

    def _checksum(self, model: nn.Module) -> int:
        """A checksum of the data, the weights' shapes and the frozen weights, which a resumed run must not change."""
        shapes = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
        total = zlib.crc32(repr(shapes).encode(), self.task.checksum())
        for parameter in model.parameters():
            if not parameter.requires_grad:
                total = zlib.crc32(raw_bytes(at_least_float32(parameter)), total)
                release_pages(parameter)
        return total

    # Saving and restoring

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on, except the order of the rows, set by seed and epoch."""
        mine = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            mine["cuda"] = torch.cuda.get_rng_state(self.device)
        # The model comes first: this shards the weights again after an evaluation has gathered them.
        model = get_model_state_dict(self.model, options=StateDictOptions(ignore_frozen_params=True))
        updated = bool(self.optimizer.state)
        optimizer = get_optimizer_state_dict(self.model, self.optimizer)
        if not updated:
            self.optimizer.state.clear()  # to create the state, torch took a step of size 0 and counted it
        average = {} if self.task.average is None else {"average": self.task.average.state()}
        return average | {
            "model": model,
            "optimizer": optimizer,
            "updated": updated,  # whether the optimizer has taken a step
            "scaler": self.scaler.state_dict(),
            "progress": asdict(self.progress),
            "generators": self.processes.gather(mine),
            "base": self.base,
        }

    def save(self) -> None:
        """Saves the state, unless it is already saved."""
        at = (self.progress.epoch, self.progress.step)
        if at == self.saved_at:
            return
        self.check_weights()
        state = self.state()
        if self.processes.fsdp:
            self.run.save_shards(f"{at[0]}-{at[1]}", state, self.processes.wait)
        else:
            self.run.save(state)
        self.saved_at = at

    def restore(self) -> None:
        """Restores the last state saved in the run's folder, if any."""
        begun = self.run.metrics_path.exists()
        if self.processes.fsdp and not self.run.last_path.exists():
            folder = self.run.shards()
            state = None if folder is None else self.run.load_shards(folder, self.state())
        else:  # with FSDP, only the end of a finished run
            state = self.run.load()
        self.processes.wait()
        if state is None:
            if begun:
                self.log(f"{self.run.path} has no saved state yet; training starts from the beginning")
            return
        if state["base"] != self.base:
            raise ValueError(
                f"{self.run.path} was started with another model, or other training or dev {self.task.unit}s; restore "
                "them, or start a new run"
            )
        if state["progress"]["best_epoch"] and not self.run.best_path.exists():
            raise ValueError(f"{self.run.best_path}, the run's best model, is missing; restore it, or start a new run")
        self.progress = progress = Progress(**state["progress"])
        if progress.step != self.task.first_step(progress.epoch) + progress.batch:
            raise ValueError(f"{self.run.path} is of a version with more or fewer steps an epoch; start a new run")
        stopped_early = self.is_stale(progress.epoch - 1)
        progress.finished &= stopped_early or progress.epoch > self.task.epochs  # else it has got more epochs
        if "model" in state:
            self.restore_weights(state)
        elif not progress.finished:
            raise ValueError(
                f"{self.run.path} is finished and its optimizer's state was removed, so it takes no more epochs; start "
                "a new run with more --epochs, and with --keep_state if it may get more later"
            )
        self.saved_at = (progress.epoch, progress.step)
        done = "; the run is finished" + ": it stopped early" * stopped_early if progress.finished else ""
        self.log(f"resumed at epoch {progress.epoch}, step {progress.step}, from {self.run.path}{done}")

    def is_stale(self, epoch: int) -> bool:
        """Whether `epoch` has used up the patience."""
        patience, best = self.settings.patience, self.progress.best_epoch
        return patience is not None and best > 0 and epoch - best >= patience

    def restore_weights(self, state: dict[str, Any]) -> None:
        """Restores the weights, the optimizer and the generators."""
        set_model_state_dict(self.model, state["model"], options=StateDictOptions(strict=False))  # without frozen ones
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])
        if not state["updated"]:
            self.optimizer.state.clear()
        if self.task.average is not None:
            self.task.average.load(state["average"])
        self.scaler.load_state_dict(state["scaler"])
        mine = state["generators"][self.processes.rank]
        torch.set_rng_state(mine["cpu"])
        if "cuda" in mine:
            torch.cuda.set_rng_state(mine["cuda"], self.device)

    def check_weights(self) -> None:
        """Raises ValueError if a weight is NaN or infinite after the last update."""
        broken = not all(bool(torch.isfinite(local(parameter)).all()) for parameter in self.trained)
        if any(self.processes.gather(broken)):
            raise ValueError(
                f"the weights are NaN or infinite after step {self.progress.step} (epoch {self.progress.epoch}), "
                f"learning rate {self.optimizer.param_groups[0]['lr']:g}; {self.last_good()}. "
                "Try a lower --lr or --dtype fp32"
            )

    def check_interrupts(self) -> None:
        """Saves the state and raises Stopped if any process has received a signal."""
        if self.processes.sum(self.interrupts.number)[0]:
            number = int(max(self.processes.gather(self.interrupts.number)))
            self.save()
            name = signal.Signals(number).name
            raise Stopped(number, f"stopped by {name}; resume with --resume --run_dir {self.run.path}")

    # An epoch

    def epoch(self) -> None:
        """Trains on the remaining batches of this epoch."""
        self.model.train()
        progress, settings, task = self.progress, self.settings, self.task
        plan, name = task.plan(progress.epoch), task.name(progress.epoch)
        with epoch_bar(name, sum(map(task.targets, plan)), progress, task.unit, self.processes.is_main) as bar:
            for positions in plan[progress.batch :]:
                if self.interrupted or self.processes.world == 1:
                    self.check_interrupts()
                start = time.perf_counter()
                taken = progress.step - progress.skipped
                lr = settings.learning_rate(taken, task.steps)
                loss, correct = self.step(positions, lr)
                targets = task.targets(positions)
                progress.step += 1
                progress.batch += 1
                progress.loss_sum += loss * targets
                progress.correct += correct
                progress.seen += targets
                seconds = time.perf_counter() - start
                skipped = {} if self.took_step else {"skipped": True}
                self.run.metric(
                    progress.step, epoch=progress.epoch, loss=loss, lr=lr, seconds=round(seconds, 4), **skipped
                )
                self.pace.add_step(seconds)
                speed = f"{task.tokens(positions) / seconds:,.0f}"
                advance(bar, name, left := self.time_left(), progress, targets, lr=f"{lr:.2g}", tokens_s=speed)
                if bar.disable and self.pace.is_due():  # no terminal shows the bar
                    self.log(describe_part(name, progress, bar.total, task.unit, left))
                if progress.step % settings.save_every == 0:
                    self.save()

    def time_left(self, scored: int = 0) -> str:
        """The estimated time to the end of the run. scored: evaluations of this epoch that are done."""
        evaluations = self.task.epochs - self.progress.epoch + 1 - scored
        return self.pace.left(self.task.steps - self.progress.step, evaluations)

    def step(self, positions: list[int], lr: float) -> tuple[float, int]:
        """Updates the weights from the rows at `positions`: (mean loss, number of correctly predicted targets).

        The summed loss of each piece is divided by the number of targets in the whole batch. So the gradient is that of
        the mean over all targets, for any division into pieces and processes.
        """
        settings, world, targets = self.settings, self.processes.world, self.task.targets(positions)
        self.optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(2, dtype=sum_dtype(self.device), device=self.device)  # loss and hits, read once at the end
        pieces = cut_batch(self.task, positions, self.device, world, settings.micro_batch_size)
        for number, piece in enumerate(pieces, start=1):
            mine, counted = self.processes.share(piece)
            with self.processes.gradients(self.model, in_step=number == len(pieces)):
                losses, hits = self.task.losses(self.model, mine, settings.dtype)
                loss = losses.sum() * (counted / len(mine))
                # Times world: torch averages the gradients over the processes, but the sum is needed.
                self.scaler.scale(loss * (world / targets)).backward()
            sums += torch.stack((loss.detach().to(sums.dtype), hits[:counted].sum().to(sums.dtype)))
        loss_sum, right, interrupted = self.processes.sum(*sums, self.interrupts.number)
        self.interrupted = bool(interrupted)
        if not math.isfinite(loss_sum):
            raise ValueError(
                f"the loss is {loss_sum / targets} at step {self.progress.step + 1} (epoch "
                f"{self.progress.epoch}), learning rate {lr:g}; {self.last_good()}. Try a lower --lr or --dtype fp32"
            )
        if settings.max_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.trained, settings.max_grad_norm)
        set_learning_rate(self.optimizer, lr)
        self.took_step = False
        self.scaler.step(self.optimizer)  # in fp16 it waits for the device once more, to see whether to skip the step
        self.scaler.update()
        if not self.took_step:
            self.note_skipped()
        elif self.task.average is not None:
            self.task.average.update(self.model, self.progress.step + 1, self.task.steps)
        return loss_sum / targets, int(right)

    def note_skipped(self) -> None:
        """Counts a step that fp16 skipped, and tells of the first one."""
        if not self.progress.skipped:
            self.log(
                f"step {self.progress.step + 1} is skipped: its gradient overflowed in fp16; the loss scale is halved "
                "now, and later skips are counted"
            )
        self.progress.skipped += 1

    def last_good(self) -> str:
        """A phrase about the last saved checkpoint."""
        if self.saved_at == (0, 0):
            return "no checkpoint was saved yet"
        path = self.run.shards_path if self.processes.fsdp else self.run.last_path
        return f"the last good checkpoint is {path}, of step {self.saved_at[1]}"

    def end_epoch(self, write_best: Callable[[dict[str, Tensor], int, Score], None]) -> None:
        """Evaluates, keeps the model if it is the best so far, and saves."""
        self.check_weights()
        progress, settings = self.progress, self.settings
        name = self.task.name(progress.epoch)
        start = time.perf_counter()
        score = self.task.score(self.model, settings.dtype, self.processes, self.check_interrupts, name)
        self.pace.add_score(time.perf_counter() - start)
        is_best = progress.is_beaten_by(score)
        if is_best:
            progress.best_epoch, progress.best_quality = progress.epoch, score.quality
            progress.best_loss = score.metrics.get("dev_loss")
        stops_early = self.is_stale(progress.epoch)
        finished = stops_early or progress.epoch >= self.task.epochs
        left = "" if finished else self.time_left(scored=1)
        self.log(describe_epoch(name, progress, score, is_best and score.quality is not None, left))
        if score.warning and not self.warned:
            self.warned = True
            self.log(f"warning: {score.warning}")
        metrics: dict[str, Any] = {"train_loss": progress.mean_loss, "running_train_accuracy": progress.accuracy}
        metrics |= score.metrics | ({"sample": score.sample} if score.sample else {})
        self.run.metric(progress.step, epoch=progress.epoch, **metrics)
        if is_best:
            options = StateDictOptions(full_state_dict=True, cpu_offload=self.processes.fsdp)
            whole: dict[str, Any] = get_model_state_dict(self.model, options=options)
            if self.processes.is_main:
                write_best(whole, progress.epoch, score)
        if stops_early and progress.epoch < self.task.epochs:
            stale = progress.epoch - progress.best_epoch
            self.log(f"stopped early: {stale} epochs without a better {self.task.judged_by}")
        self.progress = Progress(
            epoch=progress.epoch + 1,
            step=progress.step,
            best_epoch=progress.best_epoch,
            best_quality=progress.best_quality,
            best_loss=progress.best_loss,
            skipped=progress.skipped,
            finished=finished,
        )
        self.save()

    def load_best(self) -> None:
        """Restores the weights of the best epoch."""
        self.processes.wait()
        self.processes.load(self.model, read_torch(self.run.best_path, mapped=True)["model"])
