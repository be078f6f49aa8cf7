#!/usr/bin/env bash
# One process per GPU (or per CPU share) of this machine, or of several machines.
#
#   bash scripts/launch.sh N -m train.pretrain experiment=... key=value ...
#   bash scripts/launch.sh N finetune.py experiment=... key=value ...
#   bash scripts/launch.sh --hostfile FILE -m train.pretrain ...       FILE has a line "host slots=8" per machine
#
# On one machine torchrun starts N processes (train/torchrun.py).  With a hostfile, DeepSpeed's launcher starts `slots` processes on every
# host over ssh; the code, the environment and the data have to be at the same paths on all of them.
# QUEQIAO_DEEPSPEED_ARGS holds more arguments for it, e.g. "--master_addr 10.0.0.1" or "--launcher slurm".
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() { sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }
[ $# -ge 3 ] || usage

bin="${QUEQIAO_VENV:-$PWD/.venv}/bin"
[ -x "$bin/python" ] || bin="$(dirname "$(command -v python)")"
export PATH="$bin:$PATH"

if [ "$1" = --hostfile ]; then
  hostfile="$2"; shift 2
  [ -f "$hostfile" ] || { echo "launch.sh: no hostfile at $hostfile" >&2; exit 2; }
  what=()  # --module: imports work as with python -m
  if [ "$1" = -m ]; then what=(--module); shift; elif [[ "$1" != *.py ]]; then usage; fi
  # --no_local_rank: Hydra refuses arguments it does not know.
  exec deepspeed --hostfile "$hostfile" ${QUEQIAO_DEEPSPEED_ARGS:-} --no_local_rank "${what[@]}" "$@"
fi

count="$1"; shift
[[ "$count" =~ ^[1-9][0-9]*$ ]] || usage
[[ "$1" = -m || "$1" = *.py ]] || usage
# CPU processes share the cores: torchrun would give each one thread whatever there is.
if [ -z "${OMP_NUM_THREADS:-}" ]; then
  cores="$(nproc)"; export OMP_NUM_THREADS=$(( cores / count > 0 ? cores / count : 1 ))
fi
exec python -m train.torchrun --standalone --nproc_per_node "$count" "$@"
