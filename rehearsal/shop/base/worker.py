"""Starts the background worker: `SHOP_HOME=<host folder> python current/worker.py`."""

import os
import signal
import sys
import threading
from pathlib import Path

from shop import jobs, logs
from shop.database import Database
from shop.settings import SettingsError, load_settings


def main() -> int:
    """Work until SIGTERM, ending the job in hand; 78 (EX_CONFIG) when a setting is missing."""
    try:
        settings = load_settings(Path(os.environ.get("SHOP_HOME", "")))
    except SettingsError as error:
        print(f"worker does not start: {error}", file=sys.stderr)
        return 78
    logs.start(settings)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGINT, lambda *_: stop.set())
    jobs.work_until(stop, Database(settings))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
