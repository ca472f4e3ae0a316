#!/bin/bash
# What to run on a GPU machine, stage by stage: bash benchmarks/gpu/run.sh smoke tests
# README.md beside this says what the stages are. From the repository's root; DRY=1 is for CPUs.
set -o pipefail
cd "$(dirname "$0")/../.." || exit 1

export OUT=${OUT:-$PWD/outputs/gpu}
state=${STATE:-/tmp/gpu-state}
mkdir -p "$OUT" "$state/package"
export PYTHONUNBUFFERED=1

# The repository as the package it is, and what pack.py brought.
ln -sfn "$PWD" "$state/package/sparse_video_attention"
export PYTHONPATH=$state/package
if [ -d .gpu ]; then
    if [ ! -d "$state/site" ]; then
        for wheel in .gpu/wheels/*.whl; do
            python3 -m zipfile -e "$wheel" "$state/site" || exit 1
        done
    fi
    PYTHONPATH=$PYTHONPATH:$state/site
    export COMFYUI_PATH=$PWD/.gpu/comfyui
    BENCHMARKED_COMMIT=$(cat .gpu/commit)
    export BENCHMARKED_COMMIT
fi
if [ -d "$state/flash4" ]; then
    PYTHONPATH=$PYTHONPATH:$state/flash4:$state/flash4/nvidia_cutlass_dsl/dsl_packages
fi

python=${PYTHON:-python3}
results=(--out "$OUT/results")
[ -n "$DRY" ] && on_cpu=(--device cpu)

limit() { # seconds, name of the log, command...
    local seconds=$1 log=$OUT/$2.log
    shift 2
    echo "--- $* (at most $seconds s)"
    local start=$SECONDS
    timeout -k 10 "$seconds" "$@" 2>&1 | tee -a "$log"
    local status=$?
    echo "--- $([ $status = 0 ] && echo done || echo "FAILED, exit status $status") after $((SECONDS - start)) s"
    return $status
}

gpu_tests() { # seconds, log, pytest arguments...
    local seconds=$1 log=$2
    shift 2
    limit "$seconds" "$log" "$python" -m pytest -q -p no:cacheprovider ${DRY:+--collect-only} "$@"
}

hopper() { [ -n "$HOPPER" ] || [ -e "$state/hopper" ]; }

smoke() {
    [ -n "$DRY" ] || nvidia-smi | head -15
    limit 60 smoke "$python" -c "import torch, triton, sparse_video_attention.kernels as k; \
print(torch.__version__, triton.__version__, torch.cuda.is_available(), k.available())"
    # A barrier that is wrong would hang: one token first, alone.
    gpu_tests 90 smoke -m gpu tests/kernels/test_hopper.py -k one-token &&
        gpu_tests 150 smoke -m gpu tests/kernels/test_hopper.py && touch "$state/hopper"
    hopper && echo "hopper runs: HOPPER=1" || echo "hopper is left out of what follows"
}

tests() {
    # Most of the time is compiling: several processes share the GPU.
    local many=()
    [ -z "$DRY" ] && "$python" -c "import xdist" 2>/dev/null && many=(-n 8)
    OMP_NUM_THREADS=2 gpu_tests 400 tests "${many[@]}" -m "gpu and not slow" tests/kernels tests/psa tests/sparge \
        tests/third_party tests/patching tests/benchmarks --deselect tests/kernels/test_hopper.py
}

pack() {
    gpu_tests 300 pack -m gpu tests/benchmarks/test_end_to_end.py
}

sanitize() {
    gpu_tests 580 sanitize -m gpu tests/kernels/test_triton_gpu.py -k sanitizer
}

attention() {
    local kernels=(triton flex sol_attn) size=(--repeats 3)
    hopper && kernels+=(hopper)
    [ -n "$DRY" ] && kernels=(torch) && size=(--shapes 3x150:2x64 --densities 0.5 --repeats 1)
    limit 570 attention "$python" -m benchmarks.attention "${on_cpu[@]}" "${results[@]}" \
        --kernels "${kernels[@]}" "${size[@]}"
}

methods() {
    local size=(--precisions auto int8 --repeats 10)
    [ -n "$DRY" ] && size=(--shapes 8x8x9:2x32 --repeats 1 --times-only)
    limit 570 methods "$python" -m benchmarks.methods "${on_cpu[@]}" "${results[@]}" "${size[@]}"
}

end_to_end() {
    local size=(--backends comfy_kitchen_int8)
    [ -n "$DRY" ] && size=(--videos 128x128x17 --steps 1 --min-tokens 0)
    limit 570 end_to_end "$python" -m benchmarks.end_to_end "${on_cpu[@]}" "${results[@]}" \
        "${size[@]}"
}

tune() {
    local size=()
    [ -n "$DRY" ] && export TRITON_INTERPRET=1 &&
        size=(--shape 1x150:1x64 --head-dims 64 --precisions native --tiles 64 --stages 2)
    limit 400 tune "$python" -m benchmarks.tune "${on_cpu[@]}" "${results[@]}" "${size[@]}"
    unset TRITON_INTERPRET
}

profile() {
    local kernels=(triton "triton int8" "triton fp8") size=()
    hopper && kernels+=(hopper)
    [ -n "$DRY" ] && kernels=(torch) && size=(--shape 3x150:2x64 --repeats 1)
    limit 300 profile "$python" -m benchmarks.profile_kernel "${on_cpu[@]}" "${results[@]}" \
        --kernels "${kernels[@]}" "${size[@]}"
}

flash4_part() { # one part of FlashAttention 4, kept on the machine for the next
    mkdir -p "$state/parts"
    for part in .gpu-flash4-*/part; do
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
    local size=(--shapes wan14b_720p wan14b_480p --densities 1 0.34 0.2 --repeats 3)
    [ -n "$DRY" ] && size=(--shapes 3x150:2x64 --densities 0.5 --repeats 1)
    limit 400 flash4 "$python" -m benchmarks.attention "${on_cpu[@]}" --out "$OUT/flash4" \
        --kernels flash_attn4 triton "${size[@]}"
}

stages="smoke tests pack sanitize attention methods end_to_end tune profile flash4_part flash4"
for stage in "${@:?which stages? $stages}"; do
    case " $stages " in
        *" $stage "*) "$stage" ;;
        *) echo "no stage $stage; there are $stages" >&2 && exit 2 ;;
    esac
done
# Plots are drawn again from the numbers.
find "$OUT" -name "*.png" -delete
