"""Run every benchmark, one process each, then print the table. Arguments are handed on."""

import subprocess
import sys

from common import HERE

SCRIPTS = ("linear", "feed_forward", "routing", "scaling", "steps", "tokens", "eval_speed")


def main() -> None:
    failed = [
        name for name in SCRIPTS if subprocess.run([sys.executable, HERE / f"{name}.py", *sys.argv[1:]]).returncode
    ]
    out = sys.argv[sys.argv.index("--out") + 1 :][:1] if "--out" in sys.argv else []
    subprocess.run([sys.executable, HERE / "report.py", *out], check=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
