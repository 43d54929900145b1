# Every target makes the virtual environment it needs; only Python >= 3.11 and make have to be there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TORCH := $(shell grep '^torch==' constraints.txt)
C_SOURCES := $(wildcard quantization/cpu/*.[ch] training/data/*/*.c)

# Tests are run by this many processes, a file at a time; a thread each.
WORKERS ?= 2

OLDEST := .venv-oldest
# What depends on transformers most; training in several processes and 3D is left to the newest.
OLDEST_TESTS := tests/glm_hf/test_golden_*.py tests/glm_hf/test_*_glm.py tests/glm_hf/test_attention_interface.py \
        tests/glm_hf/test_masked_lm.py tests/glm_hf/test_peft.py tests/glm_hf/pipelines tests/glm_hf/hub \
        tests/glm_hf/decoding tests/quantization tests/test_main_road.py

.PHONY: install demo test test-oldest quality clean fuzz kill \
        bench bench-startup bench-checkpoints bench-conversion bench-int4 bench-bias bench-step-kernels bench-decode bench-data bench-data-scale bench-train-step bench-training-memory bench-serve bench-evaluate bench-onnx soak

install: $(INSTALLED)

# torch goes first and by its pin, since a bare requirement may bring another build. Wheels are preferred to sources.
$(INSTALLED): setup.cfg setup.py pyproject.toml constraints.txt $(C_SOURCES)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "glm_hf needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(BIN)/python examples/demo.py

# The second run is of transformers' own model tests, which its source distribution has and its wheel has not.
test: $(INSTALLED)
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
	$(BIN)/python tests/hf_common/fetch.py
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) tests/hf_common/test_modeling_glm.py

# The oldest versions of torch and transformers that are supported, in an environment of their own.
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(OLDEST_TESTS)

$(OLDEST)/.installed: setup.cfg setup.py pyproject.toml constraints-oldest.txt $(C_SOURCES)
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check \
	    $(shell grep '^torch==' constraints-oldest.txt)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt \
	    -e ".[peft]" datasets pytest pytest-xdist
	touch $@

# Thousands of random damages to files, and of random ends of commands; the suite has some of each.
N ?= 2000
fuzz: $(INSTALLED)
	OMP_NUM_THREADS=1 PYTHONPATH=tests/support $(BIN)/python tests/support/fuzzing.py $(N) $(SEED)

KILLS ?= 140 45 45
kill: $(INSTALLED)
	OMP_NUM_THREADS=1 PYTHONPATH=tests/support $(BIN)/python tests/support/kills.py $(KILLS)

# Clients that behave badly, for so many seconds.
SECONDS ?= 600
soak: $(INSTALLED)
	OMP_NUM_THREADS=1 PYTHONPATH=tests/support $(BIN)/python tests/support/soak.py $(SECONDS)

quality: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench-startup: $(INSTALLED)
	$(BIN)/python benchmarks/startup.py

bench: $(INSTALLED)
	$(BIN)/python benchmarks/forward.py

# Some minutes and 30 GB of disk
bench-conversion: $(INSTALLED)
	$(BIN)/python benchmarks/conversion.py

# Ten minutes. Peers: `pip install bitsandbytes`, and llama.cpp's libraries by GGML=folder
bench-int4: $(INSTALLED)
	$(BIN)/python benchmarks/int4_linear.py $(if $(GGML),--ggml $(GGML))

# Ten minutes
bench-bias: $(INSTALLED)
	$(BIN)/python benchmarks/linear_bias.py

# Registers of the Triton kernels, without a GPU
bench-step-kernels: $(INSTALLED)
	$(BIN)/python -W ignore benchmarks/step_kernels.py

# Some minutes, 12 GB of memory and 7 GB of disk. Peer: llama.cpp by LLAMA=folder of its programs
bench-decode: $(INSTALLED)
	$(BIN)/python benchmarks/decode.py $(if $(LLAMA),--llama $(LLAMA))

# Two minutes, 3 GB of disk
bench-checkpoints: $(INSTALLED)
	$(BIN)/python benchmarks/checkpoints.py

bench-data: $(INSTALLED)
	$(BIN)/python benchmarks/data.py

# Some minutes
bench-data-scale: $(INSTALLED)
	$(BIN)/python benchmarks/data_scale.py

bench-train-step: $(INSTALLED)
	$(BIN)/python benchmarks/train_step.py

# Some minutes, and 7 GB of disk
bench-serve: $(INSTALLED)
	$(BIN)/python benchmarks/serve.py

# A minute
bench-evaluate: $(INSTALLED)
	$(BIN)/python benchmarks/evaluate.py

# Some minutes, 3 GB of memory and 1 GB of disk
bench-onnx: $(INSTALLED)
	$(BIN)/python benchmarks/onnx_graph.py

# Seven minutes, 5 GB of memory
bench-training-memory: $(INSTALLED)
	$(BIN)/python benchmarks/training_memory.py

clean:
	rm -rf $(VENV) $(OLDEST) .cache build dist *.egg-info
