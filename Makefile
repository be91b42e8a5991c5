# Every target is one command; CI calls the same ones. PYTHON is the interpreter that makes .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test chaos bench lint gpu clean

setup: .venv/.ready

.venv/.ready: pyproject.toml setup.py constraints.txt $(shell find csrc -type f 2>/dev/null)
	$(PYTHON) -m venv .venv && $(BIN)/pip install -q --no-deps -r constraints.txt && $(BIN)/pip install -q --no-build-isolation --no-deps -e . && touch $@

demo: setup
	$(BIN)/xray demo

test: setup
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=12

# Training killed 24 times at random moments; a small version is among the tests.
chaos: setup
	$(BIN)/python tests/chaos.py

bench: setup
	$(BIN)/python -m pytest bench/ --benchmark

lint: setup
	$(BIN)/ruff check && $(BIN)/ruff format --check && $(BIN)/mypy && $(BIN)/clang-format --dry-run --Werror $$(find csrc -type f)

# On a machine with a CUDA device and its own PyTorch, without network: build, parity, benchmarks, within 10 minutes; and a
# copy of the result files in the folder OUT when that is set. A failed test does not stop the benchmarks, which check too.
gpu:
	XRAY_CUDA=1 $(PYTHON) -m pip install -q --no-build-isolation --no-deps -e . && { timeout -s INT 180 $(PYTHON) -m pytest -q tests/test_gpu.py; tests=$$?; timeout -s INT 330 $(PYTHON) -m pytest bench/bench_attention.py bench/bench_contrastive_loss.py bench/bench_token_reorganize.py bench/bench_encoder.py bench/bench_training.py --benchmark; status=$$?; if [ -n "$$OUT" ]; then cp -r bench/results/cuda-* "$$OUT"; fi; exit $$((tests + status)); }

clean:
	rm -rf .venv build *.egg-info xray_kernels/*.so .pytest_cache .mypy_cache .ruff_cache runs
