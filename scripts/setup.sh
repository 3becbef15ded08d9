#!/bin/sh
# Make a virtual environment with exactly the locked packages, and Nightmail itself in it.
# uv does in seconds what pip does in a minute: the lock's own uv is fetched first, and pip takes over if it fails.
set -eu
venv=$1
lock=requirements-dev.lock
python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Nightmail needs Python 3.11 or newer; $("$python" --version) found. Try: make PYTHON=python3.12 setup" >&2
    exit 2
}
echo "Setting up $venv with $("$python" --version) ..."
"$python" -m venv "$venv"
pip="$venv/bin/python -m pip --quiet --disable-pip-version-check"

fetch_uv() {
    sed -n '/^uv==/,/^[a-z]*[^ ]*==/p' "$lock" | sed '$d' >"$venv/uv.lock" &&
        $pip install --require-hashes --no-deps --requirement "$venv/uv.lock"
}

# What uv says is of interest only when it fails.
if fetch_uv && "$venv/bin/uv" pip sync --quiet --system-certs --python "$venv/bin/python" --require-hashes "$lock" 2>"$venv/uv.log"; then
    :
else
    cat "$venv/uv.log" >&2 || true
    echo "uv could not be used; pip takes about a minute."
    $pip install --require-hashes --requirement "$lock"
fi
$pip install --no-deps --no-build-isolation --editable .
