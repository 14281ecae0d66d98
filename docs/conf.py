"""The documentation site: ``make docs`` builds it into ``docs/_build/`` of pages, notebooks and docstrings, offline.

Sphinx's source folder is the repository, so that a page's links lead to the same files here and on a code host.
"""

import importlib
import re
import sys
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.ext.napoleon import Config, GoogleDocstring

sys.path.insert(0, str(Path(__file__).parent))
import reference

project = "unclip_pl"
author = copyright = "the unclip_pl authors"
release = version = installed("unclip_pl")

extensions = ["myst_nb", "sphinx.ext.autodoc"]
root_doc = "docs/index"
include_patterns = [
    "docs/**",
    "notebooks/*.ipynb",
    "results/*/*.md",
    "src/unclip_pl/packing/emoji.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
]
exclude_patterns = ["docs/_build", ".venv*", ".git", "runs", "data", "build", "dist"]  # prunes the walk

html_theme = "furo"
html_title = "unclip_pl"
html_additional_pages = {"index": "front.html"}  # the start page is docs/index.html
templates_path = ["_templates"]
html_math_renderer = "mathml"  # MathJax would come from a server of somebody else
html_copy_source = False
smartquotes = False  # two hyphens are an option of a command
html_static_path = ["_static"]
html_css_files = ["site.css"]

myst_enable_extensions = ["dollarmath", "html_image"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # the outputs are those that `make notebooks` has kept

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True, "ignore-module-all": True}
autodoc_typehints_format = "short"
default_role = "literal"  # docstrings put names into single backticks

#: The pages of other projects are on the network, where a build never looks: their names stay without a link.
ELSEWHERE = (
    r"torch|lightning|torchmetrics|open_clip|jsonargparse|typing|collections|pathlib|numpy|np|PIL|matplotlib|yaml|rich|"
    r"concurrent|abc|enum|datetime|argparse|io|tarfile|types|contextlib|fsspec|safetensors|pyarrow|tqdm|builtins|zipfile|gradio|gr"
)
nitpick_ignore_regex = [
    (r"py:.*", rf"({ELSEWHERE})\..*"),
    (
        r"py:.*",
        r"_worker_init_fn_t|_collate_fn_t|_T_co|Dataset|SIGTERMException",
    ),  # torch's and Lightning's, without a path
    (r"py:class", r"unclip_pl\..*\.(T|M|P|Diffused)"),  # type variables
    (r"py:class", r"unclip_pl\.training\.private\..*"),  # what it wraps is Lightning's inside
]


#: Sizes of brackets, which docutils does not know and MathML chooses by itself.
SIZES = re.compile(r"\\[bB]igg?[lrm]?(?![a-zA-Z])")
#: A letter with an accent: docutils would put an index that follows under the letter.
ACCENTED = re.compile(r"(\\(?:bar|hat|tilde)\s*(?:\\[a-zA-Z]+|\{[^{}]*\}|\w))")


def mathml(self: Any, node: nodes.Element) -> None:
    """Write a formula as MathML, which browsers draw without a script."""
    formula = ACCENTED.sub(r"\1{}", SIZES.sub("", node.astext()))
    drawn = tex2mathml(formula, as_block=isinstance(node, nodes.math_block))
    self.body.append(drawn.replace(' accent="true"', ""))  # Chromium draws a bar into the letter
    raise nodes.SkipNode


def at_home(app: Sphinx, env: Any, node: Any, content: nodes.Element) -> nodes.Element | None:
    """Link a name that a package passes on, such as ``unclip_pl.diffusion.DDIM``, to the module that defines it."""
    module, _, name = node.get("reftarget", "").rpartition(".")
    if node.get("refdomain") != "py" or not module.startswith("unclip_pl"):
        return None
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return None
    home = f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}"
    domain = env.domains["py"]
    if home == node["reftarget"] or home not in domain.objects:
        return None
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", home, node, content)


def google(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Turn a docstring's sections into fields. A line above a variable has none: a colon there is just a colon."""
    pieces = "\n".join(lines).split("`")
    pieces[::2] = [piece.replace("|", r"\|") for piece in pieces[::2]]  # an absolute value
    text = "`".join(pieces)
    if what not in ("attribute", "data", "property"):
        text = str(GoogleDocstring(text, Config(napoleon_use_ivar=True), app, what, name, obj, options))
    lines[:] = text.split("\n")


def without_fields(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leave out the fields of named tuples, of which Python says their place alone: the signature has them."""
    return True if (getattr(obj, "__doc__", "") or "").startswith("Alias for field number") else None


def without_factories(
    _app: Sphinx, _what: str, _name: str, _obj: object, _options: object, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Leave out a dataclass's factories: ``<factory>`` is no Python, and without it Sphinx can tell arguments apart."""
    return (signature.replace("<factory>", "...") if signature else signature), returns


def setup(app: Sphinx) -> None:
    """Write the reference before Sphinx looks for pages."""
    app.add_html_math_renderer("mathml", inline_renderers=(mathml, None), block_renderers=(mathml, None))
    app.connect("autodoc-process-docstring", google)
    app.connect("autodoc-process-signature", without_factories)
    app.connect("autodoc-skip-member", without_fields)
    app.connect("missing-reference", at_home)
    reference.write(Path(__file__).parent / "_reference")
