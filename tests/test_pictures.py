"""The pictures of docs/ come from the weights in the package."""

import runpy
from pathlib import Path

import pytest
from PIL import Image

NAMES = ("guidance", "priors", "noise", "pipeline", "embedding")
PAGES = Path("docs")


@pytest.mark.parametrize("name", NAMES)
def test_a_page_shows_it(name: str) -> None:
    assert any(f"pictures/{name}.png)" in page.read_text() for page in PAGES.rglob("*.md"))
    with Image.open(PAGES / "pictures" / f"{name}.png") as picture:
        assert picture.text["made by"] == "docs/pictures.py"


@pytest.mark.slow  # 20 s of a core each time
def test_made_again_they_are_the_same_bytes(tmp_path: Path) -> None:
    """Another processor may round differently, so both are made here."""
    main = runpy.run_path("docs/pictures.py")["main"]
    made = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        main(folder)
        made.append({name: (folder / f"{name}.png").read_bytes() for name in NAMES})
    assert made[0] == made[1]
