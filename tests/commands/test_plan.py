"""--plan, run through run_llama.py: what it prints, that it writes nothing, and what it says of too little memory."""

from __future__ import annotations

import json
import os

import pytest

from conftest import ROOT
from minillama.training import planning
from programs import Program, fine_tuned, outputs

MODEL = ["--pretrained-model-path", str(ROOT / "data" / "mini-llama.safetensors")]


def all_files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def program(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    return Program(tmp_path, capsys)


UNLIKE = [
    "Nobody who saw it could say why",
    "Three hours I will never get back",
    "My sister laughed, my brother cried, and I slept",
    "Its colours alone are worth the ticket",
    "One waits for a plot and gets a train timetable",
    "This director has learnt nothing since his debut",
    "Bring a friend, bring popcorn, bring the neighbours",
    "What a wonderful, strange and tender story",
    "It ends just when something begins to happen",
    "A remake that makes the original look young",
]


def plant(folder):
    """Files with known faults, and what they are: row numbers from 1."""
    train = [(n % 2, text) for n, text in enumerate(UNLIKE)]
    train += [(0, UNLIKE[0]), (1, UNLIKE[3].upper() + "!"), (1, "Bring a friend, bring tea, bring the neighbours")]
    train += [(0, UNLIKE[5])]  # with another label
    dev = [(0, "something new"), (1, UNLIKE[4]), (0, f"<br />{UNLIKE[7]}"), (1, "nothing like it at all")]
    test = [(0, "a text of its own"), (0, UNLIKE[9].lower())]
    for split, rows in {"train": train, "dev": dev, "test": test}.items():
        (folder / f"{split}.txt").write_text("".join(f"{label} ||| {text}\n" for label, text in rows))
    return {
        "repeats": {"exact": [[11, 1], [14, 6]], "near": [[12, 4], [13, 7]], "other_label": 2},
        "contradictions": [[6, 14]],
        "dev": {"exact": [[2, 5]], "near": [[3, 8]], "other_label": 2},
        "test": {"exact": [], "near": [[2, 10]], "other_label": 1},
    }


@pytest.mark.parametrize("option", ["finetune", "lora"])
def test_a_plan_of_rows_finds_what_was_planted_and_writes_nothing(command, option):
    faults = plant(command.folder)
    before = all_files(command.folder)
    code, out, err = command(option, "--plan", "--json", "--max_sentence_len", "9")
    assert code == 0, err
    assert all_files(command.folder) == before
    plan = json.loads(out)
    data = plan["data"]
    assert data["train"]["repeats"] == faults["repeats"]
    assert data["train"]["contradictions"] == faults["contradictions"]
    assert {split: data[split]["in_train"] for split in ("dev", "test")} == {s: faults[s] for s in ("dev", "test")}
    assert [data[split]["rows"] for split in ("train", "dev", "test")] == [14, 4, 2]
    assert data["train"]["classes"] == {"bad": 7, "good": 7} or sum(data["train"]["classes"].values()) == 14
    assert [data[split]["placeholder_labels"] for split in ("train", "dev", "test")] == [False, False, True]
    longer = data["train"]["longer_than"]
    assert data["train"]["cut"]["rows"] >= longer["16"] > 0 and data["train"]["tokens"]["longest"] > 11
    assert len(data["sample"]) == 5 and all(row["tokens"][0] == "<s>" for row in data["sample"])
    assert all(3 < len(row["tokens"]) <= 11 and row["tokens"][-1] == "</s>" for row in data["sample"])
    memory, time = plan["memory"], plan["time"]
    assert memory["fits"] and memory["weights"] > 0
    assert (memory["gradients"] == memory["weights"]) == (option == "finetune")
    assert time["steps"] == 3 and time["evaluations"] == 1 and time["total"] > time["start"] > 0
    assert plan["bar"]["commonest"]["accuracy"] == 0.5 and 0 <= plan["bar"]["counting_words"] <= 1


def test_the_text_has_the_same_facts(command):
    plant(command.folder)
    code, out, err = command("finetune", "--plan")
    assert code == 0
    for words in (
        "train       train.txt: 14 rows",
        "4 rows like an earlier row: 2 exact, 2 near, 2 of them with another label",
        "exact: line 11 like 1, line 14 like 6",
        "labels    1 text with several labels: lines 6, 14",
        "2 rows like a row of train: 1 exact, 1 near",
        "placeholders, so there is no accuracy",
        "cut       0 rows (the context of 64)",
        "counting words",
        "smallest difference that 4 rows can show",
    ):
        assert words in out
    assert "writes" not in err and "\nrun " not in err


def test_predictions_of_another_run_do_not_matter(program):
    for split in ("dev", "test"):
        (program.folder / f"demo-{split}-finetuning-output.txt").write_text("0 ||| another text\n")
    before = all_files(program.folder)
    short = ["--option", "finetune", "--batch_size", "2", "--max_sentence_len", "4"]
    assert program(*short)[0] == 2  # without --plan they do
    for split in ("train", "dev", "test"):
        lines = (ROOT / "data" / f"demo-{split}.txt").read_text(encoding="utf-8").splitlines()[:30]
        (program.folder / f"{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    named = [word for split in ("train", "dev", "test") for word in (f"--{split}", f"{split}.txt")]
    named += ["--label-names", str(ROOT / "data" / "demo-label-mapping.json"), *MODEL]
    code, out, err = program(*short, *named, "--plan")
    assert code == 0 and "30 rows" in out and " tokens: <s> ▁" in out, err
    assert all_files(program.folder) == sorted([*before, "train.txt", "dev.txt", "test.txt"])


def test_a_plan_of_sft(program):
    lines = [{"prompt": f"{text}, said he. What did he say?", "answer": f"{n % 3}"} for n, text in enumerate(UNLIKE)]
    leak = {"prompt": lines[2]["prompt"].upper(), "answer": "2"}
    data = {"train": [*lines[:8], lines[1] | {"answer": "7"}], "dev": [lines[8], leak], "test": lines[9:]}
    for split, some in data.items():
        (program.folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in some))
    named = [word for split in ("train", "dev", "test") for word in (f"--{split}", f"{split}.jsonl")]
    before = all_files(program.folder)
    code, out, err = program(
        "--option", "sft", *MODEL, *named, "--model_out", "a.safetensors", "--plan", "--json", "--batch_size", "4",
        "--max_new_tokens", "4",
    )  # fmt: skip
    assert code == 0, err
    assert all_files(program.folder) == before
    plan = json.loads(out)
    assert plan["data"]["train"]["repeats"] == {"exact": [[9, 2]], "near": [], "other_label": 1}
    assert plan["data"]["train"]["contradictions"] == [[2, 9]]
    assert plan["data"]["dev"]["in_train"] == {"exact": [], "near": [[2, 3]], "other_label": 0}
    assert plan["data"]["test"]["in_train"]["near"] == [] and plan["time"]["steps"] == 4 * 3
    assert plan["data"]["sample"][0]["tokens"][-1] == "</s>"


def test_a_plan_of_pretrain_leaves_no_tokens(pretrain_command):
    before = all_files(pretrain_command.folder)
    code, out, err = pretrain_command.pretrain("--plan", "--json")
    assert code == 0, err
    assert all_files(pretrain_command.folder) == before
    plan = json.loads(out)
    text = plan["data"]["texts"]["stories"]
    assert (text["documents"], text["held_out_documents"]) == (36, 4) and text["windows"] == text["tokens"] // 32
    assert plan["time"]["steps"] == 6 and plan["time"]["evaluations"] == 2 and plan["bar"] is None
    assert pretrain_command.pretrain("--plan")[1].startswith("stories     36 documents, ")
    assert pretrain_command.pretrain()[0] == 0  # nothing was in its way


# Options that contradict it


def test_a_plan_is_of_a_new_run(command):
    fine_tuned(command)
    code, _, err = command("finetune", "--plan", "--resume", "--run_dir", "run")
    assert code == 2 and err.endswith("error: --plan is for a new run; leave out --resume\n")


def test_json_belongs_to_a_plan(command):
    code, _, err = command("finetune", "--json")
    assert code == 2 and err.endswith("error: --json prints a plan as JSON; add --plan, or leave it out\n")
    assert not os.path.exists("runs")
    assert "--plan belongs to --option finetune, lora, pretrain, sft" in command("prompt", "--plan")[2]


def test_several_processes_make_no_plan(command, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    code, _, err = command("finetune", "--plan")
    assert code == 2 and "--plan measures a single process; start it without torchrun" in err


# Too little memory


def limited(monkeypatch, rows):
    """Has the measured memory grow with the rows of a step, up to a limit of so many rows."""
    peak = [10**9]
    step = planning.Planner._step

    def counted(self, positions):
        peak[0] = max(peak[0], 10**9 + 10**7 * max(len(piece) for piece in self._planned(positions).pieces))
        return step(self, positions)

    monkeypatch.setattr(planning.Planner, "_step", counted)
    monkeypatch.setattr(planning, "used_memory", lambda device: 10**9)
    monkeypatch.setattr(planning, "peak_memory", lambda device: peak[0])
    limit = (10**9 + 10**7 * rows + 10**6) / planning.WELL_FILLED
    monkeypatch.setattr(planning, "MOST_FILLED", planning.WELL_FILLED)
    monkeypatch.setattr(planning, "memory_limit", lambda device: int(limit))
    monkeypatch.setattr(planning, "forget_peak", lambda device: None)


def test_a_batch_that_does_not_fit_gets_exit_code_3_and_the_setting_that_does(command, monkeypatch):
    limited(monkeypatch, rows=6)
    code, out, err = command("finetune", "--plan", "--batch_size", "12")
    assert code == 3
    assert err.splitlines()[-1] == (
        "run_llama.py: error: the run needs 1.12 GB, and 1.33 GB are free (some of it has to stay free); "
        "--micro_batch_size 6 fits, and takes the same steps"
    )
    assert "6 rows at once fit" in out and "\ntime " not in out and "\nbar " not in out
    limited(monkeypatch, rows=6)
    code, out, err = command("finetune", "--plan", "--batch_size", "12", "--micro_batch_size", "6", "--json")
    assert code == 0 and json.loads(out)["memory"]["fits"], err


def test_a_model_that_does_not_fit_gets_exit_code_3_before_it_is_made(pretrain_command, monkeypatch):
    monkeypatch.setattr("minillama.training.memory.memory_limit", lambda device: 10**9)
    before = all_files(pretrain_command.folder)
    more = ["--preset", "Llama-2-70B", "--tokenizer", "tok.model"]
    code, out, err = pretrain_command.pretrain("--plan", *more, new=False)
    assert code == 3 and out == "" and all_files(pretrain_command.folder) == before
    told = err.splitlines()[-1]
    assert "weights, gradients and moments take 1,0" in told and told.endswith(
        "those of --preset stories42M take 0.44 GB"
    )


def test_a_checkpoint_that_does_not_fit_gets_exit_code_3(command, monkeypatch):
    monkeypatch.setattr("minillama.training.memory.memory_limit", lambda device: 10_000)
    code, out, err = command("finetune", "--plan")
    assert code == 3 and out == "" and "--option lora needs no gradients and moments of the model" in err
    assert outputs("finetune")[0] not in os.listdir(command.folder)
