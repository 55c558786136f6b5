PYTHON ?= python

.DEFAULT_GOAL := help
.PHONY: help install style check test bench docs pictures sums bundled-model bundled-classifier clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install:  ## Install what the project and its checks need into the active environment
	$(PYTHON) -m pip install -r requirements.txt -r requirements-dev.txt

style:  ## Format the code and mend what ruff can mend
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

check:  ## Lint, formatting and types; changes nothing
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

test:  ## Run the tests, without the slow ones
	$(PYTHON) -m pytest -n 2 --dist worksteal

bench:  ## Time training against transformers and the course's procedure (minutes)
	$(PYTHON) benchmark.py train

docs:  ## Write docs/options.md again from the program
	$(PYTHON) tests/make_options_page.py

# What a picture shows is made in this folder, from the bundled model and the demo data.
SHOTS = runs/pictures
RUN = cd $(SHOTS) && $(PYTHON) $(CURDIR)/run_llama.py
FINETUNE = $(RUN) --option finetune --lr 3e-4 --epochs 2 --batch_size 16 --schedule cosine

pictures:  ## Make the pictures in docs/pictures/ again, from real runs (two minutes; needs Chromium)
	rm -rf $(SHOTS)
	mkdir -p $(SHOTS) docs/pictures
	$(RUN) --prompt "Tom gave Anna a red ball. She was very" --temperature 1 --epsilon 0.02 --max_new_tokens 12 --xray xray.html
	$(FINETUNE) --seed 1 --run_dir runs/seed-1
	$(FINETUNE) --seed 2 --run_dir runs/seed-2
	$(RUN) --option wise_ft --finetuned runs/seed-1/best.pt --curve_out wise-ft.csv
	$(RUN) --option report
	$(PYTHON) tests/make_pictures.py $(SHOTS) docs/pictures

# The runs of docs/pictures/addition.svg: sums as examples/addition.json has them, and with one thing changed.
SUMS = runs/sums
ADD = $(PYTHON) $(CURDIR)/run_llama.py --config $(CURDIR)/examples/addition.json
MAKE_SUMS = $(PYTHON) data/make_addition.py --rows 50000

sums:  ## Train six models on sums, and draw docs/pictures/addition.svg again (six minutes on one core)
	rm -rf $(SUMS)
	mkdir -p $(SUMS)/forward $(SUMS)/short
	$(MAKE_SUMS) --pad --reverse --into $(SUMS)
	$(MAKE_SUMS) --pad --into $(SUMS)/forward
	$(MAKE_SUMS) --reverse --into $(SUMS)/short
	cd $(SUMS) && $(ADD) --run_dir wide
	cd $(SUMS)/forward && $(ADD) --run_dir ../unreversed
	cd $(SUMS)/short && $(ADD) --run_dir ../unpadded
	cd $(SUMS) && $(ADD) --dim 16 --run_dir narrow
	cd $(SUMS) && $(ADD) --n_layers 1 --run_dir flat
	cd $(SUMS) && $(ADD) --optimizer adamw --run_dir adamw
	$(PYTHON) tests/make_addition_picture.py docs/pictures/addition.svg "2 layers of 32=$(SUMS)/wide" \
		"answer not reversed=$(SUMS)/unreversed" "numbers not padded=$(SUMS)/unpadded" "2 layers of 16=$(SUMS)/narrow" \
		"1 layer of 32=$(SUMS)/flat" "AdamW, 2 layers of 32=$(SUMS)/adamw"

# The collections that data/MODEL_CARD.md names: corpora/ and reviews/.
COLLECTIONS ?= ../shared/assets
# Where the files of examples/bundled-*.json look.
TEXTS = runs/corpora
STAGE = $(PYTHON) run_llama.py --config examples/bundled
MEAN = $(PYTHON) run_llama.py --option convert --tokenizer runs/bundled.model

# After the third and the fourth run a mean of weights is taken. A file that is named twice counts twice.
bundled-model:  ## Make the bundled model again from the collections in COLLECTIONS (three and a half hours on two cores)
	rm -rf runs/general runs/bundled runs/longer runs/own runs/bundled-tokens
	$(PYTHON) data/make_corpora.py --source $(COLLECTIONS) --into $(TEXTS)
	$(STAGE)-1-tokenizer.json
	$(STAGE)-2-general.json
	$(STAGE)-3-reviews.json
	$(STAGE)-4-longer.json
	$(MEAN) --pretrained-model-path runs/longer.safetensors --average runs/longer.safetensors runs/bundled-final.safetensors \
		--model_out runs/longer-mean.safetensors
	$(STAGE)-5-own.json
	$(MEAN) --pretrained-model-path runs/own.safetensors --average runs/longer-mean.safetensors \
		--model_out data/mini-llama.safetensors
	$(PYTHON) tests/make_bundled_reference.py

bundled-classifier:  ## Make the bundled classifier of opinions again from the demo data (six minutes)
	rm -rf runs/opinions
	$(PYTHON) run_llama.py --config examples/demo-lora.json --run_dir runs/opinions
	$(PYTHON) run_llama.py --option convert --to adapter --adapter runs/opinions/best.pt --out_dtype bf16 \
		--pretrained-model-path data/mini-llama.safetensors --model_out data/mini-llama-opinions.pt

clean:  ## Remove caches; keeps data, checkpoints and predictions
	rm -rf .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.git/*' -not -path './.venv/*' -prune -exec rm -rf {} +
