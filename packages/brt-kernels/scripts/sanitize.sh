#!/bin/sh
# Build the CPU library with AddressSanitizer and UBSan and run the tests on it; arguments go to pytest.
set -eu
package=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
build=$package/build/asan
cmake -S "$package" -B "$build" -G Ninja -DBRT_CUDA=OFF -DBRT_SANITIZE=address,undefined \
  -DPython_EXECUTABLE="$(command -v "$python")" >/dev/null
ninja -C "$build"
# A package of its own, so that the library with sanitizers is the one that loads
mkdir -p "$build/site"
rm -rf "$build/site/brt_kernels"
cp -r "$package/src/brt_kernels" "$build/site/"
cp "$build/libbrt_kernels_cpu.so" "$build/site/brt_kernels/"
export PYTHONPATH="$build/site${PYTHONPATH:+:$PYTHONPATH}"
# leaks: Python and torch never free some of what they allocate
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1
LD_PRELOAD="$(gcc -print-file-name=libasan.so):$(gcc -print-file-name=libubsan.so):$(gcc -print-file-name=libstdc++.so)"
export LD_PRELOAD
# An editable installation's finder comes before PYTHONPATH: leave it out
exec "$python" -c '
import sys
sys.meta_path = [f for f in sys.meta_path if not type(f).__name__.startswith("ScikitBuild")]
import brt_kernels, pytest
print(brt_kernels.__file__)
sys.exit(pytest.main(sys.argv[1:]))
' "$package/tests" -q -p no:cacheprovider -m "not cuda" "$@"
