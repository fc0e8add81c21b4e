"""The kernels of a cubin, as cuobjdump, ptxas and the file itself describe them."""

from __future__ import annotations

import importlib.util
import re
import shutil
import struct
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

# Where constant bank 0 has a kernel's parameters, on sm_90.
PARAMETERS_AT = 0x210


def plain(name: str) -> str:
    """A name without namespaces and spaces: what the kernels of a file are looked up by."""
    return re.sub(r"(\w+::)+|\s", "", name)


class Line(NamedTuple):
    """An instruction, and what its encoding says of the loads before it."""

    address: int
    text: str
    scoreboard: int  # that its result is announced on; 7: on none
    waits: int  # a bit for each scoreboard whose results must be there before it is issued, whatever its predicate


@dataclass
class Kernel:
    name: str  # without namespaces and spaces, up to its parameters
    parameters: list[str]  # their types in order, such as DeviceTensor; none where the name has none
    instructions: list[Line]
    constants: dict[int, bytes] = field(default_factory=dict)  # by bank
    registers: int = 0
    spills: int = 0  # bytes of stack per thread
    parameters_at: int = PARAMETERS_AT


def tool(name: str) -> str:
    """A CUDA tool of the triton package, or the one on PATH."""
    package = importlib.util.find_spec("triton")
    for folder in (package.submodule_search_locations or []) if package else []:
        path = Path(folder) / "backends" / "nvidia" / "bin" / name
        if path.exists():
            return str(path)
    if found := shutil.which(name):
        return found
    raise FileNotFoundError(f"{name} is neither in a triton package of this Python nor on PATH")


def output(*command: str, text: str | None = None) -> str:
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def constant_sections(cubin: Path) -> dict[str, bytes]:
    """The sections .nv.constant* of an ELF file, by name: literals, and the targets of switches."""
    data = cubin.read_bytes()
    (offset,), (count, names) = struct.unpack_from("<Q", data, 0x28), struct.unpack_from("<HH", data, 0x3C)
    headers = [struct.unpack_from("<IIQQQQIIQQ", data, offset + 64 * k) for k in range(count)]
    start = headers[names][4]
    named = {data[start + h[0] : data.index(b"\0", start + h[0])].decode(): data[h[4] : h[4] + h[5]] for h in headers}
    return {name: content for name, content in named.items() if name.startswith(".nv.constant")}


def lines(listing: str) -> list[Line]:
    """An instruction has 128 bits. Of the upper 64, three from bit 46 on are the scoreboard, six from bit 52 on the waits."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);\s+/\* 0x\w+ \*/\s+/\* 0x(\w+) \*/", listing)
    upper = [int(bits, 16) for _, _, bits in found]
    return [
        Line(int(address, 16), text.strip(), bits >> 46 & 7, bits >> 52 & 63)
        for (address, text, _), bits in zip(found, upper, strict=True)
    ]


def read(cubin: Path) -> dict[str, Kernel]:
    """The kernels of a cubin by name."""
    parts = re.split(r"Function : (\S+)", output(tool("cuobjdump"), "-sass", str(cubin)))
    listings = dict(zip(parts[1::2], parts[2::2], strict=True))
    names = output("c++filt", text="\n".join(listings)).splitlines()
    usage = dict(re.findall(r"Function (\S+):\s*\n\s*(.*)", output(tool("cuobjdump"), "-res-usage", str(cubin))))
    constants = constant_sections(cubin)
    kernels = {}
    for (mangled, listing), name in zip(listings.items(), names, strict=True):
        name = plain(name).removeprefix("void")
        # Template arguments may have parentheses too. Triton's names have no parameters.
        start = name.find(">(") + 1 or name.find("(") if "(" in name else len(name)
        kernel = Kernel(name[:start], re.findall(r"\w+", name[start:].replace("const", "")), [])
        kernel.instructions = lines(listing)
        for section, content in constants.items():
            if section.endswith("." + mangled):
                kernel.constants[int(section[len(".nv.constant") : -len(mangled) - 1])] = content
        used = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage[mangled])}
        kernel.registers, kernel.spills = used["REG"], used["STACK"] + used["LOCAL"]
        kernels[kernel.name] = kernel
    return kernels
