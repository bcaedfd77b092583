# For cpu.sh and gpu.sh: sections whose result is there already are skipped, so that a run goes on where one stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export ORT_DISABLE_TELEMETRY=1

results=${RESULTS:-benchmarks/results}
scratch=${SCRATCH:-runs/bench} # checkpoints and bundles of random weights
day=$(date -u +%F)
mkdir -p "$results" "$scratch"

mmemb() {
    "${PYTHON:-.venv/bin/python}" -m mmemb_deploy "$@"
}

# section NAME COMMAND... runs `mmemb bench COMMAND... --out RESULTS/DAY-NAME-DEVICE.json`
section() {
    local file=$results/$day-$1-$device.json
    if [[ -e $file ]]; then
        printf '== %s: %s is there\n' "$1" "$file"
        return
    fi
    printf '== %s (%d s so far)\n' "$1" "$SECONDS"
    mmemb bench "${@:2}" --out "$file" >/dev/null
}

# random_bundle SHAPE NAME OPTIONS... exports a checkpoint of random weights, both made where they are not there yet
random_bundle() {
    local checkpoint=$scratch/$1 bundle=$scratch/$2
    [[ -d $checkpoint ]] || mmemb train random "$1" "$checkpoint"
    # random weights say nothing of what a precision loses, so that no bound is asked of them
    [[ -d $bundle ]] || mmemb export "$checkpoint" "$bundle" --probes 4 \
        --min-cosine 0.5 --max-flips 8 --min-token-agreement 0 "${@:3}"
}
