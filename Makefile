# make demo | make test | make lint | make bench | make gpu-report PYTHON=python3 OUT=dir | make clean
PYTHON ?= python3
OUT ?= out/gpu-report
VENV := .venv
PY := $(VENV)/bin/python
FASTNCE := $(VENV)/bin/fastnce
INSTALLED := $(VENV)/.installed
PIP_INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check

DEMO := demo
SEED ?= 0
PHOTO ?= coffee
DATA := $(DEMO)/digits-photos-$(PHOTO)
RUN := $(DEMO)/cut-seed$(SEED)
RUN_WITHOUT_NCE := $(DEMO)/cut-without-nce-seed$(SEED)
TRAIN := $(FASTNCE) train cut --preset digits --data $(DATA) --seed $(SEED)

.PHONY: demo test lint format bench gpu-report install native clean

demo: install
	@$(FASTNCE) doctor
	@$(FASTNCE) data digits-photos --out $(DATA) --photo $(PHOTO)
	@$(TRAIN) --out $(RUN)
	@$(TRAIN) --out $(RUN_WITHOUT_NCE) --lambda-nce 0
	@$(FASTNCE) translate --run $(RUN) --input $(DATA)/testA --out $(RUN)/translated
	@$(FASTNCE) evaluate --run $(RUN) --data $(DATA) --without-nce $(RUN_WITHOUT_NCE)
	@test -f $(DEMO)/benchmark/demo.md || $(PY) -m benchmarks demo --seconds 30 --out $(DEMO)/benchmark
	@cat $(DEMO)/benchmark/demo.md
	@echo
	@echo "Done. Look at:"
	@echo "  $(RUN)/samples/            digits before and after translation, over the training"
	@echo "  $(RUN)/translated/         every test digit, translated"
	@echo "  $(RUN)/loss.png            the losses"
	@echo "  $(RUN)/metrics.md          content accuracy, FID and KID beside their baselines"
	@echo "  $(DEMO)/benchmark/demo.md  fused losses against plain PyTorch"

test: install
	$(PY) -m pytest -q

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h')
	$(VENV)/bin/mypy

format: install
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $$(git ls-files 'csrc/*.cpp' 'csrc/*.h')

bench: install
	$(PY) -m benchmarks all --out out/benchmarks

# Runs with the torch that $(PYTHON) already has: no network, no virtual environment.
gpu-report:
	$(PYTHON) -m benchmarks gpu-report --out $(OUT)

install: $(INSTALLED) native

$(INSTALLED): requirements.txt pyproject.toml setup.py
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "Installing the packages of requirements.txt into $(VENV) ..."
	@$(PIP_INSTALL) -r requirements.txt
	@$(PIP_INSTALL) --no-build-isolation --no-deps --editable .
	@touch $@

# Compiles what has changed, in a moment if nothing has.
native: $(INSTALLED)
	@$(FASTNCE) build

clean:
	rm -rf $(VENV) build dist out $(DEMO) *.egg-info fastnce/*.so
