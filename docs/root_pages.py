"""Pages of the site that lie in the root of the repository, taken from where they lie.

mkdocs calls ``on_files`` and ``on_page_markdown`` (see ``hooks`` in mkdocs.yml). A page of the root
keeps its place in the paths, ``../NAME.md``, so that links between documents mean the same here as
in the repository.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mkdocs.structure.files import File, InclusionLevel

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

NAMES: Final = ("ARCHITECTURE", "CONTRIBUTING", "CHANGELOG")


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages of the root."""
    for name in NAMES:
        page = File(
            f"../{name}.md",
            config.docs_dir,
            config.site_dir,
            use_directory_urls=False,
            dest_uri=f"{name.lower()}.html",
            inclusion=InclusionLevel.INCLUDED,  # mkdocs leaves out what begins with a dot
        )
        files.append(page)


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Return the page, with links into ``docs`` counted from there where it is of the root."""
    is_of_root = page.file.src_uri.startswith("../")
    return markdown.replace("](docs/", "](/") if is_of_root else markdown
