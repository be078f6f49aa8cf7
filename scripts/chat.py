"""Talks about pictures in a terminal, in Chinese and English.

    python scripts/chat.py --model outputs/demo_stage_two
    python scripts/chat.py --model weights/visualglm-6b-hf --adapter outputs/xray/adapter --quantize 4
    python scripts/chat.py --model outputs/RUN --image fox.jpg --temperature 0 --lang en

First the path of a picture (or nothing), then questions.  `clear` begins anew, `stop` ends; Ctrl-C stops an answer.
"""

from __future__ import annotations

import argparse
import locale
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from serve.options import add_decoding_options, add_model_options, decoding_from, session_from
from serve.terminal import TEXTS, Terminal


def main() -> None:
    options = parser().parse_args()
    try:
        decoding = decoding_from(options)
        session = session_from(options)
    except ValueError as error:
        raise SystemExit(f"chat: {error}") from error
    try:
        import readline  # noqa: F401 - arrows and history while typing, where there is one
    except ImportError:
        pass
    Terminal(session, decoding, language=options.lang, question=options.question).run(options.image)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--image", type=Path, metavar="FILE", help="the first picture, instead of asking for it")
    made.add_argument("--question", help="asked first of every picture (default: to describe it)")
    made.add_argument("--lang", choices=list(TEXTS), default=usual_language(), help="of what the program itself says")
    add_model_options(made)
    add_decoding_options(made)
    return made


def usual_language() -> str:
    found, _ = locale.getlocale()
    return "zh" if (found or "").startswith(("zh", "Chinese")) else "en"


if __name__ == "__main__":
    main()
