"""Server-sent events out of a byte stream that is cut anywhere."""


class EventParser:
    """Collects the `data` of events (WHATWG HTML, section 9.2.6); other fields and comments are dropped."""

    def __init__(self) -> None:
        self._line = b""  # a line whose end has not come yet
        self._data: list[bytes] = []  # of the event whose end has not come yet
        self._skip_newline = False  # the last byte was a carriage return, which may be half a line end

    def feed(self, data: bytes) -> list[bytes]:
        """The data of every event that `data` completes."""
        between_events = not self._line and not self._data and not self._skip_newline
        if between_events and data.startswith(b"data: ") and data.endswith(b"\n\n") and b"\r" not in data:
            # Nearly all chunks of nearly all servers: whole events of one data line each.
            blocks = data[6:-2].split(b"\n\ndata: ")
            if all(b"\n" not in block for block in blocks):
                return blocks
        return self._feed_lines(data)

    def _feed_lines(self, data: bytes) -> list[bytes]:
        if not data:
            return []
        if self._skip_newline and data.startswith(b"\n"):
            data = data[1:]
        self._skip_newline = data.endswith(b"\r")
        lines = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        lines[0] = self._line + lines[0]
        self._line = lines.pop()
        events = []
        for line in lines:
            if not line:
                if self._data:
                    events.append(b"\n".join(self._data))
                    self._data = []
                continue
            name, _, value = line.partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" "))
        return events
