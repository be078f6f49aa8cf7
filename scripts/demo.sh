#!/usr/bin/env bash
# A whole run on the CPU, in minutes: draws scenes, packs shards, trains stage one, evaluates on scenes never seen.
#   bash scripts/demo.sh             again: goes on where it stopped, or says that it is done
#   bash scripts/demo.sh --fresh     starts afresh
#   bash scripts/demo.sh --help      more; key=value goes to the training, e.g. train.steps=4000
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
exec python scripts/demo.py "$@"
