#!/usr/bin/env bash
# All stages on the CPU, in about a quarter of an hour on two cores: draws scenes, packs shards, trains stage one, aligns a
# tiny ChatGLM, fine-tunes it with LoRA, and evaluates each on scenes never seen.
#   bash scripts/demo.sh             again: goes on where it stopped, or says that it is done
#   bash scripts/demo.sh --fresh     starts afresh
#   bash scripts/demo.sh --help      more; key=value goes to stage one, e.g. train.steps=4000
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
exec python scripts/demo.py "$@"
