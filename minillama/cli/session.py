"""Sessions of training commands: the run's folder and its lock, resuming, training, and writing the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minillama.cli import flags, loading
from minillama.cli.data_files import source
from minillama.cli.header import print_header, report
from minillama.cli.new_model import is_new, new_config
from minillama.cli.options import Options, all_flags, parse_options
from minillama.cli.provenance import Origin
from minillama.cli.room import check_room
from minillama.environment import this_process
from minillama.formats.names import RUNS

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from config import LlamaConfig
    from llama import Llama
    from minillama.training.distributed import Processes
    from minillama.training.planning import Duration, Memory
    from minillama.training.run_directory import RunDirectory
    from minillama.training.settings import Settings
    from minillama.training.task import Score, Task
    from tokenizer import Tokenizer

# Options without effect on results. They may differ in a resumed run, and between the runs of a group in the report.
RESUME_MAY_CHANGE = (
    *("config", "resume", "run_dir", "save_every", "keep_state", "dev_out", "test_out", "model_out", "tokens_dir"),
    *("device", "use_gpu", "typed", "substituted", "plan", "json"),
)
# Settings of a regularizer, which have no effect if it is off.
PARTS = {
    "smart_eps": "smart",
    "smart_step": "smart",
    "smart_noise": "smart",
    "smart_form": "smart",
    "bregman_beta": "bregman",
}


def active_options(saved: dict[str, Any]) -> dict[str, Any]:
    """A run's options without the settings of regularizers that were off: those defaults may have changed since."""
    return {name: value for name, value in saved.items() if name not in PARTS or saved.get(PARTS[name])}


def resume_options(options: Options, argv: Sequence[str], held: ExitStack) -> Options:
    """The options of the run to resume, updated from the command line where allowed. The main process locks the run
    until `held` is closed.

    Raises ValueError or FileNotFoundError if the run is missing or still active, or an option contradicts it.
    """
    from minillama.training.run_directory import RunDirectory, latest_run_path, locked

    if options.plan:
        raise ValueError("--plan is for a new run; leave out --resume")
    folder = options.run_dir or str(latest_run_path(Path(RUNS)))
    run = RunDirectory(folder)
    run.options()  # raises if there is no run, before a lock file is made
    if this_process().rank == 0:
        held.enter_context(locked(run.path))
    saved = active_options(run.options())
    options = parse_options(options.commands, argv, saved, options.processes)
    options = options.replace(resume=True, run_dir=folder)
    if options.dtype == "auto":
        options = options.replace(dtype=saved.get("dtype", "auto"))
    known = all_flags(options.commands)
    for name, value in saved.items():
        if name not in RESUME_MAY_CHANGE and getattr(options, name) != value:
            use = "use that value"
            if name == "epochs" and saved.get("max_steps") is None:
                if options.epochs > value:  # see `Session.save_more_epochs`
                    continue
                use = "use that value, or more"
            shown = known[name].name.lstrip("-") if name in known else name
            if name == "processes":
                start = "python" if value == 1 else f"torchrun --nproc_per_node={value}"
                count = f"{value} process{'es' * (value != 1)}"
                raise ValueError(
                    f"{folder} was started with {count}, not {options.processes}; type {start} run_llama.py --option "
                    f"{saved['option']} --resume --run_dir {folder}"
                )
            raise ValueError(
                f"{shown} is {getattr(options, name)}, but {folder} was started with {value}; {use}, or leave it out"
            )
    return options


def create_run(options: Options, held: ExitStack) -> Options:
    """Creates and locks the folder of a new run, and returns the options with its name: --run_dir or a new name. Only
    the main process does this; the others get the name in `open_session`. Closing `held` releases the lock, and
    removes a folder without a run. Raises ValueError if the folder is in use or cannot be created.
    """
    from minillama.training.run_directory import new_run

    if this_process().rank != 0:
        return options
    return options.replace(run_dir=str(held.enter_context(new_run(options.run_dir, Path(RUNS), options.option))))


def make_log(run: RunDirectory | None) -> Callable[[str], None]:
    """A function that prints a line on stderr, and adds it to the log of `run`, if any."""

    def log(line: str) -> None:
        report(line)
        if run is not None:
            run.log(line)

    return log


@dataclass(frozen=True)
class Session:
    """Everything a command needs for training. tokenizer_content: the tokenizer's file when the run started."""

    options: Options
    tokenizer: Tokenizer
    tokenizer_content: bytes
    device: torch.device
    dtype: torch.dtype
    processes: Processes
    run: RunDirectory

    def origin(self, rows: Mapping[str, Sequence[Any]]) -> Origin | None:
        """The origin of the predictions for dev and test; None except in the main process, which writes them."""
        judged = {split: (source(self.options, split), len(rows[split])) for split in ("dev", "test") if split in rows}
        return Origin.of(self.options, judged) if self.processes.is_main else None

    def load_llama(self, data: str = "") -> tuple[Llama, tuple[int, ...]]:
        """The initial model and the ids that end its texts. Prints the header. data: the data files, for the header.

        The model has the weights of the checkpoint, or random ones if the options ask for a new model.
        """
        if is_new(self.options):
            return self._new_llama(data), ()
        checkpoint = loading.open_checkpoint(self.options, self.tokenizer)
        check_room(self.options, checkpoint.config, self.device)
        llama = loading.load_llama(self.options, checkpoint, self.dtype, mapped=self.processes.fsdp)
        print_header(self.options, llama, checkpoint.kind, self.tokenizer, self.device, self.dtype, data=data)
        return llama, tuple(checkpoint.stop_ids)

    def _new_llama(self, data: str) -> Llama:
        from llama import Llama, llama_without_weights

        config = new_config(self.options, self.tokenizer.n_words)
        check_room(self.options, config, self.device)
        llama = llama_without_weights(config) if self.processes.fsdp else Llama(config)
        name, kind = self.options.preset or flags.DEFAULT_PRESET, "new, random weights"
        print_header(self.options, llama, kind, self.tokenizer, self.device, self.dtype, name=name, data=data)
        return llama

    @property
    def saved_options(self) -> dict[str, Any]:
        """The options to save, with the actual precision instead of auto."""
        from minillama.layers.precision import DTYPES

        return self.options.values() | {"dtype": next(name for name, value in DTYPES.items() if value == self.dtype)}

    def train(
        self, model: nn.Module, task: Task, write_best: Callable[[dict[str, Tensor], int, Score], None], dynamic: bool
    ) -> nn.Module:
        """Trains a model that is on the CPU, and returns the one to evaluate.

        dynamic: whether row lengths vary, for --compile.
        """
        from minillama.training.loop import train

        if not self.options.resume:
            self.run.create(self.saved_options)
        settings = self._prepare(model, dynamic)
        return train(
            model,
            task,
            settings,
            self.run,
            processes=self.processes,
            write_best=write_best,
            begun=self.save_more_epochs,
            log=make_log(self.run),
        )

    def _prepare(self, model: nn.Module, dynamic: bool) -> Settings:
        """Moves and compiles the model for training; returns the settings of the training loop."""
        from minillama.training.compilation import compile_model

        if not self.processes.fsdp:  # else each process moves only its part
            model.to(self.device)
        if self.options.compile:
            compile_model(model, self.device, dynamic)
        return settings_of(self.options, self.dtype)

    def save_more_epochs(self) -> None:
        """Saves --epochs if a resumed run has got more, and says if its earlier steps depended on their number."""
        options = self.options
        if not self.processes.is_main or (before := self.run.options()["epochs"]) == options.epochs:
            return
        self.run.change_options(epochs=options.epochs)
        causes = {f"--schedule {options.schedule}": options.schedule != "constant"}
        causes["--bregman without --bregman_beta"] = bool(options.bregman) and options.bregman_beta is None
        if found := next((name for name, depends in causes.items() if depends), None):
            make_log(self.run)(
                f"notice: {found} depends on the number of epochs, and the steps so far were planned for {before}; the "
                f"result differs from that of one run of {options.epochs}"
            )

    def measure(self, model: nn.Module, task: Task) -> tuple[Memory, Duration | None]:
        """The memory and the time of training a model that is on the CPU. Writes nothing; the model is then useless.

        The time is None if the memory does not suffice.
        """
        from minillama.training.loop import Training
        from minillama.training.planning import measure
        from minillama.training.run_directory import RunDirectory

        settings = self._prepare(model, dynamic=self.options.option != "pretrain")
        return measure(Training(model, task, settings, RunDirectory(RUNS, writes=False), self.processes, report))

    def seed_dropout(self) -> None:
        """Seeds the draws of training, which then do not depend on the draws of new weights."""
        import torch

        torch.manual_seed(self.options.seed)

    def best_writer(
        self, config: LlamaConfig, stop_ids: Sequence[int]
    ) -> Callable[[dict[str, Tensor], int, Score], None]:
        """A function that writes a language model as the best of the run: its weights, epoch and score."""
        from minillama.formats.checkpoint import write_checkpoint

        def write_best(state: dict[str, Tensor], epoch: int, score: Score) -> None:
            described: dict[str, Any] = {"epoch": epoch, "scores": score.metrics, "options": self.saved_options}
            write_checkpoint(self.run.best_path, state, config, stop_ids=list(stop_ids), **described)

        return write_best

    def write_model(self, state: dict[str, Tensor], config: LlamaConfig, stop_ids: Sequence[int]) -> list[str]:
        """Writes --model_out, and the tokenizer beside it. Returns the arguments that open the model."""
        from minillama.formats.checkpoint import write_safetensors
        from minillama.layers.precision import DTYPES

        path = self.options.model_out
        write_safetensors(path, state, config, DTYPES[self.options.out_dtype or "fp32"], stop_ids)
        report(f"wrote {path}")
        return loading.put_tokenizer_beside(path, self.tokenizer, self.tokenizer_content)


@contextmanager
def open_session(options: Options) -> Iterator[Session]:
    """Opens a session: tokenizer, device, precision, processes and the run's folder."""
    import torch

    from minillama.training.distributed import process_group
    from minillama.training.run_directory import RunDirectory

    tokenizer = loading.load_tokenizer(options, new=is_new(options))
    content = tokenizer.path.read_bytes()  # the file may change during the run
    device = loading.choose_device(options)
    dtype = loading.choose_dtype(options, device)
    with process_group(device, options.fsdp) as processes:
        folder, *others = processes.gather(options.run_dir)
        if other := next((other for other in others if other not in (None, folder)), None):
            raise ValueError(
                f"one process would resume {folder}, another one {other}; name the run's folder with --run_dir"
            )
        torch.manual_seed(options.seed)
        run = RunDirectory(folder or RUNS, writes=processes.is_main)
        yield Session(options.replace(run_dir=folder), tokenizer, content, device, dtype, processes, run)
        if not options.keep_state:
            run.drop_state()


def settings_of(options: Options, dtype: torch.dtype) -> Settings:
    """The settings of the training loop, from the options."""
    from minillama.training.settings import Settings

    same = (
        *("lr", "micro_batch_size", "optimizer", "schedule", "decay_share", "warmup_steps", "min_lr", "weight_decay"),
        *("lora_plus", "layer_decay", "max_grad_norm", "patience", "save_every"),
    )
    values = {name: getattr(options, name) for name in same}
    return Settings(dtype=dtype, betas=(0.9, options.adam_beta2), **values)
