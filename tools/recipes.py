"""What a reader copies out of README.md and docs: commands, and blocks for files."""

import re
from dataclasses import dataclass
from pathlib import Path

from container import NAME, PEM, PROJECT

HEADING = re.compile(r"^#{2,} (.*)")
FENCE = re.compile(r"^```(\w*)$")


@dataclass(frozen=True)
class Line:
    """A line of a shell block, and the heading that it stands under."""

    section: str
    text: str


@dataclass(frozen=True)
class Block:
    """A proxy's block: of which page and language, for which file, unit and URL."""

    page: str
    language: str
    place: str
    unit: str
    url: str = f"https://{NAME}"

    def text(self) -> str:
        """Return it; to Caddy's is added where the certificate lies, to ask for none."""
        found = re.search(rf"(?ms)^```{self.language}\n(.*?)^```$", read(self.page))
        assert found, f"{self.page} has no block for {self.language}"
        tls = f"{NAME} {{\n\ttls {PEM}/fullchain.pem {PEM}/privkey.pem"
        is_caddy = self.language == "caddy"
        return found[1].replace(f"{NAME} {{", tls) if is_caddy else found[1]


NGINX = ("nginx", "etc/nginx/conf.d/wxgpt.conf", "nginx.service")
BLOCKS = {
    "nginx": Block("docs/deploy.md", *NGINX),
    "nginx, README": Block("README.md", *NGINX, f"http://{NAME}"),
    "caddy": Block("docs/deploy.md", "caddy", "etc/caddy/Caddyfile", "caddy.service"),
}


def read(page: str) -> str:
    """Return the text of a page of the checkout."""
    return Path(PROJECT, page).read_text("utf-8")


def commands(page: str) -> list[Line]:
    """Return the lines of a page's shell blocks, comments included."""
    section, language, found = "", None, []
    for text in read(page).splitlines():
        fence = FENCE.match(text)
        if fence:
            language = fence[1] if language is None else None
        elif language == "sh" and text.strip():
            found.append(Line(section, text))
        elif language is None and (heading := HEADING.match(text)):
            section = heading[1]
    return found
