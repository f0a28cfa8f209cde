"""`log/app.log` for people and `log/starts.log` for whoever asks which commit was started when."""

import logging
import os
import time
from datetime import UTC, datetime

from shop.settings import Settings


def start(settings: Settings) -> None:
    """Open the log and note this start: ISO time, pid, commit.

    Side Effect: appends one line to log/starts.log.
    """
    folder = settings.home / "log"
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / "app.log", encoding="utf-8")
    formatter = logging.Formatter(
        f"%(asctime)s.%(msecs)03dZ %(levelname)s {settings.instance} %(name)s %(message)s",
        datefmt="%Y-%m-%dT%H:%M:%S",
    )
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    with (folder / "starts.log").open("a", encoding="utf-8") as starts:
        starts.write(
            f"{datetime.now(UTC).isoformat(timespec='milliseconds')} {os.getpid()} {settings.commit}\n"
        )
    logging.getLogger("shop").info("%s started, commit %s", settings.version, settings.commit)
