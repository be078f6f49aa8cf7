"""Measures a trained run: python evaluate.py run=outputs/demo   (--help explains every key)"""

from __future__ import annotations

import sys

from train.config_evaluate import evaluate_config
from train.failure import user_errors


def main() -> None:
    # A bad config ends here, before torch or any data is touched.
    config = evaluate_config(sys.argv[1:])

    from train.evaluation import evaluate
    from train.run import finish

    with user_errors():
        evaluate(config)
        finish()


if __name__ == "__main__":
    main()
