#!/usr/bin/env bash
# On a machine with a GPU and an installed torch: build with CUDA, run every test that runs on a GPU, the
# sanitizers on small cases of every op, and the bench; a short table comes last.
# Usage: tests/gpu.sh [LOG_DIR]; SITE=DIR takes a build that is there already.
set -uo pipefail
cd "$(dirname "$0")/.."
logs=${1:-build/gpu}
mkdir -p "$logs"
if [ -z "${SITE:-}" ]; then
  SITE=$PWD/build/gpu/site
  BASED_CUDA=ON python3 -m pip install -q --no-build-isolation --no-deps --upgrade --target "$SITE" . \
    2>&1 | tee "$logs/install.log" || exit 1
fi
export PYTHONPATH=$SITE
cuobjdump --list-elf --list-ptx "$SITE"/based_ops/_C*.so >"$logs/architectures.log" 2>&1

# Tests on a GPU have it in their name; compiled code is worth a run there whatever the device.
python3 -m pytest tests/python -k "cuda or gpu or test_compile" 2>&1 | tee "$logs/pytest.log"
for tool in memcheck racecheck synccheck; do
  compute-sanitizer --tool $tool --error-exitcode 1 python3 tests/python/small_cases.py 2>&1 | tee "$logs/$tool.log"
done
python3 bench/run.py --device cuda 2>&1 | tee "$logs/bench.log"

echo
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
printf '%-14s%s\n' code "$(grep -o 'sm_[0-9a-z]*' "$logs/architectures.log" | sort | uniq -c | xargs)"
printf '%-14s%s\n' pytest "$(tail -n 1 "$logs/pytest.log")"
for tool in memcheck racecheck synccheck; do
  printf '%-14s%s\n' $tool "$(grep SUMMARY "$logs/$tool.log" | tail -n 1)"
done
printf '%-14s%s\n' bench "$(grep '^targets met' "$logs/bench.log" | tail -n 1)"
