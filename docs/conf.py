"""Sphinx configuration: MyST pages, and the public API from docstrings."""

from importlib.metadata import version as _version

project = "brt"
copyright = "the brt authors"
author = "the brt authors"
version = release = _version("brt-core")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
default_role = "code"
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
html_theme = "furo"
html_static_path = ["_static"]
html_title = "brt"
exclude_patterns = ["_build"]
nitpicky = False
