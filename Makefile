# make demo | demo-contragan | test | test-kernels | test-dropins | triton-sweep | sanitize | faults | lint | format | docs | bench | gpu-report PYTHON=python3 OUT=dir | clean
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
CONTRAGAN := $(DEMO)/contragan-seed$(SEED)
TRAIN := $(FASTNCE) train cut --preset digits --data $(DATA) --seed $(SEED)

# A library of its own, so that neither the package's file nor its stamp is touched.
SANITIZED := out/sanitize/libfastnce_cpu.so
# The CUDA kernels in emulation: what they read and write beyond their tensors shows here.
SANITIZED_CUDA := out/sanitize/cuda/libfastnce_cuda_emulated.so
SANITIZE_CUDA_TESTS ?= cuda and (contract or strides)
SANITIZERS := -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all -fno-omit-frame-pointer -O1 -g1
SANITIZED_PYTEST = FASTNCE_BACKEND= \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:abort_on_error=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	$(PY) -m pytest -q -x -p no:faulthandler --capture=sys
# Of the tests of the ops those that run the kernels. Left out: what measures memory or time, which the sanitizers change, and
# PyTorch's own checks of the registration, which take long and say nothing about the kernels.
SANITIZE_TESTS ?= (native or test_maps) and not memory_does_not_grow and not fma_peak and not compile and not opcheck and not registered and not without_the_library

# Side by side, each on one thread (tests of threads set their number); who has none left takes some of the other's.
TEST_WORKERS ?= 2
TESTS_ENVIRONMENT := OMP_NUM_THREADS=1
PYTEST = $(PY) -m pytest -q -n $(TEST_WORKERS) --dist worksteal
# What compiles for GPUs, or runs their kernels on the host: minutes, and more than a newcomer needs.
OF_KERNELS := tests/triton_kernels tests/cuda_kernels

# The Triton kernels' tests on the host. Left out, for the interpreter is slow: what it cannot show, and more of the same.
INTERPRETED_TESTS ?= triton and not repeatable and not left_alone and not without_gradients and not transposed and not third

# The CUDA kernels' tests on the host.
EMULATED := out/cuda-emulated/libfastnce_cuda_emulated.so

# How threads wait, as in the commands (fastnce/waiting.py).
ifndef OMP_WAIT_POLICY
export GOMP_SPINCOUNT ?= 1000
endif

.PHONY: demo demo-contragan test test-kernels test-dropins triton-sweep sanitize faults lint format docs bench gpu-report install native clean

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

demo-contragan: install
	@$(FASTNCE) data digits --out $(DEMO)/digits
	@$(FASTNCE) train contragan --preset digits --data $(DEMO)/digits --seed $(SEED) --out $(CONTRAGAN)
	@$(FASTNCE) generate --run $(CONTRAGAN) --out $(CONTRAGAN)/generated --interpolation 10
	@$(FASTNCE) evaluate --run $(CONTRAGAN)
	@echo "Done. Look at $(CONTRAGAN)/generated/grid.png, samples/, measurements.png and metrics.md."

test: install
	$(TESTS_ENVIRONMENT) $(PYTEST) $(OF_KERNELS:%=--ignore=%)

test-kernels: install
	$(PY) -m tests.cuda_kernels.emulated
	$(TESTS_ENVIRONMENT) FASTNCE_CUDA_EMULATED=$(EMULATED) $(PYTEST) tests/cuda_kernels tests/ops/test_every_op.py tests/ops/test_registered_ops.py -k cuda
	$(TESTS_ENVIRONMENT) $(PYTEST) tests/triton_kernels
	$(TESTS_ENVIRONMENT) TRITON_INTERPRET=1 $(PYTEST) tests/ops/test_every_op.py tests/ops/test_labelled_lse.py tests/triton_kernels -k "$(INTERPRETED_TESTS)" -W ignore::RuntimeWarning

# The losses of other libraries against ours under their names. torch and pytest are those of $(VENV).
DROPINS := out/dropins-venv
test-dropins: install $(DROPINS)/.installed
	$(TESTS_ENVIRONMENT) FASTNCE_DROPINS=1 $(DROPINS)/bin/python -m pytest -q tests/integrations

SITE_PACKAGES := -c "import sysconfig; print(sysconfig.get_path('purelib'))"

$(DROPINS)/.installed: tests/integrations/requirements.txt $(INSTALLED)
	@$(PYTHON) -m venv $(DROPINS)
	@$(PY) $(SITE_PACKAGES) > $$($(DROPINS)/bin/python $(SITE_PACKAGES))/over.pth
	@echo "Installing the libraries of $< into $(DROPINS) ..."
	@$(DROPINS)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

# Mistakes made on purpose, and which test sees each: an hour; half of it where ccache compiles. Stopped, it goes on where it was.
faults: install
	$(TESTS_ENVIRONMENT) $(PY) -m tests.faults --jobs $(TEST_WORKERS)

# Every Triton kernel for all depths, dtypes and targets. Stopped, it goes on where it was.
triton-sweep: install
	$(PY) tests/triton_kernels/sweep.py --out benchmarks/results

sanitize: install
	@FASTNCE_LIBRARY=$(SANITIZED) CXX=g++ CXXFLAGS="$(SANITIZERS)" $(FASTNCE) build
	@CXX=g++ CXXFLAGS="$(SANITIZERS)" $(PY) -m tests.cuda_kernels.emulated $(SANITIZED_CUDA)
	FASTNCE_LIBRARY=$(SANITIZED) $(SANITIZED_PYTEST) tests/ops -k "$(SANITIZE_TESTS)"
	FASTNCE_CUDA_EMULATED=$(SANITIZED_CUDA) $(SANITIZED_PYTEST) tests/ops/test_every_op.py -k "$(SANITIZE_CUDA_TESTS)"

# The site, in out/site.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --site-dir out/site

$(VENV)/.docs: $(INSTALLED)
	@$(PIP_INSTALL) --no-build-isolation --editable '.[docs]'
	@touch $@

CXX_FILES := '*.cpp' '*.h' '*.cu' '*.cuh'

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $$(git ls-files $(CXX_FILES))
	$(VENV)/bin/mypy

format: install
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $$(git ls-files $(CXX_FILES))

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
