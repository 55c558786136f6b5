"""The interface of a task, as the training loop uses it."""

from __future__ import annotations

from fitting import a_task, an_instruction, some_rows
from minillama.training import task as tasks
from minillama.training.classification import Classification


def test_all_tasks_are_what_the_loop_asks_for(tokenizer):
    protocol = {name for name in vars(tasks.Task) if not name.startswith("_")} | set(tasks.Task.__annotations__)
    classification = Classification(some_rows(), some_rows(), epochs=1, batch_size=2, seed=0)
    for task in (a_task(tokenizer), classification, an_instruction(tokenizer)):
        assert all(hasattr(task, name) for name in protocol)
