"""What Sphinx is told of our docstrings: their brackets, their links and their formulas."""

# pyright: reportMissingImports=false
# Sphinx and docutils are of the group docs, which the type checker does without.
import importlib
import inspect
from functools import cache

from api_pages import escaped
from docutils import nodes
from docutils.utils.math import latex2mathml
from public_names import GROUPS, public
from sphinx.util.nodes import make_refnode


def escape_prose(app, what, name, obj, options, lines):
    """Escape the lines of a docstring that are neither doctests nor literal blocks."""
    in_doctest, literal = False, None
    for i, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if literal is not None and line.strip() and indent <= literal:
            literal = None
        if not line.strip():
            in_doctest = False
        in_doctest |= line.lstrip().startswith(">>>")
        if in_doctest or literal is not None:
            continue
        lines[i] = escaped(line)
        if line.rstrip().endswith("::"):
            literal = indent


def skip_member(app, what, name, obj, skip, options):
    """Leave out the fields of named tuples, whose docstring says their number alone."""
    described = inspect.getdoc(obj) or ""
    return True if described.startswith("Alias for field number") else skip


@cache
def pages() -> dict[int, str]:
    """The public name of each object that has a page."""
    found: dict[int, str] = {}
    for package, name in public():
        found.setdefault(id(getattr(importlib.import_module(package), name)), f"{package}.{name}")
    return found


def resolve(target: str):
    """The object of a dotted name, and what of it is left over where it is no module's."""
    parts = target.split(".")
    for n in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:n]))
        except ImportError:
            continue
        try:
            for part in parts[n:]:
                found = getattr(found, part)
        except AttributeError:
            return None
        return found
    return None


def link_to_page(app, env, node, contnode):
    """Link a name of rkl, by whatever path it is written, to the page of its object."""
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py" or not target.startswith("rkl"):
        return None
    objects = env.get_domain("py").objects
    owner, _, member = target.rpartition(".")
    candidates = [pages().get(id(resolve(target)), "")]
    candidates.append(f"{pages().get(id(resolve(owner)), '')}.{member}")
    for name in candidates:
        if name in objects:
            entry = objects[name]
            return make_refnode(
                app.builder, node["refdoc"], entry.docname, entry.node_id, contnode, name
            )
    if target in GROUPS or resolve(target) is not None:
        return contnode  # a private name: shown, without a link
    return None


def math(block: bool):
    """Formulas as MathML, which browsers draw by themselves."""

    def visit(self, node):
        text = latex2mathml.tex2mathml(node.astext(), as_block=block)
        self.body.append(f'<div class="math">{text}</div>' if block else text)
        raise nodes.SkipNode

    return visit


def use_dashes(app, doctree):
    """Put a dash between an argument and its description, where Sphinx writes two hyphens."""
    for text in list(doctree.findall(nodes.Text)):
        if str(text) == " -- ":
            text.parent.replace(text, nodes.Text(" – "))


def setup(app):
    app.connect("doctree-read", use_dashes)
    app.connect("autodoc-process-docstring", escape_prose, priority=600)  # after napoleon
    app.connect("autodoc-skip-member", skip_member)
    app.connect("missing-reference", link_to_page, priority=400)
    app.add_html_math_renderer("mathml", (math(False), None), (math(True), None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
