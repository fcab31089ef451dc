# Everything a developer does here. Needs Rust, Python ≥ 3.11 and make; the rest goes into .venv.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL: # cargo and pytest share the cores as they are, and benches must be alone
.DEFAULT_GOAL := help

# The first Python that is new enough; `make PYTHON=…` chooses another.
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { echo "$$python"; break; }; done)

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
LOCKED := $(if $(CI),--locked)
RUST := Cargo.toml Cargo.lock $(shell find rust/pkt-core rust/pkt-python -name '*.rs' -o -name Cargo.toml)

# One interpreter for every cargo call: another one would make it build pyo3 again.
export PYO3_PYTHON := $(abspath $(BIN)/python)
export PIP_ROOT_USER_ACTION := ignore

##@ Use
.PHONY: demo
demo: $(VENV)/.core ## install into .venv, run the main job on the built-in pair, draw the result
	$(BIN)/pkt demo $(DEMO)

##@ Develop
.PHONY: test test-rust test-python test-all
test: test-rust test-python ## the tests, Rust and Python; of laws over many cases a fifth

test-rust: $(VENV)/.tools
	cargo test --workspace $(LOCKED) $(CARGOTEST)

test-python: $(VENV)/.core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(PYTEST)

test-all: PYTEST += -m ""
test-all: test ## every case of every test; an hour

.PHONY: check check-rust check-python
check: check-rust check-python ## formatting, lints, types, stubs, import law

check-rust: $(VENV)/.tools
	cargo fmt --all --check
	cargo clippy --workspace --all-targets $(LOCKED) -- -D warnings

check-python: $(VENV)/.core
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest pkt._core
	$(BIN)/lint-imports --no-logo

# Needs a nightly with Miri (rustup toolchain install nightly --component miri). What has unsafe code,
# less the calls that Miri does not know: files mapped, read past the cache, or advised about.
# Trees instead of stacks of borrows, and integers as pointers, for rayon's queues; its pool is
# never ended, which is no leak.
MIRI := -Zmiri-disable-isolation -Zmiri-tree-borrows -Zmiri-permissive-provenance \
	-Zmiri-ignore-leaks
MIRI_TESTS := reader:: stream:: sensitivity::tests::opposite \
	sensitivity::tests::overflow sensitivity::tests::empty selection::window::tests::ties_go \
	selection::window::tests::windows

.PHONY: miri
miri: ## undefined behaviour in the core's unsafe code; minutes
	MIRIFLAGS="$(MIRI)" RUSTFLAGS="-C target-feature=+avx2" \
		cargo +nightly miri test --package pkt-core --lib -- $(MIRI_TESTS)

.PHONY: format
format: $(VENV)/.core ## write the formatting that `check` asks for
	cargo fmt --all
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

# Each benches/python/bench_NAME.py is a target bench-NAME; BENCH_ARGS are its arguments. They make
# their own models, up to 6 GB in $TMPDIR; bench-reader and bench-forecast drop the page cache: run
# them as root.
BENCHES := $(patsubst benches/python/bench_%.py,bench-%,$(sort $(wildcard benches/python/bench_*.py)))

.PHONY: bench bench-rust $(BENCHES)
bench: bench-rust $(BENCHES) ## every bench, one after another; results: benches/record/ and target/criterion/

bench-rust: $(VENV)/.tools
	cargo bench --package pkt-core $(LOCKED)

$(BENCHES): bench-%: $(VENV)/.core
	$(BIN)/python benches/python/bench_$*.py $(BENCH_ARGS)

.PHONY: wheel
wheel: $(VENV)/.tools ## a manylinux2014 abi3 wheel in dist/, its tag and size checked
	rm -f dist/*.whl
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/maturin build --release --zig \
		--compatibility manylinux2014 --out dist $(LOCKED)
	$(BIN)/python -c "$$CHECK_WHEEL"

.PHONY: clean
clean: ## remove what was built; .venv stays (it is gone with rm -rf .venv)
	rm -rf target dist rust/fuzz/target .pytest_cache .mypy_cache .ruff_cache \
		.import_linter_cache .hypothesis $(VENV)/.core
	find python tests benches -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f python/pkt/_core*.so

.PHONY: help
help: ## this list
	@awk 'BEGIN { FS = ":.*## " } \
		/^##@/ { printf "\n%s\n", substr($$0, 5) } \
		/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# The stamps: each says that a step was done, and is older than what would make it stale.

# A virtual environment that can build the package.
$(VENV)/.tools: pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python ≥ 3.11 found: make PYTHON=/path/to/python" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet 'maturin>=1.9,<2' 'setuptools>=70.1' ziglang
	touch $@

# The package, editable, with its dependencies and the developer's tools.
$(VENV)/.package: $(VENV)/.tools pyproject.toml
	$(PIP) install --no-build-isolation --editable '.[dev]'
	touch $@

# The Rust core, built again when its sources change.
$(VENV)/.core: $(VENV)/.package $(RUST)
	$(BIN)/maturin develop --release --skip-install $(LOCKED)
	touch $@

define CHECK_WHEEL
from pathlib import Path
(wheel,) = Path("dist").glob("*.whl")
tag, size = wheel.stem.split("-", 2)[2], wheel.stat().st_size
assert tag.startswith("cp311-abi3-") and "manylinux2014" in tag, f"unexpected tag {tag}"
assert size < 3_000_000, f"{wheel}: {size} bytes; expected less than 3 MB"
print(f"{wheel}: {size / 1e6:.2f} MB")
endef
export CHECK_WHEEL
