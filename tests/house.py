"""Print the size and the shape of the source: lines, functions, names and circles.

python tests/house.py

Nothing is judged here. `tests/test_architecture.py` holds the rules.
"""

import ast
import io
import re
import statistics
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "rkl"
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
SHOWN = 5  # longest functions and files that are named
# A function called after what has been done to something, with no noun or verb of its own.
PARTICIPLE = re.compile(
    r"(?!(?:need|seed|speed|feed|embed|bed|red|shed|spread|read|thread|head)$)"
    r"(?:[a-z]+ed|begun|bought|built|caught|chosen|cut|drawn|fed|felt|found|given|gone|held|heard|hidden|"
    r"kept|known|laid|led|left|lost|made|meant|met|paid|put|said|seen|sent|set|shown|spelt|split|"
    r"spread|taken|taught|thought|told|torn|understood|won|worn|written)"
)
VAGUE = {"it", "found", "held", "kept", "told", "said", "known", "own", "few"}  # as variables


def code_lines(source: str, tree: ast.Module) -> int:
    """The lines that hold code: no blank ones, no comments, no docstrings."""
    ignored = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in ignored | {tokenize.ENDMARKER}:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | FUNCTIONS) and ast.get_docstring(node):
            lines.difference_update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def imported(tree: ast.Module, package: str, modules: Iterable[str]) -> set[str]:
    """The modules of rkl that a module imports when it runs, also within functions.

    A module taken from its package is the module, not the package.
    """
    types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if node in types:
            continue
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            above = parts[: len(parts) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found = {f"{base}.{alias.name}" for alias in node.names}
            names.update(found if found <= set(modules) else {base, *found})
    return names & set(modules)


def modules_in(files: Iterable[Path], source: Path = SOURCE) -> dict[str, Path]:
    """The files of the source by the names that they are imported by."""
    parts = {path: path.relative_to(source).with_suffix("").parts for path in files}
    return {".".join(["rkl", *it]).removesuffix(".__init__"): path for path, it in parts.items()}


def graph_of(modules: Mapping[str, Path], trees: Mapping[Path, ast.Module]) -> dict[str, set[str]]:
    """What every module imports of the others."""
    return {
        module: imported(
            trees[path],
            module if path.name == "__init__.py" else module.rpartition(".")[0],
            modules,
        )
        - {module}
        for module, path in modules.items()
    }


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """The groups of modules that reach one another, and modules that import themselves."""

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        left = list(graph[start])
        while left:
            module = left.pop()
            if module not in found:
                found.add(module)
                left.extend(graph[module])
        return found

    beyond = {module: reached(module) for module in graph}
    groups = {
        frozenset(other for other in beyond[module] if module in beyond[other])
        for module in graph
        if module in beyond[module]
    }
    return sorted(sorted(group) for group in groups)


def variables(tree: ast.Module) -> Iterator[str]:
    """The names that a module assigns to, as often as it does; not those of comprehensions."""
    inner = {
        node
        for outer in ast.walk(tree)
        if isinstance(outer, ast.comprehension)
        for node in ast.walk(outer.target)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node not in inner:
            yield node.id


def share(count: int, total: int) -> str:
    """A number of all, and in percent."""
    return f"{count} of {total} ({100 * count / max(1, total):.1f} %)"


def main() -> None:
    """Print all figures."""
    files = {path: path.read_text("utf-8") for path in sorted(SOURCE.rglob("*.py"))}
    trees = {path: ast.parse(text) for path, text in files.items()}
    modules = modules_in(files)
    sizes: dict[str, Counter] = {}
    for path, text in files.items():
        parts = path.relative_to(SOURCE).parts
        size = sizes.setdefault(parts[0] if len(parts) > 1 else ".", Counter())
        lines = {"lines": text.count("\n"), "code": code_lines(text, trees[path])}
        size.update({"files": 1, **lines})
    tests = Counter()
    for path in sorted((ROOT / "tests").rglob("*.py")):
        parts = path.relative_to(ROOT / "tests").parts
        tests[parts[0] if len(parts) > 1 else "."] += path.read_text("utf-8").count("\n")
    print(f"{'folder':14}{'files':>7}{'lines':>8}{'code':>8}")
    for folder, size in [*sorted(sizes.items()), ("all", sum(sizes.values(), Counter()))]:
        print(f"{folder:14}{size['files']:7,}{size['lines']:8,}{size['code']:8,}")
    by_folder = ", ".join(f"{folder} {count:,}" for folder, count in sorted(tests.items()))
    print(f"\nLines of tests: {tests.total():,} ({by_folder})")
    largest = sorted(files, key=lambda path: -files[path].count("\n"))[:SHOWN]
    named = (f"{path.relative_to(SOURCE)} {files[path].count(chr(10))}" for path in largest)
    print(f"Largest files: {', '.join(named)}")

    functions = [
        (node.end_lineno - node.lineno + 1, node.name, path)
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, FUNCTIONS)
    ]
    lengths = sorted(length for length, *_ in functions)
    print(
        f"Functions: {len(functions):,}, median {statistics.median(lengths):g} lines, nine in "
        f"ten at most {lengths[len(lengths) * 9 // 10]}"
    )
    named = (f"{name} {length}" for length, name, _ in sorted(functions, reverse=True)[:SHOWN])
    print(f"Longest functions: {', '.join(named)}")
    bare = [name for _, name, _ in functions if PARTICIPLE.fullmatch(name.strip("_"))]
    print(f"Functions called by a bare participle: {share(len(bare), len(functions))}")
    stored = [name for tree in trees.values() for name in variables(tree)]
    vague = sum(name in VAGUE for name in stored)
    print(f"Variables called {', '.join(sorted(VAGUE))}: {share(vague, len(stored))}")
    private = [
        node
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, FUNCTIONS) and node.name.startswith("_") and node.name[-1] != "_"
    ]
    documented = sum(ast.get_docstring(node) is not None for node in private)
    print(f"Private functions with a docstring: {share(documented, len(private))}")

    groups = circles(graph_of(modules, trees))
    print(f"Circles of imports, those within functions counted: {len(groups)}")
    for group in groups:
        print(f"  {len(group)}: {', '.join(it.removeprefix('rkl.') for it in group)}")


if __name__ == "__main__":
    main()
