"""Check a data set before training, or convert it.

``prepare_data.py validate CONFIG`` reads every record and image of a run's sources as training
would: it counts and measures the samples, names those that training would skip, and says what
packing would gain (``--skip-images``: without opening image files).  ``--json`` writes all numbers,
with the histogram that ``plan.py --data`` reads.  ``--records`` and ``--images`` take the place of
a run's configuration.  ``prepare_data.py clean`` reads them in the same way and
writes the records that can be used.  ``prepare_data.py jsonl FILE.json`` converts a JSON array
to JSON lines.  ``prepare_data.py webdataset --records FILE --images DIR --out DIR`` writes tar
shards.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moiie_megatron.cli.launch import exit_code
from moiie_megatron.cli.overrides import parse_with_overrides
from moiie_megatron.cli.program import run_program
from moiie_megatron.cli.progress_bar import progress_bar
from moiie_megatron.config.families import template_names
from moiie_megatron.config.messages import listed
from moiie_megatron.mcore.dist_env import DistEnv
from moiie_megatron.utils.errors import UserError
from moiie_megatron.utils.files import atomic_write

if TYPE_CHECKING:
    from moiie_megatron.data.audit.audit import Audit
    from moiie_megatron.data.encode.encoding import Encoding
    from moiie_megatron.data.stream.dataset import Source
    from moiie_megatron.data.stream.example import SkippedSample

SHOWN_SKIPPED = 20


def add_validate(commands: Any) -> None:
    parser = commands.add_parser("validate", help="count, measure, find unusable records")
    _add_source_options(parser)
    parser.add_argument("--skip-images", action="store_true", help="do not open image files")
    parser.add_argument("--json", metavar="FILE", help="all numbers and every skipped record")
    _add_limit(parser)
    parser.set_defaults(task=validate)


def validate(arguments: argparse.Namespace) -> None:
    from moiie_megatron.data.audit.report import (
        data_report,
        image_fraction_lines,
        marker_lines,
        note_lines,
        packing_lines,
        summarize,
        truncation_lines,
    )

    sources, encoding, max_skipped_fraction = _sources(arguments)
    summaries: list[dict[str, Any]] = []
    skipped_samples: list[SkippedSample] = []
    for source in sources:
        found = _read(source, encoding, arguments)
        summaries.append(summarize(found, encoding))
        skipped_samples += found.skipped_samples
    samples = sum(len(source.records) for source in sources)
    _print_table(summaries)
    for line in [
        *note_lines(summaries),
        *marker_lines(summaries),
        *truncation_lines(summaries),
        *packing_lines(summaries),
        *image_fraction_lines(summaries),
    ]:
        print(line)
    if arguments.json:
        _write_json(Path(arguments.json), data_report(summaries, encoding))
    _report_skipped(skipped_samples, samples, max_skipped_fraction)


def add_clean(commands: Any) -> None:
    parser = commands.add_parser("clean", help="write the records that can be used")
    _add_source_options(parser)
    parser.add_argument("--skip-images", action="store_true", help="do not open image files")
    parser.add_argument("--out", required=True, metavar="FILE.jsonl", help="a new file")
    parser.set_defaults(task=clean, max_skipped_fraction=1.0)


def clean(arguments: argparse.Namespace) -> None:
    from moiie_megatron.data.records.convert import check_new_lines, write_lines

    out = Path(arguments.out)
    check_new_lines(out)
    sources, encoding, _ = _sources(arguments)
    if len(sources) != 1:
        raise UserError(
            f"data.sources has {len(sources)} sources: clean them one by one, with --records and "
            "--images."
        )
    (source,) = sources
    found = _read(source, encoding, arguments)
    skipped = {sample.index for sample in found.skipped_samples}
    kept = [i for i in range(len(source.records)) if i not in skipped]
    if not kept:
        first = found.skipped_samples[0].reason
        raise UserError(
            f"None of the {len(source.records):,} records of {source.records.path} can be used: "
            f"repair them; the first: {first}."
        )
    with progress_bar(f"writing {out.name}", unit="records") as progress:
        write_lines(source.records, kept, out, progress)
    _report_skipped(found.skipped_samples, len(source.records), 1.0)
    print(f"{out}: {len(kept):,} of {len(source.records):,} records")


def add_jsonl(commands: Any) -> None:
    parser = commands.add_parser("jsonl", help="convert a JSON array to JSON lines")
    parser.add_argument("records", metavar="FILE.json")
    parser.add_argument("--out", metavar="FILE.jsonl", help="default: beside it")
    parser.set_defaults(task=jsonl)


def jsonl(arguments: argparse.Namespace) -> None:
    from moiie_megatron.data.records.convert import array_to_lines

    records = Path(arguments.records)
    out = Path(arguments.out) if arguments.out else records.with_suffix(".jsonl")
    with progress_bar(f"writing {out.name}", unit="records") as progress:
        count = array_to_lines(records, out, progress)
    print(f"{out}: {count:,} records")


def add_webdataset(commands: Any) -> None:
    parser = commands.add_parser("webdataset", help="write records and images as tar shards")
    parser.add_argument("--records", required=True, metavar="FILE")
    parser.add_argument("--images", required=True, metavar="DIR")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--allow-outside-images", action="store_true")
    parser.add_argument("--samples-per-shard", type=_positive, default=10_000, metavar="N")
    parser.add_argument("--force", action="store_true", help="replace earlier shards")
    _add_limit(parser)
    parser.set_defaults(task=webdataset)


def webdataset(arguments: argparse.Namespace) -> None:
    from moiie_megatron.data.records.energon_index import DATASET_FILE, index_shards
    from moiie_megatron.data.records.webdataset import write_shards
    from moiie_megatron.utils.directories import new_directory

    source = _plain_source(arguments, "square")
    final = Path(arguments.out)
    limit = 0.01 if arguments.max_skipped_fraction is None else arguments.max_skipped_fraction
    size = source.records.path.stat().st_size
    with new_directory(
        final, num_bytes=size, force=arguments.force, marker=DATASET_FILE
    ) as directory:
        with progress_bar(f"writing {final.name}", unit="records") as progress:
            names, skipped_samples = write_shards(
                source,
                directory,
                samples_per_shard=arguments.samples_per_shard,
                progress=progress,
            )
        _report_skipped(skipped_samples, len(source.records), limit)
        indexed = index_shards(directory, names)
    samples = len(source.records) - len(skipped_samples)
    print(f"{final}: {samples:,} samples in {len(names)} shard(s)")
    if not indexed:
        print(
            "megatron-energon is not installed, so its index is missing: install it, then\n"
            "energon prepare --non-interactive --force-overwrite --split-ratio 1,0,0 "
            f"--sample-type CrudeWebdataset {final}"
        )


def _read(source: Source, encoding: Encoding | None, arguments: argparse.Namespace) -> Audit:
    """Read a whole source as training would."""
    from moiie_megatron.data.audit.audit import audit

    with progress_bar(f"reading {source.label}", unit="records") as progress:
        return audit(
            source,
            encoding,
            decode_images=not arguments.skip_images,
            workers=arguments.workers,
            progress=progress,
        )


def _add_source_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", help="YAML file of a run")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    direct = parser.add_argument_group("instead of a run")
    direct.add_argument("--records", metavar="FILE", help=".json or .jsonl of LLaVA records")
    direct.add_argument("--images", metavar="DIR")
    direct.add_argument("--tokenizer", metavar="PATH", help="without it, no lengths")
    direct.add_argument("--template", default="plain", help=listed(template_names()))
    direct.add_argument("--image-token", default="<image>")
    direct.add_argument(
        "--image-tokens", type=_positive, default=729, metavar="N", help="positions per image"
    )
    direct.add_argument("--image-mode", choices=("square", "pad"), default="square")
    direct.add_argument("--sequence-length", type=_positive, default=4096, metavar="N")
    direct.add_argument(
        "--allow-outside-images",
        action="store_true",
        help="as data.allow_outside_images=true: follow links out of the directory",
    )
    parser.add_argument(
        "--workers", type=_positive, default=os.cpu_count() or 1, metavar="N", help="processes"
    )


def _add_limit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-skipped-fraction",
        type=_fraction,
        metavar="X",
        help="fail above this fraction of skipped records; default: the run's, else 0.01",
    )


def _sources(arguments: argparse.Namespace) -> tuple[list[Source], Encoding | None, float]:
    """The sources, their encoding if there is a tokenizer, and the allowed skipped fraction."""
    limit = arguments.max_skipped_fraction
    if arguments.config is not None:
        if arguments.records or arguments.images or arguments.tokenizer:
            raise UserError(
                f"{arguments.config} and --records, --images or --tokenizer are given: give either "
                "the configuration of a run or these options."
            )
        from moiie_megatron.config.load import load_config
        from moiie_megatron.data.stream.build import build_encoding, build_sources

        config = load_config(arguments.config, arguments.overrides)
        if not config.data.sources:
            raise UserError(f"data.sources is empty in {arguments.config}: nothing to read.")
        if config.data.loader != "plain":
            raise UserError(
                f"data.loader is {config.data.loader} in {arguments.config}: validate the records "
                "that the shards were made from, with --records and --images."
            )
        limit = config.data.max_skipped_fraction if limit is None else limit
        return build_sources(config), build_encoding(config), limit
    if not arguments.records or not arguments.images:
        raise UserError("Give the configuration of a run, or both --records and --images.")
    source = _plain_source(arguments, arguments.image_mode)
    limit = 0.01 if limit is None else limit
    if arguments.tokenizer is None:
        return [source], None, limit
    from moiie_megatron.data.encode.encoding import Encoding
    from moiie_megatron.data.encode.templates import load_template
    from moiie_megatron.data.encode.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(arguments.tokenizer, arguments.image_token)
    template = load_template(arguments.template, tokenizer)
    encoding = Encoding(tokenizer, template, arguments.image_tokens, arguments.sequence_length)
    return [source], encoding, limit


def _plain_source(arguments: argparse.Namespace, mode: Any) -> Source:
    from moiie_megatron.data.encode.images import ImageLoader
    from moiie_megatron.data.records.llava import RecordFile
    from moiie_megatron.data.stream.dataset import Source

    # Images are decoded only to find unusable ones: the size of the result does not matter.
    outside = arguments.allow_outside_images
    loader = ImageLoader(arguments.images, 32, mode, mean=(0.5, 0.5, 0.5), allow_outside=outside)
    return Source(RecordFile(arguments.records), loader)


def _print_table(summaries: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console

    from moiie_megatron.data.audit.report import table

    # A file or a pipe gets the full width, a terminal what fits.
    Console(width=None if sys.stdout.isatty() else 160).print(table(summaries))


def _report_skipped(
    skipped_samples: Sequence[SkippedSample], samples: int, max_skipped_fraction: float
) -> None:
    """Print the skipped samples.

    Raises:
        UserError: There are too many.
    """
    for sample in skipped_samples[:SHOWN_SKIPPED]:
        print(f"{sample.file}[{sample.index}]: {sample.reason}")
    if len(skipped_samples) > SHOWN_SKIPPED:
        print(f"... and {len(skipped_samples) - SHOWN_SKIPPED:,} more")
    if len(skipped_samples) > max_skipped_fraction * samples:
        raise UserError(
            f"{len(skipped_samples):,} of {samples:,} records "
            f"({len(skipped_samples) / samples:.2%}) are skipped, more than "
            f"{max_skipped_fraction:.2%}: repair them or raise --max-skipped-fraction."
        )


def _write_json(path: Path, values: dict[str, Any]) -> None:
    try:
        with atomic_write(path) as beside:
            beside.write_text(json.dumps(values, indent=1) + "\n")
    except OSError as error:
        raise UserError(
            f"Cannot write --json {path} ({error.strerror or error}): name another file."
        ) from error


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of 1 or more")
    return int(text)


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, dest="command")
    for add in (add_validate, add_clean, add_jsonl, add_webdataset):
        add(commands)
    arguments = parse_with_overrides(parser)
    return exit_code(lambda: arguments.task(arguments), DistEnv())


if __name__ == "__main__":
    run_program(main)
