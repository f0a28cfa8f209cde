"""Starts one web instance: `SHOP_HOME=<host folder> python current/web.py`."""

import os
import signal
import sys
from pathlib import Path

from waitress import serve

from shop import logs
from shop.app import create_app
from shop.settings import SettingsError, load_settings

THREADS = 8


def main() -> int:
    """Serve until SIGTERM; 78 (EX_CONFIG) when a setting is missing."""
    try:
        settings = load_settings(Path(os.environ.get("SHOP_HOME", "")), needs=("PORT",))
    except SettingsError as error:
        print(f"shop does not start: {error}", file=sys.stderr)
        return 78
    logs.start(settings)
    # waitress ends its running requests on SystemExit; the default action of SIGTERM would cut them off.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    serve(create_app(settings), host="127.0.0.1", port=settings.port, threads=THREADS, ident="shop")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
