"""Prints the packages of the base image that nothing may replace, as pip constraints.

They are built for each other: torch and what is compiled against it, CUDA and NCCL.  The base
constrains every package that its makers used, also those that this project needs newer; these are
exactly the ones that must stay.
"""

import re
from importlib.metadata import distributions

KEEP = (
    "torch|torchvision|torchaudio|triton|pytorch.triton|transformer.engine.*|apex|flash.attn.*|"
    "numpy|nvidia.*"
)


def main() -> None:
    found = {
        f"{name}=={package.version}"
        for package in distributions()
        # A damaged package has no name.
        if (name := package.metadata["Name"]) and re.fullmatch(KEEP, name, re.IGNORECASE)
    }
    print("\n".join(sorted(found)))


if __name__ == "__main__":
    main()
