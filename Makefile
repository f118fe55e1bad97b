# The commands of the project; .ci/run runs them all.
.PHONY: test test-nojit lint format types bench wheel clean

test:
	pytest

# Numba's bounds checks do not reach inside parallel loops; plain Python's do. Slow, so only the kernels' own tests.
test-nojit:
	NUMBA_DISABLE_JIT=1 HYPOTHESIS_PROFILE=nojit pytest -q tests/kernels/test_kernels.py tests/heads/test_dense_head.py \
		tests/heads/test_tree_head.py tests/kernels/test_grad_norm.py tests/kernels/test_adamw.py tests/kernels/test_normuon.py \
		tests/kernels/test_ema.py tests/model/test_model.py tests/kernels/test_conv_mixer.py tests/kernels/test_ternary_gemv.py \
		tests/kernels/test_ternary_gemm.py tests/kernels/test_draw.py tests/kernels/test_packed_gemm.py tests/kernels/test_microkernels.py \
		tests/kernels/test_low_rank.py tests/kernels/test_ngram_index.py tests/kernels/test_ngrams.py tests/kernels/test_mlgru.py

lint:
	ruff check .
	ruff format --check .

format:
	ruff check --fix .
	ruff format .

types:
	mypy

bench:
	python tools/bench_head.py

wheel:
	rm -rf build dist
	pip wheel -q --no-deps --wheel-dir dist .

# Numba's files beside the sources would shadow a later installation
clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name '__pycache__' -prune -exec rm -rf {} +
	find . \( -name '*.nbi' -o -name '*.nbc' \) -delete
