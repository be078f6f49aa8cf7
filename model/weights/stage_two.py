"""Starting weights of stage two's model, from whatever brings them (`configs/model/weights/stage_two*.yaml`)."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from model import weights
from model.llm.glm import Glm
from model.weights import chatglm_folder, glm, ours, sat
from model.weights.filling import LoadReport
from model.weights.visualglm import QkvOrder

LANGUAGE_MODEL = ("llm", "visualglm")  # arguments that bring the whole of it, or an error
ENCODER = ("vision", "visualglm")


def initialise(
    model: nn.Module,
    *,
    all: str | None = None,  # noqa: A002 - the name that users type
    vision: str | None = None,
    qformer: str | None = None,
    stage_one: str | None = None,
    llm: str | None = None,
    visualglm: str | None = None,
    qkv_order: QkvOrder | None = None,
) -> LoadReport:
    """Fill stage two's model before it is handed to the engine: what was built without memory goes to its home
    (`filling.Home`), the rest is on the CPU.  Later ones replace earlier.

    Args:
        all, vision, qformer: BLIP-2 of LAVIS or transformers, as in stage one (`model.weights.initialise`).
        stage_one: a run of stage one, or a checkpoint of it: Q-Former and ln_vision, and the encoder where it trained.
        llm: a Hugging Face folder of ChatGLM-6B; or of ChatGLM2, ChatGLM3, GLM-4, original or transformers' GLM.
        visualglm: VisualGLM-6B, as SAT's folder or Hugging Face's: everything.
        qkv_order: "blocks" or "per_head", asked for by `llm` and `visualglm`; see `visualglm.resolve_order`.
    Returns:
        What became of every tensor; print it.
    Raises:
        ValueError: a path that does not exist, a format that is not known, or weights that do not fit.
    """
    report = weights.initialise(model, all=all, vision=vision, qformer=qformer)
    for key, value in (("stage_one", stage_one), ("llm", llm), ("visualglm", visualglm)):
        if value is None:
            continue
        path = Path(value).expanduser()
        if not path.exists():
            raise ValueError(f"model.weights.{key}: there is nothing at {path}")
        if key == "stage_one":
            report = report.then(ours.load(model, path))
        elif key == "llm" and isinstance(model.get_submodule("llm"), Glm):
            report = report.then(glm.load(model, path, prefix="llm.network."))
        elif (path / "model_config.json").is_file():
            report = report.then(sat.load(model, path, qkv_order=qkv_order))
        else:
            report = report.then(chatglm_folder.load(model, path, qkv_order=qkv_order))
        if key in LANGUAGE_MODEL:
            model.get_submodule("llm").loaded_from = value  # type: ignore[assignment]
    if not any(name.startswith("vision.") for name in report.new):
        report.notes = [note for note in report.notes if "IMAGE ENCODER IS FROZEN AND RANDOM" not in note]
    return report
