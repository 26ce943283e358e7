#!/usr/bin/env bash
# The studies of the evaluation itself: intervals, outlines, calibration, verdicts against the simulated truth, how long a
# large study takes, held-out rows of bbbc013, and the nested study of bbbc013 and imc_spleen.
#   scripts/reproduce_evaluation.sh DATA OUT
# DATA holds bbbc013/ and imc_spleen/. Finished parts are not computed again.
set -euo pipefail
[ $# -eq 2 ] || { sed -n 2,5p "$0"; exit 2; }
here="$(cd "$(dirname "$0")/.." && pwd)"
data="$(cd "$1" && pwd)"
mkdir -p "$2"
out="$(cd "$2" && pwd)"
python="${PYTHON:-$here/.venv/bin/python}"
cd "$here/scripts"
"$python" study_intervals.py --record "$out/results/intervals.json"
"$python" study_outlines.py "$out/outlines" --record "$out/results/outlines.json"
"$python" study_calibration.py "$out/calibration" --record "$out/results/calibration.json"
"$python" study_verdicts.py "$out/verdicts" --record "$out/results/verdicts.json"
"$python" benchmark_evaluation.py --record "$out/results/evaluation.json"
"$python" study_bbbc013.py "$data" "$out/bbbc013" --record "$out/results/bbbc013.json"
"$python" study_nested.py "$data" "$out/nested" --record "$out/results/nested.json"
