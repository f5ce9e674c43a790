"""`python -m megatron_lite.kernels`: the table of what is native, what is reference, and why."""

from __future__ import annotations

import argparse
import importlib
from concurrent.futures import ThreadPoolExecutor

from megatron_lite.errors import KernelError
from megatron_lite.kernels import extension, host, operators, sources


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m megatron_lite.kernels", description=__doc__)
    parser.add_argument(
        "--require-native-kernels",
        nargs="*",
        metavar="DEVICE",
        choices=extension.DEVICES,
        help="exit with 2 unless these devices' kernels are native (without a name: cpu)",
    )
    wanted = parser.parse_args().require_native_kernels
    print(table())
    try:
        for device in [] if wanted is None else wanted or ["cpu"]:
            extension.require_native(device)
    except KernelError as error:
        print(error)
        return error.exit_code
    return 0


def table() -> str:
    """One line an operation and one a device: its library, or why there is none."""
    for operation in sources.OPERATIONS:
        importlib.import_module(f"megatron_lite.kernels.{operation}")
    # What is not there yet is compiled side by side: the module is one file, and keeps one core busy.
    with ThreadPoolExecutor(1) as beside:
        module = beside.submit(host.description)
        for device in extension.DEVICES:
            extension.load(device)
    width = max(map(len, operators.OPERATORS))
    lines = [f"{'operation':{width}}  " + "  ".join(f"{device:9}" for device in extension.DEVICES)]
    for name in sorted(operators.OPERATORS):
        lines.append(f"{name:{width}}  " + "  ".join(f"{_state(name, device):9}" for device in extension.DEVICES))
    lines += [f"{device}: {extension.description(device)}" for device in extension.DEVICES]
    lines.append(f"no tensor operations, for the data: {module.result()}")
    return "\n".join(line.rstrip() for line in lines)


def _state(name: str, device: str) -> str:
    if operators.native(name, device):
        return "native"
    return "reference" if extension.available(device) else "-"


if __name__ == "__main__":
    raise SystemExit(main())
