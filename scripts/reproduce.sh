#!/usr/bin/env bash
# The studies of the README and their figures, from nothing but the project and the folder of real images.
#   scripts/reproduce.sh DATA OUT
# DATA holds bbbc013/ and imc_spleen/. Finished parts are not computed again. A day or two of 2 CPU cores.
set -euo pipefail
[ $# -eq 2 ] || { sed -n 2,4p "$0"; exit 2; }
here="$(cd "$(dirname "$0")/.." && pwd)"
data="$(cd "$1" && pwd)"
mkdir -p "$2"
out="$(cd "$2" && pwd)"
python="${PYTHON:-$here/.venv/bin/python}"
cd "$here/scripts"
PYTHON="$python" ./reproduce_evaluation.sh "$data" "$out"
"$python" study_imc_spleen.py "$data" "$out/imc_spleen" --record "$out/results/imc_spleen.json"
"$python" study_simulated.py "$out/simulated" --record "$out/results/simulated.json"
"$python" study_translator_simulated.py "$out/translator_simulated" --record "$out/results"
real=(study_translator_real.py "$data" "$out/translator_real" --record "$out/results")
"$python" "${real[@]}" --parts bbbc013 unpaired --seeds 0
"$python" "${real[@]}" --parts starts imc_spleen --seeds 0 1
while read -r dataset seconds; do
  "$python" benchmark_methods.py "$data" "$out/methods_$dataset" --datasets "$dataset" --seconds "$seconds" \
    --record "$out/results" < /dev/null
done <<< "simulated 540
bbbc013 180
imc_spleen 135"
"$python" benchmark_training.py --parts speed methods terms compiled --record "$out/results"
"$python" benchmark_scale.py --record "$out/results/scale.json"
"$python" study_kill.py "$out/kill" --record "$out/results/kill.json"
"$python" study_slides.py "$data" "$out/slides" --record "$out/results/slides_real.json"
for size in "[8,16,32]" "[16,32,64,128]"; do
  run="$out/gigapixels/regression_$(tr -dc 0-9 <<< "$size")"
  [ -e "$run" ] || "$python" -m imgshared.cli train ../configs/regression.yaml data="$out/kill/prepare/straight" \
    "method.channels=$size" method.epochs=3 --out "$run"
done
"$python" benchmark_slides.py "$out/gigapixels/regression_81632" "$out/gigapixels" --record "$out/results/slides.json" \
  --beside "$out/gigapixels/regression_163264128" "$out/kill/train/straight"
"$python" figures.py "$out"
