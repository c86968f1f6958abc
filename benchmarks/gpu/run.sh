#!/usr/bin/env bash
# Everything that only a GPU can show, the most valuable first, within a deadline. The results are in one archive, which is
# written anew after every step, so that what is done by then outlasts whatever happens. Needs a Python with torch,
# setuptools, pybind11, pytest and hypothesis, and nvcc; no network.
#
#   benchmarks/gpu/run.sh [--only PART]... [--deadline SECONDS] [--out FILE.tar.gz] [--libmtl DIR] [--torchjd DIR]
#                         [--device cuda] [--prebuilt] [--dry-run]
#
# --only      one of the parts build, small, kernels, step, capture, tests, compiled, triton, memcheck, profile; may be
#             repeated. An archive that is there is continued
# --deadline  seconds, 540 if not given, after which nothing runs: every step's limit is cut by what is left
# --out       the archive; benchmarks/results/<device>-<date>.tar.gz if not given
# --libmtl    a checkout of LibMTL to compare with; --torchjd likewise, a checkout or wheel
# --prebuilt  take the libraries in fastmtl/ as they are
# --dry-run   on the CPU with the smallest cases: shows that the parts work
set -uo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
cd "$root" || exit 1
python=${PYTHON:-python3}
parts=(build small kernels step capture tests compiled triton memcheck profile)
device=cuda
deadline=540
dry=0
prebuilt=0
out=
libmtl=
torchjd=
only=()
fail() { printf 'run.sh: %s\n' "$1" >&2; exit 2; }
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) dry=1; device=cpu; shift; continue ;;
    --prebuilt) prebuilt=1; shift; continue ;;
    --only|--deadline|--out|--libmtl|--torchjd|--device) [ $# -ge 2 ] || fail "$1 needs a value" ;;
    *) fail "unknown argument $1; see the head of $0" ;;
  esac
  case $1 in
    --only)
      [[ " ${parts[*]} " == *" $2 "* ]] || fail "--only must be one of ${parts[*]}, got $2"
      only+=("$2") ;;
    --deadline) [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "--deadline must be a number of seconds, got $2"; deadline=$2 ;;
    --out) out=$2 ;;
    --libmtl) libmtl=$2 ;;
    --torchjd) torchjd=$2 ;;
    --device) device=$2 ;;
  esac
  shift 2
done
[ ${#only[@]} -gt 0 ] || only=("${parts[@]}")
[ $dry = 0 ] || export CUDA_VISIBLE_DEVICES=
[ -z "$torchjd" ] || export PYTHONPATH="$torchjd${PYTHONPATH:+:$PYTHONPATH}"

name=$device
if [[ $device == cuda* ]]; then
  name=$("$python" -c "
import re, torch
if not torch.cuda.is_available():
    raise SystemExit('torch finds no CUDA device; --dry-run works without one')
print(re.sub('[^a-z0-9]+', '-', torch.cuda.get_device_name('$device').lower()).strip('-'))") || exit 2
fi
out=${out:-benchmarks/results/$name-$(date -u +%Y-%m-%d).tar.gz}
mkdir -p "$(dirname "$out")"
results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT
[ ! -f "$out" ] || tar -xzf "$out" -C "$results" || fail "$out is no archive to continue"
export MAX_JOBS=${MAX_JOBS:-$(nproc)}
status=$results/status.csv
[ -f "$status" ] || echo "part,step,exit,seconds" >"$status"
broken=0

pack() { tar -czf "$out.part" -C "$results" . && mv -f "$out.part" "$out"; }
# step PART LIMIT NAME COMMAND...: runs it under its limit or what is left, its output to NAME.log, its fate to status.csv.
step() {
  local part=$1 limit=$2 what=$3 begin=$SECONDS code
  local left=$((deadline - begin))
  shift 3
  if [ $left -le 0 ]; then
    missing "$part" "$what" "the deadline of $deadline s has passed"
    return
  fi
  # A dry run's processor may be shared.
  [ $dry = 0 ] || limit=$((limit * 4))
  [ "$limit" -le $left ] || limit=$left
  printf '== %s\n' "$what"
  # An interrupted pytest still reports what it has found.
  timeout --signal=INT --kill-after=5 "$limit" "$@" >"$results/$what.log" 2>&1
  code=$?
  tail -n 3 "$results/$what.log"
  echo "$part,$what,$code,$((SECONDS - begin))" >>"$status"
  if [ $code -ne 0 ]; then
    broken=1
    printf '   failed with %s; see %s.log in %s\n' "$code" "$what" "$out"
  fi
  pack
}
# missing PART NAME WHY: says that a step was left out.
missing() {
  printf '== %s left out: %s\n' "$2" "$3"
  echo "$1,$2,left out: $3,0" >>"$status"
  pack
}
has() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }
# checked PART LIMIT NAME ARGUMENTS...: pytest, on several processes where it can be.
checked() {
  local part=$1 limit=$2 what=$3
  shift 3
  step "$part" "$limit" "$what" "$python" -m pytest -q -p no:cacheprovider --maxfail=20 --tb=short -W default \
    --junitxml "$results/$what.xml" "${workers[@]}" "$@"
}
# timed PART LIMIT NAME OPTIONS...: a training step of the strategy that NAME begins with, beside those of others.
timed() {
  local part=$1 limit=$2 what=$3
  shift 3
  step "$part" "$limit" "step-$what" "$python" -m fastmtl bench step --weighting "${what%%-*}" --device "$device" \
    --csv "$results/step-$what.csv" "${peers[@]}" "$@"
}

workers=()
if [ $dry = 0 ] && has xdist; then workers=(-n 8); fi
peers=()
[ -z "$libmtl" ] || peers+=(--peer libmtl --libmtl "$libmtl")
if [ $dry = 0 ] && has torchjd; then peers+=(--peer torchjd); fi
resnet=(--net resnet18 --batch 32 --size 64 --cuda-graph)
mlp=(--net mlp --batch 256 --tasks 3 --seconds 3)
if [ $dry = 1 ]; then resnet=(--net mlp --batch 4 --tasks 2 --seconds 0); mlp=("${resnet[@]}"); fi

for part in "${only[@]}"; do
  case $part in
    build)
      if [ $prebuilt = 1 ]; then
        missing build build "--prebuilt"
      elif [ $dry = 1 ]; then
        step build 60 build "$python" setup.py --version
      else
        FASTMTL_BUILD_CUDA=1 step build 120 build "$python" -m pip install --no-build-isolation --no-deps --no-index --editable .
      fi
      step build 60 environment "$python" -m fastmtl.benchmarks.gpu.environment "$device" "$results/environment.json"
      [ $dry = 1 ] || step build 20 doctor "$python" -m fastmtl doctor --json
      ;;
    small)
      step small 60 small "$python" -m fastmtl.benchmarks.gpu.small --device "$device"
      ;;
    kernels)
      ops=(--op gram --op combine --op min_norm --op pcgrad)
      [ $dry = 0 ] || ops=(--op min_norm --quick)
      step kernels 90 kernels "$python" -m fastmtl bench kernels --device "$device" --csv "$results/kernels.csv" "${ops[@]}"
      ;;
    step)
      if [ $dry = 1 ]; then
        timed step 90 MGDA "${resnet[@]}"
        continue
      fi
      timed step 50 MGDA "${resnet[@]}" --tasks 3 --tasks 8 --seconds 4
      timed step 25 MGDA-bf16 "${resnet[@]}" --tasks 3 --seconds 3 --precision bf16
      timed step 25 PCGrad "${resnet[@]}" --tasks 3 --seconds 3
      timed step 25 MGDA-mlp "${mlp[@]}" --cuda-graph
      timed step 40 MGDA-mtan --arch MTAN --net resnet50 --batch 8 --size 288x384 --cuda-graph --tasks 3 --seconds 4
      ;;
    capture)
      checked capture 60 capture tests/trainer/test_capture.py tests/weighting/test_strategies.py -k "on_cuda or for_the_gpu"
      ;;
    tests)
      if [ $dry = 1 ]; then
        checked tests 90 tests tests/ops/test_rows.py
      else
        checked tests 90 tests tests/ops -k "cuda or triton or any_" -m "not slow"
      fi
      ;;
    compiled)
      timed compiled 60 MGDA-compiled "${mlp[@]}" --compile
      ;;
    triton)
      # Without the interpreter; each new size is compiled first.
      if [ $dry = 1 ]; then
        missing triton triton "there is no GPU"
        continue
      fi
      step triton 60 small-triton "$python" -m fastmtl.benchmarks.gpu.small --device "$device" --backend triton
      FASTMTL_BACKEND=triton step triton 60 kernels-triton "$python" -m fastmtl bench kernels --device "$device" \
        --csv "$results/kernels-triton.csv" --op gram --op combine --op min_norm --op pcgrad
      checked triton 60 tests-triton tests/ops/triton_cases.py
      ;;
    memcheck)
      for tool in memcheck racecheck; do
        if ! command -v compute-sanitizer >/dev/null; then
          missing memcheck "$tool" "compute-sanitizer is not installed"
          continue
        fi
        # Torch's caching allocator would give kernels memory beyond what they asked for.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 step memcheck 60 "$tool" compute-sanitizer --tool "$tool" --report-api-errors no \
          --error-exitcode 1 "$python" -m fastmtl.benchmarks.gpu.small --device "$device"
      done
      ;;
    profile)
      if ! command -v ncu >/dev/null; then
        missing profile profile "ncu is not installed"
      elif [ ! -f "$results/kernels.csv" ]; then
        missing profile profile "there is no kernels.csv; run the part kernels first"
      else
        # The ops furthest from what memory allows.
        for op in $("$python" -m fastmtl.benchmarks.gpu.slowest "$results/kernels.csv"); do
          step profile 40 "profile-$op" ncu --set full --clock-control none --profile-from-start off \
            --kernel-name 'regex:gram_|combine_|solve_' --launch-count 4 "$python" -m fastmtl.benchmarks.gpu.once "$op"
        done
      fi
      ;;
  esac
done
printf 'results in %s\n' "$out"
exit $broken
