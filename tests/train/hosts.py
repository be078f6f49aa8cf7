"""Several machines, all of them this one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

PDSH = r"""#!/usr/bin/env bash
# pdsh [-S] [-f N] -w HOST,HOST WORD ...: the words, joined by spaces, go to a shell for each host; %n is its number.
while [ "$1" != -w ]; do shift; done
hosts="$2"; shift 2
number=0
for host in ${hosts//,/ }; do
  command="$*"
  bash -c "${command//%n/$number}" &
  number=$((number + 1))
done
code=0
for job in $(jobs -p); do wait "$job" || code=$?; done
exit $code
"""


def stand_in_for_pdsh(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pdsh").write_text(PDSH)
    (folder / "pdsh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
