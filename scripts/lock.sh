#!/usr/bin/env bash
# Writes the files in requirements/ that scripts/setup.sh installs from.  Needs uv (pip install uv) and a network.
#   bash scripts/lock.sh              keep the versions already locked, add what pyproject.toml newly asks for
#   bash scripts/lock.sh --upgrade    newest versions within pyproject.toml and requirements/pins.in
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

uv="$(command -v uv || true)"
[ -n "$uv" ] || uv=".venv/bin/uv"
[ -x "$uv" ] || { echo "lock.sh: uv is missing; install it with: pip install uv" >&2; exit 1; }

# torch stays out of the hashed file: the same version has a CPU and a CUDA build, and each machine takes what its
# index gives.  What the CUDA build pulls in is pinned, without hashes, as a constraint.
resolved="$(mktemp)"
trap 'rm -f "$resolved"' EXIT
for part in lock last cuda torch; do  # uv keeps the versions that it finds in its output file
  [ ! -f "requirements/$part.txt" ] || cat "requirements/$part.txt" >> "$resolved"
done
compile() {
  "$uv" pip compile --quiet --universal --fork-strategy fewest --python-version 3.11 --generate-hashes --no-annotate \
    --no-header "$@" > /dev/null
}
compile pyproject.toml --extra dev -c requirements/pins.in -o "$resolved" "$@"
compile requirements/build.in -o requirements/build.txt "$@"

split() {  # NAME-REGEX -> those requirements, with their hashes
  awk -v want="$1" -v not="${2:-^$}" '/^[a-zA-Z]/ { split($0, part, /[=; ]/); keep = part[1] ~ want && part[1] !~ not } keep' "$resolved"
}
bare() { grep -v -- '--hash=' | sed 's/ *\\$//'; }

# setup.sh runs on Linux alone, so the marker says nothing.
sed -i -E "s/ ; sys_platform == 'linux'//; s/ and sys_platform == 'linux'//" "$resolved" requirements/build.txt

cuda='^(nvidia-|cuda-)'
{
  echo "# Written by scripts/lock.sh.  Installed with --require-hashes --no-deps."
  split '.' "$cuda|^(torch|deepspeed|setuptools|pip|wheel)\$"
} > requirements/lock.txt
{
  echo "# Written by scripts/lock.sh.  No hash: the CPU build and the CUDA build of one version are different files."
  split '^torch$' | bare
} > requirements/torch.txt
{
  echo "# Written by scripts/lock.sh.  Constraints on what the CUDA build of torch pulls in; the CPU build pulls nothing."
  split "$cuda" | bare
} > requirements/cuda.txt
{
  echo "# Written by scripts/lock.sh.  Source packages whose setup imports torch: installed last, without build isolation."
  split '^deepspeed$'
} > requirements/last.txt
wc -l requirements/*.txt
