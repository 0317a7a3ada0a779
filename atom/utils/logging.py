"""Loggers under the root name "atom": one short line each, to stderr.

An application that configures Python's root logger gets the records there instead; a line is never
written twice.
"""

import logging
import sys

ROOT = "atom"
LEVELS = ("debug", "info", "warning", "error", "critical")


class _StderrHandler(logging.Handler):
    """Writes to whatever sys.stderr is now, and only where the application logs nowhere itself."""

    def emit(self, record: logging.LogRecord) -> None:
        if logging.getLogger().handlers:
            return
        try:
            sys.stderr.write(self.format(record) + "\n")
        except (OSError, ValueError):
            self.handleError(record)


_seen: set[tuple[str, str]] = set()


def get_logger(name: str) -> logging.Logger:
    """The logger of a module; names outside the package are put under "atom"."""
    return logging.getLogger(name if name == ROOT or name.startswith(ROOT + ".") else f"{ROOT}.{name}")


def configure_logging(level: str | None = None) -> None:
    """Show ATOM's records from `level` on (one of LEVELS, any case); None: "info", unless a level was chosen before."""
    root = logging.getLogger(ROOT)
    if level is not None or root.level == logging.NOTSET:
        root.setLevel((level or "info").upper())
    if not any(isinstance(h, _StderrHandler) for h in root.handlers):
        handler = _StderrHandler()
        handler.setFormatter(logging.Formatter("%(levelname).1s %(asctime)s %(module)s: %(message)s", "%H:%M:%S"))
        root.addHandler(handler)


def log_once(logger: logging.Logger, message: str, *args: object, level: int = logging.INFO) -> None:
    """Log, unless this logger has logged this very text (arguments included) in this process."""
    text = message % args if args else message
    if (logger.name, text) in _seen:
        return
    _seen.add((logger.name, text))
    logger.log(level, "%s", text, stacklevel=2)
