#!/usr/bin/env bash
# On a machine with a GPU, nvcc, cmake and an installed torch: builds, runs what tests the GPU code, the
# sanitizers on small cases of every op, and the bench; a short table comes last. Fails if a part does.
#
#   tests/gpu.sh [PART ...]    of build, primitives, pytest, sanitizer, bench; all of them by default
#
# BASED_CUDA_ARCHITECTURES=GPUS  what build compiles for, as 90a-real: everything
# SITE=DIR          based_ops is built into, or there already when build is no part: build/gpu/site
# PRIMITIVES=DIR    the same of the C++ tests of cuda/primitives: build/gpu/cmake/tests/cpp
# LOGS=DIR          the output of every part: build/gpu
# TESTS=EXPRESSION  what pytest -k selects: tests that run on a GPU have it in their name
# OPS=NAMES         what the sanitizers run, as small_cases.py takes it: every op
# BENCH=OPTIONS     more options of bench/run.py, as --filter REGEX
set -uo pipefail
cd "$(dirname "$0")/.."
LOGS=${LOGS:-build/gpu} SITE=${SITE:-$PWD/build/gpu/site}
PRIMITIVES=${PRIMITIVES:-build/gpu/cmake/tests/cpp}
mkdir -p "$LOGS"
export PYTHONPATH=$SITE${PYTHONPATH:+:$PYTHONPATH}
parts=("${@:-build primitives pytest sanitizer bench}")
read -ra parts <<<"${parts[*]}"
table=$LOGS/table
: >"$table"

# step NAME SUMMARY COMMAND ...: its output on the screen and in NAME.log; in the table the last line of it that
# SUMMARY matches.
step() {
  local log=$LOGS/$1.log status=ok
  "${@:3}" 2>&1 | tee "$log"
  [ "${PIPESTATUS[0]}" = 0 ] || status=FAILED
  printf '%-12s%-8s%s\n' "$1" $status "$(grep -E "$2" "$log" | tail -n 1)" >>"$table"
}

build() {
  BASED_CUDA=ON python3 -m pip install -q --no-build-isolation --no-deps --upgrade --target "$SITE" . &&
    cmake -S . -B build/gpu/cmake -DBASED_CUDA=ON -DBASED_BUILD_TESTS=ON \
      ${BASED_CUDA_ARCHITECTURES:+"-DBASED_CUDA_ARCHITECTURES=$BASED_CUDA_ARCHITECTURES"} &&
    cmake --build build/gpu/cmake --target based_cuda_tests based_cuda_portable_tests --parallel
}

primitives() {
  "$PRIMITIVES/based_cuda_tests" && "$PRIMITIVES/based_cuda_portable_tests" &&
    compute-sanitizer --tool memcheck --error-exitcode 1 "$PRIMITIVES/based_cuda_tests"
}

for part in "${parts[@]}"; do
  case $part in
    build) step build "Linking" build ;;
    primitives) step primitives "ERROR SUMMARY|FAILED" primitives ;;
    pytest) step pytest "passed|failed" \
      python3 -m pytest tests/python -k "${TESTS:-cuda or gpu or test_compile}" ;;
    sanitizer) # side by side: mostly they wait for the host
      for tool in memcheck racecheck synccheck; do
        ops=${OPS:-}
        # The roles of the window's forward meet at one barrier from two places. PTX allows that, synccheck ends
        # the kernel with an error.
        [ $tool = synccheck ] && ops=${OPS:-linear_attention linear_attention_decode sliding_window_decode \
          short_conv short_conv_decode skinny_linear decode_block taylor_feature_map}
        # shellcheck disable=SC2086
        step $tool "SUMMARY" \
          compute-sanitizer --tool $tool --error-exitcode 1 python3 tests/python/small_cases.py $ops &
      done
      wait ;;
    # shellcheck disable=SC2086
    bench) step bench "^targets met" python3 bench/run.py --device cuda ${BENCH:-} ;;
    *) echo "tests/gpu.sh: part: expected build, primitives, pytest, sanitizer or bench, got $part" && exit 2 ;;
  esac
done

echo
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
cat "$table"
! grep -q FAILED "$table"
