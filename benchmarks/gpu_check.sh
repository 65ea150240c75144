#!/usr/bin/env bash
# make gpu-check: what only a GPU can show, offline, with the packages of the Python that PYTHON names.
#
#   PYTHON=python3 benchmarks/gpu_check.sh [OUT [STEP...]]        default OUT: build/gpu-check; default: every step
#
# Builds for the card found, runs every test that has a CUDA side (a missing device or a skip is a failure),
# compute-sanitizer on the kernels, and all benchmarks: ops, loaders, training steps. Steps, in their order: build tests
# memcheck racecheck initcheck synccheck benchmarks crossover ops loaders step. SSLFAST_BENCH_IMAGES names a folder of
# JPEGs for loaders and step; without it they run on made-up images. OUT gets the logs, JSON files and summary.md.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${1:-build/gpu-check}
[ $# -gt 0 ] && shift
chosen=" $* "
mkdir -p "$out"
export PYTHONPATH=$PWD SSLFAST_REQUIRE_CUDA=1
failed=0

step() { # step NAME COMMAND...: runs it into OUT/NAME.log and notes how it ended
  local name=$1 start=$SECONDS
  shift
  case "$chosen" in "  " | *" $name "*) ;; *) return ;; esac
  if "$@" >"$out/$name.log" 2>&1; then local end=ok; else local end="FAILED ($?)"; failed=1; fi
  printf '| %s | %s | %d s | %s |\n' "$name" "$end" $((SECONDS - start)) \
    "$(grep -E '(passed|failed|ERROR SUMMARY)' "$out/$name.log" | tail -n 1 | tr -d '=' | tr '|' '/')" >>"$out/summary.md"
  printf '%-12s %s\n' "$name" "$end"
}

no_skips() { # COMMAND...: a skipped test fails
  local log
  log=$("$@" 2>&1) || { printf '%s\n' "$log"; return 1; }
  printf '%s\n' "$log"
  ! grep -qE '[0-9]+ skipped' <<<"$log"
}

arch=$("$python" - <<'PY'
import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}.{minor}" + ("a" if (major, minor) == (9, 0) else ""))
PY
) || { echo "sslfast: gpu-check needs a CUDA device that torch can see"; exit 1; }

"$python" - >"$out/summary.md" <<'PY'
import platform, subprocess, torch
run = lambda *c: subprocess.run(c, capture_output=True, text=True).stdout.strip()
print("# make gpu-check\n")
print(f"- card: {torch.cuda.get_device_name()}, driver {run('nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader')}")
print(f"- torch {torch.__version__}, CUDA {torch.version.cuda}, Python {platform.python_version()}")
print(f"- commit {run('git', 'rev-parse', 'HEAD') or 'unknown'}\n\n| step | end | time | last line |\n|---|---|---|---|")
PY

step build env SSLFAST_CUDA=1 TORCH_CUDA_ARCH_LIST="$arch" "$python" setup.py build_ext --inplace
step tests no_skips "$python" -m pytest -rs tests/ops tests/methods tests/adapters tests/test_peers.py \
  tests/loaders/test_views.py tests/loaders/test_color.py
if command -v compute-sanitizer >/dev/null; then
  # Values only: torch.compile and opcheck would run the same kernels through minutes of tracing.
  kernels=(-m pytest -x tests/ops -k "cuda and not compile and not opcheck and not thread")
  for tool in memcheck racecheck initcheck synccheck; do
    step "$tool" timeout 300 compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" "${kernels[@]}"
  done
else
  echo "| compute-sanitizer | FAILED: not on PATH | | |" >>"$out/summary.md"
  failed=1
fi
step benchmarks "$python" -m pytest benchmarks --benchmark-enable --benchmark-json="$out/benchmarks.json"
step crossover "$python" -m benchmarks.bench_crossover --device cuda --without compiled -o "$out/crossover"
step ops "$python" -m sslfast.bench ops --device cuda --json "$out/ops.json"
images=${SSLFAST_BENCH_IMAGES:-}
if [ -n "$images" ]; then
  step loaders "$python" -m sslfast bench loader "$images" --device cuda --batch-size 64 \
    --json "$out/loaders.json" --chart "$out/loaders.png"
else
  step loaders "$python" -m pytest benchmarks/bench_loader_torch.py --benchmark-enable
fi
step step "$python" -m sslfast bench step ${images:+"$images"} --recipe pirl-paper --batch-size 256 --device cuda \
  --json "$out/step.json" --chart "$out/step.png"
cat "$out/summary.md"
exit $failed
