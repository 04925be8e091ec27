#!/usr/bin/env bash
# On the machine with the card: install the kit, without a network, and run the stages.
#   bash gpu/prove.sh [--stages 1-4] [--dry] ...      what benchmarks.gpu takes: python -m benchmarks.gpu --help
#   PYTHON    the interpreter that has torch (python3)      OUT       where results.json and log.txt go (gpu/out)
#   KIT       the folder of wheels (gpu/kit)                KIT_SITE  where they are installed (gpu/site)
# Status: 0 all stages are ok, 1 one is not, 2 bad arguments, 3 no card that could run them.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
site="${KIT_SITE:-$PWD/gpu/site}"
# Without the kit the stages that can do without it still run
if FASTDPO_KIT="$("$python" gpu/install.py --kit "${KIT:-$PWD/gpu/kit}" --target "$site")"; then
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
echo "$FASTDPO_KIT"
export FASTDPO_KIT PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m benchmarks.gpu "$@"
