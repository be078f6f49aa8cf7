"""A mistyped key stops a run before anything is loaded, wherever it was written."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from train.config import CONFIG_DIR, Config, build, compose
from train.config_check import ConfigError, resolved_type
from train.config_help import help_text

SMOKE = "experiment=smoke"


@pytest.mark.parametrize(
    ("override", "key", "nearest"),
    [
        ("train.stepz=5", "train.stepz", "train.steps"),
        ("+train.stepz=5", "train.stepz", "train.steps"),
        ("++train.optim.weigth_decay=0.1", "train.optim.weigth_decay", "train.optim.weight_decay"),
        ("trian.steps=5", "trian", "train"),
        ("train.seed=1", "train.seed", "run.seed"),
        ("data.loader.num_worker=2", "data.loader.num_worker", "data.loader.num_workers"),
        ("data.source.scens.seed=2", "data.source.scens", "data.source.scenes"),
        ("model.visoin.width=64", "model.visoin", "model.vision"),
        ("model.vision.widht=64", "model.vision.widht", "model.vision.width"),
        ("train.loss.itc.label_smoothin=0.2", "train.loss.itc.label_smoothin", "train.loss.itc.label_smoothing"),
        (
            "train.engine.deepspeed.zero_optimisation={overlap_comm: true}",
            "train.engine.deepspeed.zero_optimisation",
            "train.engine.deepspeed.zero_optimization",
        ),
        (
            "train.engine.deepspeed.zero_optimization.overlap_com=true",
            "train.engine.deepspeed.zero_optimization.overlap_com",
            "train.engine.deepspeed.zero_optimization.overlap_comm",
        ),
        (
            "train.engine.deepspeed.zero_optimization.offload_optimizer.pin_memry=true",
            "zero_optimization.offload_optimizer.pin_memry",
            "zero_optimization.offload_optimizer.pin_memory",
        ),
        ("train.engine.deepspeed.torch_autocast.dtyp=bfloat16", "torch_autocast.dtyp", "torch_autocast.dtype"),
        ("train.engine.deepspeed.gradient_clipping=5", "deepspeed.gradient_clipping", "train.clip_grad_norm"),
        ("experimnt=smoke", "experimnt", "experiment"),
        ("train/optm=adamw", "train/optm", "train/optim"),
    ],
)
def test_mistyped_key_on_the_command_line(override: str, key: str, nearest: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose("pretrain", [SMOKE, override])
    assert key in str(error.value)
    assert nearest in str(error.value)
    assert f"on the command line: {override}" in str(error.value)


@pytest.mark.parametrize(
    ("file", "right", "wrong", "key", "nearest"),
    [
        ("pretrain.yaml", "  accumulate:", "  acumulate:", "train.acumulate", "train.accumulate"),
        ("train/optim/adamw.yaml", "\nbeta1:", "\nbetta1:", "train.optim.betta1", "train.optim.beta1"),
        ("experiment/smoke.yaml", "  log_every:", "  log_evry:", "train.log_evry", "train.log_every"),
        ("data/loader/default.yaml", "\n  prefetch:", "\n  prefetsh:", "data.loader.prefetsh", "data.loader.prefetch"),
        ("model/qformer/tiny.yaml", "\nnum_heads:", "\nnum_head:", "model.qformer.num_head", "model.qformer.num_heads"),
    ],
)
def test_mistyped_key_in_a_file(tmp_path: Path, file: str, right: str, wrong: str, key: str, nearest: str) -> None:
    configs = tmp_path / "configs"
    shutil.copytree(CONFIG_DIR, configs)
    text = (configs / file).read_text()
    assert right in text
    broken = text.replace(right, wrong, 1)
    (configs / file).write_text(broken)
    expected_line = broken[: broken.index(wrong.strip())].count("\n") + 1
    with pytest.raises(ConfigError) as error:
        compose("pretrain", [SMOKE], config_dir=configs)
    assert f"unknown key {key} (configs/{file}, line {expected_line}): did you mean {nearest}?" in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=many", r"train\.steps.*many"),
        ("train.steps=0", r"train\.steps=0 \(on the command line: train\.steps=0\): at least 1"),
        ("train.precision=fp8", "one of auto, fp32, bf16, fp16"),
        ("run.resume=maybe", "one of auto, never"),
        ("experiment=smok", "smok"),
        ("run.dir=${nowhere}", "nowhere"),
        ("data.source.scenes.num_scenes=???", "not set: data.source.scenes.num_scenes"),
        ("train.engine.deepspeed.zero_optimization.stage=3", "set train.engine.zero_stage instead"),
        ("train.optim=3", "train.optim"),
        ("train.optim.lr=nan", r"train\.optim\.lr=nan .*finite"),
        ("train.optim.beta2=1.5", r"train\.optim\.beta2=1.5 .*below 1"),
        ("train.steps=???", "not set: train.steps"),
        ("train.loss=null", "train.loss is null"),
        ("train.loss.itg.normalise=glbal", "expected one of global, rank"),
        ("train.loss.mask_duplicates=nope", "expected true or false"),
        ("model.qformer.num_layers=abc", "expected a whole number"),
        ("model.image_text.temperature_min=x", "expected a number or null"),
        ("data.loader.num_workers=x", "expected a whole number or null"),
        ("data.loader.num_workers=-2", "expected at least 0 or null"),
        ("data.loader=7", r"data\.loader=7 is a section, not a value \(on the command line"),
        ("model.vision=foo", r"model\.vision=foo is a section, not a value"),
        ("data.source=foo", r"data\.source=foo is a section, not a value"),
        ("experiment=stage_one/emojy", r"experiment has no stage_one/emojy: did you mean stage_one/emoji\?"),
        ("model/vision=vit_tinny", r"model/vision has no vit_tinny: did you mean vit_tiny\?"),
        ("train/loss=xyz", "train/loss has no xyz: there are stage_one, stage_two"),
        ("train.loss.itc.weight=-1", r"train\.loss\.itc\.weight=-1 \(on the command line.*expected at least 0"),
        ("train.loss.itm.weight=-0.5", r"itm\.weight=-0\.5 .*expected at least 0"),
        ("train.loss.itg.weight=nan", r"itg\.weight=nan .*expected a finite number"),
        ("train.loss.itg.label_smoothing=1", r"itg\.label_smoothing=1 .*expected below 1"),
        ("train.loss.itc.weight=${data.source.scenes.num_scenes}x", "expected a number"),
        ("model.qformer.num_query_tokens=0", r"num_query_tokens=0 .*expected at least 1"),
        ("model.qformer.cross_attention_frequency=0", "expected at least 1"),
        ("model.qformer.dropout=1.5", "expected below 1"),
        ("model.image_text.temperature=0", "expected above 0"),
        ("model.image_text.embed_dim=0", "expected at least 1"),
        ("model.vision=null", r"model\.vision is null \(on the command line: model\.vision=null\): a run needs one"),
        (
            "data.mixture.sources=mine",
            r"sources=mine \(on the command.*: expected names with values.*quotes.*{mine: 1, ",
        ),
        ("data.mixture.sources=other:2", r"'data\.mixture\.sources={other: 1, \.\.\.}'"),  # of {mine:1,other:2} in bash
        ("data.mixture.sources={mine: a}", r"data\.mixture\.sources\.mine=a \(on the command line.*expected a number"),
        ("data.transform.scale=0.3", r"data\.transform\.scale=0\.3 .*expected a list, \[a, b\]"),
        ("data.mixture.languages={en: null}", r"data\.mixture\.languages\.en=None .*expected a number"),
    ],
)
def test_impossible_value(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose("pretrain", [SMOKE, override])


@pytest.mark.parametrize("override", ["train/evaluator=null", "train.evaluator=null", "~train/evaluator"])
def test_null_is_no_evaluator(override: str) -> None:
    """try_out adds keys to the evaluators it chooses; they go with them."""
    for experiment in ("smoke_stage_two", "finetune/try_out"):
        config = compose(
            "finetune", [f"experiment={experiment}", "data.source.mine.path=x"][: 1 + ("/" in experiment)] + [override]
        )
        assert not any(config.train.evaluator.values())
    assert compose(
        "pretrain", ["experiment=smoke", "experiment=null", "data/source=scenes", "model/tokenizer=own_captions"]
    )
    with pytest.raises(ConfigError, match="unknown key train.evaluator.held_out .on the command line"):
        words = ["data.source.mine.path=x", "train.evaluator.held_out.batch_size=3"]
        compose("finetune", ["experiment=finetune/try_out", override, *words])


def test_a_reference_into_null_names_both_keys() -> None:
    expected = (
        r"train\.evaluator\.held_out\.source\.path \(configs/train/evaluator/held_out.yaml, line \d+\) is "
        r"\$\{data\.source\.mine\.path\}, but data\.source\.mine is null \(on the command line: .*=null\)"
        r".* set train\.evaluator\.held_out=null too"
    )
    words = ["experiment=finetune/try_out", "data.source.mine=null"]
    with pytest.raises(ConfigError, match=expected):
        compose("finetune", words)
    compose("finetune", [*words, "train.evaluator.held_out=null"])
    with pytest.raises(
        ConfigError, match=r"run\.name \(on the command.*is \$\{run\.nome\}, but there is no run\.nome$"
    ):
        compose("pretrain", [SMOKE, "run.name=${run.nome}"])


def test_repeated_override_is_quoted_by_its_last_value() -> None:
    for wrong, message in [("many", "train.steps: .*"), ("0", "train.steps=0 ")]:
        with pytest.raises(ConfigError, match=rf"{message}\(on the command line: train\.steps={wrong}\)"):
            compose("pretrain", [SMOKE, "train.steps=5", f"train.steps={wrong}"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.llm.rope_interpolation=2", "unknown key model.llm.rope_interpolation .*rope_ratio"),
        ("model.llm.num_layer=2", r"did you mean model.llm.num_layers\?"),
        ("model.llm.num_layers=two", "expected a whole number"),
        ("model.llm.tokenizer=5", "expected text or null"),
    ],
)
def test_language_models_of_the_glm_family_are_checked_too(override: str, message: str) -> None:
    """Their signatures are put together out of two functions'."""
    with pytest.raises(ConfigError, match=message):
        compose("finetune", ["experiment=smoke_stage_two", "model/llm=tiny_glm", "model.llm.tokenizer=x", override])


@pytest.mark.parametrize("target", ["os.system", "builtins.eval", "torch.load", "datasets.load_dataset"])
def test_only_our_packages_are_built(target: str) -> None:
    with pytest.raises(ConfigError, match="may only point into data, model, train, serve"):
        compose("pretrain", [SMOKE, f"train.loss._target_={target}"])
    with pytest.raises(ConfigError, match="only things in"):
        build({"_target_": "data.mixture.Mixture", "languages": {"_target_": target}})


def test_target_that_does_not_exist_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"has no Mixtur; did you mean Mixture\?"):
        compose("pretrain", [SMOKE, "data.mixture._target_=data.mixture.Mixtur"])


def test_build_hands_arguments_over_as_they_are() -> None:
    marker = object()
    node = OmegaConf.create({"_target_": "tests.train.test_config.Holder"})
    with pytest.raises(ConfigError, match="only things in"):
        build(node, value=marker)
    node["_target_"] = "data.batch.Skip"
    skip = build(node, source=marker, shard="s", key="k", reason="r")
    assert skip.source is marker


def test_bad_config_stops_before_torch_is_imported() -> None:
    code = (
        "import sys; from train.config import from_command_line\n"
        "try: from_command_line('pretrain', argv=['train.stepz=5'])\n"
        "except SystemExit as stop: code = stop.code\n"
        "print(code, 'torch' in sys.modules, 'deepspeed' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CONFIG_DIR.parent)
    assert done.stdout.split() == ["2", "False", "False"], done.stderr
    assert "train.stepz" in done.stderr


def test_bad_config_ends_the_entry_point_and_leaves_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "train.pretrain", SMOKE, f"run.dir={tmp_path / 'run'}", "train.lr=3"],
        capture_output=True,
        text=True,
        cwd=CONFIG_DIR.parent,
    )
    assert done.returncode == 2
    assert "did you mean train.optim.lr?" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_help_explains_every_key() -> None:
    text = help_text("pretrain", [], Config, CONFIG_DIR)

    def keys(schema: type, path: str) -> None:
        for item in fields(schema):
            here, kind = f"{path}{item.name}", resolved_type(schema, item)
            assert item.metadata["help"].split()[0] in text
            if is_dataclass(kind):
                keys(kind, f"{here}.")  # type: ignore[arg-type]
            else:
                assert f"  {here}" in text

    keys(Config, "")
    for file in CONFIG_DIR.rglob("*/*.yaml"):
        assert file.stem in text, f"{file} is not mentioned"


def test_what_changed_since_the_checkpoint_is_named() -> None:
    from train.run import changed_keys

    before, after = compose("pretrain", [SMOKE]), compose("pretrain", [SMOKE, "train.loss.itc.weight=2.0"])
    assert changed_keys(before, before) == []
    assert changed_keys(before, after) == ["train.loss.itc.weight: 1.0 -> 2.0"]
