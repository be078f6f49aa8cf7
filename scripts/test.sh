#!/usr/bin/env bash
# Checks and tests; sets up .venv by itself.
#   bash scripts/test.sh                 ruff, mypy and the fast tests (at most 15 minutes on 2 cores)
#   bash scripts/test.sh --slow          the slow tier: the demo itself, stress and scale
#   bash scripts/test.sh tests/data -k mixture      anything else goes to pytest, and the checks are left out
# QUEQIAO_TEST_PROCESSES: tests that run at a time (2).  QUEQIAO_SHARED: the folder of reference data (../shared).
# QUEQIAO_CI=1 makes a skip a failure.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

# More threads than this only get into each other's way: the matrices of the tests are small, the processes many.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" MKL_NUM_THREADS="${MKL_NUM_THREADS:-1}"
export HF_HUB_OFFLINE=1 MPLBACKEND=Agg PYTHONDONTWRITEBYTECODE=

tier=fast
arguments=()
for argument in "$@"; do
  case "$argument" in
    --slow) tier=slow ;;
    -h | --help) sed -n '2,7s/^# \{0,1\}//p' scripts/test.sh; exit 0 ;;
    *) arguments+=("$argument") ;;
  esac
done

if [ "$tier" = slow ]; then
  exec python -m pytest -m slow --timeout 1800 --durations 10 "${arguments[@]}"
fi
if [ "${#arguments[@]}" = 0 ]; then
  echo "test.sh: ruff check"; ruff check .
  echo "test.sh: ruff format --check"; ruff format --check .
  echo "test.sh: mypy"; mypy
fi
# Two tests at a time; a file's tests stay together, since they share fixtures.
exec python -m pytest -m "not slow" --numprocesses "${QUEQIAO_TEST_PROCESSES:-2}" --dist loadfile --durations 15 \
  "${arguments[@]}"
