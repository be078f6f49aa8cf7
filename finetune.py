"""Stage two and domain fine-tuning: python finetune.py experiment=smoke_stage_two   (--help explains every key)"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from train.config import build, from_command_line
from train.failure import user_errors
from train.loading import build_evaluators, build_loader, build_sources, check_image_sizes, evenly


def main() -> None:
    # A bad config ends here, before torch or any data is touched.
    config = from_command_line("finetune")

    from data.picture_sides import warn_of_shared
    from train.run import finish, start, train

    with user_errors():
        check_image_sizes(config)
        check_adapter(config)
        run = start(config)
        sources = build_sources(config)
        llm = build_llm(config, run, sources)
        loader = build_loader(config, run, sources, llm.codec)
        run.say(loader.table())
        evaluators = build_evaluators(config, llm.codec)
        warn_of_shared(sources, evaluators)
        stage = build_stage(config, run, llm)
        flops = stage.model.train_flops_per_sample
        done = train(config, run, stage, loader, evaluators, flops_per_sample=flops)
        write_results(config, run, stage.model, done)
        run.say("\n".join(sorted({f"({note})" for e in evaluators if (note := getattr(e, "note", None))})))
        finish()


def check_adapter(config: DictConfig) -> None:
    """Values that no model could have; nothing is read or written yet."""
    adapter = build(config.model.adapter)
    if config.train.engine.zero_stage == 3:
        adapter.check_zero3()


def build_llm(config: DictConfig, run: Any, sources: Any) -> Any:
    """A language model from its sizes, or a small one that rank 0 warms up on the run's own dialogues (`_partial_`)."""
    from model.assemble import language_model

    made = language_model(config.model)
    if not isinstance(made, partial):
        if made.codec is None:
            raise ValueError("model.llm has no tokenizer: set model.llm.tokenizer")
        return made
    from model.llm.warm_up import load

    folder = Path(config.model.llm.folder)
    if run.ranks.is_first and not (folder / "config.json").is_file():
        dialogues, descriptions = some_dialogues(sources)
        run.say(f"a small language model learns {len(dialogues)} dialogues first, without their pictures: {folder}")
        made(dialogues=dialogues, descriptions=descriptions)
    run.ranks.barrier()
    return load(folder)


def some_dialogues(sources: Any, about: int = 6000) -> tuple[list[Any], list[Any]]:
    """Texts of every source and language, evenly, without opening a picture; and what is known of the pictures."""
    from data.source import BadSample

    found, descriptions = [], []
    for source, language, index in evenly(sources, about):
        describe = getattr(source, "descriptions", lambda language, index: ())
        try:
            candidates = source.dialogues(language, index)
        except BadSample:
            continue
        found += candidates
        descriptions += [describe(language, index)] * len(candidates)
    return found, descriptions


def build_stage(config: DictConfig, run: Any, llm: Any) -> Any:
    """Model with its starting weights, what is put on it to learn, and the objective."""
    from model.assemble import assemble
    from train.run import check_groups, home_of_frozen
    from train.stage import Stage

    home, check = home_of_frozen(config, run), partial(check_groups, config)
    model, report = assemble(config.model, llm, device=run.device, home=home, check=check)
    run.say(str(report))
    return Stage(model, build(config.train.loss), run.ranks)


def write_results(config: DictConfig, run: Any, model: Any, done: int) -> None:
    """The trained tensors as a folder that peft reads, and what changed by training."""
    from safetensors.torch import load_file

    from model.weights.adapter_folder import save
    from train.evaluator.before_after import before_and_after

    checkpoint = run.dir / "checkpoints" / f"step_{done}" / "weights.safetensors"
    if run.ranks.is_first and checkpoint.is_file():
        trained = {name.removeprefix("model."): tensor for name, tensor in load_file(checkpoint).items()}
        base = config.model.weights.get("visualglm") or config.model.weights.get("llm")
        folder = save(model, trained, run.dir / "adapter", base_model=base or config.model.llm.get("folder"))
        run.say(f"what was trained, for chat, for scripts/merge_adapter.py and for peft: {folder}")
        table = before_and_after(run.dir / "metrics.jsonl")
        run.say(f"\n{table}" if table else "")
    run.ranks.barrier()


if __name__ == "__main__":
    main()
