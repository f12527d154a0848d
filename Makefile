# The only list of commands: CI and the README call these.
DATASET ?= mnist
PORT ?= 8001
MODEL ?= $(DATASET)
PEERS ?=
SECONDS ?=
PYTHON3 ?= python3

VENV := .venv
PYTHON := $(VENV)/bin/python
CHECKPOINT := runs/$(DATASET).pt
FAST := $(if $(filter mnist,$(DATASET)),--recipe fast)

.PHONY: help setup demo test test-gpu lint protos docs train serve benchmark overload soak clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "parityserve needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON3=python3.11"; exit 1; }
	$(PYTHON3) -m venv $(VENV)
	$(PYTHON) -m pip install --constraint constraints.txt --editable '.[train,plots,tensorboard,search,bench,tracing,dev]'
	@touch $@

setup: $(VENV)/.installed  ## the environment, in .venv

demo: setup  ## data, training, export, parity, server, and real images classified through gRPC (DATASET=mnist)
	$(PYTHON) -m trainer data --dataset $(DATASET)
	$(PYTHON) -m trainer train --dataset $(DATASET) $(FAST) --checkpoint $(CHECKPOINT)
	$(PYTHON) -m trainer export --checkpoint $(CHECKPOINT)
	$(PYTHON) -m trainer parity --bundle exported/$(DATASET)
	$(PYTHON) examples/classify_test_images.py --dataset $(DATASET) --output runs/$(DATASET)-contact-sheet.png

test: setup  ## every test; those for a GPU are skipped where there is none
	$(PYTHON) -m pytest

test-gpu: setup  ## the tests that need a CUDA device, which fail here without one
	REQUIRE_GPU=1 $(PYTHON) -m pytest -m gpu

lint: setup  ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

protos: setup  ## the Python code, types and descriptors of protos/*.proto
	$(PYTHON) -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. protos/classifier.proto
	$(PYTHON) -m grpc_tools.protoc -I. --pyi_out=. --include_imports \
		--descriptor_set_out=protos/open_inference.binpb protos/open_inference.proto

train: setup  ## train and export one version (DATASET=mnist)
	$(PYTHON) -m trainer train --dataset $(DATASET) --checkpoint $(CHECKPOINT)
	$(PYTHON) -m trainer export --checkpoint $(CHECKPOINT)

docs: setup  ## the tables of settings in docs/operations.md and of training's options in docs/training.md
	$(PYTHON) -c 'from serving import config, option_table as table; table.write("docs/operations.md", config.ServerConfig)'
	$(PYTHON) -c 'from serving import option_table as table; from trainer import config; table.write("docs/training.md", config.TrainConfig)'

serve: setup  ## serve exported/ (PORT=8001)
	$(PYTHON) -m serving serve --port $(PORT)

benchmark: setup  ## measure the server beside the bound, and write docs/performance.md (MODEL=mnist, PEERS=)
	$(PYTHON) -m benchmarks.serving --model $(MODEL) $(addprefix --peer ,$(PEERS)) --json runs/serving.json
	$(PYTHON) -m benchmarks.report runs/serving.json --write docs/performance.md
	$(PYTHON) -m benchmarks.plot runs/serving.json docs/performance.png

overload: setup  ## ask twice of the server what it can answer (SECONDS=60)
	$(PYTHON) -m benchmarks.overload --model $(MODEL) $(if $(SECONDS),--seconds $(SECONDS)) --json runs/overload.json

soak: setup  ## mixed load for 10 minutes, with an eye on memory and open files (SECONDS=600)
	$(PYTHON) -m benchmarks.soak --model $(MODEL) $(if $(SECONDS),--seconds $(SECONDS)) --json runs/soak.json

clean:  ## remove the environment and the caches; trained models in runs/ and exported/ stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
