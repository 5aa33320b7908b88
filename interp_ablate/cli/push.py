"""`push`: an exported folder uploaded to the Hugging Face hub.

Knows: its flags. Does not know: how a folder is uploaded.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass

from interp_ablate.cli.settings import adding, settings_from
from interp_ablate.settings import setting


@dataclass(frozen=True)
class Push:
    """What is uploaded where."""

    folder: str = setting(help="exported folder, with its certificate", positional=True)
    repo: str = setting(help="owner/name", positional=True)
    public: bool = setting(False, "everybody may see it (default: private)")
    revision: str | None = setting(None, "branch to push to")
    message: str | None = setting(None, "commit message")
    force: bool = setting(False, "even without a passed certificate")


add = adding(Push)


def run(args: Namespace) -> int:
    """Upload, and print the address."""
    from interp_ablate.export.hub import push_to_hub

    settings = settings_from(args, Push)
    url = push_to_hub(
        settings.folder,
        settings.repo,
        private=not settings.public,
        revision=settings.revision,
        commit_message=settings.message,
        force=settings.force,
    )
    print(url)
    return 0
