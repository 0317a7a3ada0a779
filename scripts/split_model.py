"""Brings a model where only so much may travel at once: in parts, or cut to its first layers.

    python scripts/split_model.py split FILE [--mib 56]      # FILE.part000, FILE.part001, ..., FILE.sha256
    python scripts/split_model.py join FILE [--folder DIR]   # from the parts beside FILE, checked against FILE.sha256
    python scripts/split_model.py cut FILE LAYERS OUT        # a GGUF file of the first layers, in OUT

A cut model answers nonsense, but always the same: good for comparing machines, not for talking to.
"""

import argparse
import hashlib
import shutil
import struct
import sys
from pathlib import Path

_CHUNK = 1 << 20


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def split(path: Path, part_bytes: int) -> list[Path]:
    """Writes the parts and, in sha256sum's format, the checksums of file and parts."""
    parts: list[Path] = []
    with path.open("rb") as file:
        while left := min(part_bytes, path.stat().st_size - file.tell()):
            part = path.with_name(f"{path.name}.part{len(parts):03}")
            with part.open("wb") as out:
                while left:
                    left -= out.write(file.read(min(_CHUNK, left)))
            parts.append(part)
    lines = [f"{sha256(p)}  {p.name}\n" for p in (path, *parts)]
    path.with_name(path.name + ".sha256").write_text("".join(lines))
    return parts


def join(path: Path, folder: Path | None = None) -> Path:
    """Writes the file (in `folder`, else where its parts are); ValueError where a checksum or a part is missing."""
    lines = [line.split() for line in path.with_name(path.name + ".sha256").read_text().splitlines()]
    sums = {name: digest for digest, name in lines}
    parts = sorted(path.with_name(name) for name in sums if name != path.name)
    for part in parts:
        if not part.is_file() or sha256(part) != sums[part.name]:
            raise ValueError(f"{part} is missing or damaged")
    whole = (folder or path.parent) / path.name
    with whole.open("wb") as out:
        for part in parts:
            with part.open("rb") as file:
                shutil.copyfileobj(file, out, _CHUNK)
    if sha256(whole) != sums[path.name]:
        raise ValueError(f"{whole} is damaged: its checksum is another")
    return whole


def cut(path: Path, num_layers: int, out: Path) -> None:
    """Writes the GGUF file's first layers; its metadata differs in block_count alone."""
    from gguf import GGUFReader, GGUFValueType

    reader = GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    count = reader.fields[f"{architecture}.block_count"]
    total = int(count.contents())
    if not 0 < num_layers <= total:
        raise ValueError(f"{path} has {total} layers; {num_layers} can't be taken")
    for name, field in reader.fields.items():
        if field.types and field.types[0] == GGUFValueType.ARRAY and name.startswith(f"{architecture}."):
            raise ValueError(f"{name} may have a value a layer, which is not supported")
    raw = path.read_bytes()
    kept = [t for t in reader.tensors if not t.name.startswith("blk.") or int(t.name.split(".")[1]) < num_layers]

    metadata = bytearray(raw[: reader.tensors[0].field.offset])
    metadata[8:16] = struct.pack("<Q", len(kept))
    value_at = count.offset + sum(part.nbytes for part in count.parts[:-1])
    metadata[value_at : value_at + 4] = struct.pack("<I", num_layers)

    alignment, end = reader.alignment, 0
    table, starts = bytearray(), []
    for tensor in kept:
        field = tensor.field  # name, number of dimensions, dimensions, type, and last the offset
        size = sum(part.nbytes for part in field.parts) - 8
        table += raw[field.offset : field.offset + size] + struct.pack("<Q", end)
        starts.append(end)
        end += -(-tensor.n_bytes // alignment) * alignment
    with out.open("wb") as file:
        file.write(metadata + table)
        begin = -(-file.tell() // alignment) * alignment
        for tensor, start in zip(kept, starts, strict=True):
            file.seek(begin + start)
            file.write(raw[tensor.data_offset : tensor.data_offset + tensor.n_bytes])
        file.truncate(begin + end)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("split")
    command.add_argument("file", type=Path)
    command.add_argument("--mib", type=int, default=56, help="of a part, at most")
    command = commands.add_parser("join")
    command.add_argument("file", type=Path, help="the file that the parts were made of")
    command.add_argument("--folder", type=Path, help="where to write it")
    command = commands.add_parser("cut")
    command.add_argument("file", type=Path)
    command.add_argument("layers", type=int)
    command.add_argument("out", type=Path)
    options = parser.parse_args()
    try:
        if options.command == "split":
            print(*split(options.file, options.mib << 20), sep="\n")
        elif options.command == "join":
            print(join(options.file, options.folder))
        else:
            cut(options.file, options.layers, options.out)
            print(f"{options.out}: {options.layers} layers, {options.out.stat().st_size / 2**20:.1f} MiB")
    except (OSError, KeyError, ValueError) as error:
        print(f"split_model: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
