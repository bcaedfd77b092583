#!/usr/bin/env bash
# The benchmarks of a CPU: the embedded nano bundle, and 0.2B at random weights beside its peers. `make bench` runs it.
source "$(dirname "${BASH_SOURCE[0]}")/sections.sh"
device=cpu

section suite-nano suite
section latency-nano latency
section frontier-nano frontier --queries 1000
section load-nano load --trials 6 --p95-ms 120 --loop two-route
section loops-nano load --trials 8
section loops-tight-nano load --trials 8 --p95-ms 50
section overload-nano overload --p95-ms 120 --trials 6

random_bundle small small-int8 --form fused --precision int8
# of these weights the gate says nothing, so that it sends the share to reasoning that nano's sends
random=(--workload "long text" --queries 40 --reasoning-rate 0.23 --max-rationale-tokens 16)
section suite-small suite "$scratch/small-int8" --seconds 0 --passes 2 --select "not batch and not traffic"
section latency-small latency "$scratch/small-int8" --rounds 2 "${random[@]}"
section load-small load "$scratch/small-int8" --trials 4 --p95-ms 1000 --loop two-route "${random[@]}"
section loops-small load "$scratch/small-int8" --trials 7 --p95-ms 2500 --mode auto \
    --workload "short text" --queries 60 --reasoning-rate 0.23 --max-rationale-tokens 16
section load-long-small load "$scratch/small-int8" --trials 5 --p95-ms 4000 --loop two-route \
    --workload "short text" --queries 60 --reasoning-rate 0.23 --max-rationale-tokens 64
section peers-small peers "$scratch/small" "$scratch/small-int8" --here --peer "transformers bfloat16" \
    --rounds 2 --written 16

mmemb bench report "$results" --out "$scratch/report"
