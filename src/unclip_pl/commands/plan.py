"""A recipe before it runs: its stages written out, and which of them have work to do."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import product

from unclip_pl.errors import InputError


@dataclass
class Stage:
    """One command of a recipe.

    Args:
        run: the command line after ``unclip``; ``{run}`` is the run's folder, ``{source}`` the shards, ``{base}`` the
            run that it builds on, ``{results}`` what is kept.
        needs: stages whose results it reads.
        matrix: values of further names in ``run`` and ``needs``: the stage is done once for each combination, as
            ``stage-VALUE-…``.
    """

    run: str
    needs: list[str] = field(default_factory=list)
    matrix: dict[str, list[str | int | float]] = field(default_factory=dict)


def spell_out(stages: dict[str, Stage], shorthand: dict[str, str]) -> dict[str, Stage]:
    """Words that many commands share, put where their names stand; one may stand in those after it."""
    for name, words in reversed(shorthand.items()):
        stages = {key: replace(stage, run=stage.run.replace(f"{{{name}}}", words)) for key, stage in stages.items()}
    return stages


def write_out(stages: dict[str, Stage]) -> dict[str, Stage]:
    """Every combination of every matrix as a stage of its own.

    A stage may need one combination of another by its full name, or the other by its own: those of its combinations,
    then, that agree with the stage's own values.

    Raises:
        ValueError: a stage needs one that does not stand before it.
    """
    written: dict[str, Stage] = {}
    values: dict[str, list[tuple[str, dict[str, str]]]] = {}  # stage → (name, values) of its combinations
    for name, stage in stages.items():
        before, values[name] = dict(written), []
        for combination in product(*stage.matrix.values()):
            own = dict(zip(stage.matrix, map(str, combination), strict=True))
            full = "-".join([name, *own.values()])
            wanted = [_fill_in(need, own) for need in stage.needs]
            unknown = {need for need in wanted if not (values.get(need) or need in before)}
            if unknown:
                raise InputError(f"Stage {name!r} needs {sorted(unknown)}. Expected stages that stand before it.")
            needs = [n for need in wanted for n, theirs in values.get(need, [(need, {})]) if _agree(own, theirs)]
            values[name].append((full, own))
            written[full] = replace(stage, run=_fill_in(stage.run, own), needs=needs, matrix={})
    return written


def work(stages: dict[str, Stage], done: Callable[[str], bool], kept: Callable[[str], bool]) -> set[str]:
    """The stages to run, in the order that they stand.

    What is not done is worth doing where something is kept of it, where nothing else needs it, or where a stage that
    runs needs it. So what a lost training was for, once measured, does not ask for the training again.

    Args:
        stages: written out.
        done: whether a stage's result is there as the recipe wants it. It is asked for every stage in order.
        kept: whether the result is a measurement, which stays true when what it was made of is gone.
    """
    finished: set[str] = set()
    for name, stage in stages.items():
        if done(name) and (kept(name) or finished.issuperset(stage.needs)):
            finished.add(name)
    wanted: set[str] = set()
    for name in reversed(stages):
        users = [user for user, stage in stages.items() if name in stage.needs]
        if name not in finished and (kept(name) or not users or wanted.intersection(users)):
            wanted.add(name)
    return wanted


def _fill_in(text: str, own: dict[str, str]) -> str:
    for key, value in own.items():
        text = text.replace(f"{{{key}}}", value)
    return text


def _agree(a: dict[str, str], b: dict[str, str]) -> bool:
    return all(b[key] == value for key, value in a.items() if key in b)
