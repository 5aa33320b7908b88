"""`explore`: a page in the browser over a run, or a model with a file of directions.

Knows: flags, the address, the token. Does not know: what the page shows.
"""

from __future__ import annotations

import secrets
import socket
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interp_ablate.cli.options import ModelSettings, load, run_with_directions, tell
from interp_ablate.cli.settings import adding, given_flags, settings_from
from interp_ablate.errors import RunError
from interp_ablate.settings import setting


@dataclass(frozen=True)
class Explore(ModelSettings):
    """What is explored, and where the page is."""

    run: str | None = setting(None, "run folder", positional=True)
    directions: str | None = setting(None, "file of directions (.safetensors), with --model")
    expressions: str | None = setting(
        None, "what scores answers: a built-in list, or a file (default: the run's)"
    )
    out: str = setting(".", "without a run folder: where plans are kept, in plans/")
    host: str = setting("127.0.0.1", "address to listen on; beyond the loopback a token is needed")
    port: int = setting(7860, "port to listen on; 0: a free one")


add = adding(Explore)


def run(args: Namespace) -> int:
    """Serve the page until Ctrl-C."""
    settings = settings_from(args, Explore)
    try:
        import uvicorn
    except ImportError as error:
        raise RunError("explore needs its extra: pip install 'interp-ablate[explore]'") from error
    from interp_ablate.explorer.server import LOOPBACK, explorer_app

    listening = _listening(settings.host, settings.port)
    session = _session(args, settings)
    token = None if settings.host in LOOPBACK else secrets.token_urlsafe(24)
    app = explorer_app(session, token=token)
    config = uvicorn.Config(
        app, settings.host, settings.port, log_level="warning", server_header=False, ws="none"
    )
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    address = f"http://{host}:{listening.getsockname()[1]}/"
    print(address + (f"?token={token}" if token else ""), flush=True)
    tell(args, "Ctrl-C ends it")
    uvicorn.Server(config).run([listening])
    return 0


def _listening(host: str, port: int) -> socket.socket:
    """A socket at an address, before anything is loaded.

    Raises:
        RunError: an address that is taken, or none of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError, UnicodeError) as error:  # a number that no port has overflows
        raise RunError(
            f"cannot listen on {host} port {port}: {error}. Give another --host or --port (0: a free one)"
        ) from error


def _session(args: Namespace, settings: Explore) -> Any:
    """The session that the flags ask for; cheap faults first.

    Raises:
        RunError: neither a run folder nor a model with directions.
    """
    from interp_ablate.directions.direction_set import Directions
    from interp_ablate.directions.foreign_files import read_directions
    from interp_ablate.explorer.session import ExplorerSession
    from interp_ablate.plots.run_tables import read_directions as directions_of_run
    from interp_ablate.runs.configuration import NAMES, PERMISSIONS, Configuration
    from interp_ablate.runs.run_folder import Run
    from interp_ablate.scoring.expressions import expression_scorer
    from interp_ablate.storage.atomic_files import check_folder

    scorer = expression_scorer(settings.expressions, contrast="") if settings.expressions else None
    if settings.run is None:
        if not (settings.model and settings.directions):
            raise RunError("give a run folder; or --model and --directions FILE")
        own = (
            Path(settings.directions).with_suffix(".json").exists()
        )  # of a run, or of Directions.save
        check_folder(Path(settings.out) / "plans")
        read: Any = Directions.load if own else read_directions
        directions: Any = list(read(settings.directions))
        model = load(settings, settings.model)
        return ExplorerSession(model, directions, settings.out, expression=scorer)
    if ignored := {"directions", "out"} & set(vars(args)):
        raise RunError(
            f"--{min(ignored)} is for --model without a run folder: leave one of them out"
        )
    saved = run_with_directions(settings.run)
    directions = directions_of_run(Path(settings.run))
    stored, given = Configuration.stored_in(saved), given_flags(args, ModelSettings)
    as_run, asked = (Configuration.from_dict({**stored, **more}) for more in ({}, given))
    for name in sorted(set(given) - {*NAMES, *PERMISSIONS}):
        there, here = getattr(as_run, name), getattr(asked, name)
        if here != there:
            raise RunError(
                f"a run is explored as it was made: its {name} was {there!r}, and is {here!r} now. Leave "
                f"the flag out; or give --model and --directions {settings.run}/directions.safetensors in place of the run"
            )
    of_run = Run(str(settings.run), asked)
    return ExplorerSession(
        of_run.model,
        directions,
        of_run.out,
        run=of_run,
        expression=scorer or (None if of_run.configuration.scorer else of_run.expression),
    )
