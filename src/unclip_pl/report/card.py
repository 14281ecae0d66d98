"""The model card of a run: what it was trained on, how it scores, and what it is for."""

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader

from unclip_pl.data.shards import Shard, index_shard, list_shards, parse_json, read_span
from unclip_pl.data.store import read_manifest, tool_version
from unclip_pl.errors import InputError
from unclip_pl.generation.bundle import read_notes
from unclip_pl.generation.provenance import settings, stage_records
from unclip_pl.generation.run import RunDescription, read_run
from unclip_pl.report.page import markdown_table
from unclip_pl.report.tables import cost_table, foundation_table, lines_of, metric_tables, sample_sizes

log = logging.getLogger(__name__)

#: File of the card, in a bundle or an export.
CARD = "README.md"
#: Settings that name files.
FILES = ("pretrained", "checkpoint", "last_step", "codec")
#: Shards whose samples are looked through for licences.
LOOKED = 32


def model_card(run: Path, usage: str) -> str:
    """Return a run's model card: Markdown, with the head that the Hugging Face Hub reads.

    It is made from ``run.json``, ``report.json``, the records of the stages, the manifest of the store and the shards.
    Each of them may be missing but the first; a missing report is one line of the log. A run that was made of a bundle
    and has no report of its own keeps the bundle's card.

    Args:
        run: folder of the run.
        usage: commands or code that draw with the files beside the card.

    Raises:
        InputError: the run or its report is broken.
    """
    description = read_run(run)
    report = _report(run)
    if not report:
        if read_notes(run) and (run / CARD).is_file():
            return (run / CARD).read_text(encoding="utf-8")
        log.warning("No report of %s: its card has no scores. `unclip report --run` draws one of measurements.", run)
    notes, source = read_notes(run), _source(run, description)
    stages = stage_records(run).values()
    commits = notes.get("commits") or list(dict.fromkeys(commit for stage in stages for commit in stage["commits"]))
    recipe = list(notes.get("recipe", {}).values()) or [f"unclip {stage['command']}" for stage in stages]
    readme = Path(source, CARD) if source else None
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True)
    return environment.get_template("card.md.jinja").render(
        name=notes.get("run") or run.resolve().name,
        version=tool_version(),
        origin=f", commit {', '.join(commits)}" if commits else "",
        usage=usage.strip(),
        parts=_parts(description),
        data=_data(run, description, source, recipe),
        readme=readme.read_text(encoding="utf-8").splitlines() if readme and readme.is_file() else [],
        scores=_scores(run, report),
        commands=recipe,
    )


def _report(run: Path) -> dict[str, Any]:
    path = run / "report.json"
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise _broken(path, error) from error


def _broken(path: Path, error: Exception) -> InputError:
    return InputError(f"Expected a report of this version in {path}. Got {error!r:.200}: run `unclip report` again.")


def _parts(run: RunDescription) -> list[tuple[str, str]]:
    """Return what the run consists of, with its settings but without its paths."""
    found: dict[str, Any] = {"CLIP": run.clip, "decoder": run.decoder}
    found |= {f"upsampler {i}": spec for i, spec in enumerate(run.decoder.upsamplers, 1)}
    found |= {f"prior `{name}`": spec for name, spec in run.priors.items()}
    lines = []
    for part, spec in found.items():
        told = dict(lines_of(settings(spec)))
        kind = told.pop("name", "") or told["class"]
        hidden = {key for key in told if key in ("class", "upsamplers") or key.rpartition(".")[2] in FILES}
        told = {key: value for key, value in told.items() if key not in hidden and value not in ("None", "[]")}
        lines.append((part, ", ".join([kind, *(f"{key} {value}" for key, value in told.items())])))
    return lines


def _source(run: Path, description: RunDescription) -> str:
    """Return the shards that the decoder was trained on, by the config beside its checkpoint; empty if unknown."""
    config = (run / description.decoder.checkpoint).parent.parent / "config.yaml"
    if not config.is_file():
        return ""
    data = yaml.safe_load(config.read_text(encoding="utf-8")).get("data") or {}
    source = str((data.get("init_args") or {}).get("source", ""))
    return source if Path(source).is_dir() else str(run / "data") if (run / "data").is_dir() else ""


def _data(run: Path, description: RunDescription, source: str, recipe: list[str]) -> list[str]:
    """Return sentences on the pairs, where they come from, and their licences."""
    records = read_manifest(run / description.store).values() if description.store else []
    lines = [f"Made by `{command}`." for command in recipe if command.startswith("unclip pack ")]
    if records:
        train, val, heldout = map(sum, zip(*(record.splits for record in records), strict=True))
        lines.append(
            f"{train:,} training pictures in {len(records)} shards ({val:,} for validation, {heldout:,} held out)."
        )
    shards = [shard for shard in list_shards(source) if not shard.remote][:LOOKED] if source else []
    counts = _licences(shards)
    lines += [f"Licence of {count:,} pictures: {name}." for name, count in counts.most_common() if name]
    if counts[""]:
        lines.append(f"{counts['']:,} pictures name no licence.")
    if not shards:
        lines.append("The shards were not at hand when this card was written: their licences are not named here.")
    elif len(shards) == LOOKED:
        lines.append(f"Licences were counted in the first {LOOKED} shards.")
    return lines


def _licences(shards: list[Shard]) -> Counter[str]:
    """Count the pictures of some local shards by the ``license`` in their JSON; "" counts those without."""
    found: Counter[str] = Counter()
    for shard in shards:
        entries = index_shard(shard.path).entries
        with shard.path.open("rb") as file:
            found.update(str(parse_json(read_span(file, *entry.json)).get("license") or "") for entry in entries)
    return found


def _scores(run: Path, report: dict[str, Any]) -> str:
    """Return the report's tables as Markdown."""
    if not report:
        return ""
    try:
        tables = [*metric_tables(report), foundation_table(report), cost_table(report)]
        meta = report["meta"]
        head = f"{sample_sizes(report)}, with 95 % intervals. Measured on {'; '.join(meta['hardware'])}."
    except (KeyError, TypeError) as error:
        raise _broken(run / "report.json", error) from error
    parts = [head]
    for table in filter(None, tables):
        notes = "\n".join(f"- *{name}*: {what}" for name, what in table.notes)
        parts += [f"### {table.title}", markdown_table(table), notes]
    return "\n\n".join(filter(None, parts))
