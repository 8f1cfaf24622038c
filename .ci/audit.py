"""Known vulnerabilities of the locked dependencies, by pip-audit in an environment of its own.

    python .ci/audit.py [requirements/cpu.txt]

Exit code 1 if there is one; 0 if there is none, and also, with a warning, if the database cannot be asked.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

PIP_AUDIT = "pip-audit==2.10.1"
TIMEOUT_S = 600


def main(arguments: list[str]) -> int:
    requirements = arguments[0] if arguments else "requirements/cpu.txt"
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        try:
            ask(Path(folder), requirements, answer)
            report: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        except (subprocess.SubprocessError, OSError, ValueError) as error:
            print(f"warning: the dependencies were not checked for known vulnerabilities ({error})")
            return 0
    return judge(report)


def ask(folder: Path, requirements: str, answer: Path) -> None:
    """Writes what pip-audit says of the requirements to `answer`, as they stand: nothing is resolved or installed."""
    venv.create(folder / "venv", with_pip=True)
    python = str(folder / "venv" / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", PIP_AUDIT], check=True, timeout=TIMEOUT_S)
    how = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json", "--output", str(answer)]
    # Its exit code is 1 for a vulnerability and for a failure alike; there is an answer only without a failure.
    command = [python, "-m", "pip_audit", "--requirement", requirements, *how]
    subprocess.run(command, check=False, timeout=TIMEOUT_S, capture_output=True)


def judge(report: dict[str, Any]) -> int:
    """Prints what was found. pip-audit passes over a package that its database does not answer for."""
    asked = [package for package in report["dependencies"] if "skip_reason" not in package]
    skipped = [package["name"] for package in report["dependencies"] if "skip_reason" in package]
    if skipped:
        print(f"warning: {len(skipped)} of {len(report['dependencies'])} dependencies could not be checked: ", end="")
        print(", ".join(skipped[:10]) + (", ..." if len(skipped) > 10 else ""))
    found = [(package, each) for package in asked for each in package["vulns"]]
    for package, each in found:
        fixed = ", ".join(each["fix_versions"]) or "no version"
        print(f"{package['name']} {package['version']}: {each['id']}, fixed in {fixed}")
    print(f"{len(asked)} dependencies checked, {len(found)} known vulnerabilities")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
