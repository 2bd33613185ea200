# make demo: set up, then stages 0 to 3 on data/, training one epoch to be done in minutes.
# make test: set up, then the whole test suite.
# make levers DATA=folder ARGS="--size 3000": what each lever of training does, over three seeds; takes hours.
PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
.DELETE_ON_ERROR:
.PHONY: demo test levers clean

demo: $(VENV)/.requirements
	$(PY) 0_build_corpus.py
	$(PY) 1_train_embedding.py --epochs 1
	$(PY) 2_eval_retrieval.py
	$(PY) 3_rag_batch_eval.py

test: $(VENV)/.requirements-dev
	$(PY) -m pytest

DATA ?= data
levers: $(VENV)/.requirements-dev
	$(PY) tests/levers.py --data $(DATA) $(ARGS)

# torch by itself first: pip then never meets a wish for another version of it
$(VENV)/.requirements: requirements.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet "$$(grep '^torch==' requirements.txt)"
	$(PY) -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.requirements-dev: requirements-dev.txt $(VENV)/.requirements
	$(PY) -m pip install --quiet -r requirements-dev.txt
	touch $@

# everything that was produced; the environment stays
clean:
	find runs -mindepth 1 ! -name .gitkeep -delete
