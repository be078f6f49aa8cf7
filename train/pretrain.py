"""Stage one's entry point: python -m train.pretrain experiment=smoke   (--help explains every key)"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from omegaconf import DictConfig

from train.config import build, from_command_line
from train.failure import user_errors
from train.loading import build_evaluators, build_loader, build_sources, check_image_sizes, evenly


def main() -> None:
    # A bad config ends here, before torch or any data is touched.
    config = from_command_line("pretrain")

    from train.run import finish, start, train

    with user_errors():
        check_image_sizes(config)
        run = start(config)
        sources, codec, loader = build_data(config, run)
        evaluators = build_evaluators(config, codec)
        stage = build_stage(config, run, codec)
        train(config, run, stage, loader, evaluators, flops_per_sample=flops_counter(stage.model))
        finish()


def build_data(config: DictConfig, run: Any) -> tuple[Any, Any, Any]:
    """Sources, tokenizer and loader; prints what the tokenizer makes of the captions."""
    from data.caption_report import caption_report, print_caption_report

    sources = build_sources(config)
    codec = build_tokenizer(config, run, sources)
    loader = build_loader(config, run, sources, codec)
    if run.ranks.is_first:
        length = config.data.loader.max_text_tokens
        print_caption_report(
            caption_report(sources, codec, max_text_tokens=length, languages=loader.languages), max_text_tokens=length
        )
    return sources, codec, loader


def build_tokenizer(config: DictConfig, run: Any, sources: Any) -> Any:
    """A tokenizer from a folder, or one that rank 0 trains on the run's own captions (`_partial_` in its config)."""
    made = build(config.model.tokenizer)
    if not isinstance(made, partial):
        return made
    folder = run.dir / "tokenizer"
    if run.ranks.is_first:
        made(texts=some_captions(sources), folder=folder)
    run.ranks.barrier()
    return made(texts=None, folder=folder)


def some_captions(sources: Mapping[str, Any], about: int = 2000) -> Iterator[str]:
    """Cleaned captions and keywords, evenly from every source and language, to train a small tokenizer on."""
    from data.caption import clean_caption
    from data.source import BadSample

    for source, language, index in evenly(sources, about):
        try:
            sample = source.read(language, index)
        except BadSample:
            continue
        yield from (clean_caption(text, language) for text in (*sample.captions, *sample.keywords))


def build_stage(config: DictConfig, run: Any, codec: Any) -> Any:
    """Model with its starting weights, and the objectives."""
    from model.load_image_text import assemble_image_text
    from train.run import check_groups, home_of_frozen
    from train.stage import Stage

    check = partial(check_groups, config)
    model, report = assemble_image_text(config.model, codec, home_of_frozen(config, run), check)
    run.say(str(report))
    return Stage(model, build(config.train.loss), run.ranks)


def flops_counter(model: Any) -> Callable[[Any], float]:
    """Batch -> FLOPs of training on one of its samples; an encoder that trains along costs three times its forward."""
    image = model.vision.flops_per_image() * (1 if model.vision.frozen else 3)
    return lambda batch: (
        image + model.train_flops_per_sample(num_image_tokens=model.vision.num_tokens, text_length=batch.text_length)
    )


if __name__ == "__main__":
    main()
