"""Settings of Sphinx for the site that make_site.py stages and builds."""

import os
import sys
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(os.environ["RKL_SITE"])))  # rkl_pages.py, beside the original of this

project = "rkl"
author = "the authors of rkl"
copyright = author
release = version = version_of("rkl")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_design",
    "sphinx_copybutton",
    "rkl_pages",
]
if os.environ.get("DOCS_ONLINE") == "1":  # an inventory that cannot be fetched is a warning
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "transformers": ("https://huggingface.co/docs/transformers/main/en", None),
        "xarray": ("https://docs.xarray.dev/en/stable", None),
        "zuko": ("https://zuko.readthedocs.io/stable", None),
    }

source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
exclude_patterns = ["**/site/**"]
suppress_warnings = ["myst.strikethrough"]
smartquotes = False
nitpicky = True  # for names of rkl; those of others need their inventories
nitpick_ignore_regex = [("py:.*", r"(?!rkl\.).*")]

myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence", "dollarmath", "deflist"]
myst_dmath_double_inline = False
html_math_renderer = "mathml"  # of rkl_pages: no script, no font, no other host

autodoc_typehints = "signature"
autodoc_inherit_docstrings = False  # an override is described where it is declared
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
maximum_signature_line_length = 88
add_module_names = False
toc_object_entries = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_custom_sections = []

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_copy_empty_lines = False
copybutton_selector = (
    "div:not(.output) > div.highlight > pre"  # printed output is not to be copied
)

html_theme = "furo"
html_title = "rkl"
html_static_path = ["_static"]
html_css_files = ["rkl.css"]
html_copy_source = False
html_show_search_summary = False  # it is fetched, which a page without a server may not
html_show_sourcelink = False
html_show_sphinx = False
pygments_style = "friendly"
pygments_dark_style = "github-dark"
html_theme_options = {
    "light_css_variables": {
        "color-brand-primary": "#00609c",
        "color-brand-content": "#00609c",
        "color-brand-visited": "#00609c",
        "font-stack": 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, '
        "sans-serif",
        "font-stack--monospace": "ui-monospace, SFMono-Regular, Menlo, Consolas, "
        '"DejaVu Sans Mono", monospace',
    },
    "dark_css_variables": {
        "color-brand-primary": "#63b7ee",
        "color-brand-content": "#63b7ee",
        "color-brand-visited": "#63b7ee",
    },
}
