"""A browser without script, as far as own pages need one: cookies and forms."""

import re
from dataclasses import dataclass, field
from typing import Any

HIDDEN = re.compile(r'<input type="hidden" name="(\w+)" value="([^"]*)">')


@dataclass
class Page:
    """What a request brought."""

    status: int
    text: str
    headers: Any

    @property
    def number(self) -> str:
        """Return the number that signs the browser in."""
        found = re.search(r"登录 ([0-9]{6})", self.text)
        assert found, self.text
        return found[1]


@dataclass
class Phone:
    """A browser on a subscriber's phone; cookies are kept as the server sets them."""

    server: Any
    origin: str = "https://wx.example.com"
    cookies: dict[str, str] = field(default_factory=dict)
    page: Page | None = None  # the one that is shown

    async def load(self, method: str, path: str, **options: Any) -> Page:
        """Make a request, follow what leads elsewhere, and show the page."""
        cookie = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        headers = {"Cookie": cookie} | options.pop("headers", {})
        options |= {"headers": headers, "allow_redirects": False}
        url = self.server.url + path
        async with self.server.open(url, method, **options) as response:
            for morsel in response.cookies.values():
                if morsel["max-age"] == "0":
                    self.cookies.pop(morsel.key, None)
                else:
                    self.cookies[morsel.key] = morsel.value
            page = Page(response.status, await response.text(), response.headers)
        if page.status == 303:
            target = re.sub(r"^(\.\./)?", "/", page.headers["Location"])
            return await self.load("GET", target)
        self.page = page
        return page

    async def open(self, path: str = "/me") -> Page:
        """Open a page."""
        return await self.load("GET", path)

    def fields(self, action: str = "ask") -> dict[str, str]:
        """Return the hidden fields of a form of the page."""
        assert self.page
        for form in self.page.text.split("<form")[1:]:
            if f'/{action}"' in form.partition(">")[0]:
                return dict(HIDDEN.findall(form.partition("</form>")[0]))
        raise AssertionError(f"no form {action} in {self.page.text}")

    async def send(self, action: str, headers: Any = None, **fields: str) -> Page:
        """Send a form to its address; Origin is what a browser says by itself."""
        headers = {"Origin": self.origin} | (headers or {})
        path = f"/me/{action}"
        return await self.load("POST", path, data=fields, headers=headers)

    async def ask(self, question: str) -> Page:
        """Ask on the page that is shown."""
        return await self.send("ask", **self.fields(), question=question)

    async def sign_in(self, openid: str) -> Page:
        """Sign in as the subscriber, who sends the number and confirms it."""
        number = (await self.open()).number
        asked = await self.server.ask(f"登录 {number}", openid)
        await self.server.wechat.tap(openid, asked.taps[0])
        return await self.open()
