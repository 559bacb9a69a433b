"""`uni-x data check` and `uni-x data stats`: what encoded folders hold, in lines of plain English."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from uni_x.analysis.lengths import save_histogram
from uni_x.data.check import KINDS, CheckReport, Codes, Finding, FolderChecks
from uni_x.data.encode import read_fingerprint, tokenizer_fingerprint
from uni_x.data.stats import DataStatistics, FolderStatistics, TokenCounts, statistics
from uni_x.errors import UsageError
from uni_x.recipe import DataSection, RenderOptions, SourceSection, TrainRecipe, check_recipe, load_recipe
from uni_x.words import count_of

if TYPE_CHECKING:
    from uni_x.data.render import Renderer

_PICTURES = (".svg", ".png")
_FEW_ROWS = 10  # of which the last ones, with what was left over, say nothing of many


@dataclass(frozen=True)
class Checked:
    """What there is to say about a folder, or about all together, and whether it has no errors."""

    lines: tuple[str, ...]
    ok: bool


@dataclass(frozen=True)
class _Plan:
    """Everything that statistics follow from."""

    data: DataSection
    renderer: Renderer
    seed: int = 0


def check_folders(
    folders: Sequence[Path], image_tokenizer: str | None = None, benchmarks: Sequence[Path] = (), examples: int = 5
) -> Iterator[Checked]:
    """Checks folders of shards, and their codes against an image tokenizer, by its folder or name, where one is given.

    Of each kind of finding at most so many `examples` are told. Raises `UniXError` where there is nothing to check, or
    a benchmark's file cannot be read.
    """
    codes = None
    if image_tokenizer is not None:
        from uni_x.images import load_image_tokenizer

        tokenizer = load_image_tokenizer(image_tokenizer)
        codes = Codes(tokenizer.codebook_size, tokenizer.grid, tokenizer_fingerprint(tokenizer))
    checks = FolderChecks(codes=codes, benchmarks=benchmarks, limit=examples)
    for folder in folders:
        report = checks.check(folder)
        yield Checked(tuple(_describe_report(report)), report.ok)
    if shared := checks.shared():
        yield Checked(("all folders together", *chain.from_iterable(map(_describe_finding, shared))), ok=True)
    if codes is None:
        yield Checked(tuple(_describe_mixture(folders)), ok=True)


def _describe_mixture(folders: Sequence[Path]) -> Iterator[str]:
    """Says which folders cannot be trained on together."""
    by_tokenizer: defaultdict[str | None, list[str]] = defaultdict(list)
    for folder in folders:
        by_tokenizer[read_fingerprint(folder)].append(str(folder))
    by_tokenizer.pop(None, None)
    if len(by_tokenizer) > 1:
        groups = " | ".join(", ".join(group) for group in by_tokenizer.values())
        yield f"remark: encoded with different image tokenizers, of which a model takes one: {groups}"


def _describe_report(report: CheckReport) -> Iterator[str]:
    held = f"{count_of(report.samples, 'sample')} with {count_of(report.images, 'image')}"
    yield f"{report.folder}: {held} in {count_of(report.shards, 'shard')}"
    for finding in report.findings:
        yield from _describe_finding(finding)
    if report.ok:
        yield "  no errors"


def _describe_finding(finding: Finding) -> Iterator[str]:
    head = f"  {'error' if finding.is_error else 'remark'}: {KINDS[finding.kind]}"
    first = finding.examples[0]
    if finding.count == 1 and first.shard is None:
        yield f"{head}; {first}"
        return
    yield f"{head}: {finding.count:,}"
    yield from (f"    {example}" for example in finding.examples)
    if finding.count > len(finding.examples):
        yield f"    and {finding.count - len(finding.examples):,} more"


def describe_data(
    path: Path,
    model: Path | None = None,
    max_length: int | None = None,
    picture: Path | None = None,
    limit: int | None = None,
    overrides: Sequence[str] = (),
) -> Iterator[str]:
    """Lines that tell what the sources of a recipe, or a folder of shards, hold as sequences.

    Args:
        path: of a training recipe (.yaml), or of a folder.
        model: the model folder whose tokenizer and rendering count, for a folder.
        max_length: tokens in a row; None for the recipe's, or the most that the model takes.
        picture: an SVG or PNG file to draw the lengths into.
        limit: at most so many samples of each source.
        overrides: changes to the recipe, each `key=value` or `section.key=value`.

    Raises `UniXError` for what cannot be read, and where `model` is missing or not wanted.
    """
    if picture is not None and picture.suffix.lower() not in _PICTURES:
        raise UsageError(f"{picture}: a picture's name ends in {' or '.join(_PICTURES)}")
    plan = _plan(path, model, overrides)
    data = plan.data
    found = statistics(
        [(Path(source.path), source.weight) for source in data.sources],
        plan.renderer,
        max_length or data.max_length,
        plan.seed,
        limit,
        fractions=[source.fraction for source in data.sources],
        join=data.packing != "none",
        split=data.long_texts == "split",
    )
    yield from _describe(found, joined=data.packing != "none")
    if picture is not None:
        save_histogram(found, picture)
        yield f"picture: {picture}"


def _plan(path: Path, model: Path | None, overrides: Sequence[str]) -> _Plan:
    if path.suffix in (".yaml", ".yml"):
        if model is not None:
            raise UsageError("--model: a recipe names its own tokenizers; leave it out")
        recipe = load_recipe(path, TrainRecipe, list(overrides))
        return _Plan(recipe.data, _recipe_renderer(recipe), recipe.seed)
    if overrides:
        raise UsageError(
            f"'{overrides[0]}': what follows a recipe (.yaml) changes it, but {path} is none; name one folder, or "
            "write a recipe that mixes several"
        )
    if model is None:
        raise UsageError(f"--model is missing: whose tokenizer and rendering shall {path} be counted with?")
    from uni_x.data.render import Renderer, Vocabulary
    from uni_x.model_folder import load_tokenizers, read_model_config
    from uni_x.train.batches import check_codes_are_of

    config = read_model_config(model)
    text_tokenizer, image_tokenizer = load_tokenizers(model)
    check_codes_are_of(image_tokenizer, [path])
    data = DataSection(sources=[SourceSection(path=str(path))], max_length=config.max_position_embeddings)
    options = check_recipe(config.rendering or {}, RenderOptions, f"{model / 'config.json'}, rendering")
    return _Plan(data, Renderer(text_tokenizer, Vocabulary.from_config(config), options))


def _recipe_renderer(recipe: TrainRecipe) -> Renderer:
    """The renderer that training would have; only a text tokenizer is trained for it, where the recipe says so."""
    from uni_x.data.render import Renderer, Vocabulary
    from uni_x.images import load_image_tokenizer
    from uni_x.model_folder import load_tokenizers, read_model_config
    from uni_x.train.batches import check_codes_are_of
    from uni_x.train.start import make_config, make_text_tokenizer

    if recipe.model.base is not None:
        config = read_model_config(recipe.model.base)
        text_tokenizer, image_tokenizer = load_tokenizers(recipe.model.base)
        check_codes_are_of(image_tokenizer, recipe.folders)
    else:
        image_tokenizer = load_image_tokenizer(recipe.image_tokenizer)
        check_codes_are_of(image_tokenizer, recipe.folders)
        text_tokenizer = make_text_tokenizer(recipe, image_tokenizer.codebook_size)
        config = make_config(recipe, image_tokenizer, text_tokenizer)
    return Renderer(text_tokenizer, Vocabulary.from_config(config), recipe.data.render, recipe.data.stage)


def _describe(found: DataStatistics, joined: bool) -> Iterator[str]:
    total, lengths, too_long, packing = found.total, found.lengths, found.too_long, found.packing
    yield from _table("source", list(_sources(found.folders)), total)
    yield ""
    yield from _table("kind", list(found.by_kind.items()), total)
    if len(found.folders) > 1:
        yield ""
        yield "in training, by the weights of the recipe"
        for folder in found.folders:
            yield f"  {folder.path}: {folder.weight:.1%} of the sequences, {folder.token_share:.1%} of the tokens"
    yield ""
    yield (
        f"lengths: {lengths.shortest:,} to {lengths.longest:,} tokens, median {lengths.median:,.0f}, mean "
        f"{lengths.mean:,.0f}; 95% are no longer than {lengths.p95:,.0f}"
    )
    longer = too_long.split + too_long.dropped
    if not longer:
        yield f"longer than a row of {found.max_length:,}: none"
    else:
        yield f"longer than a row of {found.max_length:,}: {longer:,}"
        for became, number, noun, tokens in (
            ("cut into several", too_long.split, "text", too_long.split_tokens),
            ("left out", too_long.dropped, "sequence", too_long.dropped_tokens),
        ):
            if number:
                yield f"  {became}: {count_of(number, noun)} of {count_of(tokens, 'token')}"
    yield from _refusals(found)
    if not packing.rows:
        yield f"packing: no sequence fits into a row of {packing.max_length:,}"
    elif joined:
        rows = f"{count_of(packing.documents, 'sequence')} in {count_of(packing.rows, 'row')} of {packing.max_length:,}"
        if packing.rows < _FEW_ROWS:
            yield f"packing: {rows}; too few to tell how full rows get in training, where samples come again"
        else:
            yield f"packing: {rows}, {packing.documents_per_row:.1f} in each, {packing.fill:.1%} full"
    else:
        yield f"packing none: {count_of(packing.rows, 'row')} of one sequence each"


def _sources(folders: Sequence[FolderStatistics]) -> Iterator[tuple[str, TokenCounts]]:
    """A row for each folder, and below it for each of its origins where there are several."""
    for folder in folders:
        yield str(folder.path), folder.total
        if len(folder.by_origin) > 1:
            yield from ((f"  {origin or '(none)'}", counts) for origin, counts in folder.by_origin.items())


def _refusals(found: DataStatistics) -> Iterator[str]:
    if found.refused:
        yield f"refused by layout or template, and left out: {count_of(found.refused, 'sample')}"
        for folder in found.folders:
            if folder.refusal:
                yield f"  {folder.path}: {folder.refused:,}, the first is {folder.refusal}"


def _table(name: str, rows: Sequence[tuple[str, TokenCounts]], total: TokenCounts) -> Iterator[str]:
    """Sequences and tokens, a row for each group and one for all of them."""
    rows = [*rows, ("all", total)]
    width = max(len(name), *(len(group) for group, _ in rows))
    yield f"{name:<{width}}{'sequences':>14}{'text tokens':>16}{'image tokens':>16}{'of all tokens':>15}"
    for group, counts in rows:
        share = counts.tokens / total.tokens
        numbers = f"{counts.sequences:>14,}{counts.text_tokens:>16,}{counts.image_tokens:>16,}"
        yield f"{group:<{width}}{numbers}{share:>15.1%}"
