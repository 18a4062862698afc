# Everything a fresh machine needs is python3 (3.11 to 3.13) and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
EXTRAS ?= dev

.PHONY: demo test test-fast tpu notebooks lint clean

demo: $(READY)
	$(BIN)/python train.py workdir=.demo/tiny_shapes
	$(BIN)/python infer.py ask --model .demo/tiny_shapes --dtype float32 --image .demo/tiny_shapes/example.png "What shape is it?"

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# What a developer runs while working.
test-fast: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

# Asks the TPU compiler again: the kernels' cycles and a whole step. Takes minutes.
tpu: $(READY)
	$(BIN)/python -m pip install --quiet --editable '.[plan]'
	$(BIN)/python -m benchmarks.kernel_cycles
	$(BIN)/python -m neo_jax.plan --pods docs/pods.md --only "2b_sft v5e-16" --no-flags --no-cache

notebooks: $(READY)
	$(BIN)/python -m pip install --quiet '.[notebooks]'
	JAX_PLATFORMS=cpu $(BIN)/python notebooks/execute.py .demo/notebooks

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	touch $(READY)

clean:
	rm -rf $(VENV) .demo
