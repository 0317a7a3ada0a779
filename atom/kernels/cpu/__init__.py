"""C++ kernels for CPUs, built once a machine with the system's compiler."""


def unavailable_reason() -> str | None:
    return "not built yet"
