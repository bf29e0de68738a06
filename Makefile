# The few commands of daily work. They use the python of the active environment.
PYTHON ?= python
CXX_FILES = $(shell git ls-files '*.h' '*.cpp' '*.cu')

.PHONY: install test lint format docs build asan cuda-asan cuda-tsan gpu bench

install:  ## everything a developer needs, editable
	$(PYTHON) -m pip install -e '.[dev]'

build:  ## compile what changed, in place, without pip
	$(PYTHON) setup.py build_ext --inplace

test:
	$(PYTHON) -m pytest -n auto

lint:
	ruff check .
	ruff format --check .
	clang-format --dry-run --Werror $(CXX_FILES)

format:
	ruff check --fix .
	ruff format .
	clang-format -i $(CXX_FILES)

docs:  ## the reference of the public functions and classes, from their docstrings: build/docs/index.html
	pdoc --docformat google --output-directory build/docs fused_preact

# A build of its own in build/asan, and the suite on it. Leaks are left out: python never frees all it has. New memory
# is filled with NaN (all bits one), so that a value used before it is written shows too. The C++ library is loaded
# early because AddressSanitizer looks for its exceptions when it starts, and python alone does not bring it. The build
# has only the kernels that this processor runs, so there are none to emulate for AVX-512; and it has no pool of memory
# to test.
ASAN_TESTS ?= tests --ignore=tests/test_pool.py --ignore=tests/test_workspace.py --ignore-glob='tests/test_avx512*.py'
SUPPORTED = $(PYTHON) -c 'from fused_preact import _extension as e; print(",".join(e.instruction_sets().supported))'
asan:
	CXXFLAGS="-fsanitize=address -fno-omit-frame-pointer -g1 -O1" LDFLAGS="-fsanitize=address" \
	    $(PYTHON) setup.py --quiet build --build-base build/asan --build-lib build/asan/lib build_ext --isas "$$($(SUPPORTED))"
	PYTHONPATH=build/asan/lib \
	    LD_PRELOAD="$(foreach library,libasan.so libstdc++.so,$(shell $(CXX) -print-file-name=$(library)))" \
	    ASAN_OPTIONS=detect_leaks=0:malloc_fill_byte=255:max_malloc_fill_size=1073741824 pytest -n 2 $(ASAN_TESTS)

# The CUDA kernels on the emulated device (docs/cuda-tests.md), every product in every schedule, under a sanitizer.
CUDA_CASES ?= (as_close and (odd or stride-2-1x1 or 264-to-8 or many-images or bottleneck-first) and not eval) or formula
cuda-asan:
	PYTHONPATH=tests $(PYTHON) -m emulation address -q tests/test_cuda.py tests/test_cuda_activate.py -k "$(CUDA_CASES)"

cuda-tsan:
	PYTHONPATH=tests $(PYTHON) -m emulation thread -q tests/test_cuda.py tests/test_cuda_activate.py -k "$(CUDA_CASES)"

gpu:  ## build, tests, memory and race checks and benchmarks on the GPU of this machine, where there is one
	PYTHON=$(PYTHON) .ci/gpu

bench:
	fused-preact bench
