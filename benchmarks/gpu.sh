#!/usr/bin/env bash
# The benchmarks of an NVIDIA GPU, at most nine minutes a call; call it again, and it goes on where it stopped.
# It needs `pip install '.[gpu,train,export,bench]'`, and for TensorRT's sections `.[tensorrt]` too.
source "$(dirname "${BASH_SOURCE[0]}")/sections.sh"
device=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr -s ' /' '-')
limit=540

if [[ -z ${WITHIN_LIMIT:-} ]]; then
    WITHIN_LIMIT=1 timeout --signal=INT "$limit" "$0" && exit
    status=$?
    ((status == 124)) && echo "stopped after $limit s: call $0 again for the rest" >&2
    exit "$status"
fi

tests=$results/$day-tests-$device.xml
if [[ ! -e $tests ]]; then
    "${PYTHON:-.venv/bin/python}" -m pytest -m gpu --junit-xml "$tests.new"
    mv "$tests.new" "$tests"
fi

random=(--workload "long text" --queries 100 --reasoning-rate 0.23 --max-rationale-tokens 16)
for shape in small qwen3-vl-2b qwen3-vl-4b; do
    random_bundle "$shape" "$shape-bf16" --form portable --precision bfloat16
    section "peers-$shape" peers "$scratch/$shape" "$scratch/$shape-bf16" --here --device cuda \
        --peer "transformers bfloat16" --peer "transformers bfloat16 compile" --peer "transformers bfloat16 CUDA graphs"
    for backend in onnxruntime-cuda tensorrt; do
        if [[ $backend = tensorrt ]]; then
            "${PYTHON:-.venv/bin/python}" -c 'import tensorrt' 2>/dev/null || continue
            mmemb build "$scratch/$shape-bf16" --batch 8
        fi
        section "latency-$shape-$backend" latency "$scratch/$shape-bf16" --backend "$backend" "${random[@]}"
        section "load-$shape-$backend" load "$scratch/$shape-bf16" --backend "$backend" --trials 6 "${random[@]}"
        section "suite-$shape-$backend" suite "$scratch/$shape-bf16" --backend "$backend"
    done
done

mmemb bench report "$results" --out "$scratch/report"
