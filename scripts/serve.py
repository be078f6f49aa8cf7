"""Serves a model: a page in Chinese and English, VisualGLM's REST and OpenAI's, on http://127.0.0.1:7860.

    python scripts/serve.py --model outputs/demo_stage_two
    python scripts/serve.py --model weights/visualglm-6b-hf --adapter outputs/xray/adapter --quantize 4
    python scripts/serve.py --model outputs/RUN --no-page --port 8080                # REST alone
    QUEQIAO_TOKEN=... python scripts/serve.py --model outputs/RUN --host 0.0.0.0     # for others, with a token

The page is at /, VisualGLM's API `POST /`, OpenAI's under /v1; /health and /metrics are for those who watch it.
"""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from serve.batching import LineLimits
from serve.fetch import Fetcher
from serve.guard import is_local
from serve.options import add_model_options, session_from
from serve.pictures import PictureReader
from serve.rest import Service
from serve.server import app_of, server_of


def main() -> None:
    options = parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    try:
        token = token_from(options)
        service = service_from(options)
        app = app_of(
            service,
            host=options.host,
            token=token,
            allowed_hosts=[name.lower() for name in options.allow_host],
            page=options.page,
            language=options.lang,
        )
    except ValueError as error:
        raise SystemExit(f"serve: {error}") from error
    place = f"http://{f'[{options.host}]' if ':' in options.host else options.host}:{options.port}"
    print(
        f"{service.session.name} at {place}  (page: {'/' if options.page else 'none'}, REST: POST / and /v1)",
        flush=True,
    )
    try:
        server_of(app, host=options.host, port=options.port).run()
    except KeyboardInterrupt:  # uvicorn has shut down already, and says once more why
        pass


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(made)
    group = made.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="others than this machine's own need a token")
    group.add_argument("--port", type=port_number, default=7860, metavar="N")
    group.add_argument("--no-page", dest="page", action="store_false", help="REST alone")
    group.add_argument("--lang", choices=["zh", "en"], default="en", help="of the page where the browser says neither")
    group.add_argument(
        "--token-file", type=Path, metavar="FILE", help="else $QUEQIAO_TOKEN, else one is drawn and shown"
    )
    group.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="a name a proxy calls it by")
    group.add_argument("--fetch-host", action="append", default=[], metavar="NAME", help="whose pictures are fetched")
    limits, pictures = LineLimits(), PictureReader
    group.add_argument("--max-waiting", type=int, default=limits.waiting, metavar="N", help="requests in the line")
    group.add_argument("--time-out", type=float, default=limits.seconds, metavar="S", help="of a request, in seconds")
    group.add_argument("--max-rows", type=int, default=limits.rows, metavar="N", help="answers at a time")
    group.add_argument("--max-batch-tokens", type=int, default=limits.tokens, metavar="N", help="of all these together")
    group.add_argument("--max-picture-bytes", type=int, default=pictures.max_bytes, metavar="N", help="of a file")
    group.add_argument("--max-picture-pixels", type=int, default=pictures.max_pixels, metavar="N")
    group.add_argument("--max-pictures", type=int, default=Service.max_pictures, metavar="N", help="of a request")
    return made


def port_number(text: str) -> int:
    number = int(text)
    if not 0 <= number < 65536:
        raise argparse.ArgumentTypeError(f"{number} is no port; they go from 0 (any free one) to 65535")
    return number


def service_from(options: argparse.Namespace) -> Service:
    """Raises ValueError."""
    session = session_from(options)
    fetcher = Fetcher([name.lower() for name in options.fetch_host]) if options.fetch_host else None
    return Service.of(
        session,
        limits=LineLimits(
            waiting=options.max_waiting,
            seconds=options.time_out,
            rows=options.max_rows,
            tokens=options.max_batch_tokens,
        ),
        pictures=PictureReader(session, options.max_picture_bytes, options.max_picture_pixels, fetcher),
        max_pictures=options.max_pictures,
    )


def token_from(options: argparse.Namespace) -> str | None:
    """On this machine alone one is asked for only if it was given.  Raises ValueError: a file that cannot be read."""
    if options.token_file is not None:
        try:
            return options.token_file.read_text("utf-8").strip() or None
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--token-file {options.token_file} cannot be read ({error})") from None
    if given := os.environ.pop("QUEQIAO_TOKEN", "").strip():
        return given
    if is_local(options.host):
        return None
    drawn = secrets.token_urlsafe(24)
    print(f"token of this run (the page asks for it as the password): {drawn}", flush=True)
    return drawn


if __name__ == "__main__":
    main()
