#!/bin/sh
# Print a Python interpreter that jaxmoe supports, preferring the versions given in order (3.12 3.13 3.11 by default).
# Looks on PATH and in pyenv. Exit 1 with one line if there is none.
versions="${*:-3.12 3.13 3.11}"
for version in $versions; do
    for candidate in "python$version" python3 python "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$version".*/bin/python; do
        found=$("$candidate" -c 'import ensurepip, sys, venv; print("%d.%d" % sys.version_info[:2], sys.executable)' 2>/dev/null) || continue
        if [ "${found%% *}" = "$version" ]; then
            echo "${found#* }"
            exit 0
        fi
    done
done
echo "no Python among $versions with venv was found: install one, or name it, as in make PYTHON=/path/to/python3.12" >&2
exit 1
