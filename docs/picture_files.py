"""A hook of MkDocs: the pictures of the records, which lie outside docs/, among the built pages."""

from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

PICTURES = "outputs/record/pictures"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pictures below their own path."""
    root = Path(config.config_file_path or "mkdocs.yml").parent
    for path in sorted((root / PICTURES).glob("*")):
        files.append(File.generated(config, f"{PICTURES}/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Points links to the pictures at the added files."""
    up = "../" * len(PurePosixPath(page.file.src_uri).parents)
    return markdown.replace(f"]({up}{PICTURES}/", f"]({up.removeprefix('../')}{PICTURES}/")
