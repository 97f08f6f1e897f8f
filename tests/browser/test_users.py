"""The live view on a server with several users: each has their own settings of it, and all see the same card."""

from __future__ import annotations

import threading
from typing import Any

from chromium import Page, Problems, open_page, open_panel, save_picture
from live_run import streamed_prompt, streaming_server
from scripts.frontends import frontend_arguments
from scripts.hosts import Host
from users import User, make_user

SET_BADGE = "() => window.app.extensionManager.setting.set('LayerStream.Badge', false)"


def page_of(context: Any, user: User) -> tuple[Page, Problems]:
    """A page that this user opens, who has signed in before."""

    def sign_in(page: Page) -> None:
        page.add_init_script(f"localStorage.setItem('Comfy.userId', '{user.id}')")
        page.add_init_script(f"localStorage.setItem('Comfy.userName', '{user.id}')")

    context.once("page", sign_in)
    return open_page(context, user.server)


def test_each_user_has_a_view_of_their_own(context: Any, host: Host) -> None:
    with streaming_server(host, "--multi-user", *frontend_arguments(host)) as server:
        ada, bob = make_user(server, "ada"), make_user(server, "bob")
        for user, language in ((ada, "de"), (bob, "ja")):
            user.ask("/settings", {"Comfy.TutorialCompleted": True, "LayerStream.Language": language})
        run = threading.Thread(target=server.client.queue, args=[streamed_prompt(server)])  # the browser has this one
        run.start()
        run.join()
        texts = ada.ask("/i18n")
        for user, language in ((ada, "de"), (bob, "ja")):
            page, problems = page_of(context, user)
            panel = open_panel(page)
            assert panel.locator("[data-action=free]").inner_text() == texts[language]["layerstream"]["button"]["free"]
            assert panel.locator("[data-figure=passes]").inner_text() == "2"
            save_picture(page, f"user-{language}")
            if user is ada:
                page.evaluate(SET_BADGE)
                page.locator(".ls-badge").wait_for(state="hidden")
            else:
                assert page.locator(".ls-badge").is_visible()
            assert problems == []
            page.close()
        assert ada.ask("/settings")["LayerStream.Badge"] is False
        assert "LayerStream.Badge" not in bob.ask("/settings")
