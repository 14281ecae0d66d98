"""Check the rules of plain English that a regular expression can check.

Run ``python tests/test_language.py [PATH …]`` for a list of what breaks them in some files or folders.
"""

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
#: Folders and files whose English is ours. The package writes the reports under results/; its sources are checked.
WRITTEN = (
    *("src", "configs", "docs", "tests", "notebooks", "benchmarks", "examples", "results", "data/README.md"),
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "pyproject.toml"),
)
SUFFIXES = (".py", ".yaml", ".md", ".toml", ".ipynb", "")
README_LINES = 130

#: Words that stand in for a plainer sentence.
WORDS = re.compile(r"\b(whatever|anew|for ever|likewise)\b", re.IGNORECASE)
#: Openings of a docstring that say nothing without the name that it belongs to.
OPENINGS = re.compile(r"(As|Of|By|Likewise|Nothing|The number itself|The same)\b")
#: The same for a function of the package, whose docstring begins with a verb: no clause, no shape.
CLAUSES = re.compile(r"(What|Whether|How|Where|When|Which|Who|Whose|That|Whatever|To|If)\b|[(\[]")
#: Descriptions of a parameter that lean on its name.
PARAMETER = re.compile(r"^ +(?:\*{0,2}\w+(?: \(.*?\))?): (?:of|that|as|by|whose|which) ", re.MULTILINE)
#: Verbs with which an error tells its reader what to do.
INSTRUCTIONS = re.compile(
    r"(?:^|…|[.:;!?] |, or |\()`?(?:"
    r"Add|Allow|Ask|Build|Call|Change|Check|Choose|Close|Combine|Commit|Convert|Copy|Correct|Create|Decode|Delete|Describe|Do|"
    r"Download|Draw|Drop|Encode|End|Export|Fill|Fit|Fix|Free|Get|Give|Go|Import|Install|Invert|Keep|Leave|List|Load|Look|"
    r"Lower|Make|Measure|Move|Name|Open|Pack|Pass|Pick|Precompute|Probe|Put|Raise|Read|Rebuild|Record|Reduce|Remove|Rename|"
    r"Repeat|Replace|Report|Rerun|Resize|Restore|Run|Sample|Save|See|Select|Send|Set|Shorten|Spell|Split|Start|State|Stop|"
    r"Store|Switch|Take|Train|Try|Turn|Unpack|Update|Upgrade|Use|Wait|Write"
    r")\b",
    re.IGNORECASE,
)
#: An error whose last words are a value, which says what to do.
VALUE = re.compile(r"(: …\.?|^\W*)$")
BORDER = ("InputError", "MissingFileError")


def files(paths: list[Path]) -> Iterator[Path]:
    """Yield the files under some paths whose English is checked."""
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            generated = file.parent.parent.name == "results" and file.name == "report.md"
            generated |= file.parent.suffix == ".egg-info" or not {"_build", "_reference"}.isdisjoint(file.parts)
            if file.is_file() and file.suffix in SUFFIXES and not generated and file != Path(__file__):
                yield file


def documented(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Yield every module, class and function that has a docstring, with it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            if docstring:
                yield node, docstring


def is_property(node: ast.AST) -> bool:
    """Say whether a function is read like an attribute, so that a noun phrase describes it."""
    decorators = [ast.unparse(decorator) for decorator in getattr(node, "decorator_list", [])]
    return any(re.search(r"property$|fixture|\.setter$", name.split("(")[0]) for name in decorators)


def text_of(node: ast.AST | None) -> str | None:
    """Return the literal text of an expression with … in place of its values; None where it has none."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
        return "".join(str(part) for part in parts)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return "".join(text_of(side) or "…" for side in (node.left, node.right))
    return None


def python_faults(source: str, package: bool) -> Iterator[tuple[int, str]]:
    """Yield line and fault of docstrings, parameters and errors of a Python source."""
    tree = ast.parse(source)
    for node, docstring in documented(tree):
        line = node.body[0].lineno  # type: ignore[attr-defined]
        first = docstring.strip().splitlines()[0]
        if OPENINGS.match(first):
            yield line, f"a docstring begins with “{first[:40]}”"
        elif package and isinstance(node, ast.FunctionDef) and not is_property(node) and CLAUSES.match(first):
            yield line, f"a function's docstring begins with “{first[:40]}”: begin with a verb (Return …)"
        for match in PARAMETER.finditer(docstring):
            yield (
                line + docstring[: match.start()].count("\n"),
                f"a description leans on its name: “{match[0].strip()} …”",
            )
    for node in ast.walk(tree) if package else ():
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            name = ast.unparse(node.exc.func).split(".")[-1]
            said = text_of(node.exc.args[0])
            if name in BORDER and said is not None and not INSTRUCTIONS.search(said) and not VALUE.search(said):
                yield node.lineno, f"an error says not what to do: “{said[-60:]}”"


def faults(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and fault of everything in a file that breaks a rule."""
    text = path.read_text()
    if path.suffix == ".ipynb":
        text = "".join("".join(cell["source"]) + "\n" for cell in json.loads(text)["cells"])
    for number, line in enumerate(text.splitlines(), 1):
        for match in WORDS.finditer(line):
            yield number, f"“{match[0]}”"
    if path.suffix == ".py":
        yield from python_faults(text, "src" in path.parts)
    if path == ROOT / "README.md" and len(text.splitlines()) > README_LINES:
        yield README_LINES + 1, f"{len(text.splitlines())} lines are too many"


def report(paths: list[Path]) -> list[str]:
    """Return one line for each fault of the files under some paths."""
    found = []
    for file in files(paths):
        name = file.relative_to(ROOT) if file.is_relative_to(ROOT) else file
        found += [f"{name}:{line}: {fault}" for line, fault in sorted(faults(file))]
    return found


def test_what_we_write_is_plain_english() -> None:
    found = report([ROOT / name for name in WRITTEN])
    assert not found, "\n".join(found)


def test_the_rules_find_what_they_forbid() -> None:
    squeezed = '''
def draw(seed):
    """As the other.

    Args:
        seed: of all noise.
    """
    raise InputError(f"Expected a number. Got {seed}.")


def width():
    """(B, d), unit norm."""
    raise InputError(f"Expected a number. Got {width}. Give a number.")
'''
    found = [fault for _, fault in python_faults(squeezed, package=True)]
    assert len(found) == 4, found
    assert [bool(WORDS.search(line)) for line in ("Whatever it takes", "renewed", "drawn anew")] == [True, False, True]


if __name__ == "__main__":
    lines = report([Path(name).resolve() for name in sys.argv[1:]] or [ROOT / name for name in WRITTEN])
    print("\n".join(lines))
    print(len(lines), "faults")
