"""What the formats share: transformers and LAVIS both keep BERT's names inside a Q-Former layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from model.weights.checkpoint import Checkpoint
from model.weights.filling import LoadReport, Part

# Blocks: what comes together in a checkpoint or not at all
ENCODER, QUERIES, TEXT, LANGUAGE_HEAD = "image encoder", "Q-Former (queries)", "Q-Former (text)", "language head"


def linear(to: str, of: str, block: str) -> Iterator[Part]:
    """Weight and bias of a linear map or a norm; BERT's oldest files call those of a norm gamma and beta."""
    for mine, old in (("weight", "gamma"), ("bias", "beta")):
        sources = (f"{of}.{mine}", f"{of}.{old}") if of.endswith("LayerNorm") else (f"{of}.{mine}",)
        yield Part(f"{to}.{mine}", sources, block)


def output(to: str, of: str, block: str) -> Iterator[Part]:
    """The dense map and the norm after an attention or a feed-forward."""
    yield from linear(f"{to}.dense", f"{of}.dense", block)
    yield from linear(f"{to}.norm", f"{of}.LayerNorm", block)


def attention(to: str, of: str, block: str, *, inner: str = "self", image: str = "") -> Iterator[Part]:
    """`inner` is what holds query, key and value there, `image` what holds key and value here."""
    for mine, theirs in (("query", "query"), (f"{image}key", "key"), (f"{image}value", "value")):
        yield from linear(f"{to}.{mine}", f"{of}.{inner}.{theirs}", block)
    yield from output(f"{to}.output", f"{of}.output", block)


def feed_forward(to: str, of: str, block: str, *, suffix: str = "") -> Iterator[Part]:
    yield from linear(f"{to}.dense", f"{of}intermediate{suffix}.dense", block)
    yield from output(f"{to}.output", f"{of}output{suffix}", block)


def qformer_layer(to: str, of: str, *, inner: str) -> Iterator[Part]:
    yield from attention(f"{to}self_attention", f"{of}attention", QUERIES, inner=inner)
    yield from attention(f"{to}cross_attention", f"{of}crossattention", QUERIES, inner=inner, image="image.")
    yield from feed_forward(f"{to}query_feed_forward", of, QUERIES, suffix="_query")
    yield from feed_forward(f"{to}text_feed_forward", of, TEXT)


def encoder_layers(model: nn.Module) -> Any:
    """The blocks of a `Blip2VisionModel` in the model, or nothing where its encoder is another one."""
    network = getattr(getattr(model, "vision", None), "network", None)
    return getattr(getattr(network, "encoder", None), "layers", ()) if _is_blip2(network) else ()


def qformer_layers(model: nn.Module) -> Any:
    return getattr(getattr(model, "qformer", None), "layers", ())


def check_depth(checkpoint: Checkpoint, prefix: str, num_layers: int, what: str, *, spare: int = 0) -> int:
    """-> the checkpoint's layers.  More than `spare` too many are refused: they would be left out without a word."""
    start = len(prefix)
    theirs = len({name[start:].split(".")[0] for name in checkpoint.shapes if name.startswith(prefix)})
    if num_layers and theirs > num_layers + spare:
        raise ValueError(f"{checkpoint.path} has {theirs} layers in its {what}, the model has {num_layers}")
    return theirs


def check_whole(
    checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]], *, computed: Callable[[str], bool]
) -> None:
    """That every tensor of a model is there, in its shape, and no other.

    Args:
        expected: the shapes by the config beside the weights.
        computed: which other names may be there: tables that are no weights.
    Raises:
        ValueError: what is missing, unexpected or of another shape, by name.
    """
    shapes = checkpoint.shapes
    kinds = {
        "missing": [name for name in expected if name not in shapes],
        "unexpected": [name for name in shapes if name not in expected and not computed(name)],
        "of another shape": [
            f"{name} is {list(shapes[name])}, not {list(shape)}"
            for name, shape in expected.items()
            if shapes.get(name, shape) != shape
        ],
    }
    faults = [f"{len(found)} {kind} ({_listed(found)})" for kind, found in kinds.items() if found]
    if faults:
        raise ValueError(
            f"{checkpoint.path} does not hold the model of its config, by names and shapes: {'; '.join(faults)}. Is it "
            f"another model's config, a file cut short, quantised weights, or a model with parts added (P-tuning)?"
        )


def set_ln_vision_eps(model: nn.Module, eps: float, report: LoadReport) -> None:
    norm = model.get_submodule("ln_vision")
    assert isinstance(norm, nn.LayerNorm)
    if norm.eps != eps:
        report.notes.append(f"ln_vision now has the eps of its weights: {eps:g}, not {norm.eps:g}")
        norm.eps = eps


def whole_number(config: Mapping[str, Any], key: str, *, least: int = 1) -> int:
    """Raises ValueError where the config has something else under `key`, with its file (`checkpoint.Config`)."""
    found = config[key]
    if not isinstance(found, int) or isinstance(found, bool) or found < least:
        raise ValueError(f"{place_of(config)} has {key} {found!r}: expected a whole number of at least {least}")
    return found


def positive(config: Mapping[str, Any], key: str) -> float:
    """The same for numbers such as an eps."""
    found = config[key]
    if not isinstance(found, int | float) or isinstance(found, bool) or not found > 0:
        raise ValueError(f"{place_of(config)} has {key} {found!r}: expected a number above 0")
    return found


def divides(config: Mapping[str, Any], key: str, into: str) -> int:
    """The whole number under `key`, which has to divide the one under `into` without a rest."""
    found, whole = whole_number(config, key), whole_number(config, into)
    if whole % found:
        raise ValueError(f"{place_of(config)} has {key} {found}, which does not divide {into} {whole}")
    return found


def place_of(config: Mapping[str, Any]) -> str:
    return str(getattr(config, "place", "the config"))


def check_equal(path: str, found: Any, ours: Any, there: str, here: str) -> None:
    """Numbers that no shape shows, such as the count of heads."""
    if found is not None and found != ours:
        raise ValueError(f"{path} has {there} {found}, the model has {here} {ours}: they must be equal")


def _listed(found: list[str], most: int = 12) -> str:
    return ", ".join(found[:most] + ["..."] * (len(found) > most))


def _is_blip2(network: Any) -> bool:
    return getattr(getattr(network, "config", None), "model_type", "") == "blip_2_vision_model"
