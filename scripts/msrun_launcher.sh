#!/bin/sh
# MindFormers' launcher: COMMAND in one string, then 0, 1, 5 or 8 more arguments. What they mean: --help.
# Python is $PYTHON, else the active virtual environment's, else this checkout's .venv, else python3.
root=$(cd -P "$(dirname "$0")" && cd .. && pwd) || exit 1
if [ -z "$PYTHON" ]; then
    if [ -n "$VIRTUAL_ENV" ]; then PYTHON=$VIRTUAL_ENV/bin/python
    elif [ -x "$root/.venv/bin/python" ]; then PYTHON=$root/.venv/bin/python
    else PYTHON=python3
    fi
fi
if ! "$PYTHON" -c 'import signal; signal.signal(signal.SIGINT, signal.SIG_DFL); import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'; then
    echo "msrun_launcher: $PYTHON has no torch" >&2
    echo "  expected: the Python in which glimmer is installed" >&2
    echo "  to do:    run \`make demo\` once in $root, or set PYTHON" >&2
    exit 2
fi
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR} # no warnings about names that are not in the DNS
export PYTHONPATH TORCH_CPP_LOG_LEVEL
exec "$PYTHON" -m glimmer.mindformers "$@"
