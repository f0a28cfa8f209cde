"""What the host tells this release: `shared/env` beside the release folders."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

REQUIRED = ("INSTANCE", "DATABASE_URL", "SECRET_KEY", "BYPASS_TOKEN_FILE", "PAYMENT_WEBHOOK_URL")
RELEASE = Path(__file__).resolve().parents[1]


class SettingsError(Exception):
    """The host's settings are missing or wrong; the message names the file and the key."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything the application reads from outside, once, at its start."""

    home: Path
    instance: str
    port: int
    database_url: str
    passfile: str | None
    bypass_token_file: Path
    secret_key: str
    payment_webhook_url: str
    version: str
    commit: str

    @property
    def maintenance_flag(self) -> Path:
        """While this file exists, users can read and not write."""
        return self.home / "shared" / "maintenance"


def load_settings(home: Path, *, needs: tuple[str, ...] = ()) -> Settings:
    """Read `home/shared/env` and the release's own VERSION and REVISION.

    Raises:
        SettingsError: the file or a key is missing, or a value can't be used.
    """
    path = home / "shared" / "env"
    values = _read(path)
    missing = [key for key in (*REQUIRED, *needs) if not values.get(key)]
    if missing:
        raise SettingsError(f"{path} lacks {', '.join(missing)}; render it again with the deploy playbook")
    port = values.get("PORT", "0")
    if not port.isdecimal():
        raise SettingsError(f"{path}: PORT is {port!r}, not a number")
    if not values["PAYMENT_WEBHOOK_URL"].startswith(("https://", "http://")):
        # The address is a secret: say what is wrong with it and not what it is.
        raise SettingsError(f"{path}: PAYMENT_WEBHOOK_URL is no http(s) address; see the vault's entry")
    return Settings(
        home=home,
        instance=values["INSTANCE"],
        port=int(port),
        database_url=values["DATABASE_URL"],
        passfile=values.get("PGPASSFILE"),
        bypass_token_file=Path(values["BYPASS_TOKEN_FILE"]),
        secret_key=values["SECRET_KEY"],
        payment_webhook_url=values["PAYMENT_WEBHOOK_URL"],
        version=_first_line(RELEASE / "VERSION"),
        commit=_first_line(RELEASE / "REVISION"),
    )


def _read(path: Path) -> Mapping[str, str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise SettingsError(f"{path} can't be read ({error.strerror}); is SHOP_HOME right?") from error
    pairs = (line.partition("=") for line in lines if "=" in line and not line.lstrip().startswith("#"))
    return {key.strip(): value.strip() for key, _, value in pairs}


def _first_line(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").split("\n", 1)[0].strip()
    except OSError:
        return "unknown"
