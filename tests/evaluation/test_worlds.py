"""The paper's other claims: recipes from end to end with nothing but sizes made small, and what each measures."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning import Trainer
from torch.utils.data import DataLoader

from unclip_pl.cli import main
from unclip_pl.clip import ClipSpec
from unclip_pl.commands.plan import Recipe, Stage
from unclip_pl.commands.reproduce import reproduce
from unclip_pl.errors import InputError
from unclip_pl.evaluation.attack import Attack
from unclip_pl.evaluation.foundations import class_embeddings
from unclip_pl.evaluation.scores import binding, stated_indices
from unclip_pl.generation.decoding import DecoderSpec
from unclip_pl.report.claims import UNMEASURED, claims_table
from unclip_pl.settings import read_yaml
from unclip_pl.shapes.captions import TEMPLATES, fields
from unclip_pl.shapes.oracle import SceneOracle, ShapesOracle
from unclip_pl.shapes.render import VALUES, encode
from unclip_pl.shapes.scenes import SCENE_VALUES, draw_scenes
from unclip_pl.types import EvaluationBatch

ROOT = Path(__file__).parent.parent.parent
RECIPES = ("guidance", "words", "binding")
BASES = ("words-base", "binding-base")
SMALL = {
    "pack": "--train 64 --val 16 --heldout 12",
    "fit": "--trainer.max_steps 2 --trainer.val_check_interval 2 --data.init_args.batch_size 16",
    "test": "--model.init_args.decoder.init_args.sampler.init_args.steps 2 --model.init_args.grid_rows 2",
}
DECODER = "--model.init_args.net.init_args.channels 8 --model.init_args.net.init_args.head_channels 8"
PRIOR = " ".join(f"--model.init_args.net.init_args.{size}" for size in ("width 16", "layers 1", "heads 2"))
CELL = "--model.init_args.captions 8 --model.init_args.resamples 5"


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "configs" / "reproduce" / f"{name}.yaml").read_text())


def small(stage: Stage) -> Stage:
    """The stage on a few pictures, with the first training seed and no guidance but 1 and 4."""
    more = [SMALL.get(stage.run.split()[0], "")]
    more += [DECODER] * ("configs/decoder" in stage.run) + [PRIOR] * ("configs/prior" in stage.run)
    more += [CELL] * ("compare/binding" in stage.run or "compare/rematch" in stage.run)
    more += ["--model.init_args.diversity_samples 3"] * ("compare/rematch" in stage.run)
    more += ["--model.init_args.diversity_captions 3"] * ("diversity" in stage.run or "base/guidance" in stage.run)
    fewer = {"seed": [1]} | ({"scale": [1.0, 4.0]} if "scale" in stage.matrix else {})
    matrix = stage.matrix | {word: values for word, values in fewer.items() if word in stage.matrix}
    return replace(stage, run=" ".join([stage.run, *more]), matrix=matrix)


def follow(name: str, folder: Path) -> None:
    """Run a recipe, and before it that of the run which it builds on, unless all studies share that one."""
    recipe = read(name)
    stages = {key: small(Stage(**stage)) for key, stage in recipe.pop("stages").items()}
    recipe |= {"run": str(folder / name), "results": str(folder / "results")}
    if f"{name}-base" in BASES:
        follow(f"{name}-base", folder)
        recipe["base"] = str(folder / "results" / "base.zip")
    reproduce(stages, **recipe)


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_from_end_to_end(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes 20 to 60 s each: nothing else sees that stages, cells, claims and report agree."""
    monkeypatch.setattr("unclip_pl.report.plots.DPI", 30)  # nobody looks
    follow(name, tmp_path)
    report = json.loads((tmp_path / "results" / "report.json").read_text())
    claims = {claim["claim"]: claim["verdict"] for claim in report["claims"]}
    assert claims
    page = (tmp_path / "results" / "report.html").read_text()
    assert yaml.safe_load((ROOT / f"configs/claims/{name}.yaml").read_text())["words"]["title"] in page
    if name != "guidance":  # untrained GLIDE and unCLIP need not share a match
        assert UNMEASURED not in claims.values() or name == "binding"  # nor have all parts of a scene
    assert main(["report", "--run", str(tmp_path / "results")]) == 0


@pytest.mark.parametrize("name", BASES)
def test_a_base_is_made_of_the_pictures_that_its_study_makes(name: str) -> None:
    stages = [read(recipe)["stages"] for recipe in (name, name.removesuffix("-base"))]
    assert len({yaml.safe_dump(own["data"]) for own in stages}) == 1
    assert read(name)["stages"]["bundle"]["out"] == "{results}/base.zip"
    assert read(name.removesuffix("-base"))["base"] == f"{read(name)['results']}/base.zip"


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_hold_what_their_claims_name(name: str) -> None:
    recipe = read(name)
    stages = {key: Stage(**stage) for key, stage in recipe["stages"].items()}
    written = Recipe(stages, {"{run}": "run", "{source}": "run/data", "{base}": "", "{results}": "results"})
    texts = [f"{stage.run} {json.dumps(written.configs(key))}" for key, stage in written.stages.items()]
    assert not {word for text in texts for word in re.findall(r"\{(\w+)\}", text)} - {
        "run", "base", "source", "results", "precision", "out",
    }  # fmt: skip
    assert all(content is not None for key in written.stages for content in written.configs(key).values())
    files = [stage.out for stage in written.stages.values()]
    assert len(files) == len(set(files))
    table = yaml.safe_load((ROOT / recipe["claims"]).read_text())
    told = " ".join(texts)
    for row in table["claims"]:
        for side in (row.get("first", ""), row.get("second", "")):
            assert name == "words" or side.removeprefix("Binding: ") in told
    titles = {title for row in table["claims"] for title in row.get("titles", [])}
    assert titles <= {line["title"] for line in table.get("ablations", [])}


@pytest.mark.parametrize("name", ["guidance", "binding"])
def test_glide_and_unclip_are_one_network_and_differ_by_what_training_drops(name: str) -> None:
    stages = {key: Stage(**stage) for key, stage in read(name)["stages"].items()}
    places = {"{run}": "run", "{source}": "run/data", "{base}": "", "{results}": "results"}
    recipe = Recipe(stages, places)
    ours, theirs = (recipe.configs(f"decoder-2-{kind}") for kind in ("unclip", "glide"))
    assert {path: ours.pop(path) for path in ours.keys() - theirs} == {
        "configs/base/unclip.yaml": {"model": {"init_args": {"image_drop": 0.1, "text_drop": 0.5}}}
    }
    assert {path: theirs.pop(path) for path in theirs.keys() - ours} == {
        "configs/base/glide.yaml": {"model": {"init_args": {"image_drop": 1.0, "text_drop": 0.2}}}
    }
    assert ours == theirs
    net = ours["configs/decoder/captioned.yaml"]["model"]["init_args"]["net"]["init_args"]
    assert net["text_embed_in_time"]
    assert net["attention_levels"] == [*range(len(net["channel_mult"]))][1:]  # GLIDE's: all but the first
    cells = {key: stage.needs for key, stage in recipe.stages.items() if stage.out.startswith("{results}/")}
    assert all(sum(need.startswith("decoder-") for need in needs) == 1 for needs in cells.values())


def test_what_is_committed_of_words_was_measured_as_the_recipe_stands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["reproduce", "--config", "configs/reproduce/words.yaml", "--run", str(tmp_path / "run"), "--dry_run"]
    assert main(words) == 0
    assert capsys.readouterr().out.endswith("Nothing is to be done.\n")


def test_the_gate_of_guidance_asks_for_four_shapes_in_five() -> None:
    """Where all else is right. The share of what is stated that is a shape follows from the captions' templates."""
    stated = [fields(template) for template in TEMPLATES]
    shapes = sum(1 / len(names) for names in stated if "shape" in names) / len(stated)
    gate = read_yaml(ROOT / "configs/claims/guidance.yaml")["gate"]["at_least"]
    right = {match: 1 - (1 - match) / shapes for match in (0.9, gate)}
    assert list(right.values()) == pytest.approx([0.63, 0.81], abs=0.01)


def test_a_recipe_brings_its_claims(tmp_path: Path) -> None:
    reproduce({}, str(tmp_path / "run"), claims="configs/claims/words.yaml", results=str(tmp_path / "results"))
    assert len(claims_table(tmp_path / "results")["claims"]) == 3
    with pytest.raises(FileNotFoundError, match="claims/wrods"):
        reproduce({}, str(tmp_path / "run"), claims="configs/claims/wrods.yaml")


CAPTION = "a red circle to the left of a blue star"


@pytest.mark.parametrize(
    ("shown", "parts", "swapped", "colors", "colors_swapped"),
    [
        (CAPTION, True, False, True, False),
        ("a blue circle to the left of a red star", True, True, True, True),
        ("a red star to the left of a blue circle", True, True, True, False),
        ("a blue star to the left of a red circle", True, True, True, True),
        ("a red ring to the left of a blue heart", False, False, True, False),
        ("a blue ring to the left of a red heart", False, False, True, True),
        ("a red circle above a blue star", False, False, False, False),
        ("a red circle to the left of a red star", False, False, False, False),
        ("a green circle to the left of a blue star", False, False, False, False),
        ("a blue star to the right of a red circle on a navy background", True, False, True, False),
    ],
)
def test_binding_is_asked_of_what_has_all_parts_and_of_what_has_both_colours(
    shown: str, parts: bool, swapped: bool, colors: bool, colors_swapped: bool
) -> None:
    read, stated = (stated_indices([text], SceneOracle) for text in (shown, CAPTION))
    assert [found.item() for found in binding(read, stated)] == [parts, swapped, colors, colors_swapped]


def test_who_knows_the_parts_alone_swaps_72_percent_and_who_knows_the_colours_alone_half() -> None:
    rng = np.random.default_rng(0)
    stated = encode(draw_scenes(20_000, split="train", rng=rng), SCENE_VALUES)
    read = stated.clone()
    for own in ([0, 2], [1, 3]):
        turned = torch.from_numpy(rng.integers(2, size=(len(read), 1))).bool()
        read[:, own] = torch.where(turned, stated[:, own[::-1]], stated[:, own])
    found = binding(read, stated)
    assert found.parts.all()
    assert found.swapped.float().mean().item() == pytest.approx(0.75 * 7 / 8 + 0.5 / 8, abs=0.01)
    assert found.colors_swapped.float().mean().item() == pytest.approx(0.5, abs=0.01)


def attack(batches: list[EvaluationBatch], lookup: DecoderSpec, folder: Path) -> dict[str, Any]:
    cell = Attack(str(folder), ClipSpec("tiny-rn"), lookup, str(folder / "a.json"), oracle=ShapesOracle(), grid_rows=3)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=folder)
    trainer.test(cell, DataLoader(batches, batch_size=None), verbose=False)
    return json.loads((folder / "a.json").read_text())


def test_a_decoder_that_sees_the_shape_is_not_misled(
    batches: list[EvaluationBatch], lookup: DecoderSpec, tmp_path: Path
) -> None:
    """This decoder shows the picture itself, and this CLIP is random: it takes a picture for any shape."""
    named = [
        batch._replace(metadata=[sample | {"word": other(sample["attributes"]["shape"])} for sample in batch.metadata])
        for batch in batches
    ]
    cell = attack(named, lookup, tmp_path)
    shares = {name: torch.tensor(arm["values"]["class_share"]) for name, arm in cell["arms"].items()}
    assert set(shares) == {f"{who}, the {what}" for who in ("CLIP", "drawn", "picture") for what in ("shape", "word")}
    assert shares["drawn, the shape"].tolist() == shares["picture, the shape"].tolist() == [1] * 48
    assert shares["drawn, the word"].tolist() == [0] * 48
    assert ((shares["CLIP, the shape"] > 0) & (shares["CLIP, the shape"] + shares["CLIP, the word"] < 1)).all()
    assert cell["pictures"]["grid"]["columns"] == ["picture", "drawn from its z_i"]
    assert len(cell["pictures"]["grid"]["rows"]) == 3

    with pytest.raises(InputError, match="Got 16 of 48 with one"):
        attack([*named[: len(named) // 2], *batches[len(named) // 2 :]], lookup, tmp_path)
    plain = attack(batches, lookup, tmp_path)["arms"]
    assert set(plain) == {f"{who}, the shape, no word" for who in ("CLIP", "drawn", "picture")}


def test_a_class_is_the_mean_of_its_prompts_so_that_more_of_them_make_no_clip_surer() -> None:
    clip = ClipSpec("tiny-rn").load()
    one, many = (class_embeddings(clip, "shape", prompts) for prompts in (1, 8))
    torch.testing.assert_close(one.norm(dim=-1), torch.ones(8))
    assert (many.norm(dim=-1) < 0.999).all()


def other(shape: str) -> str:
    names = VALUES["shape"]
    return names[(names.index(shape) + 1) % len(names)]
