"""Run every benchmark, one process each, then print the table. Arguments are handed on.

--peer PYTHON (an environment with moe_peft 2.0.2) has peers.py run as well.
"""

import argparse
import subprocess
import sys

from common import HERE, RESULTS

SCRIPTS = ("linear", "feed_forward", "routing", "scaling", "steps", "where", "tokens", "eval_speed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--peer", help="a Python with moe_peft 2.0.2")
    parser.add_argument("--out", default=str(RESULTS))
    own, rest = parser.parse_known_args()
    commands = {name: [*rest, "--out", own.out] for name in SCRIPTS}
    if own.peer:
        commands["peers"] = [*rest, "--out", own.out, "--peer", own.peer]
    else:
        print("Left out: peers.py, which needs --peer PYTHON (or: make bench-peers).", flush=True)
    run = {name: [sys.executable, HERE / f"{name}.py", *options] for name, options in commands.items()}
    failed = [name for name, command in run.items() if subprocess.run(command).returncode]
    subprocess.run([sys.executable, HERE / "report.py", own.out], check=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
