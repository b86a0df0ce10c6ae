#!/bin/sh
# MindFormers' launcher: COMMAND in one string, then 0, 1, 5 or 8 more arguments. What they mean: --help.
# Python is the active virtual environment's, else this checkout's .venv, else python3; PYTHON=... overrides.
root=$(cd "$(dirname "$0")/.." && pwd) || exit 1
if [ -z "$PYTHON" ]; then
    if [ -n "$VIRTUAL_ENV" ]; then PYTHON=$VIRTUAL_ENV/bin/python
    elif [ -x "$root/.venv/bin/python" ]; then PYTHON=$root/.venv/bin/python
    else PYTHON=python3
    fi
fi
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR} # no warnings about names that are not in the DNS
export PYTHONPATH TORCH_CPP_LOG_LEVEL
exec "$PYTHON" -m glimmer.launch "$@"
