#!/bin/sh
# On a machine with an NVIDIA GPU: install wheels, run the CUDA tests, the benchmark and the sanitizer. Builds nothing.
#
#   sh packages/brt-kernels/scripts/gpu_check.sh WHEELS OUT [tests|bench|sanitizer]...
#
# WHEELS is a folder with brt_kernels-*.whl and, where the machine has none, those of pluggy and pytest; brt-core is
# taken from this checkout. OUT gets junit.xml, bench.json and sanitizer.txt. Without a third argument, all three run.
set -eu
here=$(cd "$(dirname "$0")/../../.." && pwd)
wheels=$1
out=$2
shift 2
what=${*:-tests bench sanitizer}
mkdir -p "$out"
site=$(mktemp -d)
python3 -m pip install --quiet --no-index --no-deps --target "$site" "$wheels"/*.whl
PYTHONPATH=$site:$here/packages/brt-core/src:$here/packages/brt-kernels/tests
BRT_REQUIRE_CUDA=1
export PYTHONPATH BRT_REQUIRE_CUDA
python3 -c 'import torch; from brt_kernels._load import load; print(torch.__version__, torch.cuda.get_device_name(), load())'
status=0
for part in $what; do
  case $part in
    tests)
      python3 -m pytest "$here/packages/brt-kernels/tests" -m cuda -q -p no:cacheprovider \
        --junitxml="$out/junit.xml" || status=1 ;;
    bench)
      python3 "$here/packages/brt-kernels/benchmarks/gpu.py" "$out/bench.json" || status=1 ;;
    sanitizer)
      for tool in memcheck racecheck; do
        compute-sanitizer --tool "$tool" --error-exitcode 1 python3 -m pytest "$here/packages/brt-kernels/tests" \
          -m cuda -q -p no:cacheprovider -k "one-path or some or transposed or compact" -x \
          >"$out/sanitizer-$tool.txt" 2>&1 || status=1
        tail -n 5 "$out/sanitizer-$tool.txt"
      done ;;
    *) echo "gpu_check.sh: tests, bench or sanitizer, not $part" >&2; exit 2 ;;
  esac
done
exit $status
