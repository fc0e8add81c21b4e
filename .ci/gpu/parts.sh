# shellcheck shell=bash
# One part of .ci/gpu/run, which calls this in the work folder's tree: parts.sh NAME. All output is the part's log, whose last line
# stands in the summary. `seconds` is what the part may take; `dry`, if set, asks for a small size on the CPU.
set -uo pipefail
: "${repo:?}" "${python:?}" "${OUT:?}" "${site:?}" "${tree:?}" "${logs:?}" "${seconds:?}"
kit=$tree/.ci/gpu
cores=$(nproc)
workers=$((cores < 4 ? 1 : cores > 16 ? 14 : cores - 2))
[[ -z $dry ]] || workers=1

# Leaves the part out where a tool is not on this machine.
need() {
  local tool
  for tool in "$@"; do
    command -v "$tool" >/dev/null || { echo "$tool is not on this machine"; exit 75; }
  done
}

install() {
  if [[ -n $dry ]]; then
    echo "a dry run uses the precond of its environment"
    exit 75
  fi
  rm -rf "$site"
  local pip=("$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site") arch
  local wheels=("$repo"/.whl/precond-*.whl)
  if [[ -f ${wheels[0]} ]]; then
    "${pip[@]}" "${wheels[0]}" && echo "${wheels[0]##*/}" && return
    echo "The wheel does not fit: building from source."
  fi
  arch=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || return
  PRECOND_CUDA=ON PRECOND_CUDA_ARCHS=$arch "${pip[@]}" --no-build-isolation "$repo" && echo "built for sm_$arch"
}

parity() { OMP_NUM_THREADS=$workers "$python" "$kit/parity.py" --seconds $((seconds - 10)) ${dry:+--every 40}; }

speed() { "$python" "$kit/speed.py" speed --seconds $((seconds - 15)) ${dry:+--scale 1e-5 --rounds 1 --only fp32}; }

small() { "$python" "$kit/speed.py" small --seconds $((seconds - 10)) ${dry:+--scale 1e-5 --rounds 1 --only 1000}; }

graph() { "$python" "$kit/graph.py"; }

# Not the project's options: they name plugins that this environment may lack. A test that breaks a process's CUDA context fails
# those after it too: 40 failures are enough to see.
pytest=("$python" -m pytest -q -p no:cacheprovider -p no:benchmark -o "addopts=--import-mode=importlib --strict-markers"
  --maxfail=40)

# suite NAME PERCENT ARGUMENT...: pytest in at most that part of the time that the part has left.
suite() {
  local name=$1 percent=$2 status
  shift 2
  OMP_NUM_THREADS=1 timeout --foreground -k 5 $(((seconds - SECONDS) * percent / 100 + 1)) "${pytest[@]}" \
    --junitxml="$logs/$name.xml" "$@" >"$logs/$name.log" 2>&1 </dev/null
  status=$?
  echo "$name: $(tail -1 "$logs/$name.log")"
  return $status
}

tests() {
  local failed=0 on=(-n "$workers" -m "not large and not capture")
  suite tests-cuda 60 "${on[@]}" -k "not triton${dry:+ and every_layout and offset}" tests/test_gpu.py || failed=1
  PRECOND_BACKEND=cuda suite tests-formats 60 "${on[@]}" ${dry:+-k "adamw-split24 or (adamw and beside)"} \
    tests/test_formats_cuda.py tests/test_device_scalars.py || failed=1
  PRECOND_BACKEND=cuda suite tests-offload 60 "${on[@]}" ${dry:+-k "wherever and float32-adamw or errors"} \
    tests/test_offload.py tests/test_offload_moves.py tests/test_offload_steps.py || failed=1
  # Compiles for about 40 s on 14 cores.
  suite tests-triton 95 "${on[@]}" -k "triton${dry:+ and place_of_a_tensor and adamw and not amsgrad}" \
    tests/test_gpu.py tests/test_triton_device.py || failed=1
  tail -qn 1 "$logs"/tests-*.log | paste -sd ';'
  return $failed
}

# A capture that fails can leave its process unable to capture again, so each test has one of its own.
captures() {
  local found names name pid pids k failed=0 at_once=$((workers / 4 + 1))
  found=$("${pytest[@]}" --collect-only -m capture tests/test_gpu.py 2>&1)
  mapfile -t names < <(grep '::' <<<"$found")
  if ((${#names[@]} == 0)); then
    echo "$found"
    echo "no test is marked capture"
    return 1
  fi
  [[ -z $dry ]] || names=("${names[0]}")
  for ((k = 0; k < ${#names[@]}; k += at_once)); do
    pids=()
    for name in "${names[@]:k:at_once}"; do
      suite "capture-$((k + ${#pids[@]} + 1))" 50 "$name" &
      pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid" || failed=$((failed + 1)); done
  done
  echo "$failed of ${#names[@]} failed"
  ((failed == 0))
}

report() { "$python" "$kit/report.py"; }

profile() {
  local tool=(ncu --clock-control none --profile-from-start off -k 'regex:update|norm' --csv --log-file "$OUT/ncu.csv")
  local section
  for section in SpeedOfLight Occupancy WarpStateStats InstructionStats MemoryWorkloadAnalysis; do
    tool+=(--section "$section")
  done
  if [[ -n $dry ]]; then tool=(); else need ncu; fi
  "${tool[@]}" "$python" "$kit/one_step.py" ${dry:+--scale 1e-5}
}

sanitize() {
  local failed=0 tool command
  for tool in memcheck racecheck; do
    command=(timeout --foreground -k 5 $((seconds / 2 - 2)) compute-sanitizer --tool "$tool" --error-exitcode 9)
    if [[ -n $dry ]]; then command=(); else need compute-sanitizer; fi
    "${command[@]}" "$python" "$kit/report.py" >"$logs/$tool.log" 2>&1 || failed=1
    echo "$tool: $(tail -1 "$logs/$tool.log")"
    [[ -z $dry ]] || break
  done
  return $failed
}

bench() {
  local arguments=(--rounds 8 --parity quick)
  [[ -z $dry ]] || arguments=(--device cpu --scale 1e-5 --rounds 1 --only '^AdamW fp32, one|with int8')
  PYTHONPATH=$PYTHONPATH:$repo/.peers "$python" -m bench gpu --out "$OUT" "${arguments[@]}"
}

products() {
  local arguments=()
  [[ -z $dry ]] || arguments=(--device cpu --rounds 1)
  "$python" -m bench products --out "$OUT" "${arguments[@]}"
}

exact() {
  local arguments=()
  if [[ -n $dry ]]; then arguments=(--device cpu --elements 10000 --rounds 1 --only fp32); else need nvcc cmake ninja; fi
  "$python" -m bench exact --out "$OUT" "${arguments[@]}"
}

"$1"
