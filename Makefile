# make serve   make the environment, fetch the default model, serve it on port 8000; Ctrl-C ends it
# make demo    against a running server: ask, teach one example, ask again
# make test    the same environment, then lint, types, tests
# make check   lint and types only
# make watch   Prometheus over a running server, on port 9090; see docs/observability.md
# make clean   remove the environment and caches (models stay under REVERIE_HOME)

MODEL  ?= smollm2-135m
PORT   ?= 8000
EXTRA  ?= cpu
PYTHON ?= python3

BEGUN := $(shell date +%s)
VENV := .venv
BIN  := $(VENV)/bin
LOG  := $(VENV)/install.log
# A stamp is written last: an environment without one was interrupted, and is made anew.
BASE := $(VENV)/made-$(EXTRA)
DEV  := $(VENV)/made-$(EXTRA)-dev
LOCK := $(if $(filter cpu,$(EXTRA)),requirements-cpu.lock)

# Bytecode is compiled at the first import of a module, and not for all of torch at once; so it must
# be kept, whatever the caller's environment says: Ray starts many processes.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/python -m pip install --quiet --no-input --no-compile --disable-pip-version-check
TORCH_INDEX := https://download.pytorch.org/whl/cpu

ifeq ($(filter cpu cuda,$(EXTRA)),)
$(error EXTRA=$(EXTRA) is unknown; use EXTRA=cpu or EXTRA=cuda)
endif

.PHONY: serve demo watch test check environment clean
.SILENT:
.ONESHELL:
.SHELLFLAGS := -ec

# The shell is replaced, so that Ctrl-C reaches `reverie` and nothing else.
serve: environment
	printf '[%5d s] environment\n' $$(($$(date +%s) - $(BEGUN)))
	export REVERIE_ELAPSED_S=$$(($$(date +%s) - $(BEGUN)))
	exec $(BIN)/reverie up --model '$(MODEL)' --port '$(PORT)'

demo: environment
	exec $(BIN)/reverie demo --port '$(PORT)'

watch:
	command -v prometheus >/dev/null \
		|| { echo "make: there is no prometheus; install it (Debian: apt-get install prometheus)" >&2; exit 1; }
	place="$${REVERIE_HOME:-$$HOME/.reverie}/prometheus"
	mkdir -p "$$place"
	sed 's/127\.0\.0\.1:8000/127.0.0.1:$(PORT)/' observability/prometheus.yml >"$$place/prometheus.yml"
	exec prometheus --config.file="$$place/prometheus.yml" --web.listen-address=127.0.0.1:9090 \
		--storage.tsdb.path="$$place"

test: check
	$(BIN)/python -m pytest

check: $(DEV)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

environment: $(BASE)

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BASE): pyproject.toml $(LOCK)
	fail() { echo "make: $$1" >&2; exit 1; }
	logged() {
		"$$@" >>$(LOG) 2>&1 && return
		tail -n 20 $(LOG) >&2
		fail "the environment was not made; all of pip's words are in $(LOG)"
	}
	command -v '$(PYTHON)' >/dev/null \
		|| fail "there is no $(PYTHON); install Python 3.11 or newer, or say make PYTHON=PATH"
	'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| fail "$(PYTHON) is $$('$(PYTHON)' -V); Reverie needs 3.11 or newer: make PYTHON=PATH"
	'$(PYTHON)' -c 'import ensurepip, venv' 2>/dev/null \
		|| fail "$(PYTHON) lacks venv; install it (Debian: apt-get install python3-venv)"
	[ -e $@ ] || rm -rf $(VENV)
	rm -f $(VENV)/made-*
	echo "making the environment in $(VENV), some minutes the first time (log: $(LOG))"
	[ -x $(BIN)/python ] || '$(PYTHON)' -m venv $(VENV)
	: >$(LOG)
	if [ $(EXTRA) = cpu ]; then
		# First where pip already looks; only if that has no such build, PyTorch's own index.
		torch=$$(grep '^torch==' $(LOCK))
		$(PIP) --no-deps "$$torch" >>$(LOG) 2>&1 \
			|| logged $(PIP) --no-deps --extra-index-url $(TORCH_INDEX) "$$torch"
		logged $(PIP) --no-deps -r $(LOCK)
		logged $(PIP) --no-deps --no-build-isolation -e .
	else
		logged $(PIP) -e '.[$(EXTRA)]'
	fi
	touch $@

$(DEV): $(BASE) requirements-dev.lock requirements-triton.lock
	logged() {
		"$$@" >>$(LOG) 2>&1 || { tail -n 20 $(LOG) >&2; echo "make: see $(LOG)" >&2; exit 1; }
	}
	logged $(PIP) --no-deps -r requirements-dev.lock
	# Apart, for one test: vLLM's CPU build fails where triton can be imported.
	rm -rf $(VENV)/triton
	logged $(PIP) --no-deps --target $(VENV)/triton -r requirements-triton.lock
	touch $@
