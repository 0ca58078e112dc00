#!/usr/bin/env bash
# Runs seeds of the simulation (`src/simulation`): the shipped reactors and clients on a simulated kernel. A seed that
# breaks a rule fails the run and is printed with the command that runs it again.
# Usage: ci/simulation.sh [--seeds N] [--seed FIRST] [--events N] [--threads N]
# By default 2000 seeds of 2000 steps each, from seed 0 on, on all cores. `--seed N` alone runs that one. To go on with a
# long run, begin with the seed behind the last one that has been run.
set -euo pipefail
cd "$(dirname "$0")/.."
seeds='' first=0 events=2000 threads=$(nproc)
while [ $# -gt 0 ]; do
    case $1 in
    --seeds) seeds=$2 ;;
    --seed) first=$2 seeds=${seeds:-1} ;;
    --events) events=$2 ;;
    --threads) threads=$2 ;;
    *) sed -n 's/^# Usage: //p' "$0" >&2; exit 2 ;;
    esac
    shift 2
done
export DOORBELL_SEED=$first DOORBELL_SEEDS=${seeds:-2000} DOORBELL_EVENTS=$events DOORBELL_THREADS=$threads
exec cargo test --quiet --lib --no-default-features --profile simulation simulation_of_many_seeds -- --ignored --nocapture
