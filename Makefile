# One front door: the same names by hand and in continuous integration.
PYTHON ?= python3
BIN := .venv/bin

# The package's build compiles it.
KERNEL := $(wildcard attention/native/*.cpp attention/native/*.h) attention/native/build.py hatch_build.py

.PHONY: help setup demo docs test test-slow test-clients package test-rdma rdma-packages rdma-kernel check format bench soak checkpoint clean

help:            ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */\t/' | expand -t 15

setup: .venv/ready   ## make .venv with everything that the other targets need

.venv/ready: pyproject.toml constraints.txt $(KERNEL)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Lamina needs Python >= 3.11, this is " + sys.version)'
	@echo 'Making .venv (1/3): an empty Python environment.'
	@$(PYTHON) -m venv .venv
	@echo 'Making .venv (2/3): torch and the other packages: 1.5 GB, or 5 if torch comes with CUDA (docs/install.md).'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable '.[dev]'
	@echo 'Making .venv (3/3): compiling them for Python on all cores, half a minute.'
	@# pip would compile with one core. A few packages ship templates that are no Python, which is no failure.
	@$(BIN)/python -c 'import compileall; compileall.compile_dir(".venv/lib", quiet=2, workers=0)'
	@# pip hides what the package's build says.
	@test -e attention/native/liblamina_attention.so || echo 'lamina: the native attention kernel was not compiled, so memory nodes are several times slower; install g++ and run: $(BIN)/python -m lamina.attention.native.build'
	@touch $@
	@echo 'Made .venv.'

demo: setup      ## run one compute and two memory nodes on this machine and compare with transformers
	$(BIN)/lamina demo

test: setup      ## the fast tests; those over RDMA too, where its kernel has been built
	$(BIN)/python -m pytest -rs --numprocesses 2 --dist worksteal

test-slow: setup ## the long tests
	$(BIN)/python -m pytest -rs -m slow --ignore tests/clients

test-clients: setup  ## programs that others wrote against the endpoint; once they need the package indexes, half an hour and 7 GB
	$(BIN)/python -m pytest -rs -m 'slow or not slow' --durations 10 tests/clients $(if $(CLIENT),-k $(CLIENT))

package: setup   ## build sdist and wheel, install them where nothing else is, run the demo and a few tests
	$(BIN)/python -m pytest -rs -m slow --durations 0 --durations-min 1 tests/packaging

test-rdma: setup rdma-kernel  ## the tests over RDMA, which need Debian but no adapter
	$(BIN)/python -m pytest -rs tests/rdma

rdma-packages:   ## install what those need (as root)
	$(PYTHON) tests/rdma/uml.py --install

rdma-kernel:     ## build the user-mode kernel that those run under (once, three minutes)
	$(PYTHON) tests/rdma/uml.py --build

check: setup     ## format, lint, types, import directions
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror attention/native/*.cpp attention/native/*.h lamina/model/*.cpp
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup    ## format the code and mend what the linter can
	$(BIN)/ruff format .
	$(BIN)/clang-format -i attention/native/*.cpp attention/native/*.h lamina/model/*.cpp
	$(BIN)/ruff check --fix .

bench: setup     ## all benchmarks, each beside its yardstick
	$(BIN)/lamina bench all

docs: setup      ## build the pages of docs/ into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

soak: setup      ## an hour of links at full rate, which must not grow
	$(BIN)/python -m lamina.bench.soak --minutes 60

checkpoint: setup  ## train the demo checkpoint again (about 25 minutes on 2 cores)
	$(BIN)/python -m lamina.demo.train

clean:           ## remove what setup and the tools made
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis dist site attention/native/*.so
