#!/bin/sh
# Make a virtual environment with exactly the locked packages, and Nightmail itself in it.
# With uv on the PATH it takes seconds; without, venv and pip do the same from the same lock.
set -eu
venv=$1
lock=requirements-dev.lock
python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Nightmail needs Python 3.11 or newer; $("$python" --version) found. Try: make PYTHON=python3.12 setup" >&2
    exit 2
}
echo "Setting up $venv ..."
if command -v uv >/dev/null 2>&1; then
    uv venv --quiet --allow-existing --python "$python" "$venv"
    uv pip sync --quiet --python "$venv/bin/python" --require-hashes "$lock"
    uv pip install --quiet --python "$venv/bin/python" --no-deps --no-build-isolation --editable .
else
    "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes --requirement "$lock"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
fi
