import pytest

from tests.browser.site import Page, Site


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    site = Site(tmp_path_factory.mktemp("run"))
    site.start()
    yield site
    site.stop()


# not for the session: a module may have a server of its own
@pytest.fixture(scope="module")
def window(server):
    page = Page(server)
    yield page
    page.driver.quit()


@pytest.fixture
def site(server):
    """The server with nothing to do yet."""
    server.clear()
    return server


@pytest.fixture
def page(window):
    """The browser; `page.open(site.person())` shows somebody the page."""
    window.resize(1280, 900)
    window.scheme("light")
    return window
