"""The pages: each module turns the data of the site into pages with a template and its context."""

from attnbench.site.page import PageModule
from attnbench.site.pages import (
    cases,
    charts,
    compare,
    data,
    docs,
    explore,
    hardware,
    history,
    home,
    impl,
    leaderboard,
    missing,
    run,
    status,
    task,
)

MODULES: tuple[PageModule, ...] = (
    home,
    leaderboard,
    explore,
    compare,
    status,
    impl,
    task,
    hardware,
    run,
    history,
    docs,
    cases,
    charts,
    data,
    missing,
)
"""Every page module, in the order in which their files are written."""
