"""What a tokenizer makes of the captions, language by language: a wrong one shows here before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from data.batch import TextCodec
from data.caption import clean_caption, draw_caption
from data.keyed import keyed_rng
from data.source import BadSample, Source


@dataclass(frozen=True)
class CaptionStatistics:
    """Of a sample of one language's captions; shares are 0..1."""

    captions: int
    tokens: int  # [CLS] and [SEP] included, before truncation
    longest: int
    unknown_rate: float  # of the tokens between [CLS] and [SEP]
    truncated_rate: float  # of the captions

    @property
    def tokens_per_caption(self) -> float:
        return self.tokens / max(self.captions, 1)


def caption_report(
    sources: Mapping[str, Source],
    codec: TextCodec,
    *,
    max_text_tokens: int,
    languages: tuple[str, ...] | None = None,
    num_captions: int = 1000,
    seed: int = 0,
    clean: bool = True,
) -> dict[str, CaptionStatistics]:
    """Reads up to `num_captions` captions per language, from all sources alike; no picture is decoded."""
    found = dict.fromkeys(languages or [name for source in sources.values() for name in source.languages])
    return {
        language: _statistics(_captions(sources, language, num_captions, seed, clean), codec, max_text_tokens)
        for language in found
    }


def print_caption_report(report: Mapping[str, CaptionStatistics], *, max_text_tokens: int) -> str:
    """The report as a table, which is also printed."""
    lines = [f"{'language':<10}{'captions':>10}{'tokens':>10}{'mean':>8}{'longest':>9}{'unknown':>9}{'truncated':>11}"]
    for language, s in report.items():
        lines.append(
            f"{language:<10}{s.captions:>10}{s.tokens:>10}{s.tokens_per_caption:>8.1f}{s.longest:>9}"
            f"{s.unknown_rate:>9.2%}{s.truncated_rate:>11.2%}"
        )
    lines.append(f"(tokens of a sample of captions; truncated: longer than {max_text_tokens})")
    table = "\n".join(lines)
    print(table)
    return table


def _captions(sources: Mapping[str, Source], language: str, num: int, seed: int, clean: bool) -> list[str]:
    having = [source for source in sources.values() if language in source.languages and source.num_samples(language)]
    captions = []
    for i, source in enumerate(having):
        size = source.num_samples(language)
        share = min(size, -(-num // len(having)))
        for n in range(share):
            rng = keyed_rng("caption report", seed, i, n)
            try:
                caption = draw_caption(source.read(language, n * size // share), language, rng)
            except BadSample:
                continue
            captions.append(clean_caption(caption, language) if clean else caption.strip())
    return [caption for caption in captions if caption]


def _statistics(captions: list[str], codec: TextCodec, max_text_tokens: int) -> CaptionStatistics:
    encoded = [codec.encode(caption) for caption in captions]
    inner = [token for ids in encoded for token in ids[1:-1]]
    return CaptionStatistics(
        captions=len(captions),
        tokens=sum(map(len, encoded)),
        longest=max(map(len, encoded), default=0),
        unknown_rate=inner.count(codec.unk_id) / max(len(inner), 1),
        truncated_rate=sum(len(ids) > max_text_tokens for ids in encoded) / max(len(encoded), 1),
    )
