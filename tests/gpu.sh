#!/usr/bin/env bash
# On a machine with a GPU and an installed torch: build with CUDA, run the GPU tests, then the sanitizers
# on small cases of every kernel. Usage: tests/gpu.sh [LOG_DIR]
set -euo pipefail
cd "$(dirname "$0")/.."
logs=${1:-build/gpu}
mkdir -p "$logs"
export BASED_CUDA=ON PYTHONPATH=$PWD/build/gpu/site
python3 -m pip install -q --no-build-isolation --no-deps --upgrade --target build/gpu/site . 2>&1 | tee "$logs/install.log"
cuobjdump --list-elf --list-ptx build/gpu/site/based_ops/_C*.so | tee "$logs/architectures.log"
tests="tests/python/test_taylor_feature_map.py tests/python/test_cuda.py"
python3 -m pytest $tests -k cuda 2>&1 | tee "$logs/pytest.log"
for tool in memcheck racecheck; do
  compute-sanitizer --tool $tool --error-exitcode 1 python3 -m pytest $tests \
    -k "cuda and (matches_definition or strided)" 2>&1 | tee "$logs/$tool.log"
done
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
tail -n 2 "$logs"/*.log
