# Everything a newcomer needs. `make demo` and `make test` do all set-up themselves; the only
# requirements are make and Python 3.11 or newer. What is installed is pinned by hash in
# requirements/ and lives in .uv and .venv, here in the folder.

PYTHON ?= python3
DEMO_ARGS ?=
CHECK_ARGS ?=
LOCK_ARGS ?=

UV := .uv/bin/uv
BIN := .venv/bin
DEMO_READY := .venv/demo.ready
DEV_READY := .venv/dev.ready
BACKBONE := requirements/backbone.txt
PINS := requirements/uv.txt requirements/demo.txt requirements/dev.txt
COMPILE := $(UV) pip compile --no-config --quiet --universal --python-version 3.11 \
	--generate-hashes --no-emit-index-url --custom-compile-command 'make lock' $(LOCK_ARGS)

# The largest packages are gigabytes: a slow connection is no reason to give up.
export UV_HTTP_TIMEOUT ?= 300

.PHONY: help demo test check lock clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

help:
	@echo 'make demo   run the whole path on a real model and real images (DEMO_ARGS=...)'
	@echo 'make test   format, lint, types, architecture and tests (CHECK_ARGS=tests/storage)'
	@echo 'make lock   pin the requirements anew (LOCK_ARGS=--upgrade for the newest)'
	@echo 'make clean  delete the environment and every cache'
	@echo 'Another Python: make test PYTHON=python3.12'

demo: $(DEMO_READY)
	$(BIN)/visae demo $(DEMO_ARGS)

test: $(DEV_READY)
	scripts/check $(CHECK_ARGS)

check: test

# A set of packages is marked as ready after the last step. While it is being installed nothing is
# ready, and the mark "installing" stands: the run after an interrupted one starts with a new .venv.
define install
	@test ! -e .venv/installing || rm -rf .venv
	@test -x $(BIN)/python || $(UV) venv --quiet --clear --python .uv/bin/python .venv
	@rm -f .venv/*.ready && touch .venv/installing
	$(UV) pip install --python $(BIN)/python --no-deps --require-hashes -r $(1) -r $(BACKBONE)
	$(UV) pip install --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@rm .venv/installing
	@touch $@
endef

$(DEMO_READY): requirements/demo.txt $(BACKBONE) pyproject.toml | .uv/ready
	$(call install,requirements/demo.txt)

$(DEV_READY): requirements/dev.txt $(BACKBONE) pyproject.toml | .uv/ready
	$(call install,requirements/dev.txt)
	@touch $(DEMO_READY)

.uv/ready: requirements/uv.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "visae needs Python 3.11 or newer; $(PYTHON) --version says:"; \
		$(PYTHON) --version; \
		echo 'Name another one, for example: make test PYTHON=python3.12'; exit 1; } >&2
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) cannot make virtual environments: install its venv package"; \
		echo '(on Debian and Ubuntu: apt install python3-venv).'; exit 1; } >&2
	$(PYTHON) -m venv --clear .uv
	.uv/bin/python -m pip install --quiet --disable-pip-version-check \
		--require-hashes --only-binary :all: -r requirements/uv.txt
	@touch $@

# All pins come from pyproject.toml; those of the demo are the same as those of development. The
# last line refuses a pin that names an index or a file: they must install from any mirror.
lock: .uv/ready
	$(COMPILE) --group bootstrap -o requirements/uv.txt
	$(COMPILE) pyproject.toml --extra demo --extra dev --group install -o requirements/dev.txt
	$(COMPILE) pyproject.toml --extra demo --group install -c requirements/dev.txt \
		-o requirements/demo.txt
	@! grep -nE '://|--(index|extra-index|find-links)| @ ' $(PINS)

clean:
	rm -rf .venv .uv .coverage htmlcov dist build .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
