"""--plan: what a training run would read, need and take, without training. Prints text, or with --json one object."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minillama.cli.console import stdout_is_utf8
from minillama.cli.data_files import source
from minillama.cli.options import Options
from minillama.cli.plan_text import plan_lines
from minillama.cli.room import DoesNotFit, advice
from minillama.environment import STARTED

if TYPE_CHECKING:
    from torch import nn

    from minillama.cli.session import Session
    from minillama.text.corpus import Corpus
    from minillama.text.examples import Example
    from minillama.text.labelled import Row
    from minillama.training.planning import Memory
    from minillama.training.task import Task
    from tokenizer import Tokenizer

SHOWN_ROWS = 5
Facts = dict[str, Any]


# The plans of the tasks


def plan_rows(
    session: Session,
    model: nn.Module,
    task: Task,
    data: Mapping[str, Sequence[Row]],
    labels: Mapping[str, str | None],
) -> None:
    """The plan of finetune and lora. data: the tokenized rows of each split; labels: see `read_labels`."""
    import sklearn.metrics  # noqa: F401  # as the run's evaluation does, so that it counts as part of the program

    from minillama.text.labelled import class_names

    options, names = session.options, class_names(labels)
    cost = {split: sum(len(row.ids) for row in rows) for split, rows in data.items()}
    scored = cost["dev"] + (cost["train"] if options.eval_train else 0)
    predictions = sum(cost[split] for split in ("dev", "test") if split in cost) / scored

    def facts() -> Facts:
        texts = {split: [row.sentence for row in rows] for split, rows in data.items()}
        classes = {split: [names[row.label] for row in rows] for split, rows in data.items()}
        full = full_lengths(session, data, names)
        limit = model.llama.config.max_seq_len  # type: ignore[union-attr]
        lines = {split: [row.line for row in rows] for split, rows in data.items()}
        found = inspect_splits(options, texts, classes, full, lines)
        for split, rows in data.items():
            cut = sum(length > len(row.ids) for length, row in zip(full[split], rows, strict=True))
            counts = Counter(classes[split])
            found[split] |= {
                "classes": {name: counts[name] for name in names},
                "placeholder_labels": len(counts) == 1,
                "cut": {"rows": cut, "context": limit, "max_sentence_len": options.max_sentence_len},
            }
        found["sample"] = [
            {"row": lines["train"][n], "label": classes["train"][n], "text": texts["train"][n], "tokens": pieces}
            for n, pieces in sample_tokens(session, [row.ids for row in data["train"]])
        ]
        return found

    finish(session, model, task, facts, predictions, lambda: bar_of_rows(data, names))


def plan_examples(session: Session, model: nn.Module, task: Task, data: Mapping[str, Sequence[Example]]) -> None:
    """The plan of sft. data: the tokenized examples of each split."""
    options = session.options
    judged = sum(len(examples) for split, examples in data.items() if split != "train")
    answered = min(options.answer_rows or len(data["dev"]), len(data["dev"]))

    def facts() -> Facts:
        texts = {split: [example.prompt for example in examples] for split, examples in data.items()}
        answers = {split: [example.answer for example in examples] for split, examples in data.items()}
        encode = session.tokenizer.encode_many
        full = {}
        for split, examples in data.items():
            prompts = encode([text.rstrip(" ") for text in texts[split]])
            begins = [example.ids[:1] == (session.tokenizer.bos_id,) for example in examples]
            full[split] = [
                begin + len(ids) + one.targets for begin, ids, one in zip(begins, prompts, examples, strict=True)
            ]
        lines = {split: [example.line for example in examples] for split, examples in data.items()}
        found = inspect_splits(options, texts, answers, full, lines)
        for split, examples in data.items():
            cut = sum(length > len(one.ids) for length, one in zip(full[split], examples, strict=True))
            found[split]["cut"] = {"rows": cut, "context": None, "max_sentence_len": None}
        found["sample"] = [
            {"row": lines["train"][n], "label": answers["train"][n], "text": texts["train"][n], "tokens": pieces}
            for n, pieces in sample_tokens(session, [example.ids for example in data["train"]])
        ]
        return found

    def bar() -> Facts:
        from minillama.text.inspection import commonest, smallest_differences

        answers = {split: [example.answer for example in data[split]] for split in ("train", "dev")}
        label, share = commonest(answers["train"], answers["dev"])
        smallest = dict(smallest_differences(len(answers["dev"]), 0.5))
        return {"commonest": {"label": label, "accuracy": share}, "at_accuracy": 0.5, "smallest_difference": smallest}

    finish(session, model, task, facts, judged / answered, bar)


def plan_corpus(session: Session, model: nn.Module, task: Task, corpus: Corpus) -> None:
    """The plan of pretrain."""

    def facts() -> Facts:
        return {
            "texts": {
                text.name: {
                    "documents": text.documents,
                    "tokens": text.train.size,
                    "windows": text.training_windows,
                    "weight": text.weight,
                    "held_out_documents": text.held_out_documents,
                    "held_out_tokens": text.held_out_tokens,
                    "held_out_windows": text.held_out_windows,
                }
                for text in corpus.texts
            },
            "window": corpus.texts[0].train.length,
            "windows_of_a_pass": corpus.pass_length,
            "passes": round(task.steps * task.batch_size / corpus.pass_length, 3),
        }

    finish(session, model, task, facts, 0.0, lambda: None)


@contextmanager
def scratch_folder(options: Options) -> Iterator[Path | None]:
    """A temporary folder for the tokens of a plan, which leaves no file; None without --plan."""
    from tempfile import TemporaryDirectory  # imported here, as random below, so that `--help` stays instant

    if not options.plan:
        yield None
        return
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        yield Path(folder)


# The parts of a plan


def finish(
    session: Session,
    model: nn.Module,
    task: Task,
    facts: Callable[[], Facts],
    predictions: float,
    bar: Callable[[], Facts | None],
) -> None:
    """Measures, inspects the data, and prints the plan. predictions: the work after training, in evaluations. Raises
    DoesNotFit, after printing, if the memory does not suffice.
    """
    start = time.perf_counter() - STARTED
    memory, duration = session.measure(model, task)  # first, because the rest of the plan takes memory too
    plan: Facts = {"option": session.options.option, "data": facts(), "memory": memory_facts(memory), "time": None}
    if duration is not None:
        after = predictions * duration.evaluation
        plan["time"] = {
            "step": duration.step,
            "steps": duration.steps,
            "shapes": duration.shapes,
            "first_step_with_a_shape": duration.first,
            "measured_steps": duration.measured,
            "evaluation": duration.evaluation,
            "evaluations": duration.evaluations,
            "save": duration.save,
            "saves": duration.saves,
            "start": start,
            "training": duration.training + duration.evaluating,
            "predictions": after,
            "total": start + duration.training + duration.evaluating + after,
        }
    plan["bar"] = bar() if memory.fits else None  # which would take memory again
    if session.options.json:
        print(json.dumps(plan, ensure_ascii=not stdout_is_utf8()), flush=True)
    else:
        print("\n".join(plan_lines(plan)), flush=True)
    if not memory.fits:
        raise DoesNotFit(advice(session.options, memory))


def memory_facts(memory: Memory) -> Facts:
    return asdict(memory) | {"fits": memory.fits}


def full_lengths(session: Session, data: Mapping[str, Sequence[Row]], names: Sequence[str]) -> dict[str, list[int]]:
    """The lengths of the rows in tokens, if none were cut."""
    from minillama.text.batches import prompt_parts, tokenize_rows

    options, no_limit = session.options, 1 << 40
    prompt: dict[str, Any] = {}
    if options.head == "prompt":
        before, question = prompt_parts(options.template, options.label_words or names, options.pooling)
        prompt = {"before": before, "question": question}
    return {
        split: [len(row.ids) for row in tokenize_rows(rows, session.tokenizer, no_limit, **prompt)[0]]
        for split, rows in data.items()
    }


def inspect_splits(
    options: Options,
    texts: Mapping[str, Sequence[str]],
    labels: Mapping[str, Sequence[str]],
    lengths: Mapping[str, Sequence[int]],
    lines: Mapping[str, Sequence[int]],
) -> Facts:
    """The facts of each split: rows, lengths, repeats and contradictions. lines: of the rows in their files, which name
    them.
    """
    from minillama.text.inspection import TextIndex, contradictions, length_quantiles, longer_than

    found: Facts = {}
    train = TextIndex(texts["train"])
    for split, sentences in texts.items():
        repeats = train.repeats if split == "train" else train.find(sentences)
        pairs = [(repeat.row, repeat.other, repeat.exact) for repeat in repeats]
        found[split] = {
            "path": source(options, split),
            "rows": len(sentences),
            "tokens": length_quantiles(lengths[split]),
            "longer_than": longer_than(lengths[split]),
            "repeats" if split == "train" else "in_train": {
                "exact": [[lines[split][row], lines["train"][other]] for row, other, exact in pairs if exact],
                "near": [[lines[split][row], lines["train"][other]] for row, other, exact in pairs if not exact],
                "other_label": sum(labels[split][row] != labels["train"][other] for row, other, exact in pairs),
            },
            "contradictions": [
                [lines[split][row] for row in rows] for rows in contradictions(sentences, labels[split])
            ],
        }
    return found


def sample_tokens(session: Session, ids: Sequence[Sequence[int]]) -> list[tuple[int, list[str]]]:
    """A few random rows, the same for the same seed: their positions, and the texts of their tokens."""
    import random

    chosen = random.Random(session.options.seed).sample(range(len(ids)), min(SHOWN_ROWS, len(ids)))
    return [(n, [token_text(session.tokenizer, i) for i in ids[n]]) for n in chosen]


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """The piece of a token as its tokenizer has it; else its text, or its number in angle brackets."""
    with suppress(AttributeError, IndexError):
        return tokenizer.sp_model.id_to_piece(token)
    return tokenizer.decode([token]) or f"<{token}>"


def bar_of_rows(data: Mapping[str, Sequence[Row]], names: Sequence[str]) -> Facts | None:
    """The accuracies on dev that a model has to beat, and the smallest difference that dev shows. None without gold
    labels.
    """
    from minillama.text.inspection import commonest, smallest_differences
    from minillama.text.labelled import has_gold_labels
    from minillama.training.word_counts import counting_words

    if not has_gold_labels(data["dev"]):
        return None
    labels = {split: [row.label for row in data[split]] for split in ("train", "dev")}
    label, share = commonest(labels["train"], labels["dev"])
    words = None
    if has_gold_labels(data["train"]):
        words = counting_words({"train": data["train"], "dev": data["dev"], "test": data["dev"]})["dev"]
    accuracy = max(share, words or 0.0)
    return {
        "commonest": {"label": names[label], "accuracy": share},  # type: ignore[call-overload]
        "counting_words": words,
        "at_accuracy": accuracy,
        "smallest_difference": dict(smallest_differences(len(data["dev"]), accuracy)),
    }
