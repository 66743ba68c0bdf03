"""`fleecebox-build PROGRAM.py` makes a component of a program that exports a provider."""

import argparse
import ast
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

PACKAGE = Path(__file__).parent
WORLDS = {"export": ("provider", "provider_entry"), "export_blind": ("blind-provider", "blind_entry")}


def main() -> None:
    """Without WASI: what Python would ask the system for is not there, and `random` has one seed for all."""
    parser = argparse.ArgumentParser(prog="fleecebox-build", description=__doc__)
    parser.add_argument("program", type=Path, help="the Python file whose provider is exported")
    parser.add_argument("-o", "--output", type=Path, help="the component; PROGRAM.wasm unless given")
    arguments = parser.parse_args()
    program = arguments.program
    output = arguments.output or Path(program.stem + ".wasm")

    world, entry = WORLDS[_exporter(program)]
    tool = Path(sysconfig.get_path("scripts")) / "componentize-py"
    with tempfile.TemporaryDirectory() as folder:
        # The entry has to be able to import the program, whatever that is called.
        (Path(folder) / "fleecebox_provider_program.py").write_text(f"import {program.stem}\n")
        paths = [folder, PACKAGE / "component", PACKAGE.parent, program.resolve().parent]
        command = [tool, "--quiet", "--wit-path", PACKAGE / "provider.wit", "--world", world]
        command += ["componentize", entry, "--stub-wasi", "--output", output]
        for path in paths:
            command += ["--python-path", path]
        try:
            status = subprocess.run(command).returncode
        except FileNotFoundError:
            sys.exit(f"error: {tool} is missing: pip install componentize-py")
    if status != 0:
        sys.exit(f"error: componentize-py could not make {output} of {program}")
    print(f"{output}: {output.stat().st_size} bytes, world {world}")


def _exporter(program: Path) -> str:
    """Which of the two functions the program calls; its provider's kind is the component's world."""
    try:
        tree = ast.parse(program.read_text())
    except (OSError, SyntaxError) as error:
        sys.exit(f"error: {program}: {error}")
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    found = sorted(names & WORLDS.keys())
    if len(found) != 1:
        sys.exit(f"error: {program} has to call one of `export` and `export_blind`")
    return found[0]


if __name__ == "__main__":
    main()
