"""--option finetune and lora: train a classifier on labelled sentences (all weights, or LoRA adapters and a head),
then predict dev and test.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from minillama.cli import classifiers, flags
from minillama.cli.bundled import use_bundled_rows
from minillama.cli.checks import check_template, check_training
from minillama.cli.data_files import check_share, model_file, share_of
from minillama.cli.header import report, report_next
from minillama.cli.loading import add_lora
from minillama.cli.options import Command, Flag, Group, Options, OwnFlag
from minillama.cli.parser import FRACTION, NOT_NEGATIVE, POSITIVE
from minillama.cli.plan import plan_rows
from minillama.cli.session import PARTS, open_session
from minillama.environment import file_sha256
from minillama.formats.names import is_table, path_and_fold

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from classifier import LlamaEmbeddingClassifier, LlamaPromptClassifier
    from minillama.cli.session import Session
    from minillama.text.labelled import Row
    from minillama.training.task import Score

ENDINGS = {"finetune": "finetuning-output.txt", "lora": "lora-output.txt"}
REGULARIZERS = ("smart", "bregman", "r_drop")
HEAD = Group(
    "the classifier",
    (
        Flag(
            "--head",
            "linear: train a new layer on the state that --pooling names. prompt: add no layer; ask the model with "
            "--template, as --option prompt does, and train it to answer with the label's word; only the first token "
            "of the word counts",
            ("linear", "prompt"),
            "linear",
        ),
        flags.TEMPLATE,
        flags.LABEL_WORDS,
        Flag("--hidden_dropout_prob P", "dropout before the head", FRACTION, 0.3),
        flags.CLASS_WEIGHTS,
        Flag("--label_smoothing S", "label smoothing: spread a share S of each label over all classes", FRACTION, 0.0),
        Flag("--eval_train", "also score the whole training set after each epoch", bool),
    ),
)
REGULARIZATION = Group(
    "regularizers",
    (
        OwnFlag(
            "--smart L",
            "add L times the largest change of the class distribution, in symmetric KL, under a small change of the "
            "embeddings (SMART; usually 1 to 5; a step takes up to five times as long)",
            NOT_NEGATIVE,
            0.0,
            default_text="off",
        ),
        Flag(
            "--smart_eps X",
            "largest change of each number of an embedding; the term of --smart grows with its square",
            POSITIVE,
            1e-3,
        ),
        Flag("--smart_step X", "step size of the search for the worst change, for the largest gradient", POSITIVE, 0.1),
        Flag("--smart_noise X", "standard deviation of the noise where that search starts", POSITIVE, 1e-3),
        Flag(
            "--smart_form",
            "program: as the authors' program does it since August 2020, scaled in each token so that the largest "
            "change is --smart_eps (docs/results.md)",
            ("paper", "program"),
            "paper",
        ),
        OwnFlag(
            "--bregman MU",
            "add MU times the symmetric KL between the class distributions of the model and of a moving average of its "
            "weights (the other half of SMART; usually 1)",
            NOT_NEGATIVE,
            0.0,
            default_text="off",
        ),
        Flag(
            "--bregman_beta B",
            "decay rate of the moving average per step",
            FRACTION,
            default_text="0.99 in the first tenth of the steps, then 0.999",
        ),
        OwnFlag(
            "--r_drop A",
            "run each row twice, with two dropout masks, and add A times half the symmetric KL of the results (R-Drop; "
            "usually 1 to 5; a step takes twice as long)",
            NOT_NEGATIVE,
            0.0,
            default_text="off",
        ),
    ),
    "The printed training loss includes these terms.",
)


# The options


def check(options: Options) -> None:
    if options.head != "prompt" and (names := options.changed("template", "label_words")):
        raise ValueError(f"--{names[0]} {flags.TEMPLATE.elsewhere}; leave it out for --option {options.option}")
    check_template(options)
    given = options.changed(*REGULARIZERS)
    for other in ("fsdp", "compile"):
        if given and getattr(options, other):
            raise ValueError(f"--{given[0]} does not go with --{other}, which allows one pass per step; leave one out")
    for name in options.changed(*PARTS):
        if not getattr(options, PARTS[name]):
            raise ValueError(f"--{name} is a setting of --{PARTS[name]}, which is off; add --{PARTS[name]} 1")
    classifiers.check_pooling(options)
    check_training(options)
    check_share(options)
    classifiers.check_predictions(options, ENDINGS[options.option])


# The command


def run(options: Options) -> None:
    """Builds and trains the classifier, then predicts dev and test with the best model."""
    from types import SimpleNamespace

    from classifier import LlamaEmbeddingClassifier, LlamaPromptClassifier, acting_dropout
    from minillama.text.batches import prompt_parts

    raw, labels, words, columns = classifiers.read_data(options, ("train", "dev", "test"))
    options = options.replace(columns=columns)  # which other tables of this model are read by, too
    with open_session(options) as session:
        options, tokenizer = session.options, session.tokenizer
        origin = session.origin(raw)
        held_out = {"dev": " of train"} if share_of(options.dev) is not None else {}
        files = ", ".join(f"{split} {getattr(options, split)}{held_out.get(split, '')}" for split in raw)
        llama, _ = session.load_llama(f"{files}, labels {options.label_names or 'those of train'}")
        config = SimpleNamespace(
            llama=llama,
            num_labels=len(words),
            hidden_dropout_prob=options.hidden_dropout_prob,
            option=options.option,
            pooling=options.pooling,
        )
        prompted = options.head == "prompt"
        prompt = prompt_parts(options.template, words, options.pooling) if prompted else ()
        if prompted:
            report(f"prompt      {'{sentence}'.join(prompt)}")
        rows = classifiers.tokenize_data(options, raw, tokenizer, llama.config.max_seq_len, *prompt)
        model: LlamaEmbeddingClassifier | LlamaPromptClassifier
        model = LlamaPromptClassifier(config, tokenizer, words) if prompted else LlamaEmbeddingClassifier(config)
        if options.r_drop and not acting_dropout(model):
            raise ValueError(
                "--r_drop compares two dropout masks, but all dropout is off: that of the model and "
                "--hidden_dropout_prob are 0; add --dropout 0.1"
            )
        if options.option == "lora":
            add_lora(options, model, "" if prompted else ", besides the head")
        trained = train(session, model, rows, labels)
        if options.plan:
            return
        classifiers.predict(session, trained, rows, labels, origin)
        report(f"wrote {model_file(options)}, the best model on dev")
        more = ("--prompt_file", "new.csv") if is_table(options.train) else ("--prompt", "your sentence")
        report_next("--option", "classify", "--finetuned", model_file(options), *more)


def train(
    session: Session,
    model: LlamaEmbeddingClassifier | LlamaPromptClassifier,
    data: Mapping[str, list[Row]],
    labels: dict[str, str | None],
):
    """Trains `model`. The best one by dev accuracy is written to the run's folder and to `model_file`. Returns
    the model to predict with.
    """
    from minillama.formats.checkpoint import write_checkpoint
    from minillama.formats.files import link_or_copy
    from minillama.text.labelled import class_names
    from minillama.training.class_shares import class_weights
    from minillama.training.classification import Classification
    from minillama.training.regularizers import MovingAverage, Smart

    options, run = session.options, session.run
    train_sha256 = file_sha256(path_and_fold(options.train)[0])  # for the rows that were held out of it
    config = model.llama.config

    def write_best(state: dict[str, Tensor], epoch: int, score: Score) -> None:
        write_checkpoint(
            run.best_path,
            state,
            config,
            kind="classifier",
            head=options.head,
            label_names=class_names(labels),
            labels=labels,
            options=session.saved_options | {"train_sha256": train_sha256},
            epoch=epoch,
            dev_accuracy=score.quality,
        )
        link_or_copy(run.best_path, model_file(options))

    names = class_names(labels)
    smart = (options.smart, options.smart_eps, options.smart_step, options.smart_noise, options.smart_form)
    task = Classification(
        data["train"],
        data["dev"],
        epochs=options.epochs,
        batch_size=options.batch_size,
        seed=options.seed,
        pad_id=session.tokenizer.pad_id,
        bucketed=options.pooling != "last_column",
        label_smoothing=options.label_smoothing,
        evaluate_train=options.eval_train,
        smart=Smart(*smart) if options.smart else None,
        average=MovingAverage(options.bregman, options.bregman_beta) if options.bregman else None,
        r_drop=options.r_drop,
        class_weights=class_weights(data["train"], len(names)) if options.class_weights == "balanced" else None,
        label_names=names,
    )
    session.seed_dropout()
    if options.plan:
        return plan_rows(session, model, task, data, labels)
    trained = session.train(model, task, write_best, dynamic=True)
    if session.processes.is_main:
        link_or_copy(run.best_path, model_file(options))  # another run may have used that name meanwhile
    return trained


def command(name: str, summary: str, groups: tuple[Group, ...], examples: str) -> Command:
    return Command(
        name,
        summary,
        (
            flags.DATA,
            flags.TRAINING,
            *groups,
            HEAD,
            REGULARIZATION,
            flags.ROWS,
            flags.RUN,
            flags.TRAINED_MODEL,
            flags.DEVICE,
        ),
        run,
        examples,
        default_texts=classifiers.output_texts(ENDINGS[name]),
        resolve=partial(use_bundled_rows, ending=ENDINGS[name]),
        check=check,
        inputs=classifiers.row_files,
        outputs=lambda options: [path for path in (options.dev_out, options.test_out, model_file(options)) if path],
        trains=True,
    )


FINETUNE = command(
    "finetune",
    "train all weights and a classifier head on labelled sentences",
    (),
    """
python run_llama.py --option finetune --lr 3e-4 --epochs 2 --batch_size 16 --schedule cosine
python run_llama.py --option classify --finetuned finetune-2-0.0003.pt --prompt "A fine film with a weak end."
""",
)
LORA = command(
    "lora",
    "train LoRA adapters and a head on labelled sentences",
    (flags.LORA,),
    """
python run_llama.py --option lora --lora_rank 8 --lora_alpha 16 --lora_targets all --lr 1e-3 --epochs 5 \\
    --batch_size 16 --schedule cosine
python run_llama.py --option lora --lora_rank 8 --lora_alpha 8 --dora --lr 3e-3 --epochs 10 --batch_size 16
""",
)
