#!/usr/bin/env bash
# Everything that only a GPU can show, in under ten minutes: builds, tests, sanitizes, benchmarks, profiles, and leaves one
# folder of results. Needs a Python with torch, setuptools, pybind11, pytest and hypothesis, and nvcc; no network.
#
#   benchmarks/gpu/run.sh [--only build|tests|kernels|step|profile]... [--out DIR] [--libmtl DIR] [--torchjd DIR]
#                         [--device cuda] [--dry-run]
#
# --only     do these parts alone, into the folder of an earlier run of the same day or into --out
# --libmtl   a checkout of LibMTL, to measure its solvers too; --torchjd likewise, a checkout or wheel
# --dry-run  on the CPU with the smallest cases: shows that every part works
set -uo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
cd "$root" || exit 1
python=${PYTHON:-python3}
device=cuda
dry=0
out=
libmtl=
torchjd=
parts=()
fail() { printf 'run.sh: %s\n' "$1" >&2; exit 2; }
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) dry=1; device=cpu; shift; continue ;;
    --only|--out|--libmtl|--torchjd|--device) [ $# -ge 2 ] || fail "$1 needs a value" ;;
    *) fail "unknown argument $1; see the head of $0" ;;
  esac
  case $1 in
    --only)
      case $2 in
        build|tests|kernels|step|profile) parts+=("$2") ;;
        *) fail "--only must be build, tests, kernels, step or profile, got $2" ;;
      esac ;;
    --out) out=$2 ;;
    --libmtl) libmtl=$2 ;;
    --torchjd) torchjd=$2 ;;
    --device) device=$2 ;;
  esac
  shift 2
done
[ ${#parts[@]} -gt 0 ] || parts=(build tests kernels step profile)
[ -z "$torchjd" ] || export PYTHONPATH="$torchjd${PYTHONPATH:+:$PYTHONPATH}"

name=$("$python" - "$device" <<'PYTHON'
import re, sys, torch
device = torch.device(sys.argv[1])
if device.type == "cuda" and not torch.cuda.is_available():
    sys.exit("torch finds no CUDA device; --dry-run works without one")
name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
print(re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"))
PYTHON
) || exit 2
out=${out:-benchmarks/results/$name-$(date -u +%Y-%m-%d)}
mkdir -p "$out"
export MAX_JOBS=${MAX_JOBS:-$(nproc)}
status=$out/status.csv
[ -f "$status" ] || echo "part,step,exit,seconds" >"$status"
broken=0

# step PART LIMIT NAME COMMAND...: runs it under its time limit, its output to NAME.log, its fate to status.csv. All limits
# together are less than ten minutes; a dry run's shared processor gets more.
step() {
  local part=$1 limit=$2 what=$3 begin=$SECONDS code
  shift 3
  [ $dry = 0 ] || limit=$((limit * 4))
  printf '== %s\n' "$what"
  timeout --kill-after=10 "$limit" "$@" >"$out/$what.log" 2>&1
  code=$?
  tail -n 3 "$out/$what.log"
  echo "$part,$what,$code,$((SECONDS - begin))" >>"$status"
  if [ $code -ne 0 ]; then
    broken=1
    printf '   failed with %s; see %s\n' "$code" "$out/$what.log"
  fi
}
# missing PART NAME WHY: says that a step was left out.
missing() {
  printf '== %s left out: %s\n' "$2" "$3"
  echo "$1,$2,left out: $3,0" >>"$status"
}

for part in "${parts[@]}"; do
  case $part in
    build)
      if [ $dry = 1 ]; then
        step build 60 build "$python" setup.py --version
      else
        FASTMTL_BUILD_CUDA=1 step build 100 build "$python" -m pip install --no-build-isolation --no-deps --no-index --editable .
      fi
      step build 15 doctor "$python" -m fastmtl doctor --json
      step build 10 environment "$python" -m fastmtl.benchmarks.gpu.environment "$device"
      ;;
    tests)
      if [ $dry = 1 ]; then
        step tests 120 tests "$python" -m pytest -q -p no:cacheprovider tests/ops/test_rows.py
      else
        step tests 80 tests "$python" -m pytest -q -p no:cacheprovider tests/ops -k "cuda or triton" -m "not slow"
        for tool in memcheck racecheck; do
          if command -v compute-sanitizer >/dev/null; then
            step tests 25 "$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" -m fastmtl.benchmarks.gpu.small
          else
            missing tests "$tool" "compute-sanitizer is not installed"
          fi
        done
      fi
      step tests 20 small "$python" -m fastmtl.benchmarks.gpu.small --device "$device"
      ;;
    kernels)
      # One step for each op: what is done by the time limit of another one stays.
      ops=(gram combine min_norm pcgrad cagrad upgrad)
      quick=()
      [ $dry = 0 ] || { ops=(min_norm); quick=(--quick); }
      for op in "${ops[@]}"; do
        step kernels 14 "kernels-$op" \
          "$python" -m fastmtl bench kernels --op "$op" --device "$device" --csv "$out/kernels-$op.csv" "${quick[@]}"
      done
      ;;
    step)
      if [ $dry = 1 ]; then
        missing step solvers "it has no small cases"
      else
        step step 20 solvers "$python" -m fastmtl bench solvers --csv "$out/solvers.csv" ${libmtl:+--libmtl "$libmtl"}
      fi
      peers=()
      [ -z "$libmtl" ] || peers+=(--peer libmtl --libmtl "$libmtl")
      if "$python" -c "import torchjd" >/dev/null 2>&1; then peers+=(--peer torchjd); fi
      # One step for each load: a peer that fails takes the time of its own load alone. A GPU's steps are captured too, those
      # of the small network compiled, all its VJPs in one graph.
      if [ $dry = 1 ]; then
        loads=("30 MGDA --net mlp --batch 4 --tasks 2 --seconds 0 --compile" \
               "30 MGDA-bf16 --net mlp --batch 4 --tasks 2 --seconds 0 --precision bf16")
        peers=()
      else
        resnet="--net resnet18 --batch 32 --size 64 --cuda-graph"
        loads=("40 MGDA $resnet --tasks 3 --tasks 8 --seconds 4" \
               "25 MGDA-bf16 $resnet --tasks 3 --seconds 3 --precision bf16" \
               "25 PCGrad $resnet --tasks 3 --seconds 3" \
               "40 MGDA-mtan --arch MTAN --net resnet50 --batch 8 --size 288x384 --cuda-graph --tasks 3 --seconds 6" \
               "45 MGDA-mlp --net mlp --batch 256 --cuda-graph --compile --tasks 3 --seconds 3")
      fi
      for load in "${loads[@]}"; do
        read -r limit name options <<<"$load"
        # shellcheck disable=SC2086 # the options are words
        step step "$limit" "step-$name" "$python" -m fastmtl bench step --weighting "${name%%-*}" --device "$device" \
          $options "${peers[@]}" --csv "$out/step-$name.csv" --plot "$out/step-$name.png"
      done
      step step 10 model "$python" -m fastmtl bench step --model H100 --net resnet18 --batch 32 --size 64 --tasks 3 --tasks 8
      ;;
    profile)
      if ! command -v ncu >/dev/null; then
        missing profile profile "ncu is not installed"
      elif ! compgen -G "$out/kernels-*.csv" >/dev/null; then
        missing profile profile "there are no kernels-*.csv; run the part kernels first"
      else
        # The ops furthest from what memory allows.
        for op in $("$python" -m fastmtl.benchmarks.gpu.slowest "$out"/kernels-*.csv); do
          step profile 20 "profile-$op" ncu --set full --launch-count 4 --target-processes all \
            "$python" -m fastmtl.benchmarks.gpu.small --device "$device" --op "$op"
        done
      fi
      ;;
  esac
done
"$python" -m fastmtl.benchmarks.gpu.environment "$device" >"$out/environment.json" || broken=1
printf 'results in %s\n' "$out"
exit $broken
