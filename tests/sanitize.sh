#!/usr/bin/env bash
# csrc/ under AddressSanitizer and UBSan, by the tests of the loss; results/sanitize.txt
#
#     PYTHON=.venv/bin/python [FUZZ_SECONDS=60] tests/sanitize.sh [options of pytest]
#
# The tests of the loss, then tests/fuzz.py. Minutes; needs g++ with its libasan.
#
# Left out: torch.compile and opcheck, which start compilers of their own and reach the same C++; training;
# test_build.py, whose processes look for compilers; vptr, which wants type information of torch's classes.
# -O2: with less, g++ fuses no product with a sum, and test_exp sees it.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export CXX=${CXX:-g++} OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
export CFLAGS="-O2 -g -fno-omit-frame-pointer -fsanitize=address,undefined"
CFLAGS+=" -fno-sanitize=vptr -fno-sanitize-recover=all"
T2T_CACHE=$(mktemp -d)                              # of its own: no other process should load this build
export T2T_CACHE
trap 'rm -rf "$T2T_CACHE"' EXIT

# Python is not instrumented, so the libraries come first by preload (libstdc++: ASan must see who throws).
# Python leaks when it ends, and that is its own business.
library() { "$CXX" -print-file-name="$1"; }
preload="$(library libasan.so) $(library libubsan.so) $(library libstdc++.so)"
log=$T2T_CACHE/log
start=$SECONDS
sanitized() {
  LD_PRELOAD=$preload ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
    "$PYTHON" "$@"
}
sanitized -m pytest -q -p no:cacheprovider tests/test_ext.py tests/test_loss.py \
  -k "not compile and not opcheck and not training" "$@" 2>&1 | tee "$log"
status=${PIPESTATUS[0]}
sanitized tests/fuzz.py --seconds "${FUZZ_SECONDS:-60}" 2>&1 | tee "$log.fuzz"
fuzzed=${PIPESTATUS[0]}
cat "$log" "$log.fuzz" > "$log.all"

# A planted error, logits of 800 bytes in 64, must be seen: else this script would always say "clean".
control=$(sanitized -c "
import torch, build_ext
build_ext.load(build=False)
x = torch.zeros(5, 40)
x.untyped_storage().resize_(64)
torch.ops.t2t.kl_loss(x, torch.zeros(5, 1).long(), torch.ones(5, 1))" 2>&1 |
  grep -c "AddressSanitizer: heap-buffer-overflow")

findings=$(grep -cE "ERROR: AddressSanitizer|runtime error:" "$log.all")
{
  echo tests/sanitize.sh "$@"
  echo "$(date -u +%F), $("$CXX" --version | head -1)," \
       "torch $("$PYTHON" -c 'import torch; print(torch.__version__)')," \
       "$(uname -m), $((SECONDS - start)) s with the build"
  echo "flags: $CFLAGS"
  echo "pytest: $(tail -1 "$log")"
  tail -1 "$log.fuzz"
  echo "planted error: $([ "$control" = 0 ] && echo "NOT SEEN: what follows means nothing" || echo seen)"
  if [ "$findings" = 0 ] && [ "$status$fuzzed" = 00 ]; then echo "clean"
  elif [ "$findings" = 0 ]; then echo "no finding of a sanitizer, but pytest ended with $status, fuzz with $fuzzed:"
    grep "^FAILED" "$log" | cut -c1-200
  else echo "$findings findings:"
    grep -E -A8 "ERROR: AddressSanitizer|runtime error:" "$log.all" | sed "s|$PWD/||g; s|/[^ ]*/||g" | head -60
  fi
} | tee results/sanitize.txt
[ "$status$fuzzed" = 00 ] && [ "$control" != 0 ]
