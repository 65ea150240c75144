#!/usr/bin/env bash
# make gpu-check: what only a GPU can show, offline, with the packages of the Python that PYTHON names.
#
#   PYTHON=python3 benchmarks/gpu_check.sh [OUT [STEP...]]        default OUT: build/gpu-check; default: every step
#
# Builds for the card found, runs every test that has a CUDA side (a missing device or a skip is a failure),
# compute-sanitizer on the kernels, and all benchmarks: ops, loaders, training steps. Steps in order: build tests
# memcheck racecheck initcheck synccheck benchmarks crossover ops loaders step. No step takes longer than
# SSLFAST_STEP_SECONDS (540); its output until then is in its log. SSLFAST_BENCH_IMAGES names a folder of JPEGs
# in class folders for loaders (else photographs of scikit-image) and step (else synthetic images). SSLFAST_WHEELS names a
# folder of wheels (*.whl) that this Python lacks (tyro for ops and step, matplotlib for charts); they are unpacked
# into OUT. OUT gets the logs, JSON files and summary.md.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${1:-build/gpu-check}
[ $# -gt 0 ] && shift
chosen=" $* "
mkdir -p "$out"
export PYTHONPATH=$PWD SSLFAST_REQUIRE_CUDA=1 PYTHONUNBUFFERED=1
failed=0

known=" build tests memcheck racecheck initcheck synccheck benchmarks crossover ops loaders step "
for name in $chosen; do
  case "$known" in *" $name "*) ;; *) echo "sslfast: gpu-check has no step '$name'; it has$known" && exit 2 ;; esac
done

if [ -n "${SSLFAST_WHEELS:-}" ]; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$out/site" "$SSLFAST_WHEELS"/*.whl ||
    exit 1
  export PYTHONPATH=$PWD:$(realpath "$out/site")
fi

step() { # step NAME COMMAND...: runs it with output to OUT/NAME.log and records the result in summary.md
  local name=$1 start=$SECONDS end=ok code
  shift
  case "$chosen" in "  " | *" $name "*) ;; *) return ;; esac
  timeout -k 10 "${SSLFAST_STEP_SECONDS:-540}" "$@" >"$out/$name.log" 2>&1
  code=$?
  [ $code -eq 124 ] && end="FAILED (longer than ${SSLFAST_STEP_SECONDS:-540} s)"
  [ $code -ne 0 ] && [ $code -ne 124 ] && end="FAILED ($code)"
  if [ "$name" = tests ] && grep -qE '[0-9]+ skipped' "$out/$name.log"; then end="FAILED (skipped tests)"; fi
  [ "$end" = ok ] || failed=1
  printf '| %s | %s | %d s | %s |\n' "$name" "$end" $((SECONDS - start)) \
    "$(grep -E '(passed|failed|ERROR SUMMARY)' "$out/$name.log" | tail -n 1 | tr -d '=' | tr '|' '/')" >>"$out/summary.md"
  printf '%-12s %s\n' "$name" "$end"
}

arch=$("$python" - <<'PY'
import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}.{minor}" + ("a" if (major, minor) == (9, 0) else ""))
PY
) || { echo "sslfast: gpu-check needs a CUDA device that torch can see"; exit 1; }

"$python" - >"$out/summary.md" <<'PY'
import platform, shutil, subprocess, torch
run = lambda *c: subprocess.run(c, capture_output=True, text=True).stdout.strip() if shutil.which(c[0]) else ""
driver = run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
print("# make gpu-check\n")
print(f"- card: {torch.cuda.get_device_name()}, driver {driver or 'unknown'}")
print(f"- torch {torch.__version__}, CUDA {torch.version.cuda}, Python {platform.python_version()}")
print(f"- commit {run('git', 'rev-parse', 'HEAD') or 'unknown'}\n\n| step | end | time | last line |\n|---|---|---|---|")
PY

# Kernels emulated on the CPU (tests/ops/test_cuda_*.py) need no GPU; of the other tests only those on CUDA are run.
on_cuda=(-m pytest -k cuda --ignore-glob="*/tests/ops/test_cuda_*")

step build env SSLFAST_CUDA=1 TORCH_CUDA_ARCH_LIST="$arch" "$python" setup.py build_ext --inplace
step tests "$python" "${on_cuda[@]}" -rs --durations=10 tests/ops tests/adapters tests/benchmarks/test_peers.py \
  tests/loaders/test_synthetic.py tests/training/test_cuda.py tests/training/test_trainer.py
# Values only: torch.compile and opcheck would run the same kernels after minutes of tracing. Without torch's caching
# allocator every tensor is its own allocation, so that the tools see accesses past its end.
kernels=("${on_cuda[@]}" -x tests/ops -k "cuda and not compile and not opcheck and not thread")
for tool in memcheck racecheck initcheck synccheck; do
  step "$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
    "$python" "${kernels[@]}"
done
# Every op beside its plain form; loaders and steps follow below.
step benchmarks "$python" -m pytest benchmarks --benchmark-enable --benchmark-json="$out/benchmarks.json"
step crossover "$python" -m benchmarks.studies.crossover --device cuda --without compiled --batch 64 256 1024 \
  --rows 1e5 1281167 --rounds 5 --limit 0.5 -o "$out/crossover"
step ops "$python" -m sslfast bench ops --device cuda --json "$out/ops.json"
images=${SSLFAST_BENCH_IMAGES:-}
step loaders "$python" -m benchmarks.studies.loaders_beside_plain ${images:+"$images"} --device cuda -o "$out/loaders"
rm -rf "$out/loaders/images"
step step "$python" -m sslfast bench step ${images:+"$images"} --recipe pirl-paper --batch-size 256 --device cuda \
  --json "$out/step.json" --chart "$out/step.png"
cat "$out/summary.md"
exit $failed
