# Sourced with a requirements file: makes .venv beside it where it is missing, and installs what has changed since.
python="$here/.venv/bin/python"
if [ ! -x "$python" ]; then python3 -m venv "$here/.venv"; fi
stamp="$here/.venv/installed-$(basename "$(dirname "$1")")"
if ! cat "$1" "$here/requirements.txt" | cmp -s - "$stamp"; then
    echo "installing $1 into .venv (once)"
    "$python" -m pip install --quiet --disable-pip-version-check --requirement "$1"
    cat "$1" "$here/requirements.txt" > "$stamp"
fi
