#!/bin/bash
# What to run on a GPU machine, by stages or by sequences of them: bash benchmarks/gpu/run.sh first
# README.md beside this says what they are. From the repository's root; DRY=1 is for CPUs.
# BUDGET: seconds for the whole command. A stage gets what is left of them, and none with too little.
set -o pipefail
cd "$(dirname "$0")/../.." || exit 1

export OUT=${OUT:-$PWD/outputs/gpu}
state=${STATE:-/tmp/gpu-state${DRY:+-dry}}
[ -n "$DRY" ] && rm -rf "$state/results" "$state/done"
mkdir -p "$OUT" "$state/package" "$state/done"
export PYTHONUNBUFFERED=1
# A machine may hand back the latest command's files alone: they have everything.
[ -f "$state/run.log" ] && cp "$state/run.log" "$OUT/run.log"
exec > >(tee -a "$OUT/run.log") 2>&1
log=$!

# The repository as the package it is, and what pack.py brought.
packed=${PACKED:-.gpu}
ln -sfn "$PWD" "$state/package/sparse_video_attention"
export PYTHONPATH=$state/package
if [ -d "$packed/comfyui" ]; then
    if [ "$(python3 benchmarks/gpu/pack.py --digest)" != "$(cat "$packed/digest")" ]; then
        echo "the code is not what $packed was packed with: run pack.py again, and copy both"
        exit 1
    fi
    if [ ! -d "$state/site" ]; then
        for wheel in "$packed"/wheels/*.whl; do
            python3 -m zipfile -e "$wheel" "$state/site" || exit 1
        done
    fi
    PYTHONPATH=$PYTHONPATH:$state/site
    export COMFYUI_PATH=$(realpath "$packed/comfyui")
    BENCHMARKED_COMMIT=$(cat "$packed/commit")
    export BENCHMARKED_COMMIT
fi
peers=$state/parts/.gpu-peers-0
if [ -e "$peers" ] && [ ! -d "$state/peers" ]; then
    python3 -m zipfile -e "$peers" "$state/peers" || exit 1
    for wheel in "$state"/peers/*.whl; do
        python3 -m zipfile -e "$wheel" "$state/site" || exit 1
    done
fi
if [ -d "$state/flash4" ]; then
    PYTHONPATH=$PYTHONPATH:$state/flash4:$state/flash4/nvidia_cutlass_dsl/dsl_packages
fi
# Results to go on from: those of this machine, else those brought along.
if [ ! -d "$state/results" ]; then
    mkdir -p "$state/results"
    [ -n "$DRY" ] || [ ! -d "$packed/results" ] || cp -r "$packed/results/." "$state/results/"
fi
mkdir -p "$OUT/results" && cp -r "$state/results/." "$OUT/results/"

python=${PYTHON:-python3}
results=(--out "$OUT/results")
resumed=("${results[@]}" --resume "$state/results")
[ -n "$DRY" ] && on_cpu=(--device cpu)
# Less is not worth a start; and what a process may take to end, and copying results.
least=40
reserve=15
skipped=99

seconds_for() { # a stage's own limit -> what it gets
    local seconds=$1 left=$((${BUDGET:-0} - SECONDS - reserve))
    [ -n "$BUDGET" ] && [ "$left" -lt "$seconds" ] && seconds=$left
    echo "$seconds"
}

limit() { # seconds, command...
    local seconds
    seconds=$(seconds_for "$1")
    shift
    if [ "$seconds" -lt "$least" ]; then
        echo "--- skipped, $((BUDGET - SECONDS)) s are left: $*"
        return $skipped
    fi
    echo "--- $* (at most $seconds s)"
    local start=$SECONDS out=()
    # "auto" must not choose what has failed: it could hang, or break all that comes after.
    hopper || out+=(hopper)
    pooled || out+=(hopper:pooled)
    BENCHMARK_WITHOUT="${out[*]}" timeout -k 10 "$seconds" "$@"
    local status=$?
    echo "--- $([ $status = 0 ] && echo done || echo "FAILED, exit status $status") after $((SECONDS - start)) s: ${*:2:3}"
    cp -r "$OUT/results/." "$state/results/"
    cp "$OUT/run.log" "$state/run.log"
    return $status
}

ended() { # after a command: tests that failed are not run again for that
    [ $? -le 1 ]
}

gpu_tests() { # seconds, pytest arguments...
    local seconds=$1 many=()
    shift
    "$python" -c "import pytest" || return $skipped
    # Most of the time is compiling: several processes share the GPU.
    [ -z "$DRY" ] && "$python" -c "import xdist" 2>/dev/null && many=(-n 8)
    # Test by test: where one hangs until all are stopped, the log has the others.
    TORCHINDUCTOR_COMPILE_THREADS=2 OMP_NUM_THREADS=2 limit "$seconds" \
        "$python" -m pytest -p no:cacheprovider "${many[@]}" \
        $([ -n "$DRY" ] && echo --collect-only -q || echo -v) "$@"
}

hopper() { [ -n "$HOPPER" ] || [ -e "$state/hopper" ]; }
pooled() { hopper && { [ "$HOPPER" = pooled ] || [ -e "$state/pooled" ]; }; }

smoke() {
    [ -n "$DRY" ] || nvidia-smi | head -15
    limit 60 "$python" -c "import torch, triton, sparse_video_attention.kernels as k; \
print(torch.__version__, triton.__version__, torch.cuda.is_available(), k.available())"
    # A barrier that is wrong would hang: one token first, alone.
    local of_hopper=(-m gpu tests/kernels/test_hopper.py)
    hopper || { gpu_tests 90 "${of_hopper[@]}" -k one-token &&
        gpu_tests 150 "${of_hopper[@]}" -k "not 160000 and not pooled" && touch "$state/hopper"; }
    hopper && { pooled || gpu_tests 150 "${of_hopper[@]}" -k pooled && touch "$state/pooled"; }
    hopper && echo "hopper runs: HOPPER=1" || echo "hopper is left out of what follows"
    pooled && echo "with pooled levels too: HOPPER=pooled" || echo "pooled levels on it are left out"
}

# Every kernel at both head dims, odd sizes, batch 2, each precision, pooled levels and remainders,
# slices of one projection, addresses past 2**31, syncs and memory, and the maps and orders.
core="test_is_the_definition and (one-token or N63 or k333 or k1000 or pyramid or remainder)
or slices-of-one or test_published_outputs or (everything_kept and 128-torch.bfloat16)
or (outliers and (block128 or block64)) or one-token or exact_where and 128-
or 160000 and native-mask or no_device_sync or do_not_sync
or equal_to_torch or made_on_the_gpu or plan_on_a_gpu or published_map_on_a_gpu or row_i_is
or timed_on_a_gpu or test_triton_is_the_definition or the_map_on_a_gpu
or in_8_bits_is_near or (sums_in_fp16_are and float16)"

core() {
    gpu_tests 200 -m "gpu and not slow" tests/kernels tests/psa tests/sparge tests/patching \
        --deselect tests/kernels/test_hopper.py -k "${core//$'\n'/ }"
    ended
}

tests() {
    # What smoke has run, and what it found to fail, which could hang again.
    local of_hopper=tests/kernels/test_hopper.py apart=(test_is_the_definition_on_a_gpu
        test_slices_of_one_projection_on_a_gpu) left_out=()
    pooled || apart+=(test_pooled_levels_on_a_gpu)
    hopper || apart+=(test_160000_tokens_on_a_gpu)
    for name in "${apart[@]}"; do
        left_out+=(--deselect "$of_hopper::$name")
    done
    gpu_tests 400 -m "gpu and not slow" tests/kernels tests/psa tests/sparge tests/third_party \
        tests/patching tests/benchmarks "${left_out[@]}"
    ended
}

pack() {
    gpu_tests 300 -m gpu tests/benchmarks/test_end_to_end.py
    ended
}

sanitize() {
    # One by one: each says what it found when it ends.
    for tool in memcheck racecheck initcheck; do
        gpu_tests 580 -m gpu tests/kernels/test_triton_gpu.py -k "sanitizer and $tool"
        ended || return
    done
}

# Compiling needs no GPU to itself: it goes on beside the tests. Nothing is timed beside it.
warm() {
    local size=(--shapes wan14b_720p wan14b_480p)
    [ "$sequence" = first ] || size+=(cogvideox5b --precisions auto int8)
    size+=(--kernels triton)
    hopper && size+=(hopper)
    [ -n "$DRY" ] && size=(--shapes 8x8x9:2x32 --dtype fp32 --kernels torch --head-dims 64 --processes 1)
    limit 240 "$python" -m benchmarks.warm "${on_cpu[@]}" "${size[@]}" &
    warming=$!
}

settled() { # once compiling has ended
    [ -z "$warming" ] && return
    wait "$warming" && touch "$state/done/warm"
    warming=
}

attention() {
    local kernels=(triton flex sol_attn) size=(--repeats 2)
    [ "$sequence" = first ] && kernels=(triton) && size+=(--dense sdpa_cudnn --densities 0.2 1
        --shapes wan14b_720p cogvideox5b wan14b_480p)
    hopper && kernels+=(hopper)
    [ -n "$DRY" ] && kernels=(torch) && size=(--shapes 3x150:2x64 --densities 0.5 --repeats 1)
    limit 540 "$python" -m benchmarks.attention "${on_cpu[@]}" "${resumed[@]}" \
        --kernels "${kernels[@]}" "${size[@]}"
}

methods() {
    local size=(--precisions auto int8 --repeats 8)
    [ "$sequence" = first ] && size=(--precisions auto --repeats 8 --times-only
        --shapes wan14b_720p wan14b_480p)
    [ -n "$DRY" ] && size=(--shapes 8x8x9:2x32 --repeats 1 --times-only)
    limit 540 "$python" -m benchmarks.methods "${on_cpu[@]}" "${resumed[@]}" "${size[@]}"
}

end_to_end() {
    # torch_sdpa: on sm_90 the nodes run what stays dense on it, faster than ComfyUI's own choice.
    local size=(--backends torch_sdpa comfy_kitchen_int8)
    [ "$sequence" = first ] && size+=(--videos 832x480x81)
    [ -n "$DRY" ] && size=(--videos 128x128x17 --steps 1 --min-tokens 0)
    limit 540 "$python" -m benchmarks.end_to_end "${on_cpu[@]}" "${resumed[@]}" "${size[@]}"
}

tune() {
    local size=() interpret=()
    [ -n "$DRY" ] && interpret=(env TRITON_INTERPRET=1) &&
        size=(--shape 1x150:1x64 --head-dims 64 --precisions native --tiles 64 --stages 2)
    limit 400 "${interpret[@]}" "$python" -m benchmarks.tune "${on_cpu[@]}" "${resumed[@]}" "${size[@]}" ||
        return
    # PSA's presets: the loops of pooled levels spill a little, which may or may not cost time.
    [ -n "$DRY" ] || size=(--head-dims 128 --precisions native)
    limit 150 "${interpret[@]}" "$python" -m benchmarks.tune "${on_cpu[@]}" "${resumed[@]}" \
        "${size[@]}" --levels pyramid --blocks-n 32
}

profile() {
    local kernels=(triton "triton int8" "triton fp8") size=()
    hopper && kernels=(hopper "${kernels[@]}")
    [ -n "$DRY" ] && kernels=(torch) && size=(--shape 3x150:2x64 --repeats 1)
    limit 300 "$python" -m benchmarks.profile_kernel "${on_cpu[@]}" "${results[@]}" \
        --kernels "${kernels[@]}" "${size[@]}"
}

part() { # of a package that is sent by itself, kept on the machine for what comes next
    mkdir -p "$state/parts"
    for part in .gpu-*-*/part; do
        cp "$part" "$state/parts/$(basename "$(dirname "$part")")" && echo "kept $part"
    done
}

flash4() {
    cat "$state"/parts/.gpu-flash4-* > "$state/flash4.zip" || return 1
    "$python" -m zipfile -e "$state/flash4.zip" "$state/wheels4" || return 1
    for wheel in "$state"/wheels4/*.whl; do
        "$python" -m zipfile -e "$wheel" "$state/flash4" || return 1
    done
    PYTHONPATH=$PYTHONPATH:$state/flash4:$state/flash4/nvidia_cutlass_dsl/dsl_packages
    local size=(--shapes wan14b_720p wan14b_480p --densities 0.2 1 0.34 --dense sdpa_cudnn --repeats 2)
    [ -n "$DRY" ] && size=(--shapes 3x150:2x64 --densities 0.5 --repeats 1)
    limit 400 "$python" -m benchmarks.attention "${on_cpu[@]}" --out "$OUT/flash4" \
        --kernels flash_attn4 triton "${size[@]}"
}

# One for each quarter of an hour. The same command again goes on with what is not done.
first="smoke warm core attention methods end_to_end"
second="smoke warm attention methods end_to_end pack tests"
third="smoke tune profile sanitize"
stages="smoke core tests pack sanitize warm attention methods end_to_end tune profile part flash4"

stage() {
    case $1 in
        attention | methods | end_to_end | tune | profile | flash4 | sanitize) settled ;;
    esac
    "$1"
}

for asked in "${@:?which? first, second, third, or stages: $stages}"; do
    case $asked in
        first | second | third)
            sequence=$asked
            for name in ${!sequence}; do
                mark=$state/done/$sequence-$name
                [ "$name" = warm ] && mark=$state/done/warm
                if [ -e "$mark" ]; then
                    echo "--- $name is done"
                elif stage "$name" && [ "$name" != warm ]; then
                    touch "$mark"
                fi
                cp "$OUT/run.log" "$state/run.log"
            done
            sequence=
            ;;
        *)
            case " $stages " in
                *" $asked "*) stage "$asked" ;;
                *) echo "no stage $asked; there are first, second, third and $stages" >&2 && exit 2 ;;
            esac
            ;;
    esac
done
settled
# Plots are drawn again from the numbers.
find "$OUT" -name "*.png" -delete
exec >&- 2>&-
wait "$log"
