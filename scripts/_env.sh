# To be sourced by the other scripts: goes to the repository root, brings .venv up to date, puts it on PATH.
#   source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
bash scripts/setup.sh --quiet || exit 1
export VIRTUAL_ENV="$PWD/.venv"
export PATH="$VIRTUAL_ENV/bin:$PATH"
export PYTHONUTF8=1                                      # captions are Chinese, whatever the locale says
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"  # its threads and forked loader workers deadlock
export WDS_SECURE=1                                      # webdataset: no shell in URLs, no unpickling of members
export WANDB_MODE="${WANDB_MODE:-offline}"
