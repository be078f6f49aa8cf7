#!/usr/bin/env bash
# Makes .venv from requirements/ (exact versions) and installs this project into it.  Call it as often as you like.
#   QUEQIAO_PYTHON=/path/to/python3.12   the Python to use (default: the first of python3, 3.13, 3.12, 3.11 that fits)
#   QUEQIAO_TORCH_INDEX=URL              take torch from this index, e.g. PyTorch's own one of CPU builds
#   PIP_INDEX_URL=URL                    a PyPI mirror; pip reads this and its other settings by itself
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."
quiet=no
[ "${1:-}" != --quiet ] || quiet=yes

fail() { printf 'setup.sh: %s\n' "$@" >&2; exit 1; }
say() { printf '%s\n' "$*"; }

fits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2> /dev/null; }
find_python() {
  local candidate
  if [ -n "${QUEQIAO_PYTHON:-}" ]; then
    fits "$QUEQIAO_PYTHON" || fail "QUEQIAO_PYTHON=$QUEQIAO_PYTHON is $("$QUEQIAO_PYTHON" -V 2>&1 || echo 'no Python'); Python 3.11, 3.12 or 3.13 is needed"
    echo "$QUEQIAO_PYTHON"
    return
  fi
  for candidate in python3 python3.13 python3.12 python3.11; do
    if fits "$candidate"; then command -v "$candidate"; return; fi
  done
  fail "no Python 3.11, 3.12 or 3.13 found (python3 is $(python3 -V 2>&1 || echo missing))." \
    "Install one (Debian, Ubuntu: apt install python3 python3-venv) or name one: QUEQIAO_PYTHON=/path/to/python3.12 bash scripts/setup.sh"
}

[ "$(uname -s)" = Linux ] || fail "training runs on Linux; this is $(uname -s)"
# A second call must be quick: with a working .venv its own Python decides, and nothing else is started.
python=.venv/bin/python
if [ -n "${QUEQIAO_PYTHON:-}" ] || ! fits "$python"; then python="$(find_python)"; fi

fingerprint() {  # changes when what is installed would change
  { "$python" -c 'import sys; print(sys.version_info[:3], sys.base_prefix)'
    pwd  # a copied or moved folder has the old place written into .venv
    cat requirements/*.txt pyproject.toml scripts/setup.sh
    ls -d ./*/__init__.py
  } | sha256sum | cut -d' ' -f1
}
stamp=.venv/.queqiao-installed
want="$(fingerprint)"
if [ "$(cat "$stamp" 2> /dev/null || true)" = "$want" ]; then
  [ $quiet = yes ] || say "setup: .venv is up to date"
  exit 0
fi

# Two checkouts cannot share one: the project is installed into it by its place, and the other's would be made anew here.
[ ! -L .venv ] || fail ".venv is a link to $(readlink -f .venv), which another checkout may use; nothing was changed." \
  "Remove the link (rm $PWD/.venv) and call setup.sh again: packages come from pip's cache."

mkdir -p .venv
exec 9> .venv/.queqiao-lock
if command -v flock > /dev/null; then
  flock -n 9 || { say "setup: another setup.sh is at work on this .venv; waiting for it"; flock 9; }
  [ "$(cat "$stamp" 2> /dev/null || true)" != "$want" ] || exit 0
fi
rm -f "$stamp"  # from here on an interruption leaves no stamp, and the next call goes on where pip stopped

start=$SECONDS
log=.venv/setup.log
: > "$log"
step() { say "setup: [$1/6] $2"; }
# pip's many lines go to the log; a counter shows that it is alive.
run() {
  local code=0 every=10
  [ ! -t 1 ] || every=1
  "$@" 2>&1 | tee -a "$log" | awk -v every="$every" -v tty="$every" '
    /^(Collecting|Processing) |^Requirement already/ { n++; if (n % every == 0) printf(tty == 1 ? "\r         %d packages looked at" : "         %d packages looked at\n", n); fflush() }
    /^ *Downloading .*[0-9.]+ GB/ { print "         " $0; fflush() }
    END { if (n && tty == 1) print "" }' || code=$?
  if [ "$code" != 0 ]; then
    tail -n 25 "$log" >&2
    fail "this step failed: $*" "The whole output is in $PWD/$log.  Mend the cause and call setup.sh again; it goes on from here."
  fi
}

step 1 "Python environment: $("$python" -V) in .venv"
same_python() {
  [ -x .venv/bin/pip ] && fits .venv/bin/python &&
    [ "$(.venv/bin/python -c 'import sys; print(sys.version_info[:2])')" = "$("$python" -c 'import sys; print(sys.version_info[:2])')" ]
}
moved() { [ -f .venv/bin/activate ] && ! grep -qF "$PWD/.venv" .venv/bin/activate; }
if ! same_python || moved; then
  rm -rf .venv/bin .venv/lib .venv/lib64 .venv/include .venv/pyvenv.cfg
  case "$python" in .venv/*) python="$(find_python)" ;; esac  # that one is gone now
  "$python" -m venv .venv >> "$log" 2>&1 ||
    fail "$python cannot make a virtual environment (Debian, Ubuntu: apt install python3-venv); see $PWD/$log"
fi
# pip writes INSTALLER after a package's files: without it the package was cut off half way, though pip thinks it is there.
for info in .venv/lib/python*/site-packages/*.dist-info; do
  if [ -d "$info" ] && [ ! -f "$info/INSTALLER" ]; then
    say "         $(basename "$info" .dist-info) was cut off while being installed; again"
    rm -rf "$info"
  fi
done
pip=(.venv/bin/python -m pip --disable-pip-version-check --no-input)

step 2 "pip and setuptools"
run "${pip[@]}" install --require-hashes --no-deps -r requirements/build.txt
step 3 "$(grep -c '^[a-zA-Z]' requirements/lock.txt) packages, each checked against its hash"
run "${pip[@]}" install --require-hashes --no-deps --no-build-isolation -r requirements/lock.txt
step 4 "$(grep '^torch' requirements/torch.txt) (the CUDA build takes about 5 GB of disk)"
torch_index=()
[ -z "${QUEQIAO_TORCH_INDEX:-}" ] || torch_index=(--index-url "$QUEQIAO_TORCH_INDEX")
run "${pip[@]}" install "${torch_index[@]}" -r requirements/torch.txt -c requirements/cuda.txt
step 5 "DeepSpeed (built from source; its CUDA operators are compiled when first used)"
DS_BUILD_OPS=0 run "${pip[@]}" install --require-hashes --no-deps --no-build-isolation -r requirements/last.txt
step 6 "this project, editable"
run "${pip[@]}" install --no-deps --no-build-isolation -e .

.venv/bin/python -c 'import data, model, train, torch' || fail "the finished .venv cannot import torch and this project; remove .venv and call setup.sh again"
echo "$want" > "$stamp.new"
mv "$stamp.new" "$stamp"
say "setup: done in $((SECONDS - start)) s; activate with: source .venv/bin/activate"
