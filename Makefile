# Every target sets up what it needs in .venv first, once: all it takes is make and a Python 3.10, 3.11 or 3.12.
# Only test-gpu and bench-gpu install what a GPU needs: several GB, for Python 3.11 or 3.12.
#
#   PYTHON      the interpreter for .venv; by default the first of the ones below that works
#   PIP_ARGS    more arguments for pip. On Linux, PyPI's torch brings several GB of CUDA libraries along, which nothing
#               here needs on a CPU. PyTorch's own index has a CPU build of the same version:
#                   make test PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
#               With that build, bench-gpu has no torch to compare with.
#   ARGS        more arguments for pytest: make test ARGS="-k sampler"
#   WORKERS     processes that share the tests: make test WORKERS=0 runs them in pytest's own
#   MODELS      what to measure: make bench-gpu MODELS=cogvideox-5b
#   MINUTES     how long a soak takes: make soak MINUTES=60
#   ADDRESS     a server that runs, for fuzz, instead of one it starts: make fuzz ADDRESS=http://127.0.0.1:8000
#   GPU_EXTRAS  what test-gpu and bench-gpu need besides; without TensorRT: make test-gpu GPU_EXTRAS=cuda

PYTHONS := python3.11 python3.12 python3.10 python3
EXTRAS := export,video,report,dev
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
WORKERS := 2
SPREAD := --numprocesses=$(WORKERS) --dist=loadfile
GPU_EXTRAS := cuda,tensorrt
GPU_READY := $(VENV)/ready-$(GPU_EXTRAS)
GPU_INDEX := https://pypi.nvidia.com
DEMO := out/demo
MODELS := latte cogvideox-2b open-sora wan-1.3b
MINUTES := 10
ADDRESS :=

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-all test-page test-ray test-triton check-deploy test-rtx test-gpu test-simulated-gpu bench-gpu soak fuzz lint format demo-train clean

help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 27

demo: $(READY) ## export the demo checkpoint and make a video with it: without reuse, by default, by a tuned profile
	@mkdir -p $(DEMO)
	$(BIN)/python cli.py export --model latte-demo
	$(BIN)/python cli.py run --bundle bundles/latte-demo --prompt "a red circle moving right" --seed 0 --compare \
		--output $(DEMO)/video.mp4 --report $(DEMO)/report.html --trace $(DEMO)/trace.json
	$(BIN)/python cli.py run --bundle bundles/latte-demo --prompt "a red circle moving right" --seed 0 --compare \
		--profile balanced --output $(DEMO)/balanced.mp4 --report $(DEMO)/balanced.html --trace $(DEMO)/balanced.json
	@echo
	@echo "The videos are $(DEMO)/video.mp4, by the default policy, and $(DEMO)/balanced.mp4, by a profile tuned for this model."
	@echo "What each skipped, and what that changed: open $(DEMO)/report.html and $(DEMO)/balanced.html in a browser;"
	@echo "in numbers, $(DEMO)/trace.json and $(DEMO)/balanced.json."

test: $(READY) ## run the tests, but for the slow ones
	$(BIN)/python -m pytest $(SPREAD) $(ARGS)

test-all: $(READY) ## run all tests that need no GPU
	$(BIN)/python -m pytest -m "not gpu and not browser and not ray and not triton" $(SPREAD) $(ARGS)

test-rtx: $(READY) ## build engines of real size with TensorRT-RTX, without a GPU, and check their memory
	$(BIN)/python -m pytest -m rtx $(ARGS)

test-page: $(READY) ## the server's page in a browser: needs Chromium, CHROMIUM says where
	$(BIN)/python -m pip install "playwright>=1.50" $(PIP_ARGS)
	$(BIN)/python -m pytest -m browser tests/serving $(ARGS)

test-ray: $(READY) ## batches and the server on a cluster of Ray on this machine; installs Ray (500 MB)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[ray]" --constraint constraints.txt $(PIP_ARGS)
	$(BIN)/python -m pytest -m ray $(ARGS)

# Of PyTriton only the server that it brings along is used, and numpy 1, which that server needs, is for it alone.
test-triton: $(READY) ## a model repository in Triton Inference Server on this machine; installs that (220 MB)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "tritonclient[grpc]>=2.60" $(PIP_ARGS)
	test -d $(VENV)/triton/pytriton || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--target $(VENV)/triton "nvidia-pytriton==0.7.0" "numpy<2" $(PIP_ARGS)
	$(BIN)/python -m pytest -m triton $(ARGS)

check-deploy: $(READY) ## the manifest for Kubernetes, against its schemas; installs those
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "kubernetes-validate>=1.37" $(PIP_ARGS)
	$(BIN)/kubernetes-validate --strict deploy/cpu/foresight.yaml

test-gpu: $(GPU_READY) ## on a machine with an NVIDIA GPU: contract, parity and isolation on every backend there is
	$(BIN)/python -m tests.gpu $(ARGS)

test-simulated-gpu: $(READY) ## what test-gpu runs, on a simulated GPU: everything but kernels
	PYTHONPATH=tests/simulation/modules:. $(BIN)/python -m tests.gpu $(ARGS)

bench-gpu: $(GPU_READY) ## on a machine with an NVIDIA GPU: measure models of real size, those in MODELS
	for model in $(MODELS); do $(BIN)/python -m benchmarks.gpu --model $$model --save $(ARGS) || exit 1; done

soak: $(READY) ## a server under mixed, cancelled and failing requests for MINUTES, 10 unless told; needs the bundle of make demo
	$(BIN)/python -m tests.serving.soak --minutes $(MINUTES) $(ARGS)

fuzz: $(READY) ## 2,000 cases of the OpenAPI document, sent to a server that it starts; installs schemathesis
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "schemathesis>=4.32" $(PIP_ARGS)
	$(BIN)/python -m tests.serving.fuzz $(if $(ADDRESS),--address $(ADDRESS)) $(ARGS)

lint: $(READY) $(VENV)/stubs ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(READY) ## format the code, and fix what can be fixed safely
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

demo-train: $(READY) ## train the demo checkpoints from nothing; can be interrupted, and goes on when called again
	$(BIN)/python -m demo.train --model latte
	$(BIN)/python -m demo.train --model cogvideox
	$(BIN)/python -m demo.train --model open_sora
	$(BIN)/python -m demo.train --model wan

clean: ## remove what the targets above made, except .venv, the trained checkpoint and other bundles
	rm -rf $(DEMO) bundles/latte-demo build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# Type stubs of TensorRT, read off the TensorRT-RTX that `dev` installs on Linux x86-64; elsewhere it stays unchecked.
$(VENV)/stubs: $(READY) tests/tensorrt_stubs.py
	@if $(BIN)/python -c "import tensorrt_rtx_bindings" 2>/dev/null; then \
		$(BIN)/python -m tests.tensorrt_stubs $@; \
	else mkdir -p $@; fi
	@touch $@

# Commands of that name may exist and yet not run, or come without what makes a virtual environment.
SUITABLE := import ensurepip, sys, venv; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))

# The link lets type checkers find this folder under the name of the package; see [tool.mypy] in pyproject.toml.
$(READY): pyproject.toml constraints.txt
	@if $(BIN)/python -c "$(SUITABLE)" 2>/dev/null; then exit 0; fi; \
	for python in $(or $(PYTHON),$(PYTHONS)); do \
		if $$python -c "$(SUITABLE)" >/dev/null 2>&1; then \
			echo "Making $(VENV) with $$($$python -V)."; \
			exec $$python -m venv --clear $(VENV); \
		fi; \
	done; \
	echo "No Python 3.10, 3.11 or 3.12 with venv among: $(or $(PYTHON),$(PYTHONS)). Name one: make PYTHON=/path/to/python" >&2; \
	exit 1
	@mkdir -p $(VENV)/src && ln -sfn ../.. $(VENV)/src/foresight
	@echo "Installing into $(VENV); the first time, this takes some minutes."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$(EXTRAS)]" --constraint constraints.txt $(PIP_ARGS)
	@touch $@

# onnxruntime and onnxruntime-gpu unpack into one folder: what stays there has to be the GPU one, see pyproject.toml.
$(GPU_READY): $(READY)
	@$(BIN)/python -c "import sys; sys.exit(sys.version_info < (3, 11))" || { \
		echo "$(VENV) has $$($(BIN)/python -V), expected 3.11 or 3.12, which onnxruntime-gpu needs. Remove $(VENV), and name one: make PYTHON=/path/to/python" >&2; \
		exit 1; \
	}
	@echo "Installing $(GPU_EXTRAS) into $(VENV); the first time, this takes some minutes."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$(GPU_EXTRAS)]" --extra-index-url $(GPU_INDEX) --constraint constraints.txt $(PIP_ARGS)
	$(BIN)/python -m pip uninstall --quiet --yes onnxruntime onnxruntime-gpu
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps "onnxruntime-gpu>=1.31" --constraint constraints.txt $(PIP_ARGS)
	@touch $@
