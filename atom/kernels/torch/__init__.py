"""References in plain torch: exact, readable, and the meaning of every op."""


def unavailable_reason() -> str | None:
    return None
