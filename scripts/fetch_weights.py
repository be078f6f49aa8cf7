"""Fetch published weights and tokenizers into a folder that the configs read.

    python scripts/fetch_weights.py --list                              what is known, with sizes and licences
    python scripts/fetch_weights.py bert-base-chinese blip2-itm-vit-g   into weights/<name>
    HF_ENDPOINT=https://hf-mirror.com python scripts/fetch_weights.py owner/repository   anything, from a mirror
    python scripts/fetch_weights.py bert-base-chinese --from /mnt/usb   from a folder, without a network
    python scripts/fetch_weights.py --check weights/bert-base-chinese   hash what lies there once more

Downloads go on where they stopped, also after the program was killed, and every file is compared with the hub's size
and hash.  By default only files that cannot hold a program are taken (safetensors, tokenizers, texts); --allow-pickle
takes .bin and .pth too, for weights that are published in no other form.  docs/weights.md says more of each.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

RECORD = "fetched.json"  # beside the files: where they came from, their sizes and hashes
SAFE = ("*.safetensors", "*.json", "*.txt", "*.model", "*.md", "LICENSE*", "MODEL_LICENSE*", "*.tiktoken")
PICKLE = ("*.bin", "*.pth", "*.pt")
LAVIS = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2"
REGISTER = "academic use free, commercial use after registration (see its MODEL_LICENSE)"


@dataclass(frozen=True)
class Published:
    """`where`: repositories on the hub, the first that exists is taken; or one https address of a file."""

    where: tuple[str, ...]
    size: str
    licence: str
    what: str
    pickle_only: bool = False


PUBLISHED = {
    "blip2-itm-vit-g": Published(
        ("Salesforce/blip2-itm-vit-g",), "4.7 GB", "MIT", "all of stage one: EVA-ViT-g, Q-Former"
    ),
    "blip2-itm-vit-g-coco": Published(("Salesforce/blip2-itm-vit-g-coco",), "4.7 GB", "MIT", "the same, tuned on COCO"),
    "blip2-opt-2.7b": Published(
        ("Salesforce/blip2-opt-2.7b",), "about 15 GB", "MIT; OPT: its own", "stage two with OPT"
    ),
    "eva-vit-g": Published((f"{LAVIS}/eva_vit_g.pth",), "not known", "MIT", "EVA-ViT-g alone, from LAVIS", True),
    "blip2-pretrained": Published(
        (f"{LAVIS}/blip2_pretrained.pth",), "not known", "BSD-3 (LAVIS)", "LAVIS's stage one", True
    ),
    "bert-base-chinese": Published(
        ("google-bert/bert-base-chinese",), "0.4 GB", "Apache-2.0", "Q-Former start, Chinese"
    ),
    "bert-base-uncased": Published(
        ("google-bert/bert-base-uncased",), "0.4 GB", "Apache-2.0", "Q-Former start, English"
    ),
    "bert-base-multilingual-cased": Published(
        ("google-bert/bert-base-multilingual-cased",), "0.7 GB", "Apache-2.0", "Q-Former start, 104 languages"
    ),
    "xlm-roberta-base": Published(("FacebookAI/xlm-roberta-base",), "1.1 GB", "MIT", "Q-Former start, 100 languages"),
    "clip-vit-large-patch14": Published(
        ("openai/clip-vit-large-patch14",), "1.7 GB", "see its card", "a smaller encoder"
    ),
    "chatglm-6b": Published(("zai-org/chatglm-6b", "THUDM/chatglm-6b"), "13 GB", REGISTER, "VisualGLM's LLM", True),
    "chatglm2-6b": Published(("zai-org/chatglm2-6b", "THUDM/chatglm2-6b"), "12.5 GB", REGISTER, "LLM"),
    "chatglm3-6b": Published(("zai-org/chatglm3-6b", "THUDM/chatglm3-6b"), "12.5 GB", REGISTER, "LLM"),
    "glm-4-9b-hf": Published(("zai-org/glm-4-9b-hf", "THUDM/glm-4-9b-hf"), "18.8 GB", f"glm-4: {REGISTER}", "LLM"),
    "visualglm-6b": Published(
        ("zai-org/visualglm-6b", "THUDM/visualglm-6b"),
        "17.8 GB",
        "NON-COMMERCIAL RESEARCH ONLY",
        "VisualGLM whole",
        True,
    ),
}


@dataclass(frozen=True)
class Remote:
    """One file to fetch.  `sha256` for large files; `git_sha1` (of the blob) for those that git itself keeps."""

    name: str
    url: str
    size: int | None
    sha256: str | None = None
    git_sha1: str | None = None

    def is_in(self, path: Path) -> bool:
        """Is it this file that lies at `path`?  Size first, since that costs nothing."""
        if not path.is_file() or (self.size is not None and path.stat().st_size != self.size):
            return False
        if self.sha256:
            return hash_file(path, "sha256") == self.sha256
        return self.git_sha1 is None or hash_file(path, "git") == self.git_sha1


def hash_file(path: Path, kind: str) -> str:
    """sha256 of a file, or "git": the sha1 that git names the file's content by."""
    digest = hashlib.sha256() if kind == "sha256" else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def list_repository(
    repositories: Sequence[str], revision: str | None, endpoint: str | None
) -> tuple[str, str, list[Remote]]:
    """-> the repository that exists, its commit, all its files

    Raises:
        ValueError: none exists, or access is closed.
    """
    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    api = HfApi(endpoint=endpoint)
    for repository in repositories:
        try:
            info = api.model_info(repository, revision=revision, files_metadata=True)
        except GatedRepoError as error:
            raise ValueError(f"{repository} asks for consent on its page first; then set HF_TOKEN") from error
        except RevisionNotFoundError as error:
            raise ValueError(f"{repository} has no revision {revision}") from error
        except RepositoryNotFoundError:
            continue
        commit = info.sha or revision or "main"
        files = []
        for entry in info.siblings or []:
            url = hf_hub_url(repository, entry.rfilename, revision=commit, endpoint=endpoint)
            sha256 = entry.lfs.sha256 if entry.lfs else None
            files.append(Remote(entry.rfilename, url, entry.size, sha256, None if sha256 else entry.blob_id))
        return repository, commit, files
    raise ValueError(f"no repository {' or '.join(repositories)} at {endpoint or 'https://huggingface.co'}")


def choose(files: Iterable[Remote], allow_pickle: bool, repository: str) -> list[Remote]:
    """Top-level files that are safe; with `allow_pickle` torch's too, where there are no safetensors.

    Raises:
        ValueError: the weights are in pickles alone and those were not allowed.
    """
    top = [file for file in files if "/" not in file.name]
    safe = [file for file in top if any(fnmatch(file.name, pattern) for pattern in SAFE)]
    pickles = [file for file in top if any(fnmatch(file.name, pattern) for pattern in PICKLE)]
    if any(file.name.endswith(".safetensors") for file in safe):
        pickles = []
        safe = [file for file in safe if not file.name.startswith("pytorch_model.bin.index")]
    elif pickles and not allow_pickle:
        raise ValueError(
            f"{repository} has its weights as pickles only ({pickles[0].name}, ...), which could hold a program. This "
            f"project reads them with torch.load(weights_only=True), which runs none: add --allow-pickle to fetch them"
        )
    return safe + pickles


def download(file: Remote, folder: Path, headers: dict[str, str] | None = None) -> str:
    """Fetch one file, going on from `<name>.<hash>.part` where that is there.  -> "kept" or "fetched"

    huggingface_hub's own downloads begin anew after the process was killed (since 1.x it deletes the part), hence this.

    Raises:
        ValueError: what came is not what the hub announced; the part is deleted.
    """
    from huggingface_hub.file_download import http_get

    target = folder / file.name
    if file.is_in(target):
        return "kept"
    version = (file.sha256 or file.git_sha1 or "unknown")[:12]  # a part of another version is not continued
    part = folder / f"{file.name}.{version}.part"
    done = part.stat().st_size if part.is_file() else 0
    if file.size is not None and done > file.size:
        part.unlink()
        done = 0
    with part.open("ab") as out:
        http_get(file.url, out, resume_size=done, headers=headers, expected_size=file.size)
    if not file.is_in(part):
        size = part.stat().st_size
        part.unlink()
        raise ValueError(
            f"{file.url} came with {size} bytes and another hash than announced ({file.size} bytes, "
            f"{file.sha256 or file.git_sha1}); it was deleted: try again, or another HF_ENDPOINT"
        )
    part.replace(target)
    return "fetched"


def fetch_repository(
    repositories: Sequence[str], folder: Path, *, allow_pickle: bool, revision: str | None, endpoint: str | None
) -> None:
    from huggingface_hub.utils import build_hf_headers

    repository, commit, files = list_repository(repositories, revision, endpoint)
    chosen = choose(files, allow_pickle, repository)
    folder.mkdir(parents=True, exist_ok=True)
    _check_space(folder, chosen)
    record: dict[str, Any] = {
        "repository": repository,
        "commit": commit,
        "endpoint": endpoint or "https://huggingface.co",
    }
    _fetch_all(chosen, folder, record, lambda file: download(file, folder, build_hf_headers()))


def fetch_url(url: str, folder: Path) -> None:
    """A file at a plain address: no hash is published there, so its size is compared and its sha256 noted."""
    from huggingface_hub.utils import get_session

    folder.mkdir(parents=True, exist_ok=True)
    response = get_session().head(url, follow_redirects=True)
    response.raise_for_status()
    length = response.headers.get("content-length")
    file = Remote(url.rsplit("/", 1)[1], url, int(length) if length else None)
    _check_space(folder, [file])
    _fetch_all([file], folder, {"url": url}, lambda remote: download(remote, folder))
    print(f"  no hash is published for {url}; its sha256 is in {folder / RECORD}, compare it with a second source")


def fetch_local(name: str, source: Path, folder: Path, *, allow_pickle: bool) -> None:
    """Copy from a folder (`source/<name>`, or `source` itself), and compare with its record, where it has one."""
    found = source / name if (source / name).is_dir() else source
    if not found.is_dir():
        raise ValueError(f"--from {source}: there is no such folder")
    known: dict[str, Any] = {}
    if (found / RECORD).is_file():
        known = json.loads((found / RECORD).read_text("utf-8"))["files"]
    files = []
    for path in sorted(p for p in found.iterdir() if p.is_file() and p.name != RECORD and p.suffix != ".part"):
        files.append(Remote(path.name, str(path), path.stat().st_size, known.get(path.name, {}).get("sha256")))
    chosen = choose(files, allow_pickle, str(found))
    if not chosen:
        raise ValueError(f"--from {found}: nothing there that could be weights or a tokenizer")
    folder.mkdir(parents=True, exist_ok=True)
    _check_space(folder, chosen)
    _fetch_all(chosen, folder, {"folder": str(found)}, lambda file: _copy(file, folder))


def check(folder: Path) -> None:
    """Hash every file that was fetched into `folder` once more.

    Raises:
        ValueError: no record, or files that are missing or differ.
    """
    if not (folder / RECORD).is_file():
        raise ValueError(f"{folder} has no {RECORD}: it was not fetched by this script")
    files = json.loads((folder / RECORD).read_text("utf-8"))["files"]
    bad = [
        f"{name} ({'missing' if not (folder / name).is_file() else 'differs'})"
        for name, entry in files.items()
        if not (folder / name).is_file() or hash_file(folder / name, "sha256") != entry["sha256"]
    ]
    if bad:
        raise ValueError(f"{folder}: {', '.join(bad)}. Delete them and fetch again")
    print(f"{folder}: {len(files)} files are as they were fetched")


def _fetch_all(files: Sequence[Remote], folder: Path, record: dict[str, Any], get: Callable[[Remote], str]) -> None:
    entries: dict[str, Any] = {}
    for file in files:
        outcome = get(file)
        path = folder / file.name
        entries[file.name] = {"size": path.stat().st_size, "sha256": file.sha256 or hash_file(path, "sha256")}
        print(f"  {outcome:>7}  {entries[file.name]['size'] / 1e6:>10,.1f} MB  {path}", flush=True)
    (folder / RECORD).write_text(json.dumps({**record, "files": entries}, indent=1, ensure_ascii=False), "utf-8")


def _copy(file: Remote, folder: Path) -> str:
    target = folder / file.name
    if target.exists() and file.sha256 and file.is_in(target):
        return "kept"
    part = folder / f"{file.name}.part"
    shutil.copyfile(file.url, part)
    if not file.is_in(part):
        part.unlink()
        raise ValueError(f"{file.url} is not what its {RECORD} says (sha256 {file.sha256}): the copy is damaged")
    part.replace(target)
    return "copied"


def _check_space(folder: Path, files: Sequence[Remote]) -> None:
    need = sum(file.size or 0 for file in files if not (folder / file.name).exists())
    free = shutil.disk_usage(folder).free
    if need > free:
        raise ValueError(f"{folder} has {free / 1e9:.1f} GB free, {need / 1e9:.1f} GB are needed")


def fetch(name: str, options: argparse.Namespace) -> None:
    published = PUBLISHED.get(name, Published((name,), "", "see its page", ""))
    if name not in PUBLISHED and name.count("/") != 1 and options.source is None:
        raise ValueError(f"{name!r} is not known ({', '.join(PUBLISHED)}) and is no owner/repository either")
    folder = Path(options.to) / name.rsplit("/", 1)[-1]
    print(f"{name} -> {folder}   licence: {published.licence}", flush=True)
    if options.source is not None:
        fetch_local(folder.name, Path(options.source), folder, allow_pickle=options.allow_pickle)
        return
    if published.where[0].startswith("https://"):
        if not options.allow_pickle:
            raise ValueError(
                f"{published.where[0]} is a pickle: add --allow-pickle (it is read with weights_only=True)"
            )
        fetch_url(published.where[0], folder)
        return
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None
    fetch_repository(
        published.where, folder, allow_pickle=options.allow_pickle, revision=options.revision, endpoint=endpoint
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="names from --list, or owner/repository")
    parser.add_argument("--list", action="store_true", help="what is known by name")
    parser.add_argument("--to", default="weights", help="parent folder (default: weights)")
    parser.add_argument("--from", dest="source", help="a local folder to copy from; nothing is asked of the network")
    parser.add_argument("--revision", help="branch, tag or commit of the repository")
    parser.add_argument("--allow-pickle", action="store_true", help="also .bin and .pth, where there is nothing safer")
    parser.add_argument("--check", nargs="+", metavar="FOLDER", default=[], help="hash fetched folders again")
    options = parser.parse_args(arguments)
    if options.list:
        for name, entry in PUBLISHED.items():
            mark = "  (--allow-pickle)" if entry.pickle_only else ""
            print(f"{name:<29} {entry.size:>11}  {entry.what}{mark}\n{'':<29} {'':>11}  licence: {entry.licence}")
        return 0
    if not options.names and not options.check:
        parser.error("name what to fetch, or --list, or --check FOLDER")
    try:
        for folder in options.check:
            check(Path(folder))
        for name in options.names:
            fetch(name, options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from what has come so far", file=sys.stderr)
        return 130
    except Exception as error:
        from httpx import HTTPError
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        if not isinstance(error, HTTPError | HfHubHTTPError | OfflineModeIsEnabled | OSError):
            raise
        print(
            f"error: {type(error).__name__}: {error}\nThe same command goes on from what has come so far. "
            f"A mirror: HF_ENDPOINT=https://hf-mirror.com; without a network: --from FOLDER",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
