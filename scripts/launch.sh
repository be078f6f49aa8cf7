#!/usr/bin/env bash
# One process per GPU (or per CPU share) of this machine, or of several machines.
#
#   bash scripts/launch.sh N -m train.pretrain experiment=... key=value ...
#   bash scripts/launch.sh N finetune.py experiment=... key=value ...
#   bash scripts/launch.sh --hostfile FILE -m train.pretrain ...       FILE has a line "host slots=8" per machine
#
# On one machine torchrun starts N processes (train/torchrun.py).  With a hostfile it is DeepSpeed's launcher,
#   deepspeed --hostfile FILE --no_local_rank --module train.pretrain ...
# typed once, on any of the machines: it starts `slots` processes on every host over ssh.  It needs pdsh here, ssh
# without a password to every host, and code, .venv and data at the same paths everywhere.  Variables that all hosts
# should have go into a file .deepspeed_env, NAME=value a line.  QUEQIAO_DEEPSPEED_ARGS holds more for the launcher:
#   "--master_addr 10.0.0.1"        the first host's address, where `hostname -I` there says another
#   "--launcher slurm"              srun starts the processes, without pdsh
#   "--no_ssh --node_rank K --master_addr 10.0.0.1"    no ssh at all: typed on every machine, K = 0, 1, ... as in FILE
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() { sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }
[ $# -ge 3 ] || usage

bin="${QUEQIAO_VENV:-$PWD/.venv}/bin"
[ -x "$bin/python" ] || bin="$(dirname "$(command -v python)")"
export PATH="$bin:$PATH"

if [ "$1" = --hostfile ]; then
  hostfile="$2"; shift 2
  [ -f "$hostfile" ] || { echo "launch.sh: no hostfile at $hostfile" >&2; exit 2; }
  what=()  # --module: imports work as with python -m
  if [ "$1" = -m ]; then what=(--module); shift; elif [[ "$1" != *.py ]]; then usage; fi
  hosts="$(grep -cvE '^[[:space:]]*(#|$)' "$hostfile" || true)"
  case " ${QUEQIAO_DEEPSPEED_ARGS:-} " in *" --launcher"* | *" --no_ssh "*) over_pdsh=no ;; *) over_pdsh=yes ;; esac
  if [ "$hosts" -gt 1 ] && [ "$over_pdsh" = yes ]; then
    command -v pdsh > /dev/null \
      || { echo "launch.sh: $hosts hosts need pdsh; without: see --no_ssh under bash scripts/launch.sh" >&2; exit 2; }
    # pdsh gives the words to a shell on every host; DeepSpeed puts quotes around those with a space, and no others.
    words=()
    for word in "${@:2}"; do
      case "$word" in
        *" "*) words+=("$(sed 's/[\\$`]/\\&/g' <<< "$word")") ;;
        *) words+=("$(printf %q "$word")") ;;
      esac
    done
    set -- "$1" "${words[@]}"
  fi
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
